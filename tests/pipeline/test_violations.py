"""Surprise at films that are made here: who knows the rule wins every pair, who looks at pixels ties or is
told, and the command answers without any download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from salt_vla.evaluation.settings import EvalSettings
from salt_vla.evaluation.surprise import Curve, FilmSurprise, Setting
from salt_vla.evaluation.surprise_models import CopyLastFrame, PixelDifference
from salt_vla.evaluation.surprise_scores import PairScore
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.violations import (
    FILMS,
    ROOMS,
    Violations,
    beyond_random,
    both_ways,
    film_frames,
    look,
    rooms,
    score_kind,
)
from salt_vla.reports.violations import conclusions, sees

GEOMETRY = ClipGeometry(8, 32, 2, 8)
SCENES = 10
HIDDEN = ("permanence", "hidden-colour")


class Rule:
    """Knows by heart which windows hold an impossible moment: those of impossible films that no possible film
    has. `wrong` turns it round, `forgets` makes all equal."""

    target, frame_step = "the rule", 1

    def __init__(self, geometry: ClipGeometry, impossible: set[bytes], sign: float = 1.0) -> None:
        self.geometry, self.impossible, self.sign = geometry, impossible, sign
        self.fingerprint = f"rule {sign}"

    def surprise(self, clips: np.ndarray, contexts: Sequence[int], /) -> np.ndarray:
        found = [[1 + self.sign * (clip.tobytes() in self.impossible)] for clip in clips]
        return np.repeat(np.array(found), len(contexts), axis=1)


def impossible_windows(seed: int) -> set[bytes]:
    windows: dict[bool, set[bytes]] = {True: set(), False: set()}
    for make in rooms(seed, SCENES, GEOMETRY):
        for pair in make():
            for possible in (True, False):
                film = pair.film(possible)
                starts = range(0, len(film) - GEOMETRY.num_frames + 1, 2)
                windows[possible] |= {film[at : at + GEOMETRY.num_frames].tobytes() for at in starts}
    return windows[False] - windows[True]


@pytest.fixture(autouse=True, scope="module")
def _kept_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was found of films lies below the root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALT_VLA_ROOT", str(tmp_path_factory.mktemp("root")))
        yield


@pytest.fixture(scope="module")
def seen() -> Violations:
    """Drawn rooms, looked at by who knows, who errs, who cannot tell, and by pixels."""
    known = impossible_windows(0)
    models: dict[str, Any] = {
        "student": Rule(GEOMETRY, known),
        "contrary": Rule(GEOMETRY, known, -0.5),
        "random": Rule(GEOMETRY, set()),
        "copy-last-frame": CopyLastFrame(GEOMETRY, 1),
        "pixel-difference": PixelDifference(GEOMETRY, 1),
    }
    (violations,) = look(models, "nowhere", EvalSettings(), SCENES)
    return violations


@pytest.fixture(scope="module")
def scores(seen: Violations) -> dict[tuple[str, str], PairScore]:
    return {(score.encoder, score.part): score for score in score_kind(seen)[1] if score.over == "mean"}


def test_who_knows_the_rule_wins_every_pair_and_a_tie_is_no_win(scores: dict[Any, PairScore]) -> None:
    conditions = {part for _, part in scores}
    assert len(conditions) == 6
    for condition in conditions:
        assert scores["student", condition].value == 1 and scores["student", condition].ties == 0
        assert scores["contrary", condition].value == 0
        blind = scores["random", condition]
        assert (blind.value, blind.ties, blind.p) == (0, SCENES, 1)
        assert scores["student", condition].p == pytest.approx(0.5**SCENES)


def test_pixels_cannot_tell_what_happened_behind_a_screen(scores: dict[Any, PairScore]) -> None:
    for baseline in ("copy-last-frame", "pixel-difference"):
        for condition in HIDDEN:
            assert scores[baseline, condition].ties == SCENES, (baseline, condition)


def test_pixels_see_what_changes_in_full_sight(scores: dict[Any, PairScore]) -> None:
    assert scores["pixel-difference", "teleport"].value == 1
    assert scores["pixel-difference", "colour"].value == 1
    assert scores["copy-last-frame", "colour"].value == 1


def test_words_follow_the_figures(seen: Violations, scores: dict[Any, PairScore]) -> None:
    ahead = {place for place, gap in beyond_random(score_kind(seen)[0], "student").items() if gap.low > 0}
    assert ahead == {(ROOMS, part) for _, part in scores}
    of_student = conclusions(list(scores.values()), ahead, "student")
    hidden = next(
        sentence for sentence in of_student if "where neither pixels nor random weights" in sentence
    )
    assert "permanence (rooms; 100% [" in hidden and "hidden-colour" in hidden and "colour (rooms" in hidden
    also = next(sentence for sentence in of_student if "proves nothing" in sentence)
    assert "teleport" in also and "the difference of neighbouring frames" in also and "permanence" not in also
    doubted = conclusions(list(scores.values()), set(), "student")
    assert doubted[0].startswith("In no condition"), "what random init cannot be told from is no finding"
    contrary = " ".join(conclusions(list(scores.values()), ahead, "contrary"))
    assert "surprised by the possible film instead in permanence" in contrary
    blind = " ".join(conclusions(list(scores.values()), ahead, "random"))
    assert "In no condition" in blind and not any(sees(s) for (n, _), s in scores.items() if n == "random")


def test_both_ways_cancel_what_an_ending_surprises_by_itself(seen: Violations) -> None:
    """A model that dislikes one ending loses one way what it wins the other."""
    liking = {
        film.name: FilmSurprise(
            (curve(2.0 if (film.label == "possible") == film.run.endswith("1") else 1.0),)
        )
        for film in seen.films.films
    }
    violations = Violations(seen.films, {"fond": liking})
    pairs, found = both_ways(violations)
    for pair in pairs:
        gap = found["fond"][pair.impossible.name].mean - found["fond"][pair.possible.name].mean
        assert gap == (0 if pair.parts["condition"] not in ("gravity", "solidity") else -1)


def curve(value: float) -> Curve:
    return Curve(Setting(4, 1), np.array([0, 2]), np.array([4, 6]), np.array([value, value]))


def test_every_window_but_the_first_holds_the_violation_and_what_follows() -> None:
    for geometry in (GEOMETRY, ClipGeometry(16, 32, 2, 16), ClipGeometry(4, 16, 2, 8)):
        frames = film_frames(geometry)
        for make in rooms(1, 1, geometry):
            for pair in make():
                assert len(pair.possible) == frames and pair.possible.shape[1] == geometry.image_size
                if frames > 8:
                    assert pair.frame < geometry.num_frames + 2 and pair.frame + 2 < frames


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scenes: the command is the same, and ten times as fast."""
    monkeypatch.setattr("salt_vla.jobs.violations.SCENES", 2)


