"""What a queued job waits for, as it is written: on the command line, in words, in the queue's file.

Whether a condition holds is `conditions_now`'s business; nothing is looked at here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from salt_vla.config import Criterion, parse_criterion
from salt_vla.config.checks import parse_bytes
from salt_vla.errors import ConfigError

Kind = Literal["after", "after_any", "after_cache", "at", "when_free", "if", "unless"]
RESOURCES = ("gpu", "ram", "disk")
STATISTICS = ("last", "min", "max", "mean_last100")
OF_A_JOB: tuple[Kind, ...] = ("after", "after_any", "if", "unless")
_IN = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_LATER = re.compile(r"\+(?P<number>\d+(?:\.\d+)?) ?(?P<unit>s|min|h|d)")
_FIGURE = re.compile(
    rf"(?:(?P<of>{'|'.join(STATISTICS)})\((?P<inner>[^()\s]+)\)|(?P<bare>[^()\s]+))\s*(?P<sign>>=|<=|<|>)(?P<rest>.*)"
)
_COLUMN = re.compile(r"(?P<run>.+)\.(?P<kind>[a-z]+)\.(?P<column>\w+)")


@dataclass(frozen=True)
class Condition:
    """One thing that must hold before a job starts. `text` is what was asked for: a job's or run's name, a
    folder, a time, an amount, a comparison. `job`: the queue's number of the job that is meant, 0 for a run
    that it does not know. `number`: seconds since the epoch (`at`) or bytes (`when_free`)."""

    kind: Kind
    text: str
    job: int = 0
    number: float = 0.0

    @property
    def run(self) -> str:
        """The name of the job or run that is waited for; empty where none is."""
        if self.kind in ("if", "unless"):
            return parse_figure(self.text).run
        return self.text if self.kind in OF_A_JOB else ""

    def __str__(self) -> str:
        """As one says it, after "waits for"."""
        in_words = {
            "after": f"{self.text} to end well",
            "after_any": f"{self.text} to end",
            "after_cache": f"the cache at {self.text} to be complete",
            "when_free": f"{self.text.partition(':')[2]} free of {self.text.partition(':')[0]}",
            "if": f"{self.text}, once it can be told",
            "unless": f"not {self.text}, once it can be told",
        }
        return in_words[self.kind] if self.kind != "at" else f"{in_clock(self.number)}"


@dataclass(frozen=True)
class Figure:
    """A run's figure against a number: `statistic` over the column's lines in `metrics.jsonl`."""

    run: str
    statistic: str
    criterion: Criterion


def parse_figure(text: str) -> Figure:
    """`e1.val.loss < 10.76`: the column's last line; `min(e1.train.loss) < 10.76`, and alike with `max`,
    `last` and `mean_last100`, which is over the last hundred lines. Raises `ConfigError`."""
    match = _FIGURE.fullmatch(text.strip())
    column = _COLUMN.fullmatch(match["inner"] or match["bare"]) if match else None
    if match is None or column is None:
        raise ConfigError(
            f"condition {text!r} does not read as RUN.KIND.COLUMN < NUMBER, such as 'e1.val.loss < 10.76', "
            f"or with one of {', '.join(STATISTICS)} around it, such as 'min(e1.train.loss) < 10.76'"
        )
    criterion = parse_criterion(f"{column['kind']}.{column['column']} {match['sign']} {match['rest']}")
    if criterion.of_parent:
        raise ConfigError(f"condition {text!r} needs a number: a queue knows no parent")
    return Figure(column["run"], match["of"] or "last", criterion)


def parse_time(text: str, now: float) -> float:
    """`2026-11-24 03:00` by this machine's clock, or `+2h` (`s`, `min`, `h`, `d`) from `now`; in seconds
    since the epoch. Raises `ConfigError`, also for what has passed."""
    later = _LATER.fullmatch(text.strip())
    try:
        if later is not None:
            at = now + float(later["number"]) * _IN[later["unit"]]
            datetime.fromtimestamp(at)  # Refuses what no clock will ever show.
            return at
        at = datetime.fromisoformat(text.strip()).timestamp()
    except (ValueError, OverflowError, OSError) as error:
        raise ConfigError(f"--at {text!r} is no time; write it as '2026-11-24 03:00' or +2h") from error
    if at < now:
        raise ConfigError(f"--at {text!r} has passed; leave it out to start as soon as may be")
    return at


def parse_free(text: str) -> Condition:
    """`gpu:20GB`, `ram:8GB`, `disk:50GB`. Raises `ConfigError`."""
    what, _, amount = text.partition(":")
    if what not in RESOURCES or not amount:
        raise ConfigError(f"--when-free {text!r} does not read as {' or '.join(RESOURCES)}:20GB")
    return Condition("when_free", f"{what}:{amount.strip()}", number=parse_bytes(amount))


def cache_condition(text: str) -> Condition:
    """The folder of a cache, which need not be there yet. Raises `ConfigError` for none."""
    if not text.strip():
        raise ConfigError("--after-cache '' names no folder; give that of a cache")
    return Condition("after_cache", str(Path(text).resolve()))


def figure_condition(kind: Literal["if", "unless"], text: str, number_of: Callable[[str], int]) -> Condition:
    figure = parse_figure(text)
    return Condition(kind, " ".join(text.split()), job=number_of(figure.run))


def in_clock(seconds: float) -> str:
    """Seconds since the epoch as this machine's clock shows them, to the minute."""
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):  # A rate near zero expects an end that no clock shows.
        return "after the year 9999"
