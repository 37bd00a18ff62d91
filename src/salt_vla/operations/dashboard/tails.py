"""Ends of text files and of histories, for a page: never more than fits on one, whatever is in them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

BYTES = 64 * 1024
LINES = 400
# What moves a terminal's cursor or colours its text; of a line drawn over and over, the last drawing counts.
_ESCAPES = re.compile(
    r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07\x1b]*(\x07|\x1b\\)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)


def tail(file: Path, lines: int = LINES) -> str:
    """The last lines of a text file; empty where there is none."""
    try:
        with file.open("rb") as text:
            size = text.seek(0, os.SEEK_END)
            text.seek(max(0, size - BYTES))
            read = text.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}"
    whole = read.decode(errors="replace").replace("\r\n", "\n").split("\n")
    kept = whole[1:] if size > BYTES else whole
    return "\n".join(_ESCAPES.sub("", line.rsplit("\r", 1)[-1]) for line in kept[-lines:])


def last_events(file: Path, count: int = 100) -> list[dict[str, Any]]:
    """The last lines of a history, the newest first; what is no event is left out."""
    events = []
    for line in tail(file).splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict):
            events.append(event)
    return events[-count:][::-1]
