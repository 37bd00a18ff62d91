"""What lies around the runs of a project: the machine, the data and caches in use, the queue.

Says nothing that tells one machine from another of its kind: no host name, no user, no variables.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from salt_vla.cache import Manifest
from salt_vla.cache.format import manifests_below
from salt_vla.errors import UserError
from salt_vla.operations.handoff.commands import near
from salt_vla.operations.handoff.facts import RunFacts
from salt_vla.rundir import root

DEEPEST = 3
_GPUS = Path("/proc/driver/nvidia/gpus")
_CPU = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class CacheFacts:
    """A cache below the root, as it is named from there. `used_by`: runs of this page; `problem`: why its
    manifest cannot be read."""

    path: str
    kind: str = ""
    teacher: str = ""
    fingerprint: str = ""
    split: str = ""
    clips: int = 0
    views: int = 0
    quarantined: int = 0
    complete: bool = False
    geometry: tuple[int, ...] = ()
    used_by: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class TableFacts:
    """What runs learn from: a clip table with its number of clips (0: unknown), and the runs that use it."""

    table: str
    clips: int
    used_by: tuple[str, ...]


def machine() -> list[tuple[str, str]]:
    """(what, how much) of this machine."""
    # A new project has no folder yet.
    place = next(place for place in (root(), *root().parents) if place.exists())
    memory, disk = psutil.virtual_memory().total, shutil.disk_usage(place)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        ("processor", f"{_processor()}, {cores} cores"),
        ("memory", f"{memory / 1e9:.0f} GB"),
        ("GPU", ", ".join(_gpus()) or "none"),
        ("disk", f"{disk.free / 1e9:.0f} of {disk.total / 1e9:.0f} GB free"),
        ("system", f"{platform.system()}, Python {platform.python_version()}"),
    ]


def _processor() -> str:
    said = _CPU.read_text(errors="replace") if _CPU.is_file() else ""
    found = re.search(r"^model name\s*: (.+)$", said, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _gpus() -> Iterator[str]:
    """As the driver's folder in /proc names them."""
    for file in sorted(_GPUS.glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", file.read_text(errors="replace"), re.MULTILINE)
        yield found[1].strip() if found else "unknown"


def caches(runs: Sequence[RunFacts]) -> list[CacheFacts]:
    """Every cache of latents below the root's `caches/`, by path; stores of decoded views are left out."""
    place = root() / "caches"
    latents = (
        folder
        for folder in manifests_below(place, DEEPEST)
        if not any(part.startswith("views-") for part in folder.relative_to(place).parts)
    )
    found = [_cache(folder, runs) for folder in latents]
    return [cache for cache in found if cache.kind != "views"]


def _cache(folder: Path, runs: Sequence[RunFacts]) -> CacheFacts:
    name = near(str(folder))
    users = tuple(run.name for run in runs if run.config and near(run.config.target.source) == name)
    try:
        manifest = Manifest.read(folder)
    except UserError as error:
        return CacheFacts(name, used_by=users, problem=str(error))
    said = manifest.provenance
    geometry = said.get("geometry")
    sizes = tuple(geometry.values()) if isinstance(geometry, dict) else ()
    return CacheFacts(
        name,
        manifest.kind,
        str(said.get("teacher") or "unknown"),
        str(said.get("fingerprint") or ""),
        str(said.get("split") or ""),
        manifest.num_clips,
        manifest.num_views,
        manifest.num_quarantined,
        manifest.complete,
        tuple(size for size in sizes if isinstance(size, int)),
        users,
    )


def tables(runs: Sequence[RunFacts]) -> list[TableFacts]:
    """The tables that runs learn from, the one with most runs first."""
    users: dict[str, list[str]] = {}
    for run in runs:
        if run.config is not None and run.config.data.table:
            users.setdefault(run.config.data.table, []).append(run.name)
    by_use = sorted(users, key=lambda table: (-len(users[table]), table))
    return [TableFacts(near(table), _num_clips(Path(table)), tuple(users[table])) for table in by_use]


def _num_clips(table: Path) -> int:
    if not table.is_file():
        return 0
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        return int(parquet.ParquetFile(table).metadata.num_rows)
    except (arrow.ArrowInvalid, OSError):
        return 0
