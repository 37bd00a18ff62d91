"""`salt-vla sweep …`"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import tyro

from salt_vla.cli.detach import Apart
from salt_vla.cli.printing import print_json, print_table
from salt_vla.errors import ConfigError, UserError

if TYPE_CHECKING:
    from salt_vla.jobs.sweep_table import SweepTable


def run(
    recipe: Annotated[str, tyro.conf.Positional],
    assignments: Annotated[tuple[str, ...], tyro.conf.Positional],
    name: str | None = None,
    random: int | None = None,
    optuna: int | None = None,
    seed: int = 0,
    metric: str = "val.r2_position_mean",
    max_steps: int | None = None,
    data: str | None = None,
    cache: str | None = None,
    json: bool = False,
    apart: Annotated[Apart, tyro.conf.arg(name="")] = Apart(),  # noqa: B008
) -> int:
    """Run a recipe at every point of a grid, at random points, or where Optuna proposes; the same command
    goes on after any interruption, and ends with one table. Exit code 1 when a point has no finished run.

    A field with several values (a,b) is varied, one with a single value holds for all. A value that has
    commas itself is written in brackets or quotes: optimizer.betas=[0.9,0.95],[0.9,0.99]. With --random and
    --optuna a number may be a range: optimizer.lr=log:1e-4..1e-2, predictor.depth=2..8.

    Example: salt-vla sweep run demo_student optimizer.lr=3e-4,1e-3 masks.ratio=0.75,0.9 --name rates

    Args:
        recipe: the experiment to vary (`salt-vla recipes ls`).
        assignments: fields and what to try in them, as field=value,value.
        name: the sweep's name; default: the recipe's. Its runs are called NAME-lr3e-4-ratio0.9.
        random: so many points at random instead of all.
        optuna: so many points that Optuna proposes (extra: sweep).
        seed: of the random points; the runs' own is the field seed.
        metric: the figure that is to be best, KIND.FIELD of metrics.jsonl; a loss is best where it is low.
        max_steps: stop each run after this many steps, without changing the schedules.
        data: a clip table, a LeRobot data set's folder, or metaworld-mini.
        cache: the folder of the teacher's cached latents.
        json: print JSON instead of a table.
    """
    from salt_vla.jobs.sweep import run_sweep
    from salt_vla.jobs.sweep_spec import SweepSpec

    if random is not None and optuna is not None:
        raise ConfigError("give --random or --optuna, not both")
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"--max-steps must be at least 1, not {max_steps}")
    spec = SweepSpec(
        name=recipe if name is None else name,
        recipe=recipe,
        assignments=assignments,
        method="optuna" if optuna is not None else "random" if random is not None else "grid",
        trials=next((number for number in (random, optuna) if number is not None), 0),
        seed=seed,
        metric=metric,
        max_steps=max_steps or 0,
        data=data or "",
        cache=cache or "",
    )
    if apart.starts("sweep", spec.name, {"--data": data, "--cache": cache}):
        return 0
    table = run_sweep(spec)
    _print(table, json)
    return 0 if all(row["state"] == "finished" for row in table.rows) else 1


def ls(json: bool = False) -> None:
    """List the sweeps below SALT_VLA_ROOT.

    Example: salt-vla sweep ls

    Args:
        json: print JSON instead of a table.
    """
    from salt_vla.jobs.sweep_table import all_sweeps

    rows = []
    for sweep in all_sweeps():
        row = {"name": sweep.name, "state": "damaged", "points": 0, "of": 0, "recipe": ""}
        try:
            status = sweep.status()
            row |= {"state": status.state, "points": len(sweep.points()), "of": status.total_steps}
            row |= {"recipe": sweep.spec().recipe}
        except UserError as error:  # One damaged sweep must not hide the others.
            row |= {"recipe": str(error)}
        rows.append(row)
    if json:
        print_json(rows)
    else:
        print_table(rows, ["name", "state", "points", "of", "recipe"])


def show(name: Annotated[str, tyro.conf.Positional], json: bool = False) -> None:
    """A sweep's table as its runs now are, the best first.

    Example: salt-vla sweep show rates

    Args:
        name: the sweep's name.
        json: print JSON instead of a table.
    """
    from salt_vla.jobs.sweep_table import SweepFolder, read_table

    sweep = SweepFolder(name)
    table = read_table(sweep)
    if json:
        print_json(table.to_json() | {"status": asdict(sweep.status())})
    else:
        _print(table, json=False)


def promote(
    name: Annotated[str, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    new_name: Annotated[str | None, tyro.conf.arg(name="as")] = None,
    steps: int | None = None,
) -> None:
    """A sweep's best run as a recipe of its own, in recipes/ below SALT_VLA_ROOT, to be run for longer.

    Example: salt-vla sweep promote rates --as rates_long --steps 20000

    Args:
        name: the sweep's name.
        overrides: further fields to set, as field=value.
        new_name: the recipe's name; default: NAME_best.
        steps: its steps; default: those of the recipe that the sweep varied.
    """
    from salt_vla.jobs.sweep import promote as promote_best

    recipe, file = promote_best(name, new_name, steps, overrides)
    print(f"{recipe.name}: {recipe.summary}; {recipe.config.steps} steps, in {file}")


def _print(table: SweepTable, json: bool) -> None:
    if json:
        print_json(table.to_json())
        return
    print_table(table.for_people(), table.columns)
    best = table.best
    if best is not None:
        print(f"\nBest {table.spec.metric}: {best['metric']:.4g}, run {best['run']}")
