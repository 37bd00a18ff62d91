"""The same video on both sides of a split is found, under whatever name, and shares of the episodes nest."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.errors import DataError
from salt_vla.evaluation.fractions import share_of
from salt_vla.evaluation.leaks import require_no_leak

FRAMES = 40


def clip(name: str, file: str, episode: int, first: int = 0, label: str = "push") -> Clip:
    return Clip(
        clip_id=name,
        dataset="films",
        source="folder",
        file=file,
        first_frame=first,
        episode=episode,
        episode_first_frame=first,
        episode_frames=FRAMES,
        camera="",
        label=label,
        fps=10.0,
        variable_rate=False,
        split="train",
    )


@pytest.fixture
def films(tmp_path: Path) -> Path:
    for number in range(4):
        (tmp_path / f"{number}.mp4").write_bytes(bytes([number]) * 500)
    return tmp_path


def sides(films: Path, train: Sequence[Clip], test: Sequence[Clip]) -> tuple[ClipTable, ClipTable]:
    return ClipTable.from_clips(train, films), ClipTable.from_clips(test, films)


def test_other_films_are_no_leak(films: Path) -> None:
    require_no_leak(*sides(films, [clip("a", "0.mp4", 0), clip("b", "1.mp4", 1)], [clip("c", "2.mp4", 2)]))


def test_the_same_film_under_another_name_is_found_and_both_are_named(films: Path) -> None:
    shutil.copy(films / "1.mp4", films / "holiday.mp4")
    train, test = sides(
        films,
        [clip("a", "0.mp4", 0), clip("b", "1.mp4", 1)],
        [clip("c", "2.mp4", 2), clip("d", "holiday.mp4", 3)],
    )
    with pytest.raises(DataError, match=r"'b' \(1.mp4\) in training and clip 'd' \(holiday.mp4\) held out"):
        require_no_leak(train, test)


def test_a_planted_leak_in_a_real_data_set_is_found(tiny_table: ClipTable) -> None:
    episodes = sorted(set(tiny_table.rows["episode"].to_pylist()))
    clips = tiny_table.clips()
    train = [each for each in clips if each.episode in episodes[:-1]]
    test = [each for each in clips if each.episode == episodes[-1]]
    as_tables = [ClipTable.from_clips(side, tiny_table.root) for side in (train, test)]
    require_no_leak(as_tables[0], as_tables[1])
    again = replace(train[0], clip_id="another name", episode=999)
    with pytest.raises(DataError, match="same frames of one video"):
        require_no_leak(as_tables[0], ClipTable.from_clips([*test, again], tiny_table.root))


@pytest.mark.parametrize(
    ("start", "leaks"), [(FRAMES, False), (FRAMES - 1, True), (0, True), (-FRAMES, False)]
)
def test_episodes_of_one_file_leak_only_where_their_frames_overlap(
    films: Path, start: int, leaks: bool
) -> None:
    train, test = sides(
        films,
        [clip("a", "0.mp4", 0, first=100), clip("far", "0.mp4", 1, first=1000)],
        [clip("b", "0.mp4", 2, first=100 + start)],
    )
    if not leaks:
        return require_no_leak(train, test)
    with pytest.raises(DataError, match=r"clip 'a'.*clip 'b'"):
        require_no_leak(train, test)


def test_a_short_episode_within_a_long_one_is_found(films: Path) -> None:
    long = replace(clip("long", "0.mp4", 0), episode_frames=5000)
    later = clip("later", "0.mp4", 1, first=200)
    with pytest.raises(DataError, match=r"clip 'long'.*clip 'b'"):
        require_no_leak(*sides(films, [long, later], [clip("b", "0.mp4", 2, first=3000)]))


def test_one_episode_and_one_clip_on_both_sides_are_found(films: Path) -> None:
    with pytest.raises(DataError, match="'a' in training and clip 'b' held out are of one episode, 7"):
        require_no_leak(*sides(films, [clip("a", "0.mp4", 7)], [clip("b", "1.mp4", 7)]))
    with pytest.raises(DataError, match="clip 'a' is in both"):
        require_no_leak(*sides(films, [clip("a", "0.mp4", 0)], [clip("a", "1.mp4", 1)]))


def test_files_that_cannot_be_read_are_not_taken_for_one_another(films: Path) -> None:
    require_no_leak(*sides(films, [clip("a", "gone.mp4", 0)], [clip("b", "away.mp4", 1)]))


def many(films: Path, episodes: int = 60, classes: int = 3) -> ClipTable:
    return ClipTable.from_clips(
        [
            clip(f"{episode}-{part}", "0.mp4", episode, label=f"class {episode % classes}")
            for episode in range(episodes)
            for part in range(2)
        ],
        films,
    )


def episodes_of(table: ClipTable) -> set[int]:
    return set(table.rows["episode"].to_pylist())


@pytest.mark.parametrize("seed", range(3))
def test_smaller_shares_lie_within_larger_ones(films: Path, seed: int) -> None:
    table = many(films)
    shares = [share_of(table, fraction, seed) for fraction in (0.01, 0.1, 0.5, 1.0)]
    found = [episodes_of(share) for share in shares]
    assert found[0] < found[1] < found[2] < found[3] == episodes_of(table)
    assert [len(each) for each in found] == [3, 6, 30, 60]
    assert all(len(share) == 2 * len(each) for share, each in zip(shares, found, strict=True))


def test_every_class_keeps_its_part(films: Path) -> None:
    rows = share_of(many(films), 0.5, seed=0).rows["label"].to_pylist()
    assert {label: rows.count(label) for label in set(rows)} == {f"class {n}": 20 for n in range(3)}


def test_another_seed_draws_other_episodes(films: Path) -> None:
    assert episodes_of(share_of(many(films), 0.2, 0)) != episodes_of(share_of(many(films), 0.2, 1))


def test_two_episodes_are_the_fewest(films: Path) -> None:
    assert len(episodes_of(share_of(many(films, classes=1), 0.001, 0))) == 2
    with pytest.raises(DataError, match="two or more"):
        share_of(many(films, episodes=1), 0.5, 0)


def test_labels_of_which_every_episode_has_its_own_are_no_classes(films: Path) -> None:
    assert len(episodes_of(share_of(many(films, classes=60), 0.1, 0))) == 6
