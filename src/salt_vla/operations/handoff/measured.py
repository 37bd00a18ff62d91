"""What a run's metrics come to: lowest and last loss, held-out R², trend, alarms. It is kept, so that the
page reads again only metrics that have changed; without that file it reads all of them.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from salt_vla.errors import UserError
from salt_vla.operations.curves import Follower, Row, points
from salt_vla.operations.handoff.trends import Trend, trend
from salt_vla.rundir import RunDirectory, read_json, write_text

FILE, VERSION = ".handoff.json", 2
R2 = ("r2_position_mean", "r2_channel_mean", "r2_copy_nearest")
WAITS_TOO_LONG = 0.2  # share of a run's time


@dataclass(frozen=True)
class Measured:
    """`last_loss`: the mean of the last tenth of the lines of kind train, at most 100. `r2`: of the last
    held-out line. `last_lr`: the rate of the last line."""

    min_loss: float | None = None
    min_step: int = 0
    last_loss: float | None = None
    last_lr: float | None = None
    r2: dict[str, float] = field(default_factory=dict)
    trend: Trend | None = None
    alarms: tuple[str, ...] = ()


def measured(rows: list[Row]) -> Measured:
    steps, losses = points(rows, "train", "loss")
    _, rates = points(rows, "train", "lr")
    r2 = {name: values[-1] for name in R2 if (values := points(rows, "val", name)[1])}
    alarms, last_lr = tuple(_alarms(rows)), rates[-1] if rates else None
    if not losses:
        return Measured(r2=r2, alarms=alarms, last_lr=last_lr)
    lowest = losses.index(min(losses))
    tail = losses[-min(100, max(1, len(losses) // 10)) :]
    found = trend([int(step) for step in steps], losses)
    last_loss = sum(tail) / len(tail)
    return Measured(losses[lowest], int(steps[lowest]), last_loss, last_lr, r2, found, alarms)


def _alarms(rows: list[Row]) -> list[str]:
    collapsed = [row["step"] for row in rows if row.get("collapse") is True]
    said = []
    if collapsed:
        said.append(f"the collapse alarm rang {len(collapsed)} times, first at step {collapsed[0]}")
    for column, what in (("bad_steps", "bad steps were left out"), ("rollbacks", "returns to a checkpoint")):
        counts = points(rows, "train", column)[1]
        if counts and counts[-1]:
            said.append(f"{int(counts[-1])} {what}")
    damaged = [value for kind in ("train", "val") for value in points(rows, kind, "corrupt_records")[1]]
    if max(damaged, default=0):
        said.append(f"{int(max(damaged))} damaged records were met")
    waits = points(rows, "train", "data_wait_share")[1]
    if waits and sum(waits) / len(waits) > WAITS_TOO_LONG:
        said.append(f"{sum(waits) / len(waits):.0%} of its time was spent waiting for data")
    return said


class Kept:
    """What was read before, and what is read now."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self.before: dict[str, Any] = {}
        self.now: dict[str, Any] = {}
        with suppress(UserError, OSError):
            held = read_json(self.file, dict)
            if held.get("version") == VERSION and isinstance(held.get("runs"), dict):
                self.before = held["runs"]

    def of(self, run: RunDirectory) -> Measured:
        """Raises `OSError` for metrics that cannot be read."""
        signature = _signature(run.metrics_file)
        held = self.before.get(run.name)
        found = _read(held, signature)
        if found is None:
            follower = Follower(run.metrics_file)
            follower.poll()
            found = measured(follower.rows)
        self.now[run.name] = asdict(found) | {"signature": signature}
        return found

    def keep(self) -> None:
        """Write down what is new; where that cannot be, it is read again next time."""
        if self.now != self.before and self.file.parent.is_dir():
            with suppress(UserError):
                write_text(self.file, json.dumps({"version": VERSION, "runs": self.now}))


def _signature(file: Path) -> str:
    try:
        about = file.stat()
    except OSError:
        return ""
    return f"{about.st_ino}:{about.st_size}:{about.st_mtime_ns}"


def _read(held: Any, signature: str) -> Measured | None:
    """What is kept of metrics that are the very same; None where they are not, or it is damaged."""
    if not isinstance(held, dict) or held.get("signature") != signature:
        return None
    fields = {name: value for name, value in held.items() if name != "signature"}
    try:
        found = Trend(**fields["trend"]) if fields["trend"] else None
        return Measured(**fields | {"trend": found, "alarms": tuple(fields["alarms"])})
    except (TypeError, KeyError):
        return None