def test_the_command_answers_without_a_download(workshop: Any, short: None) -> None:
    salt = workshop.salt
    rows = salt.json("eval", workshop.teacher, "--suite", "violations", "--data", workshop.dataset)
    suites = {row["suite"] for row in rows}
    assert {f"violations/{ROOMS}/permanence", f"violations/{FILMS}/rewind"} <= suites
    assert {row["metric"] for row in rows} == {"relative_accuracy"}
    for row in rows:
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1 and "against chance p = " in row["note"]
    encoders = {row["encoder"] for row in rows}
    assert encoders >= {"random", "copy-last-frame", "pixel-difference"} and len(encoders) == 4


def test_without_films_of_robots_rooms_remain_and_the_reason_is_said(
    seen: Violations, capsys: pytest.CaptureFixture[str]
) -> None:
    models: dict[str, Any] = {"random": Rule(GEOMETRY, set())}
    (violations,) = look(models, "nowhere", EvalSettings(), 2)
    assert violations.films.name == ROOMS
    assert "drawn rooms alone, no films of nowhere" in capsys.readouterr().err


def test_a_made_film_can_be_looked_at_again(seen: Violations) -> None:
    for film in seen.films.films[::9]:
        again = list(film.pictures())
        assert len(again) == film_frames(GEOMETRY) and again[0].shape == (32, 32, 3)
        assert np.array_equal(again, list(film.pictures()))
