"""Why the earlier attempt's loss stood still, re-created at small size: `python studies/plateau.py`.

A good recipe and a bad one, of five settings each, and both with one setting of the other: twelve students
of each of two teachers, at three seeds. Finished cells are kept below SALT_VLA_ROOT
(`runs/`); the same command goes on. What comes of it: `runs/plateau_study/results.md` and `results.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from cells import Cell, folder_of, on_record, side_by_side
from joined import (
    Joined,
    difference,
    markdown,
    matched,
    over_seeds,
    paired_probes,
    signed,
    spread,
    with_interval,
)
from scoring import BASELINES, PROBED, STUDENT, join, join_baselines, run_seeds, scores_of
from teachers import PLAIN, PLANTED, TEACHER, LatentFacts, Outliers, make_teachers

from salt_vla.config import MaskConfig, TrainConfig, override
from salt_vla.recipes import get_recipe
from salt_vla.rundir import write_text

STUDY = "plateau"
OUTLIERS = Outliers()
TEACHER_STEPS = 800
WIDTH = 128  # of the teacher's latents
# Masks that every student is also scored under, so that students of other masks can be compared: the first of
# V-JEPA's two groups alone, since a student of one group has but one trained mask token.
COMMON_MASKS = MaskConfig(blocks=MaskConfig().blocks[:1])


@dataclass(frozen=True)
class Factor:
    """One setting: what it is called where it is as it should be and where it is as it was, with overrides.

    `max_targets` of the two masks differ so that a step predicts 48 tokens a clip under both.
    """

    good: str
    bad: str
    good_fields: tuple[str, ...]
    bad_fields: tuple[str, ...]


FACTORS = {
    "targets": Factor("normalised", "raw", ("objective.targets=normalised",), ("objective.targets=raw",)),
    "loss": Factor("absolute", "squared", ("objective.power=1.0",), ("objective.power=2.0",)),
    "parameters": Factor(
        "float32", "bfloat16", ("optimizer.parameters=float32",), ("optimizer.parameters=bfloat16",)
    ),
    "masks": Factor(
        "multiblock",
        "topup",
        ("masks.strategy=multiblock", "masks.max_targets=24"),
        ("masks.strategy=topup_block", "masks.max_targets=48"),
    ),
    "decay": Factor("spared", "all", ("optimizer.decay_all=false",), ("optimizer.decay_all=true",)),
}


def fields_of(name: str) -> list[str]:
    """The overrides of a cell: `good`, `bad`, or one of them with one factor as in the other, `good-raw`."""
    base, dash, flipped = name.partition("-")
    known = {factor.bad if base == "good" else factor.good for factor in FACTORS.values()}
    if base not in ("good", "bad") or (dash and flipped not in known):
        raise ValueError(f"there is no cell {name!r}")
    fields: list[str] = []
    for factor in FACTORS.values():
        is_good = (base == "good") != (flipped in (factor.good, factor.bad))
        fields += factor.good_fields if is_good else factor.bad_fields
    return fields


def cell_names() -> list[str]:
    """The two recipes, then each with one factor as in the other."""
    flips = [f"good-{factor.bad}" for factor in FACTORS.values()]
    flips += [f"bad-{factor.good}" for factor in FACTORS.values()]
    return ["good", "bad", *flips]


def config_of(name: str, teacher: str, steps: int, seed: int) -> TrainConfig:
    """`demo_student`, cut to `steps`, with a cell's settings and this teacher's cache."""
    config = override(get_recipe("demo_student").config, fields_of(name))
    config = replace(config, target=replace(config.target, source=f"caches/study_{teacher}"))
    return side_by_side(config, steps, seed)


def all_cells(steps: int, seeds: int, study: str = STUDY, names: Sequence[str] = ()) -> list[Cell]:
    """Seed by seed, so that a study that is cut short has whole seeds; all names where none are given."""
    return [
        Cell(study, teacher, name, config_of(name, teacher, steps, seed))
        for seed in range(seeds)
        for teacher in (PLAIN, PLANTED)
        for name in names or cell_names()
    ]


def score(cell: Cell) -> dict[str, Any]:
    """`scores_of`, where the teacher's own channels are all that nothing was planted into."""
    planted = OUTLIERS.places(WIDTH).tolist() if cell.teacher == PLANTED else []
    own_channels = [channel for channel in range(WIDTH) if channel not in planted]
    return scores_of(cell, {"common": COMMON_MASKS}, own_channels)


