"""Files that appear only whole, and refusals of the operating system as sentences.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil

from salt_vla.errors import ResourceError, RunError

T = TypeVar("T")


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals into a sentence that names the place and the cure."""
    try:
        yield
    except PermissionError as error:
        raise ResourceError(
            f"cannot write {_named(error, path)}: permission denied; choose another folder"
        ) from error
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ResourceError(
            f"cannot write {_named(error, path)}: {reason}; make space or choose another folder"
        ) from error


def _named(error: OSError, path: Path) -> str | Path:
    """The place that the system names, unless it is a temporary file, which nobody asked for."""
    said = str(error.filename or path)
    return path if said.endswith(".part") else said


def require_place(path: Path) -> None:
    """Refuse to write a file where a folder, a device or a pipe is: a rename would take its place."""
    folder = os.path.realpath(path.parent)
    if path.is_dir():
        raise ResourceError(f"cannot write {path}: it is a folder; give the name of a file in it")
    is_device = folder == "/dev" or f"{folder}/".startswith("/proc/")  # Their links may lead to files.
    if is_device or (path.exists() and not path.is_file()):
        raise ResourceError(f"cannot write {path}: it is a device or a pipe; give the name of a file")


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk and rename it into place."""
    with writing_to(path):
        require_place(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}.{os.getpid()}-"
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".part")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            flush_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def is_in_work(part: Path) -> bool:
    """Whether the process lives that writes this file, one of `write_atomically`."""
    writer = re.search(r"\.(\d{1,9})-[^.]*\.part\Z", part.name)
    return writer is not None and psutil.pid_exists(int(writer[1]))


def remove_left_parts(folder: Path) -> None:
    """What killed writers left of their files in `folder`; a living one's stays."""
    for part in folder.glob(".*.part"):
        if not is_in_work(part):
            part.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Only then does a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some network file systems flush no folders.
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: void(temporary.write_text(text)))


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: void(temporary.write_bytes(content)))


def void(_: object) -> None:
    """Drop a value, for callbacks that must return None."""


def _finite(value: Any) -> Any:
    """JSON has no NaN: what was not a number is written as null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json_line(row: dict[str, Any]) -> str:
    return json.dumps({key: _finite(value) for key, value in row.items()}, allow_nan=False)


def read_json(path: Path, kind: type[T], cure: str = "remove it and run the same command again") -> T:
    """A JSON file that holds a `kind` (dict or list); a damaged one is a sentence with its cure."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged ({error}); {cure}") from error
    if not isinstance(value, kind):
        raise RunError(f"{path} is damaged (no {kind.__name__}); {cure}")
    return value
