"""Keeping the context that V-JEPA's masks cut off, at equal compute: `python studies/context.py`.

The reference cuts every context of a batch to the shortest one by dropping its end. Students of the
demonstration's recipe with that and with three other policies, all of one teacher, each with as many steps as
the same floating-point operations pay for. Finished cells are kept below SALT_VLA_ROOT (`runs/`); the same
command goes on. What comes of it: `runs/context_study/results.md` and `results.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cells import Cell, folder_of, on_record, side_by_side
from joined import Joined, difference, markdown, matched, over_seeds, paired_probes, spread, with_interval
from scoring import PROBED, STUDENT, join, join_baselines, run_seeds, scores_of
from teachers import PLAIN, TEACHER, make_teachers

from salt_vla.config import TrainConfig, override
from salt_vla.masks import build_masks
from salt_vla.recipes import get_recipe
from salt_vla.rundir import write_text
from salt_vla.training.flops import mean_step_flops

STUDY = "context"
REFERENCE, WHOLE = "end", "pad"
POLICIES = ("end", "random", "pad", "even")
TEACHER_STEPS = 800
WIDTH = 128  # of the teacher's latents
DRAWS = 64  # steps whose masks are counted


def config_of(policy: str, steps: int, seed: int) -> TrainConfig:
    """`demo_student`, cut to `steps`, with contexts brought to one size by `policy`."""
    config = override(get_recipe("demo_student").config, [f"masks.truncate={policy}", "masks.max_targets=24"])
    config = replace(config, target=replace(config.target, source=f"caches/study_{PLAIN}"))
    return side_by_side(config, steps, seed)


def flops_of(config: TrainConfig) -> float:
    """Of a step, for one clip, on average over masks."""
    masks = build_masks(config.masks, config.geometry)
    return mean_step_flops(replace(config, seed=0), WIDTH, masks, DRAWS).total


def steps_of(policy: str, steps: int) -> int:
    """Steps that cost what `steps` of the reference's policy cost."""
    reference, mine = (flops_of(config_of(name, steps, 0)) for name in (REFERENCE, policy))
    return round(steps * reference / mine)


def mean_context(config: TrainConfig) -> list[float]:
    """Tokens that a clip shows, real ones, on average over masks: one figure a mask group."""
    totals = [0.0] * config.masks.num_groups
    masks = build_masks(config.masks, config.geometry)
    for step in range(DRAWS):
        for number, group in enumerate(masks.sample(config.batch_size, 0, step)):
            valid = group.context_valid
            shown = group.context_ids.numel() if valid is None else int(valid.sum())
            totals[number] += shown / config.batch_size / DRAWS
    return totals


def all_cells(steps: int, seeds: int) -> list[Cell]:
    """Seed by seed."""
    lengths = {policy: steps_of(policy, steps) for policy in POLICIES}
    return [
        Cell(STUDY, PLAIN, policy, config_of(policy, lengths[policy], seed))
        for seed in range(seeds)
        for policy in POLICIES
    ]


def score(cell: Cell) -> dict[str, Any]:
    """`scores_of`, under the reference's masks too, and under those that keep every context."""
    masks = cell.config.masks
    return scores_of(
        cell,
        {name: replace(masks, truncate=name) for name in (REFERENCE, WHOLE)},  # type: ignore[arg-type]
    )


def table(cells: Sequence[Cell], baselines: Joined) -> str:
    """In Markdown: what each policy shows, costs and explains, and its probes beside the reference's."""
    found = {policy: join(policy, [cell for cell in cells if cell.name == policy]) for policy in POLICIES}
    done = {policy: joined for policy, joined in found.items() if joined.records}
    count = sum(len(joined.records) for joined in done.values())
    first = {cell.name: cell.config for cell in reversed(cells)}
    rows = []
    for policy, joined in done.items():
        config = first[policy]
        shown = " and ".join(f"{tokens:.1f}" for tokens in mean_context(config))
        r2 = [spread(over_seeds(joined.values(name, "position_mean"))) for name in ("own", REFERENCE, WHOLE)]
        rows.append([policy, shown, f"{flops_of(config) / 1e9:.3f}", str(config.steps), *r2])
    header = [
        "policy",
        "context tokens",
        "GFLOP a clip",
        "steps",
        "R², own masks",
        "under `end`",
        "under `pad`",
    ]
    pairs = []
    for policy, joined in done.items():
        mine, random = matched(joined, baselines)
        cells_ = [paired_probes(mine.probe(STUDENT, t), random.probe("random", t)) for t in PROBED]
        pairs.append([f"{policy} − random init", "", *map(with_interval, cells_)])
        if policy != REFERENCE and REFERENCE in done:
            mine, other = matched(joined, done[REFERENCE])
            cells_ = [paired_probes(mine.probe(STUDENT, t), other.probe(STUDENT, t)) for t in PROBED]
            r2_gain = with_interval(difference(mine, other, WHOLE, "position_mean"))
            pairs.append([f"{policy} − {REFERENCE}", r2_gain, *map(with_interval, cells_)])
    parts = [
        f"{count} of {len(cells)} cells, {len(baselines.records)} seeds; means over seeds. R² is held out, "
        "against each token place's mean.\n",
        markdown(header, rows) + "\n",
        markdown(["difference", "R² under `pad`", *PROBED], pairs),
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--steps", type=int, default=600, help="updates of the reference's policy")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--jobs", type=int, default=2, help="students at a time, one thread each")
    arguments.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS)
    arguments.add_argument("--table", action="store_true", help="make nothing; join what is on record")
    given = arguments.parse_args()
    cells = all_cells(given.steps, given.seeds)
    if not given.table:
        make_teachers(given.teacher_steps)
        run_seeds(cells, score, given.jobs, TEACHER)
    text = table(cells, join_baselines(STUDY, given.seeds))
    write_text(folder_of(STUDY) / "results.md", text)
    write_text(folder_of(STUDY) / "results.json", json.dumps(on_record(cells), indent=1))
    print(text)


if __name__ == "__main__":
    main()
