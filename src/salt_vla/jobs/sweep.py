"""`sweep run` and `sweep promote`: points as ordinary runs, one after another; the best as a recipe.

Killed at any moment, the same command goes on: finished runs are not run again, a broken one resumes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from salt_vla.config import Recipe, TrainConfig, differing_fields, override
from salt_vla.errors import CacheError, ConfigError, DataError, RunError, UserError
from salt_vla.interrupts import stop_on_signals
from salt_vla.jobs import train as job
from salt_vla.jobs.sweep_points import Point, num_points, propose, require_of
from salt_vla.jobs.sweep_spec import Axis, SweepSpec, read_assignments
from salt_vla.jobs.sweep_table import (
    SweepFolder,
    SweepTable,
    read_table,
    require_metric,
    result_of,
    settings_of,
)
from salt_vla.progress import progress
from salt_vla.recipes import all_recipes, get_recipe
from salt_vla.recipes.stored import store
from salt_vla.rundir import RunDirectory, launched

OWN = ("runtime.", "steps.")  # A recipe has its parent's, unless they were varied.


def run_sweep(spec: SweepSpec) -> SweepTable:
    """Try every point, and leave the table in the sweep's folder after each.

    A point that is refused, or whose run fails for a reason that its user can mend, is a row that says so;
    all else ends the sweep, and the same call goes on. Raises `ConfigError` before the first run for a grid
    with a point that cannot be, `RunError` for another sweep of that name, `Stopped` after a signal.
    """
    recipe = get_recipe(spec.recipe)
    _require_alone()
    base = job.with_paths(recipe.config, spec.data or None, spec.cache or None)
    # On record as a run has them, so that the same command may be given from any folder.
    spec = replace(spec, data=spec.data and base.data.table, cache=spec.cache and base.target.source)
    axes, fixed = read_assignments(spec, base)
    _require_possible(spec, axes, override(base, fixed))
    sweep = SweepFolder(spec.name)
    sweep.require_idle()
    sweep.keep_spec(spec, recipe)
    total = num_points(spec, axes)
    status = sweep.claim(total)
    try:
        with stop_on_signals() as stop, progress(f"Sweeping {spec.name}", total, "runs") as advance:
            for number, point in enumerate(_points(sweep, spec, axes), start=1):
                stop.check(f"after {number - 1} of {total} points")
                sweep.note(point.run, _try(point, spec, base, [*fixed, *point.assignments(axes)]))
                require_metric(spec, point)
                sweep.keep_table(read_table(sweep))
                sweep.set_status(replace(status, step=number))
                advance(1, note=point.run)
    except BaseException as error:
        sweep.set_status(
            replace(sweep.status(), state="stopped", exit_reason=f"{type(error).__name__}: {error}")
        )
        raise
    sweep.set_status(replace(sweep.status(), state="finished", exit_reason="finished"))
    return read_table(sweep)


def _require_alone() -> None:
    """Raises `ConfigError` for one of several processes: a sweep's runs are of one each."""
    if launched().size > 1:
        raise ConfigError(
            "a sweep runs in one process; start it without torchrun, or train its points with it"
        )


def _points(sweep: SweepFolder, spec: SweepSpec, axes: list[Axis]) -> Iterator[Point]:
    """Those on record, then new ones, each on record before its run begins."""
    require_of(sweep.points(), axes, sweep.points_file)
    yield from sweep.points()
    while True:
        points = sweep.points()
        point = propose(spec, axes, points, [result_of(spec, each) for each in points])
        if point is None:
            return
        sweep.add_point(point)
        yield point


def _try(point: Point, spec: SweepSpec, base: TrainConfig, assignments: Sequence[str]) -> str:
    """Run a point unless it has been, and return what is wrong with it alone. What would be wrong with every
    point, the data or the cache, is raised."""
    try:
        config = override(base, assignments)
        if not _is_done(point.run, config, spec.max_steps):
            job.train(config, point.run, spec.max_steps or None, recipe=get_recipe(spec.recipe))
    except (DataError, CacheError):
        raise
    except UserError as error:
        # Which of a run's fields may be changed is no business of a sweep, whose runs go by its own.
        return str(error).partition("\n")[0].partition(", or allow them")[0]
    return ""


def _is_done(name: str, config: TrainConfig, max_steps: int) -> bool:
    """Whether the run is there, with these settings, and has come to its end."""
    run = RunDirectory.named(name)
    status = run.status()
    if status.state != "finished" or status.step < min(max_steps or config.steps, config.steps):
        return False
    rows = differing_fields(settings_of(name), config)
    return all(each.free or each.field.startswith("runtime.") for each in rows)


def _require_possible(spec: SweepSpec, axes: list[Axis], base: TrainConfig) -> None:
    """Every point of a grid can be a configuration; of the other kinds nobody knows the points yet."""
    points: list[Point] = []
    while spec.method == "grid" and (point := propose(spec, axes, points, [])) is not None:
        try:
            override(base, point.assignments(axes))
        except ConfigError as error:
            raise ConfigError(f"point {' '.join(point.assignments(axes))}: {error}") from error
        points.append(point)


def promote(
    name: str, new_name: str | None = None, steps: int | None = None, overrides: Sequence[str] = ()
) -> tuple[Recipe, Path]:
    """The best finished run of a sweep as a recipe of its own, below the root, and the recipe's file.

    Its steps are `steps`, or those of the recipe that the sweep varied, or the best run's where the sweep
    varied them. Raises `RunError` where no run of the sweep has finished with a figure, and `ConfigError` for
    a name that is taken, or where nothing is left of what was varied.
    """
    sweep = SweepFolder(name)
    spec = sweep.spec()
    table = read_table(sweep)
    best = table.best
    if best is None:
        raise RunError(f"no run of sweep {name!r} has finished with a {spec.metric}; let it end first")
    parent = sweep.recipe()
    taken = f"{name}_best" if new_name is None else new_name
    if taken in all_recipes():
        raise ConfigError(f"{taken!r} is a recipe of this package; choose another name with --as")
    given = {each.partition("=")[0] for each in overrides} | ({"steps"} if steps is not None else set())
    varied = dict(zip([axis.field for axis in sweep.axes()], table.keys, strict=True))
    kept = {field: key for field, key in varied.items() if field not in given}
    what = ", ".join(f"{key} {best[key]}" for key in kept.values())
    if not what:
        raise ConfigError(f"nothing that sweep {name!r} varied is left ({', '.join(varied)} given anew)")
    length = parent.config.steps if steps is None else steps
    machine = [f"{field}={best[key]}" for field, key in kept.items() if f"{field}.".startswith(OWN)]
    won = replace(settings_of(best["run"]), runtime=parent.config.runtime, steps=length)
    config = override(won, [*machine, *overrides])
    better, sign = ("below", "<") if spec.lower_is_better else ("above", ">")
    recipe = Recipe(
        name=taken,
        summary=f"{parent.name} with {what}, the best of sweep {name}",
        config=config,
        parent=parent.name,
        hypothesis=f"The lead of {what} at step {best['step']}, the best of {len(table.rows)} points of "
        f"sweep {name}, lasts for {config.steps} steps.",
        target=f"{spec.metric} {better} that of {parent.name} at the same steps.",
        criterion=f"{spec.metric} {sign} parent at the same steps",
        notes=f"Its figure in the sweep was {best['metric']:.4g}, of run {best['run']}; the best of many is "
        "too good by chance alone.",
    )
    return recipe, store(recipe)
