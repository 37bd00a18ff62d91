"""A sweep's folder, `sweeps/NAME/`, and its one table: what differs, how far each run is, what it reached.

Figures are read from the runs every time; `results.json` and `results.md` are copies for others. Knows
nothing of how runs are made.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass
from typing import Any

from salt_vla.config import Recipe, TrainConfig, differing_fields, from_json, to_json
from salt_vla.errors import RunError
from salt_vla.jobs.sweep_points import Point, require_of
from salt_vla.jobs.sweep_spec import Axis, SweepSpec, keys_of, read_assignments
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, read_json, require_name, root, write_text
from salt_vla.verdicts import last_figure

COLUMNS = {
    "val_loss": ("val", "loss"),
    "r2_channel_mean": ("val", "r2_channel_mean"),
    "r2_position_mean": ("val", "r2_position_mean"),
    "r2_copy_nearest": ("val", "r2_copy_nearest"),
}
KEYS = {"values", "run"}  # of a point on record


@dataclass(frozen=True)
class SweepTable:
    """Rows in the order of the metric, the best first, then those that have not finished. `keys`: the columns
    of what differs."""

    spec: SweepSpec
    keys: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]

    @property
    def best(self) -> dict[str, Any] | None:
        """The row of the finished run with the best metric."""
        return next((row for row in self.rows if row["metric"] is not None), None)

    @property
    def columns(self) -> list[str]:
        """Those in which any row has something to say."""
        wanted = ["run", *self.keys, "step", *COLUMNS, "metric", "state", "note"]
        always = {"run", *self.keys, "step", "state"}
        return [
            name for name in wanted if name in always or any(row[name] not in (None, "") for row in self.rows)
        ]

    def to_json(self) -> dict[str, Any]:
        best = self.best
        return {
            "sweep": asdict(self.spec),
            "best": None if best is None else best["run"],
            "points": list(self.rows),
        }

    def to_markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns)]
        lines += [[_cell(row[name]).replace("|", "\\|") for name in self.columns] for row in self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    def for_people(self) -> list[dict[str, str]]:
        return [{name: _cell(row[name]) for name in self.columns} for row in self.rows]


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


class SweepFolder(RunDirectory):
    """`sweeps/NAME/`: the sweep as it was asked for, the points so far, and who works on it (as a run's)."""

    def __init__(self, name: str) -> None:
        require_name(name, "sweep")
        super().__init__(root() / "sweeps" / name)
        self.spec_file = self.path / "sweep.json"
        self.points_file = self.path / "points.json"
        self.notes_file = self.path / "notes.json"
        self.recipe_file = self.path / "recipe.json"

    def exists(self) -> bool:
        return self.spec_file.is_file()

    def spec(self) -> SweepSpec:
        if not self.exists():
            raise RunError(f"there is no sweep at {self.path}; `salt-vla sweep ls` lists the sweeps")
        return from_json(SweepSpec, self.spec_file.read_bytes(), str(self.spec_file))

    def keep_spec(self, spec: SweepSpec, recipe: Recipe) -> None:
        """Write down the sweep and the recipe that it varies, or refuse another one under the same name once
        it has a point; only `trials` may grow, and the metric change where no point was proposed for it."""
        if self.exists() and self.points():
            self._require_same(spec, recipe)
        write_text(self.recipe_file, to_json(recipe))
        write_text(self.spec_file, to_json(spec))

    def _require_same(self, spec: SweepSpec, recipe: Recipe) -> None:
        stored, before, now = self.spec(), asdict(self.spec()), asdict(spec)
        free = {"trials"} if spec.trials >= stored.trials and spec.method != "grid" else set()
        if spec.method != "optuna" or all(result_of(stored, point) is None for point in self.points()):
            free.add("metric")
        said = [f"{key}: {before[key]!r}, not {now[key]!r}" for key in now if now[key] != before[key]]
        said = [each for each in said if each.partition(":")[0] not in free]
        rows = differing_fields(self.recipe().config, recipe.config)
        said += [f"recipe {recipe.name} has changed since: {row}" for row in rows if not row.free]
        if said:
            raise RunError(
                f"sweep {self.name!r} was started otherwise ({'; '.join(said)}); give this one another --name"
            )

    def recipe(self) -> Recipe:
        """The recipe that is varied, as it was at the start."""
        if not self.recipe_file.is_file():
            return get_recipe(self.spec().recipe)
        return from_json(Recipe, self.recipe_file.read_bytes(), str(self.recipe_file))

    def axes(self) -> list[Axis]:
        return read_assignments(self.spec(), self.recipe().config)[0]

    def points(self) -> list[Point]:
        if not self.points_file.is_file():
            return []
        rows = read_json(self.points_file, list)
        for row in rows:
            fields = [*row["values"], row["run"]] if _is_point(row) else [None]
            if not all(isinstance(each, str) for each in fields):
                raise RunError(f"{self.points_file} is damaged: {row!r} is no point; remove it from the list")
        return [Point(tuple(row["values"]), row["run"]) for row in rows]

    def add_point(self, point: Point) -> None:
        rows = [asdict(each) for each in (*self.points(), point)]
        write_text(self.points_file, json.dumps(rows, indent=2))

    def notes(self) -> dict[str, str]:
        """Why a point has no run of its own, by the run's name."""
        return read_json(self.notes_file, dict) if self.notes_file.is_file() else {}

    def note(self, run: str, why: str) -> None:
        """Write that down; an empty reason takes an earlier one back."""
        notes = {name: each for name, each in self.notes().items() if name != run}
        write_text(self.notes_file, json.dumps(notes | ({run: why} if why else {}), indent=2))

    def keep_table(self, table: SweepTable) -> None:
        write_text(self.path / "results.json", json.dumps(table.to_json(), indent=2))
        write_text(self.path / "results.md", table.to_markdown())


def _is_point(row: Any) -> bool:
    return isinstance(row, dict) and set(row) == KEYS and isinstance(row["values"], list)


def require_metric(spec: SweepSpec, point: Point) -> None:
    """Raises `RunError` where a finished run measured no such figure. Probes may come later."""
    run = RunDirectory.named(point.run)
    if run.status().state != "finished" or spec.metric_kind == "probe":
        return
    rows = [(row["kind"], key, value) for row in run.metrics() for key, value in row.items()]
    figures = sorted(
        {f"{kind}.{key}" for kind, key, value in rows if type(value) in (int, float, type(None))}
    )
    if spec.metric not in figures:
        close = difflib.get_close_matches(spec.metric, figures, n=3, cutoff=0.5) or figures
        raise RunError(
            f"run {point.run} has no figure {spec.metric!r}, perhaps {' or '.join(close)}; the same command "
            "with another --metric goes on"
        )


def all_sweeps() -> list[SweepFolder]:
    """Every sweep under the root, by name."""
    folder = root() / "sweeps"
    names = sorted(path.parent.name for path in folder.glob("*/sweep.json")) if folder.is_dir() else []
    return [SweepFolder(name) for name in names]


def result_of(spec: SweepSpec, point: Point) -> float | None:
    """The figure that a sweep is about, of a run that has finished."""
    run = RunDirectory.named(point.run)
    finished = run.status().state == "finished"
    return last_figure(run, spec.metric_kind, spec.metric_field) if finished else None


def read_table(sweep: SweepFolder) -> SweepTable:
    """The table as the runs now are. A point whose name another run has is `refused`, without figures."""
    spec, notes = sweep.spec(), sweep.notes()
    axes, points = sweep.axes(), sweep.points()
    require_of(points, axes, sweep.points_file)
    keys = keys_of(axes)
    rows = []
    for point in {point.run: point for point in points}.values():
        run = RunDirectory.named(point.run)
        status = run.status()
        note = notes.get(point.run, "")
        refused = bool(note) and status.state in ("queued", "finished")
        row: dict[str, Any] = {"run": point.run, "state": "refused" if refused else status.state}
        row |= {"step": 0 if refused else status.step}
        row |= {keys[axis.field]: value for axis, value in zip(axes, point.values, strict=True)}
        for name, (kind, field) in COLUMNS.items():
            row[name] = None if refused else last_figure(run, kind, field)
        row["metric"] = None if refused else result_of(spec, point)
        row["note"] = note or ("" if status.state == "finished" else status.exit_reason)
        rows.append(row)
    sign = 1 if spec.lower_is_better else -1
    rows.sort(key=lambda row: (row["metric"] is None, sign * (row["metric"] or 0.0)))
    return SweepTable(spec, tuple(keys.values()), tuple(rows))


def settings_of(run: str) -> TrainConfig:
    file = RunDirectory.named(run).require().config_file
    return from_json(TrainConfig, file.read_bytes(), str(file))
