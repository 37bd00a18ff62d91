"""A sweep's folder, `sweeps/NAME/`, and its one table: what differs, how far each run is, what it reached.

Figures are read from the runs every time; `results.json` and `results.md` are copies for others. Knows
nothing of how runs are made.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from salt_vla.config import TrainConfig, from_json, to_json
from salt_vla.errors import RunError
from salt_vla.jobs.sweep_points import Point
from salt_vla.jobs.sweep_spec import SweepSpec, keys_of, read_assignments
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, read_json, require_name, root, write_text
from salt_vla.verdicts import last_figure

COLUMNS = {
    "val_loss": ("val", "loss"),
    "r2_channel_mean": ("val", "r2_channel_mean"),
    "r2_position_mean": ("val", "r2_position_mean"),
    "r2_copy_nearest": ("val", "r2_copy_nearest"),
}


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

    def exists(self) -> bool:
        return self.spec_file.is_file()

    def spec(self) -> SweepSpec:
        if not self.exists():
            raise RunError(f"there is no sweep at {self.path}; `salt-vla sweep ls` lists the sweeps")
        return from_json(SweepSpec, self.spec_file.read_bytes(), str(self.spec_file))

    def keep_spec(self, spec: SweepSpec) -> None:
        """Write it down, or refuse another one under the same name; only `trials` may grow."""
        if not self.exists():
            write_text(self.spec_file, to_json(spec))
            return
        before = asdict(self.spec())
        now = asdict(spec)
        differing = [name for name in now if now[name] != before[name]]
        if differing == ["trials"] and spec.trials > before["trials"] and spec.method != "grid":
            write_text(self.spec_file, to_json(spec))
        elif differing:
            said = "; ".join(f"{name}: {before[name]!r}, not {now[name]!r}" for name in differing)
            raise RunError(
                f"sweep {self.name!r} was started otherwise ({said}); give this one another --name"
            )

    def points(self) -> list[Point]:
        if not self.points_file.is_file():
            return []
        return [Point(tuple(row["values"]), row["run"]) for row in read_json(self.points_file, list)]

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
    axes, _ = read_assignments(spec, get_recipe(spec.recipe).config)
    keys = keys_of(axes)
    rows = []
    for point in {point.run: point for point in sweep.points()}.values():
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
