"""`cache ls` and `cache prune`: which caches lie under the root, who uses them, and what killed builds left.

Removes only files that a cache is made of, never a folder's other content.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from salt_vla.cache.format import (
    INDEX,
    INDEX_PAGES,
    LEASES,
    MANIFEST,
    PROBE,
    QUARANTINE,
    SHARDS,
    Manifest,
    is_in_pieces,
    is_of_others,
    manifests_below,
)
from salt_vla.cache.leases import living
from salt_vla.cache.shards import MAGIC
from salt_vla.config import TrainConfig, from_json
from salt_vla.data.view_lock import view_hash
from salt_vla.errors import CacheError, ConfigError, RunError
from salt_vla.rundir import RunDirectory, all_runs, read_json, root, writing_to

DEEPEST = 3  # folders below caches/ that are looked into: caches/NAME/SPLIT, and one more
CACHE_PIN = "cache_provenance.json"
FILES = (INDEX, INDEX_PAGES, QUARANTINE, PROBE)  # the index first: without it nobody reads what is going
PARTS = (*(f".{name}.*.part" for name in (*FILES, MANIFEST)), f"{SHARDS}/.[0-9]*.bin.*.part")
SHARD = re.compile(r"[0-9]{6,}\.bin")
# What a run has left whose config.json is lost.
OF_RUNS = ("checkpoints", "status.json", "metrics.jsonl", CACHE_PIN)


@dataclass(frozen=True)
class FoundCache:
    """A cache on disk. `used_by`: runs that learn from it; `builders`: processes that are at work in it;
    `leftovers`: what killed ones left; `problem`: why its manifest cannot be read, empty where it can."""

    path: Path
    kind: str
    teacher: str
    split: str
    records: int
    bytes: int
    complete: bool
    used_by: tuple[str, ...]
    builders: tuple[str, ...]
    leftovers: tuple[Path, ...]
    problem: str = ""

    @property
    def state(self) -> str:
        if self.builders:
            return f"being built by {self.builders[0]}"
        return "damaged" if self.problem else "complete" if self.complete else "unfinished"

    @property
    def is_unused(self) -> bool:
        return not self.used_by and not self.builders and not self.problem

    def to_json(self) -> dict[str, Any]:
        said = asdict(self) | {"path": str(self.path), "unused": self.is_unused}
        return said | {"leftovers": [str(path) for path in self.leftovers]}


@dataclass(frozen=True)
class Pruning:
    """What is to go: leftovers of killed builds, and whole caches; and how much they take."""

    leftovers: tuple[Path, ...]
    caches: tuple[FoundCache, ...]
    bytes: int

    def carry_out(self) -> None:
        """Remove it all. Looks again whether somebody has begun to build there in the meantime."""
        for path in self.leftovers:
            if not living(_cache_of(path) / LEASES):
                _remove(path)
        # Those that lie in another's folder first, so that it is empty when its turn comes.
        for cache in sorted(self.caches, key=lambda cache: len(cache.path.parts), reverse=True):
            if builders := living(cache.path / LEASES):
                raise CacheError(f"{cache.path} is being built by {builders[0]}; wait for it")
            remove_cache(cache.path)


def find_caches() -> list[FoundCache]:
    """Every cache under the root's `caches/`, by path."""
    users = _users()
    return [_found(path, users) for path in manifests_below(root() / "caches", DEEPEST) if _is_cache(path)]


def plan_pruning(found: Sequence[FoundCache], paths: Sequence[Path], unused: bool) -> Pruning:
    """What `prune` would remove: leftovers wherever nobody is building, the caches at `paths`, and with
    `unused` those that no run uses.

    Raises `CacheError` for a path that is no cache or is being built, and `RunError` when it is not known
    what all runs use.
    """
    chosen = {cache.path: cache for cache in found if unused and cache.is_unused}
    if chosen:
        _require_known_runs()
    users = _users()
    for path in paths:
        where = path.resolve()
        if not _is_cache(where):
            raise CacheError(
                f"{path} is no cache ({MANIFEST} is missing, or no cache's), so it is left alone; remove it "
                "by hand"
            )
        cache = _found(where, users)
        if cache.builders:
            raise CacheError(f"{path} is being built by {cache.builders[0]}; wait for it, or stop it first")
        chosen[where] = cache
    leftovers = [
        path for cache in found if cache.path not in chosen and not cache.builders for path in cache.leftovers
    ]
    size = sum(map(_size, leftovers)) + sum(cache.bytes for cache in chosen.values())
    return Pruning(tuple(leftovers), tuple(chosen.values()), size)


def remove_cache(folder: Path) -> None:
    """Remove the files of a cache, the manifest last; the folder too, if nothing else lies in it."""
    with writing_to(folder):
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        for path in [*_shards(folder), *(p for part in PARTS for p in folder.glob(part))]:
            path.unlink(missing_ok=True)
        _remove(folder / LEASES)
        if (folder / SHARDS).is_dir() and not any((folder / SHARDS).iterdir()):
            (folder / SHARDS).rmdir()
        (folder / MANIFEST).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _shards(folder: Path) -> list[Path]:
    """Files that are called as shards are, and those that are one under another name."""
    found = sorted((folder / SHARDS).glob("*.bin"))
    return [path for path in found if SHARD.fullmatch(path.name) or _ends_as_shards_do(path)]


