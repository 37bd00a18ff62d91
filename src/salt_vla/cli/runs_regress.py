"""`salt-vla runs regress`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import tyro

from salt_vla.cli.printing import print_json, print_table


def regress(
    names: Annotated[tuple[str, ...], tyro.conf.Positional],
    suite: str = "front/grid",
    target: str = "action_mean",
    column: str = "val.loss",
    figure: Path | None = None,
    json: bool = False,
) -> None:
    """Does a held-out loss foretell what probes find? A line through runs, with what it is worth.

    Runs must have been evaluated (`salt-vla eval`), and their losses must lie in one target space.

    Example: salt-vla runs regress sweep_1 sweep_2 sweep_3 sweep_4 --target hand_velocity --figure line.png

    Args:
        names: of four runs or more.
        suite: of the probes' figure, as tables name it.
        target: of the probes' figure.
        column: the other figure, as KIND.COLUMN of metrics.jsonl, at its last line.
        figure: also draw the runs and the line into this PNG file.
        json: print JSON instead of a table.
    """
    from salt_vla.jobs.loss_to_accuracy import loss_to_accuracy

    said = loss_to_accuracy(list(names), column, suite, target)
    for note in said.notes:
        print(f"salt-vla: {note}", file=sys.stderr)
    found = said.found
    title = f"R² {found.r2:.2f} [{found.low:.2f}, {found.high:.2f}] over {found.runs} runs"
    if figure is not None:
        from salt_vla.files import write_bytes
        from salt_vla.reports.scatter import scatter

        points = [(point["run"], point["x"], point["y"]) for point in said.points]
        line = (found.slope, found.intercept)
        write_bytes(figure, scatter(points, line, column, f"{suite} {target}", title))
    if json:
        return print_json(said.as_dict())
    header = ("run", column, target)
    print_table(
        [dict(zip(header, (p["run"], f"{p['x']:.4g}", f"{p['y']:.3f}"), strict=True)) for p in said.points],
        list(header),
    )
    print(
        f"{target} ≈ {found.intercept:.4g} {found.slope:+.4g} · {column}; "
        f"Pearson {found.pearson:+.3f}; {title}"
    )
    print(f"each run foretold by the others: R² {found.r2_left_out:+.2f}")
