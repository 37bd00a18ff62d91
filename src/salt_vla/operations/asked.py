"""Who asked a run or job to end, and how, noted in its folder: so that its end can be told, and so that what
was ended on purpose is not started again.
"""

from __future__ import annotations

import getpass
import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from salt_vla.errors import RunError
from salt_vla.identity import ProcessId
from salt_vla.rundir import read_json, write_text

ASKED = "asked.json"


@dataclass(frozen=True)
class Asked:
    """Holds for that launch alone (`token`; empty without one) and, where it has one, for that process.
    `time`: seconds since the epoch."""

    how: Literal["stop", "kill"]
    by: str
    time: float
    token: str = ""
    process: ProcessId | None = None

    @property
    def words(self) -> str:
        """Such as "by `salt-vla runs stop`, user ada"."""
        return f"by `salt-vla runs {self.how}`, {self.by}"


def ask(folder: Path, how: Literal["stop", "kill"], token: str, process: ProcessId | None) -> None:
    """Note it, before anything is done about it."""
    asked = Asked(how, f"user {_user()}", round(time.time(), 3), token, process)
    write_text(folder / ASKED, json.dumps(asdict(asked), indent=2))


def _user() -> str:
    with suppress(KeyError, OSError):  # What Python raises for a number without a name.
        return getpass.getuser()
    return "unknown"


def asked_of(folder: Path, token: str = "", process: ProcessId | None = None) -> Asked | None:
    """What was asked of that launch, or else of that process; None for nothing, or of others."""
    file = folder / ASKED
    with suppress(FileNotFoundError, NotADirectoryError, RunError, TypeError):
        held = read_json(file, dict)
        named = held["process"]
        asked = Asked(**held | {"process": ProcessId(**named) if named else None})
        is_meant = asked.token == token if token else process is not None and asked.process == process
        return asked if is_meant else None
    return None