def _is_cache(folder: Path) -> bool:
    """Whether the manifest here is a cache's, of whatever version; `manifest.json` is a common name. Where it
    is in pieces, whether there is a shard of ours."""
    if is_in_pieces(folder):
        return any(_ends_as_shards_do(shard) for shard in _shards(folder))
    return (folder / MANIFEST).is_file() and not is_of_others(folder)


def _ends_as_shards_do(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size < len(MAGIC):
        return False
    with path.open("rb") as file:
        file.seek(-len(MAGIC), os.SEEK_END)
        return file.read() == MAGIC


def _remove(path: Path) -> None:
    with writing_to(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _cache_of(leftover: Path) -> Path:
    return leftover.parent.parent if leftover.parent.name == SHARDS else leftover.parent


@dataclass(frozen=True)
class _User:
    """What a run says of the caches that it needs."""

    name: str
    source: Path | None
    provenance: dict[str, Any] | None
    view_hash: str


def _require_known_runs() -> None:
    """Raises `RunError` where runs may be out of sight, so that what they use would pass for unused."""
    runs = root() / "runs"
    if not all_runs():
        raise RunError(
            f"there is no run in {runs}, so no cache is used; mount that folder if it lies elsewhere, or "
            "name the caches that shall go"
        )
    for path in sorted(runs.iterdir()):
        is_away = path.is_symlink() and not path.exists()
        is_run = any((path / name).exists() for name in OF_RUNS)
        run = RunDirectory(path)
        if is_away or (is_run and not run.config_file.is_file() and not _never_began(run)):
            raise RunError(
                f"{path} is a run without a config.json, so nobody knows which caches it needs: mend or "
                "remove it"
            )


def _never_began(run: RunDirectory) -> bool:
    """Whether it ended before it had settings, so that it uses nothing."""
    status = run.status()
    has_worked = any((run.path / name).exists() for name in OF_RUNS if name != "status.json")
    return status.state in ("failed", "killed", "stopped") and status.step == 0 and not has_worked


def _users() -> list[_User]:
    return [_user(run) for run in all_runs() if run.config_file.is_file()]


def _user(run: RunDirectory) -> _User:
    """Raises `RunError` for a damaged run: what it needs is then unknown, and nothing may go."""
    try:
        config = from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))
    except ConfigError as error:
        raise RunError(f"{error}; so nobody knows which caches the run needs: mend or remove it") from error
    pin = run.path / CACHE_PIN
    source = config.target.source if config.target.provider == "cache" else ""
    return _User(
        run.name,
        (root() / source).resolve() if source else None,
        read_json(pin, dict) if pin.exists() else None,
        view_hash(config.data.view, config.geometry) if config.data.store_views else "",
    )


def _found(path: Path, users: Iterable[_User]) -> FoundCache:
    leftovers = [found for pattern in PARTS for found in sorted(path.glob(pattern))]
    builders = tuple(living(path / LEASES))
    if not builders and (path / LEASES).is_dir():
        leftovers.append(path / LEASES)
    size, about = _size(path), (builders, tuple(leftovers))
    try:
        manifest = Manifest.read(path)
    except CacheError as error:
        return FoundCache(path, "?", "?", "?", 0, size, False, (), *about, problem=str(error))
    provenance = manifest.provenance
    return FoundCache(
        path,
        manifest.kind,
        str(provenance["teacher"]) if "teacher" in provenance else "",
        str(provenance["split"]) if "split" in provenance else "",
        manifest.num_records,
        size,
        manifest.complete,
        tuple(user.name for user in users if _uses(user, path, manifest)),
        *about,
    )


def _uses(user: _User, path: Path, manifest: Manifest) -> bool:
    """By its place, by what the run wrote down of the cache that it began with, or by the views it reads.

    A run that keeps decoded views needs any store of its views: which clips it took of it, it does not say.
    """
    said = json.loads(json.dumps(manifest.provenance))
    if manifest.kind == "views":
        return bool(user.view_hash) and said.get("view_hash") == user.view_hash
    where = path.resolve()
    if user.source in (where, where.parent) or user.provenance is None:
        return user.source in (where, where.parent)
    # A run writes down its training cache; held-out latents of the same teacher and views may be its own.
    may_differ = () if said.get("split") == "train" else ("split", "clip_table", "files", "batch_size")
    return all(user.provenance.get(name) == value for name, value in said.items() if name not in may_differ)


def _size(path: Path) -> int:
    """Bytes that a file or folder takes on disk: holes take none. Further caches below are not counted."""
    if not path.is_dir():
        return path.lstat().st_blocks * 512 if path.exists() else 0
    total = 0
    for place, folders, files in os.walk(path):
        here = Path(place)
        folders[:] = [name for name in folders if not (here / name / MANIFEST).is_file()]
        total += sum((here / name).lstat().st_blocks * 512 for name in files)
    return total