def joined_cells(cells: Sequence[Cell]) -> dict[tuple[str, str], Joined]:
    """(teacher, name) → what is on record of the cell, over its seeds."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.teacher, cell.name), []).append(cell)
    joined = {key: join(key[1], some) for key, some in found.items()}
    return {key: some for key, some in joined.items() if some.records}


def tables(cells: Sequence[Cell], facts: dict[str, LatentFacts], baselines: Joined) -> str:
    """Everything in Markdown: per teacher the curves' figures, the probes, and what each factor does."""
    done = joined_cells(cells)
    count = sum(len(joined.records) for joined in done.values())
    parts = [
        f"{count} of {len(cells)} cells, {len(baselines.records)} seeds; means over seeds, ± and [ ] 95 %. "
        "The error is mean |error|^p, p the power of the loss, in the space of the student's own targets.\n"
    ]
    for teacher, said in facts.items():
        mine = {name: joined for (of, name), joined in done.items() if of == teacher}
        if not mine:
            continue
        parts += [
            f"### Teacher: {teacher}\n",
            f"Its raw latents on training clips: mean squared error of predicting zero "
            f"{said.mse_of_zero:.2f}, of each channel's mean {said.mse_of_channel_mean:.2f}; the eight "
            f"widest of {WIDTH} channels own {said.share_of_top_8:.0%} of the variance.\n",
            markdown(CURVES, [curve_row(name, joined) for name, joined in mine.items()]) + "\n",
            "Probes, student − the same network at random init:\n",
            markdown(["student of", *PROBED], [probe_row(n, j, baselines) for n, j in mine.items()]) + "\n",
            "What one setting does, the better one − the other:\n",
            markdown(["setting", "in the recipe", "R², teacher's channels", *PROBED], effect_rows(mine))
            + "\n",
        ]
    values = [
        [name, *(signed(float(np.mean([s.value for s in baselines.probe(name, t)]))) for t in PROBED)]
        for name in ("random", "teacher", "constant")
    ]
    parts += ["### What students are held to\n", markdown(["features", *PROBED], values)]
    return "\n".join(parts) + "\n"


CURVES = (
    "student of",
    "held-out error",
    "÷ mean predictor's",
    "R², channel mean",
    "place mean",
    "copy nearest",
    "same masks, teacher's channels: R², place mean",
    "weights changed in a step",
    "in the last tenth",
)


def curve_row(name: str, joined: Joined) -> list[str]:
    own = [signed(joined.mean("own", baseline)) for baseline in BASELINES]
    shares = [f"{joined.mean(key):.0%}" for key in ("changed", "changed_late")]
    common = over_seeds(joined.values("common_own_channels", "position_mean"))
    ratio = joined.mean("loss_of_mean_predictor")
    return [name, f"{joined.mean('mean_error'):.3f}", f"{ratio:.3f}", *own, spread(common), *shares]


def probe_row(name: str, joined: Joined, baselines: Joined) -> list[str]:
    mine, random = matched(joined, baselines)
    cells = (paired_probes(mine.probe(STUDENT, t), random.probe("random", t)) for t in PROBED)
    return [name, *map(with_interval, cells)]


def effect_rows(mine: Mapping[str, Joined]) -> list[list[str]]:
    """Every factor twice: its good level − its bad one, all else as in the good recipe, and as in the bad."""
    rows = []
    for factor_name, factor in FACTORS.items():
        for recipe, names in (
            ("good", ("good", f"good-{factor.bad}")),
            ("bad", (f"bad-{factor.good}", "bad")),
        ):
            if not all(name in mine for name in names):
                continue
            better, worse = matched(*(mine[name] for name in names))
            r2 = difference(better, worse, "common_own_channels", "position_mean")
            effects = (paired_probes(better.probe(STUDENT, t), worse.probe(STUDENT, t)) for t in PROBED)
            label = f"{factor_name}: {factor.good} − {factor.bad}"
            rows.append([label, recipe, with_interval(r2), *map(with_interval, effects)])
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--steps", type=int, default=250, help="updates a student")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--jobs", type=int, default=2, help="students at a time, one thread each")
    arguments.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS)
    arguments.add_argument("--only", default="", help="some of the cells, such as good,bad-float32")
    arguments.add_argument("--study", default=STUDY, help="what its runs and its folder are called")
    arguments.add_argument("--table", action="store_true", help="make nothing; join what is on record")
    given = arguments.parse_args()
    names = given.only.split(",") if given.only else cell_names()
    cells = all_cells(given.steps, given.seeds, given.study, names)
    facts = make_teachers(given.teacher_steps, OUTLIERS)
    if not given.table:
        run_seeds(cells, score, given.jobs, TEACHER)
    text = tables(cells, facts, join_baselines(given.study, given.seeds))
    write_text(folder_of(given.study) / "results.md", text)
    write_text(folder_of(given.study) / "results.json", json.dumps(on_record(cells), indent=1))
    print(text)


if __name__ == "__main__":
    main()
