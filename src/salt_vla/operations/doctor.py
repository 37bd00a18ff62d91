"""Is this machine, and what lies on it, fit for a night of training: a check is a function, a finding a line
with its cure as a command. A check that fails itself is a finding too, and hides none of the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "refuse"]
Check = Callable[[], Iterable["Finding"]]


@dataclass(frozen=True)
class Finding:
    """`refuse`: no work worth the name can be done; `warn`: some work will fail or be slow. `cure` is a
    command where there is one."""

    check: str
    verdict: Verdict
    what: str
    cure: str = ""


# In the order in which they are told: name → "module:function".
CHECKS: dict[str, str] = {
    "python": "salt_vla.operations.doctor_programs:python",
    "torch": "salt_vla.operations.doctor_programs:torch",
    "decoders": "salt_vla.operations.doctor_programs:decoders",
    "ffmpeg": "salt_vla.operations.doctor_programs:ffmpeg",
    "extras": "salt_vla.operations.doctor_programs:extras",
    "terminal": "salt_vla.operations.doctor_programs:terminal",
    "cores": "salt_vla.operations.doctor_machine:cores",
    "memory": "salt_vla.operations.doctor_machine:memory",
    "/dev/shm": "salt_vla.operations.doctor_machine:shared_memory",
    "limits": "salt_vla.operations.doctor_machine:limits",
    "disk": "salt_vla.operations.doctor_machine:disk",
    "clock": "salt_vla.operations.doctor_machine:clock",
    "logout": "salt_vla.operations.doctor_machine:logout",
    "runs": "salt_vla.operations.doctor_work:runs",
    "trackers": "salt_vla.operations.doctor_work:trackers",
    "caches": "salt_vla.operations.doctor_work:caches",
    "queue": "salt_vla.operations.doctor_work:queue",
}


def examine(checks: dict[str, str] = CHECKS) -> Iterator[Finding]:
    """Every finding, as it comes. Nothing that was there is changed."""
    for name, place in checks.items():
        module, _, function = place.partition(":")
        try:
            check: Check = getattr(importlib.import_module(module), function)
            yield from check()
        except Exception as error:  # noqa: BLE001 - whatever is broken here, the others are still asked.
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            yield Finding(name, "warn", f"could not be checked: {said}")
