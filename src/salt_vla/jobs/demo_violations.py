"""The demonstration's violations: what surprises its student, measured, drawn, and told in its report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from salt_vla.config import from_json
from salt_vla.data.film_pairs import FilmSet
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.evaluation.surprise_models import COPY_LAST
from salt_vla.evaluation.surprise_scores import PairScore
from salt_vla.jobs.demo_plan import Demo
from salt_vla.jobs.surprise import RANDOM, open_models
from salt_vla.jobs.violations import (
    CONDITION,
    MadeFilm,
    Violations,
    beyond_random,
    both_ways,
    look,
    score_kind,
    share_targets,
)
from salt_vla.reports.html import Block, Figure, Section
from salt_vla.reports.surprise import pair_figure, score_tables, shown_pairs
from salt_vla.reports.violations import CURVES_CAPTION, Excess, conclusions, excess_figure
from salt_vla.rundir import read_json, write_bytes, write_text

STUDENT = "student"
RESULTS = "violations.json"
STRIP, CURVES = "violations_film", "violations_curves"
SMALLEST = 1e-6  # surprise that another is divided by
SHOWN = (STUDENT, RANDOM, COPY_LAST)
LINES = {STUDENT: STUDENT, RANDOM: "random init"}  # Those of pixels would dwarf them.
ABOUT = (
    "Pairs of films are equal up to a moment; from then on one shows what cannot be. Rooms are drawn here by "
    "plain physics; films are held-out episodes that were tampered with. Surprise is the distance between "
    "what the student predicts of a window’s later half and the teacher’s latents of it. Where films go both "
    "ways (a ball goes in and none comes out; none goes in and one comes out), both pairs count as one, so "
    "that what the end of a film looks like cancels. A tie is not a win."
)
LEVELS = (
    "It was trained on films like the second kind alone; where it can predict little, little can surprise it."
)
STRIP_CAPTION = (
    "Above, the possible and the impossible film; below, how much each surprised, at the frame that "
    "prediction begins with. Dashed: where the films part. Scales differ from panel to panel."
)


def evaluate_violations(demo: Demo) -> None:
    """`violations.json` and its pictures, unless they are of this very student and its targets."""
    settings = EvalSettings(demo.student.seed)
    teacher = str(demo.teacher_run.path)
    models = open_models({STUDENT: str(demo.student_run.path)}, replace(settings, teacher=teacher))
    wanted = {name: model.fingerprint for name, model in models.items()} | {"scenes": str(demo.scenes)}
    file = demo.folder / RESULTS
    if file.is_file() and read_json(file, dict).get("of") == wanted:
        print("violations: done already for this student")
        return
    share_targets(models)
    kinds = look(models, demo.student.data.table, settings, demo.scenes)
    figures = [score_kind(each) for each in kinds]
    scores = [score for _, own in figures for score in own if score.over == "mean"]
    ahead = beyond_random([one for scored, _ in figures for one in scored], STUDENT)
    curves = [curve for each in kinds for curve in _excess(each, demo.student.geometry.num_frames)]
    caption = _draw(demo, kinds, scores, curves)
    said: dict[str, Any] = {"of": wanted, "scores": [score.as_dict() for score in scores], "caption": caption}
    said["beyond_random"] = [
        {"set": kind, "condition": condition} | asdict(estimate)
        for (kind, condition), estimate in ahead.items()
    ]
    said["levels"] = {each.films.name: _level(each) for each in kinds}
    write_text(file, json.dumps(said | {"curves": [asdict(curve) for curve in curves]}, indent=1))


def _excess(violations: Violations, clip_frames: int) -> list[Excess]:
    """How far apart possible and impossible films are, by how much of the violation a window holds."""
    pairs, found = both_ways(violations)
    curves = []
    for condition in dict.fromkeys(pair.parts[CONDITION] for pair in pairs):
        for encoder, by_film in found.items():
            by_seen: dict[int, list[float]] = {}
            for pair in pairs:
                if pair.parts[CONDITION] != condition:
                    continue
                assert isinstance(pair.possible, MadeFilm)
                first, second = (by_film[film.name].curves[0] for film in (pair.possible, pair.impossible))
                seen = first.starts + clip_frames - pair.possible.frame
                for number, low, high in zip(seen.tolist(), first.values, second.values, strict=True):
                    by_seen.setdefault(max(number, 0), []).append(float((high - low) / max(low, SMALLEST)))
            numbers = tuple(sorted(by_seen))
            means = tuple(float(np.mean(by_seen[number])) for number in numbers)
            curves.append(Excess(violations.films.name, condition, encoder, numbers, means))
    return curves


def _level(violations: Violations) -> float:
    found = violations.found[STUDENT]
    return float(np.mean([found[pair.possible.name].mean for pair in violations.films.pairs]))


def _draw(
    demo: Demo, kinds: Sequence[Violations], scores: Sequence[PairScore], curves: Sequence[Excess]
) -> str:
    """Write the pictures; what the film strip shows: of the condition that the student tells best, the pair
    in the middle of its own order."""
    best = max((score for score in scores if score.encoder == STUDENT), key=lambda score: score.value)
    kind = next(each for each in kinds if each.films.name == best.set)
    pairs = tuple(pair for pair in kind.films.pairs if pair.parts[CONDITION] == best.part)
    chosen = FilmSet(best.set, tuple(f for p in pairs for f in (p.possible, p.impossible)), pairs)
    ordered = shown_pairs(chosen, kind.found[STUDENT])
    why, pair = ordered[min(1, len(ordered) - 1)]
    for dark in (False, True):
        pictures = {
            STRIP: pair_figure(pair, kind.found, SHOWN, dark),
            CURVES: excess_figure([each for each in curves if each.encoder in LINES], LINES, dark),
        }
        for name, png in pictures.items():
            write_bytes(demo.folder / _picture(name, dark), png)
    assert isinstance(pair.possible, MadeFilm)
    return (
        f"{best.part.capitalize()} in {best.set}, {pair.scene}: {why}. The films part at frame "
        f"{pair.possible.frame}. {STRIP_CAPTION}"
    )


def _picture(name: str, dark: bool) -> str:
    return f"{name}{'_dark' * dark}.png"


def violations_section(demo: Demo) -> Section:
    """Words, figures and pictures from what `evaluate_violations` left."""
    said = read_json(demo.folder / RESULTS, dict)
    scores = [from_json(PairScore, json.dumps(each), RESULTS) for each in said["scores"]]
    told = {(gap["set"], gap["condition"]) for gap in said["beyond_random"] if gap["low"] > 0}
    levels = ", ".join(f"{level:.3f} in {kind}" for kind, level in said["levels"].items())
    blocks: list[Block] = [ABOUT, *conclusions(scores, told, STUDENT)]
    blocks.append(f"The student’s mean surprise at possible films: {levels}. {LEVELS}")
    blocks += [table for table in score_tables(scores) if table.names]
    for name, caption, alt in (
        (STRIP, said["caption"], "Two films that part in the middle, and surprise over time below them"),
        (CURVES, CURVES_CAPTION, "Surprise at impossible films beyond that at possible ones, by condition"),
    ):
        light, dark = ((demo.folder / _picture(name, is_dark)).read_bytes() for is_dark in (False, True))
        blocks.append(Figure(light, caption, alt, dark, wide=True))
    return Section("Does the impossible surprise it", blocks)
