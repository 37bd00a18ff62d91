"""What a tracker is, which there are, and whether they are installed. Imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Protocol

from salt_vla.errors import ConfigError
from salt_vla.rundir import RunDirectory, Status

Row = Mapping[str, Any]
PROJECT = "salt-vla"


class Tracker(Protocol):
    """One run in one tracker, opened; its methods may block and may raise whatever they like.

    `destination` names where the rows go, without secrets: what another one holds is not held here. `keeps`:
    rows are safe when `send` returns, not only when `close` does.
    """

    destination: str
    keeps: bool

    def held(self) -> int | None:
        """How many of the rows it was ever sent are there, the first ones; None where it cannot tell."""

    def send(self, rows: Sequence[tuple[int, Row]]) -> None:
        """Each with its number, which counts all rows that were ever sent there, those twice too."""

    def rewind(self, step: int) -> None:
        """The run was set back: rows of `step` and later come again, with other figures."""

    def close(self, status: Status) -> None:
        """How the run ended for now; everything is there when this returns."""


@dataclass(frozen=True)
class Opening:
    """What a tracker is opened with: `identifier` stays the same as long as the run lives."""

    run: RunDirectory
    identifier: str
    config: dict[str, Any]
    is_continued: bool


@dataclass(frozen=True)
class Entry:
    """How a tracker is found: its factory as "module:function", the package it needs, how to install that."""

    factory: str
    package: str
    install: str = "pip install 'salt-vla[track]'"
    about: str = field(default="", compare=False)

    def open(self, opening: Opening) -> Tracker:
        module, _, function = self.factory.partition(":")
        make: Callable[[Opening], Tracker] = getattr(importlib.import_module(module), function)
        return make(opening)


TRACKERS: dict[str, Entry] = {
    "tensorboard": Entry(
        "salt_vla.operations.trackers.tensorboard:TensorBoard", "tensorboard", about="files in the run"
    ),
    # Of its own, as it asks for an older Pillow than the one that everything is tested with.
    "trackio": Entry(
        "salt_vla.operations.trackers.trackio:Trackio",
        "trackio",
        "pip install 'salt-vla[trackio]'",
        "a local database, a Space or an own server",
    ),
    "wandb": Entry("salt_vla.operations.trackers.wandb:Wandb", "wandb", about="wandb's servers, or offline"),
}


def require_trackers(names: Iterable[str]) -> None:
    """Raises `ConfigError` for a name that is no tracker's, or one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"there is no tracker {name!r}; trackers: {', '.join(TRACKERS)}")
        entry = TRACKERS[name]
        if find_spec(entry.package) is None:
            raise ConfigError(f"the tracker {name} is not installed; install it with: {entry.install}")


def flat(row: Row) -> dict[str, Any]:
    """The row's figures as trackers name them: "train/loss"; what was no number (null) is left out."""
    kind = row["kind"]
    return {
        f"{kind}/{name}": value
        for name, value in row.items()
        if name not in ("kind", "step") and value is not None
    }
