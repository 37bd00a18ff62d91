"""What the pages know of the runs: read anew where files have changed, once for all who look.

Knows run directories, not what a page looks like. Ten thousand runs cost two looks at the disk each.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salt_vla.errors import RunError
from salt_vla.operations.curves import Follower, Row
from salt_vla.operations.overview import UNSETTLED, Overview, glance, overview, overviews
from salt_vla.rundir import RunDirectory, root

OLDEST = 1.0  # Seconds: what was read since then is not read again; with 0 it always is.
SHARE = 0.1  # of a core, at most, that reading may take however many runs there are
FOLLOWED = 32  # files of metrics that are kept in memory
Mark = list[Any]  # What somebody has seen: whose counting, and how far.


@dataclass
class _Seen:
    """One run: how its files looked when it was read, and when its row last changed."""

    files: tuple[int, ...]
    overview: Overview
    row: dict[str, Any]
    changed: int


@dataclass
class Changes:
    """What somebody who had seen `mark` has to know: `all_rows` anew, or only those that are others now."""

    mark: Mark
    all_rows: list[dict[str, Any]] | None = None
    updates: list[dict[str, Any]] = field(default_factory=list)


class Live:
    """The runs below the root, for any number of pages at once. `oldest`: see `OLDEST`."""

    def __init__(self, oldest: float = OLDEST) -> None:
        self._oldest = oldest
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}
        self._followers: OrderedDict[str, Follower] = OrderedDict()
        self._counting = secrets.token_hex(4)  # Another one when runs come or go.
        self._count = 0
        self._next_look = 0.0

    def overviews(self) -> dict[str, Overview]:
        """Of every run, by name."""
        with self._lock:
            self._look()
            return {name: seen.overview for name, seen in self._seen.items()}

    def changes(self, mark: Mark | None) -> Changes:
        """Since `mark`; None: everything."""
        with self._lock:
            self._look()
            now = [self._counting, self._count]
            if not mark or mark[0] != self._counting:
                return Changes(now, [seen.row for seen in self._seen.values()])
            return Changes(now, None, [s.row for s in self._seen.values() if s.changed > mark[1]])

    def overview(self, run: RunDirectory) -> Overview:
        """Of one run, as it is at this moment."""
        return overview(run, self.metrics(run))

    def stamp(self, run: RunDirectory) -> list[int]:
        """Another one whenever something in the run's directory has changed, its process' end included."""
        seen = self.overviews().get(run.name)
        works = int(seen is not None and seen.state in UNSETTLED)
        return [*_looks(run.path), *_looks_at(run.log_file), *_looks_at(run.pictures), works]

    def stamps(self, names: Sequence[str]) -> list[list[int]]:
        """Of several runs; names that are no run's are left out."""
        there = self.overviews()
        return [self.stamp(RunDirectory.named(name)) for name in names if name in there]

    def metrics(self, run: RunDirectory) -> list[Row]:
        """All rows of the run's metrics."""
        with self._lock:
            key = str(run.metrics_file)
            follower = self._followers.pop(key, None) or Follower(run.metrics_file)
            self._followers[key] = follower
            if len(self._followers) > FOLLOWED:
                self._followers.popitem(last=False)
            follower.poll()
            return list(follower.rows)

    def _look(self) -> None:
        began = time.monotonic()
        if began < self._next_look:
            return
        self._count += 1
        now = _folders()
        first = {} if self._seen else {each.name: each for each in overviews()}
        seen = {}
        for name, files in now.items():
            before = self._seen.get(name)
            # A process that ends without a word changes no file.
            if before is None or before.files != files or before.overview.state in UNSETTLED:
                run = _run(name)
                if run is None:
                    continue
                seen_now = first.get(name) or glance(run)
                row = row_of(seen_now)
                changed = before.changed if before is not None and before.row == row else self._count
                before = _Seen(files, seen_now, row, changed)
            seen[name] = before
        if seen.keys() != self._seen.keys():
            self._counting = secrets.token_hex(4)
        self._seen = seen
        ended = time.monotonic()
        self._next_look = ended + max(self._oldest, (ended - began) / SHARE * bool(self._oldest))


def _run(name: str) -> RunDirectory | None:
    try:
        run = RunDirectory.named(name)
    except RunError:  # Something else that lies there.
        return None
    return run if run.exists() else None


def _folders() -> dict[str, tuple[int, ...]]:
    """How the files look of all that may be runs, by name. Strings, not paths: of ten thousand."""
    runs = f"{root()}/runs"
    try:
        names = sorted(entry.name for entry in os.scandir(runs) if not entry.name.startswith("."))
    except OSError:
        return {}
    return {name: _looks(f"{runs}/{name}") for name in names}


def _looks(run: str | Path) -> tuple[int, ...]:
    """Files that appear whole change their folder; metrics alone grow."""
    return (*_looks_at(str(run)), *_looks_at(f"{run}/metrics.jsonl"))


def _looks_at(path: str | Path) -> tuple[int, int]:
    try:
        about = os.stat(path)  # noqa: PTH116
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


def row_of(run: Overview) -> dict[str, Any]:
    """A line of the table of runs: plain values alone, for a browser to sort and filter."""
    return {
        "name": run.name,
        "state": run.state,
        "step": run.step,
        "steps": f"{run.step:,} of {run.total_steps:,}" if run.total_steps else f"{run.step:,}",
        "share": round(run.share, 4),
        "eta": run.eta_seconds,
        "loss": run.figure("train", "loss"),
        "val_loss": run.figure("val", "loss"),
        "r2": run.figure("val", "r2_position_mean"),
        "clips_per_s": run.clips_per_s,
        "recipe": str(run.recipe.get("name") or ""),
        "verdict": str(run.verdict.get("verdict") or ""),
        "reason": run.status.exit_reason,
        "warnings": "; ".join(run.warnings),
        "updated": run.updated or None,
    }
