"""From names of runs to their curves, as charts want them; knows metrics and costs, nothing of pages."""

from __future__ import annotations

from collections.abc import Sequence

from salt_vla.errors import UserError
from salt_vla.operations.curves import is_number, points
from salt_vla.operations.dashboard.charts import Curves
from salt_vla.operations.dashboard.live import Live
from salt_vla.operations.overview import COST, config_of, last_of, noted
from salt_vla.rundir import RunDirectory

FIRST_COLUMNS = ("train.loss", "val.r2_position_mean")


def curves_of(live: Live, names: Sequence[str], columns: Sequence[str]) -> list[Curves]:
    """Of the runs that are (still) there, in the order of the names."""
    overviews = live.overviews()
    found = []
    for name in names:
        if name not in overviews:
            continue
        run = RunDirectory.named(name)
        rows = live.metrics(run)
        by_column = {each: points(rows, *each.split(".", 1)) for each in columns}
        found.append(Curves(name, by_column, per_step(run)))
    return found


def per_step(run: RunDirectory) -> dict[str, float]:
    """What a step is in clips and in FLOPs, where the run says so."""
    try:
        cost, config = noted(run, COST), config_of(run)
    except UserError:  # The page says elsewhere what is wrong with it.
        return {}
    known = {"clips": cost.get("clips_a_step"), "flops": cost.get("flops_a_step")}
    if known["clips"] is None and config is not None:
        known["clips"] = config.batch_size
    return {axis: float(value) for axis, value in known.items() if is_number(value) and value}


def columns_of(live: Live, names: Sequence[str], chosen: Sequence[str]) -> list[dict[str, str]]:
    """What can be drawn of the runs: columns of numbers, and those that are chosen already."""
    known = {*FIRST_COLUMNS, *chosen}
    there = live.overviews()
    for name in names:
        if name not in there:
            continue
        probed = last_of(live.metrics(RunDirectory.named(name)), "probe")
        for row in filter(None, (there[name].last_train, there[name].last_val, probed)):
            known |= {
                f"{row['kind']}.{column}"
                for column, value in row.items()
                if is_number(value) and column != "step"
            }
    ordered = sorted(known, key=lambda column: (column not in FIRST_COLUMNS, column))
    return [{"label": column.replace(".", ": ", 1), "value": column} for column in ordered]
