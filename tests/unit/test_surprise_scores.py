"""From films in IntPhys 2's layout to figures: a planted violation is found, chance stays at chance, and work
that was done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from salt_vla.data.film_pairs import FilmSet, read_film_sets
from salt_vla.errors import DataError
from salt_vla.evaluation.results import tabulate
from salt_vla.evaluation.surprise import Curve, FilmSurprise, Setting, Windows
from salt_vla.evaluation.surprise_scores import PairScore, parts_of, score_pairs
from salt_vla.evaluation.surprise_store import FilmSource, SurpriseStore
from salt_vla.geometry import ClipGeometry
from salt_vla.reports.surprise import (
    SurprisePage,
    conclusions,
    first_difference,
    score_tables,
    write_surprise_page,
)

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=8)
Squares = Callable[..., Path]


class EvenMotion:
    """Expects the square's columns to move on as they did: the distance of its picture from what comes, on a
    circle, in the share of pixels. What a violation of the planted kind surprises."""

    geometry, fingerprint, target, frame_step = GEOMETRY, "even motion", "the square's place", 1

    def surprise(self, clips: np.ndarray, contexts: Sequence[int], /) -> np.ndarray:
        bright = clips.astype(np.float32).max((2, 4))  # The brightest of each column.
        phase = np.angle((bright * np.exp(2j * np.pi * np.arange(32) / 32)).sum(2))
        speed = np.angle(np.exp(1j * (phase[:, 1:2] - phase[:, :1])))
        expected = phase[:, :1] + speed * np.arange(phase.shape[1])
        distance = np.abs(np.angle(np.exp(1j * (phase - expected))))
        return np.stack([distance[:, context:].mean(1) for context in contexts], axis=1)


class Guesses:
    """Surprised at random, whatever it is shown."""

    geometry, fingerprint, target, frame_step = GEOMETRY, "guesses", "nothing", 1

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.calls = 0

    def surprise(self, clips: np.ndarray, contexts: Sequence[int], /) -> np.ndarray:
        self.calls += 1
        return self.rng.random((len(clips), len(contexts)))


def sources(films: FilmSet) -> list[list[FilmSource]]:
    return [[FilmSource(film.name, film.identity(), film.pictures)] for film in films.films]


@pytest.fixture(scope="module")
def scenes(times: Callable[[int, int], int]) -> int:
    """With `--torture`, as many as the published set has: 253, so 1,012 films and 506 pairs."""
    return times(12, 253)


@pytest.fixture(scope="module")
def main(squares: Squares, scenes: int) -> FilmSet:
    (found,) = read_film_sets(squares({"Main": scenes}))
    return found


@pytest.fixture(scope="module")
def found(main: FilmSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, FilmSurprise]]:
    store = SurpriseStore(tmp_path_factory.mktemp("store"))
    return store.surprises({"motion": EvenMotion(), "guesses": Guesses()}, sources(main), Windows())


@pytest.fixture(scope="module")
def scores(main: FilmSet, found: dict[str, dict[str, FilmSurprise]]) -> list[PairScore]:
    return score_pairs("Main", main.pairs, found)[1]


def figure(scores: list[PairScore], encoder: str, part: str = "all", over: str = "mean") -> PairScore:
    (one,) = [s for s in scores if (s.encoder, s.part, s.over) == (encoder, part, over)]
    return one


def test_a_planted_violation_is_recovered(scores: list[PairScore], scenes: int) -> None:
    one = figure(scores, "motion")
    print(*[score for score in scores if score.part == "all"], sep="\n")  # Shown by -s.
    assert (one.pairs, one.scenes) == (2 * scenes, scenes)
    assert one.value > 0.95
    assert one.low > 0.7  # All of 12 scenes: Clopper and Pearson have 0.74.
    assert one.p < 1e-3


def test_a_random_predictor_stays_at_chance(scores: list[PairScore]) -> None:
    for over in ("mean", "max"):
        one = figure(scores, "guesses", over=over)
        assert one.low < 0.5 < one.high
        assert one.p > 0.05


def test_parts_are_conditions_difficulties_and_cameras(scores: list[PairScore], scenes: int) -> None:
    parts = {s.part: s.pairs for s in scores if (s.encoder, s.over) == ("motion", "mean")}
    assert set(parts) == {
        "all",
        *(f"condition={c}" for c in ("permanence", "immutability", "continuity", "solidity")),
        *(f"difficulty={level}" for level in ("Easy", "Medium", "Hard")),
        *("camera=Fixed", "camera=Moving"),
    }
    for family in ("condition", "difficulty", "camera"):
        assert sum(count for part, count in parts.items() if part.startswith(family)) == 2 * scenes


def test_p_values_are_corrected_within_their_family(scores: list[PairScore]) -> None:
    conditions = [s for s in scores if (s.encoder, s.over) == ("guesses", "mean") and "condition" in s.part]
    smallest = min(conditions, key=lambda s: s.p)
    assert smallest.p_holm == pytest.approx(min(4 * smallest.p, 1.0))
    assert all(s.p_holm >= s.p for s in conditions)
    assert figure(scores, "guesses").p_holm == figure(scores, "guesses").p


def test_rows_join_the_tables_of_every_suite(
    main: FilmSet, found: dict[str, dict[str, FilmSurprise]], scores: list[PairScore]
) -> None:
    scored, _ = score_pairs("Main", main.pairs, found)
    results = tabulate(scored, seed=3, reference="guesses")
    whole = next(result for result in results if result.suite == "intphys2/Main")
    row = next(row for row in whole.rows if (row.encoder, row.target) == ("motion", "mean surprise"))
    assert row.metric == "relative_accuracy"
    assert row.value == pytest.approx(figure(scores, "motion").value)
    assert (row.clips, row.episodes) == (len(main.pairs), len({pair.scene for pair in main.pairs}))
    assert "against chance p = " in row.note
    difference = next(c for c in whole.comparisons if (c.encoder, c.against) == ("motion", "guesses"))
    assert difference.apart
    assert any(result.suite == "intphys2/Main/condition=solidity" for result in results)


def flat(value: float) -> FilmSurprise:
    numbers = np.array([0])
    return FilmSurprise((Curve(Setting(4, 1), numbers, numbers + 4, np.array([value])),))


def test_ties_are_counted_and_said(main: FilmSet) -> None:
    films = {film.name: flat(1.0) for film in main.films}
    films[main.pairs[0].impossible.name] = flat(2.0)
    scored, scores = score_pairs("Main", main.pairs, {"still": films})
    assert scores[0].ties == len(main.pairs) - 1
    assert scores[0].value == pytest.approx(1 / len(main.pairs))
    assert f"{len(main.pairs) - 1} ties" in scored[0].note


def test_several_settings_are_shown_beside_their_mean(main: FilmSet) -> None:
    settings = [Setting(2, 1), Setting(4, 1)]
    parts = parts_of(main.pairs, settings)
    assert [part.name for part in parts if part.family == "setting"] == [
        "context 2, step 1",
        "context 4, step 1",
    ]
    assert not [part for part in parts_of(main.pairs, settings[:1]) if part.family == "setting"]


def test_a_part_of_one_scene_has_no_figure(main: FilmSet) -> None:
    names = [part.name for part in parts_of(main.pairs[:4], [Setting(4, 1)])]  # Scenes 0 and 1.
    assert names == ["all", "camera=Fixed"]


def test_a_set_of_one_scene_is_refused(main: FilmSet) -> None:
    with pytest.raises(DataError, match="one scene only"):
        score_pairs("Main", main.pairs[:2], {"a": {film.name: flat(1.0) for film in main.films}})


def test_a_film_without_surprise_is_refused(main: FilmSet) -> None:
    films = {film.name: flat(1.0) for film in main.films[1:]}
    with pytest.raises(DataError, match=f"nothing was found of film {main.films[0].name}"):
        score_pairs("Main", main.pairs, {"a": films})


def test_work_goes_on_where_it_stopped(main: FilmSet, tmp_path: Path) -> None:
    store, films = SurpriseStore(tmp_path), sources(main)[:6]

    class Stopped(Guesses):
        def surprise(self, clips: np.ndarray, contexts: Sequence[int], /) -> np.ndarray:
            if self.calls >= limit:
                raise KeyboardInterrupt
            return super().surprise(clips, contexts)

    limit = 8
    with pytest.raises(KeyboardInterrupt):
        store.surprises({"a": Stopped()}, films, Windows())
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert 0 < len(kept) < 6
    limit, seen = 10**6, []
    model = Stopped()
    found = store.surprises({"a": model}, films, Windows(), partial(seen.append, None))
    assert len(found["a"]) == len(seen) == 6
    assert {path: path.read_bytes() for path in kept} == kept
    calls = model.calls
    again = store.surprises({"a": model}, films, Windows())
    assert model.calls == calls
    for name, surprise in found["a"].items():
        assert again["a"][name].mean == surprise.mean
        assert again["a"][name].curves[0].setting == surprise.curves[0].setting


def test_what_was_kept_is_of_this_model_these_windows_and_this_film(main: FilmSet, tmp_path: Path) -> None:
    store, films = SurpriseStore(tmp_path), sources(main)[:1]
    model = Guesses()

    def calls(windows: Windows, films: list[list[FilmSource]]) -> int:
        before = model.calls
        store.surprises({"a": model}, films, windows)
        return model.calls - before

    assert calls(Windows(), films) > 0
    assert calls(Windows(batch=3), films) == 0
    assert calls(Windows(stride=4), films) > 0
    changed = FilmSource(films[0][0].name, "other pixels", films[0][0].pictures)
    assert calls(Windows(), [[changed]]) > 0
    model.fingerprint = "others"
    assert calls(Windows(), films) > 0


def test_a_new_model_does_not_redo_the_others(main: FilmSet, tmp_path: Path) -> None:
    store, films = SurpriseStore(tmp_path), sources(main)[:2]
    first, second = Guesses(), EvenMotion()
    store.surprises({"a": first}, films, Windows())
    calls = first.calls
    found = store.surprises({"a": first, "b": second}, films, Windows())
    assert first.calls == calls
    assert set(found) == {"a", "b"}


def test_films_of_a_scene_share_a_file_and_keep_their_own_surprise(main: FilmSet, tmp_path: Path) -> None:
    apart, model = sources(main)[:4], EvenMotion()
    alone = SurpriseStore(tmp_path / "alone").surprises({"a": model}, apart, Windows())
    store, scenes = SurpriseStore(tmp_path / "scenes"), [[*apart[0], *apart[1]], [*apart[2], *apart[3]]]
    for _ in range(2):  # Looked at, and read.
        together = store.surprises({"a": model}, scenes, Windows())
        assert len(list((tmp_path / "scenes").rglob("*.json"))) == 2
        assert list(together["a"]) == list(alone["a"])
        for name, surprise in together["a"].items():
            assert surprise.curves[0].values.tolist() == alone["a"][name].curves[0].values.tolist()


CURVE = {"context_frames": 4, "frame_step": 1, "starts": [0], "first": [4], "values": [0.5]}
DAMAGES = {
    "a curve without lists": [{"film": "a", "curves": [{"context_frames": 4}]}],
    "no curve": [{"film": "a", "curves": []}],
    "no film": [],
    "a list that is cut short": [{"film": "a", "curves": [CURVE | {"values": []}]}],
    "what is no number": [{"film": "a", "curves": [CURVE | {"values": [float("nan")]}]}],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage: str, main: FilmSet, tmp_path: Path) -> None:
    store, films = SurpriseStore(tmp_path), sources(main)[:1]
    store.surprises({"a": Guesses()}, films, Windows())
    (file,) = tmp_path.rglob("*.json")
    file.write_text(json.dumps({"films": [{"film": "a", "curves": [CURVE]}]}))
    assert store.surprises({"a": Guesses()}, films, Windows())["a"][films[0][0].name].mean == 0.5
    file.write_text(json.dumps({"films": DAMAGES[damage]}))
    with pytest.raises(DataError, match=f"{file.name} is damaged.*remove it"):
        store.surprises({"a": Guesses()}, films, Windows())


def test_where_films_part_is_told_only_of_films_that_are_equal_before() -> None:
    possible = list(np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3))
    impossible = [*possible[:4], possible[0], possible[1]]
    assert first_difference(possible, impossible) == 4
    assert first_difference(possible, [frame + 1 for frame in possible]) == 0
    assert first_difference(possible, possible) == 0


def test_the_page_says_what_was_found_whichever_way_it_falls(
    main: FilmSet, found: dict[str, dict[str, FilmSurprise]], scores: list[PairScore], tmp_path: Path
) -> None:
    page = SurprisePage("squares", {"guesses": "a", "motion": "b"}, Windows(), scores, [(main, found)])
    html = write_surprise_page(page, tmp_path / "page.html").read_text()
    assert "not told from chance" in html
    assert "motion is above chance too" in html
    assert html.count("<figure") == 3
    whole = [s for s in scores if (s.part, s.over) == ("all", "mean")]
    (sentence,) = conclusions(whole, "motion")
    assert "above chance" in sentence
    tables = score_tables(scores)
    assert [table.title for table in tables] == [
        "Main: relative accuracy, mean over windows",
        "Main: relative accuracy, max over windows",
    ]
    marks = dict(zip(tables[0].columns, tables[0].cells[0], strict=True))
    assert (marks["motion"].mark, marks["guesses"].mark) == ("ahead", "level")


@pytest.mark.parametrize(
    ("low", "high", "p", "mark"),
    [
        (0.6, 0.8, 0.01, "ahead"),
        (0.6, 0.8, 0.2, "level"),
        (0.2, 0.4, 1.0, "behind"),
        (0.5 - 1e-16, 0.5 - 1e-16, 1.0, "level"),
        (0.4, 0.6, 0.01, "level"),
    ],
)
def test_a_mark_needs_interval_and_p_value_and_no_rounding(
    low: float, high: float, p: float, mark: str
) -> None:
    one = PairScore("a", "Main", "all", "mean", (low + high) / 2, low, high, p, p, 8, 4, 0)
    assert score_tables([one])[0].cells[0][0].mark == mark
