"""Films of the impossible: equal to their twins wherever nothing impossible is shown, and what they claim."""

from __future__ import annotations

import numpy as np
import pytest

from salt_vla.data.violations import ViolationPair, World, switched
from salt_vla.data.violations_filmed import filmed_pairs, moving
from salt_vla.data.violations_rendered import CONDITIONS, rendered_pairs
from salt_vla.errors import ConfigError, DataError

FRAMES, SIZE, WIDE = 12, 48, 64
BOTH_WAYS = {"permanence", "hidden-colour", "teleport", "colour", "cut", "vanish", "recolour"}


@pytest.fixture(scope="module")
def drawn() -> list[ViolationPair]:
    return [pair for scene in range(4) for pair in rendered_pairs(0, scene, FRAMES, SIZE)]


def episode(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two stretches of a film in which a bright square crosses a grained still background."""
    rng = np.random.default_rng(seed)
    background = rng.integers(40, 80, (WIDE, WIDE, 3), dtype=np.uint8)
    film = np.repeat(background[None], 2 * FRAMES, axis=0)
    for number, frame in enumerate(film):
        frame[20:30, 2 * number : 2 * number + 8] = (230, 60, 20)
    return film[:FRAMES], film[FRAMES:]


@pytest.fixture(scope="module")
def filmed() -> list[ViolationPair]:
    return list(filmed_pairs("episode-0", *episode()))


@pytest.fixture
def pairs(drawn: list[ViolationPair], filmed: list[ViolationPair]) -> list[ViolationPair]:
    return drawn + filmed


def test_before_the_violation_films_are_equal_bit_by_bit(pairs: list[ViolationPair]) -> None:
    for pair in pairs:
        assert 0 < pair.frame < FRAMES and pair.possible.dtype == np.uint8
        assert (pair.possible[: pair.frame] == pair.impossible[: pair.frame]).all(), pair.name
        assert (pair.possible[pair.frame] != pair.impossible[pair.frame]).any(), pair.name


def test_outside_of_the_violated_thing_films_are_equal_bit_by_bit(pairs: list[ViolationPair]) -> None:
    for pair in pairs:
        apart = (pair.possible != pair.impossible).any(-1)
        assert not (apart & ~pair.region).any(), pair.name
        if pair.condition not in ("cut", "rewind"):  # Those change the whole picture.
            assert apart.sum() > 0.3 * pair.region.sum(), f"{pair.name}: a region far too large"
            assert pair.region[pair.frame :].mean() < 0.35, pair.name


def test_every_condition_is_there_and_goes_both_ways_where_it_can(pairs: list[ViolationPair]) -> None:
    runs: dict[str, set[int]] = {}
    for pair in pairs:
        runs.setdefault(pair.condition, set()).add(pair.run)
    assert set(runs) == {*CONDITIONS, "rewind", "cut", "vanish", "recolour"}
    assert {name for name, numbers in runs.items() if numbers == {1, 2}} == BOTH_WAYS
    assert len({pair.name for pair in pairs}) == len(pairs)


def test_both_ways_show_the_same_endings_once_as_possible_and_once_as_impossible(
    pairs: list[ViolationPair],
) -> None:
    by_name = {(pair.condition, pair.scene, pair.run): pair for pair in pairs}
    for (condition, scene, run), pair in by_name.items():
        if run == 2:
            other = by_name[condition, scene, 1]
            assert (pair.possible[pair.frame :] == other.impossible[pair.frame :]).all()
            assert (other.possible[pair.frame :] == pair.impossible[pair.frame :]).all()


def test_what_is_hidden_shows_nothing_when_worlds_change_over(drawn: list[ViolationPair]) -> None:
    for pair in drawn:
        if pair.condition in ("permanence", "hidden-colour"):
            assert pair.frame > FRAMES // 2, "the ball is behind its screen when the worlds change over"
            assert not pair.region[: pair.frame].any()


def centre(film: np.ndarray, still: np.ndarray) -> np.ndarray:
    """(frames, 2): middle of what differs from the room, in pixels (down, across); NaN where nothing does."""
    places = []
    for frame in film:
        where = np.argwhere((frame != still).any(-1))
        places.append(where.mean(0) if len(where) else (np.nan, np.nan))
    return np.array(places)


def standing(pair: ViolationPair) -> bool:
    """Whether the camera stands: the top corners hold no ball and must not change."""
    corners = np.concatenate([pair.possible[:, :3, :3], pair.possible[:, :3, -3:]], axis=2)
    return bool((corners == corners[0]).all())


def test_the_possible_ball_falls_and_the_impossible_one_rises(drawn: list[ViolationPair]) -> None:
    looked_at = [pair for pair in drawn if pair.condition == "gravity" and standing(pair)]
    assert looked_at, "no scene has a standing camera: widen the fixture"
    for pair in looked_at:
        room = np.median(np.concatenate([pair.possible, pair.impossible]), axis=0)
        for film, sign in ((pair.possible, 1), (pair.impossible, -1)):
            heights = centre(film, room)[:, 0]
            assert (sign * np.diff(heights[FRAMES // 2 + 1 :]) > 0).all()
            assert heights[1] > heights[FRAMES // 2], "it flew up before"


def test_a_shelf_holds_the_possible_ball_only(drawn: list[ViolationPair]) -> None:
    looked_at = [pair for pair in drawn if pair.condition == "solidity" and standing(pair)]
    assert looked_at
    for pair in looked_at:
        room = np.median(np.concatenate([pair.possible, pair.impossible]), axis=0)
        lowest = [np.nanmax(centre(film, room)[:, 0]) for film in (pair.possible, pair.impossible)]
        assert lowest[1] > lowest[0] + 0.1 * SIZE


def test_films_are_a_function_of_seed_and_scene() -> None:
    def films(seed: int, scene: int) -> list[bytes]:
        return [pair.impossible.tobytes() for pair in rendered_pairs(seed, scene, 8, 24)]

    assert films(0, 0) == films(0, 0)
    assert not set(films(0, 0)) & set(films(0, 1)) and not set(films(0, 0)) & set(films(1, 0))


def test_scenes_differ_in_room_side_and_camera(drawn: list[ViolationPair]) -> None:
    walls = {pair.scene: pair.possible[0, 0, SIZE // 2].tobytes() for pair in drawn}
    assert len(set(walls.values())) > 0.9 * len(walls)
    assert {standing(pair) for pair in drawn} == {True, False}


def test_sizes_and_lengths_are_free_and_tell_the_same_story() -> None:
    for frames, size in ((8, 16), (28, 64), (60, 32)):
        for pair in rendered_pairs(3, 1, frames, size):
            assert pair.possible.shape == (frames, size, size, 3)
            assert frames // 2 <= pair.frame <= frames // 2 + frames // 4 + 1


def test_too_short_or_odd_films_are_refused_in_a_sentence() -> None:
    for frames, size in ((6, 48), (13, 48), (12, 8)):
        with pytest.raises(ConfigError, match="violations need films of an even"):
            list(rendered_pairs(0, 0, frames, size))
    with pytest.raises(DataError, match="change over at frame 0"):
        world = World(np.zeros((4, 2, 2, 3), np.uint8), np.zeros((4, 2, 2), bool))
        list(switched("none", "none", (world, world), 0))
    with pytest.raises(DataError, match="two stretches of one length"):
        list(filmed_pairs("e", episode()[0], episode()[1][:-1]))


def test_what_moves_is_found_and_what_stands_is_not() -> None:
    early, late = episode()
    background = np.median(np.concatenate([early, late]), axis=0).astype(np.uint8)
    found = moving(early, background)
    for number in range(FRAMES):
        assert found[number, 20:30, 2 * number : 2 * number + 8].all()
        assert not found[number, :16].any() and not found[number, :, 2 * number + 12 :].any()


def test_vanishing_shows_the_background_that_other_frames_have_shown() -> None:
    early, late = episode()
    (first, second) = [pair for pair in filmed_pairs("e", early, late) if pair.condition == "vanish"]
    empty = late[-1].copy()
    empty[20:30, 40:] = early[0, 20:30, 40:]
    assert (first.impossible[first.frame :] == empty).all()
    assert (second.impossible[second.frame :] == early[second.frame :]).all()


def test_time_runs_backwards_from_the_middle() -> None:
    early, late = episode()
    (pair,) = [pair for pair in filmed_pairs("e", early, late) if pair.condition == "rewind"]
    middle = FRAMES // 2
    for number in range(middle - 1):
        assert (pair.impossible[middle + number] == early[middle - 2 - number]).all()


def test_a_film_in_which_nothing_moves_has_nothing_to_violate() -> None:
    still = np.repeat(episode()[0][:1], FRAMES, axis=0)
    assert list(filmed_pairs("e", still, still)) == []
    early, _ = episode()
    alone = {pair.condition for pair in filmed_pairs("e", early)}
    assert alone == {"rewind", "vanish", "recolour"}, "one stretch alone cannot be cut to another"
