"""`cache import`: latents that another program left as one file a clip become a cache of ours.

What the user states and what nobody knows are written into the manifest, apart from each other.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import xxhash

from salt_vla.cache import CacheWriter, Key, Manifest, Record
from salt_vla.cache.foreign import IDS, ForeignFolder, Names, clean, look_into, pair
from salt_vla.cache.foreign_file import read_latents
from salt_vla.cache.format import EncodingName
from salt_vla.cache.ledger import Contents
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import view_hash, view_settings
from salt_vla.errors import CacheError, ConfigError
from salt_vla.evaluation.teacher_findings import claim_in
from salt_vla.geometry import ClipGeometry
from salt_vla.interrupts import stop_on_signals
from salt_vla.jobs.build_cache import RECORDS_PER_SHARD, split_folder
from salt_vla.jobs.cache_checks import int8_cost_of
from salt_vla.jobs.data_index import MAX_BAD_SHARE
from salt_vla.jobs.import_compare import Clips, teacher_r2
from salt_vla.jobs.resources import require_disk
from salt_vla.jobs.unread_views import refuse_too_many_bad
from salt_vla.progress import progress

LOOKED_AT = 16  # files, to learn the latents' shape
SAID = ("model", "teacher", "teacher_name", "model_name")  # what metadata.json may call the teacher
COUNTS = ("num_samples", "num_clips", "num_files", "count")  # what it may say of their number
MOST_SAID = 32  # of metadata.json's single values that are kept
NEVER_KNOWN = ("fingerprint", "dtype", "batch_size")
MISSING = "there is no file of it"
UNREADABLE = "it could not be read when the latents were made, as was stated at their import"


@dataclass(frozen=True)
class Stated:
    """What the user says of latents that do not say it themselves; None where nobody knows.

    `table` may hold further splits. `view` and `geometry` come together: which pixels the
    teacher saw, as a recipe has them.
    """

    split: str | None = None
    table: ClipTable | None = None
    view: ViewConfig | None = None
    geometry: ClipGeometry | None = None
    teacher: str | None = None
    layer: int | None = None


@dataclass(frozen=True)
class Imported:
    """The finished cache; its manifest; how many of the folder's files are of none of its clips; and what
    deserves a second look."""

    folder: Path
    manifest: Manifest
    left_out: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Plan:
    """Clip → its name in the folder, for all clips of the cache; a clip without a file has none.

    `unreadable`: clips that were stated to be so.
    """

    clip_ids: list[str]
    name_of: Mapping[str, str]
    left_out: int = 0
    unreadable: frozenset[str] = frozenset()


def import_latents(
    source: Path,
    out: Path,
    stated: Stated,
    names: Names = "check",
    unreadable: Sequence[str] = (),
    encoding: EncodingName = "float16",
    compare: str | None = None,
) -> Imported:
    """Bring the folder's latents into a cache at `out`; the same call goes on where one was interrupted.

    `names` and `unreadable` say whose a file is: see `cache.foreign.pair`. Files that cannot be read, hold
    NaN, or are of another shape are quarantined. `compare` names a teacher whose latents they must be. Raises
    `CacheError` when too many are bad, when clips and files do not fit, or when they are not the teacher's.
    """
    if stated.teacher is not None and clean(stated.teacher) != stated.teacher:
        raise ConfigError(f"--teacher-name {stated.teacher!a} cannot be printed; give another name")
    found = look_into(_of_split(source, stated.split))
    split = _split(found, stated)
    folder = split_folder(out, split)
    if stated.table is not None:
        stated = replace(stated, table=stated.table.select(split=split))
    plan = _plan(found, stated.table, names, unreadable)
    missing = len(plan.clip_ids) - len(plan.name_of) - len(plan.unreadable)
    if missing > MAX_BAD_SHARE * len(plan.clip_ids):
        raise CacheError(
            f"{missing} of {len(plan.clip_ids)} clips have no file in {found.folder}, more than "
            f"{MAX_BAD_SHARE:.0%}; give the clip table and split that the latents were made of"
        )
    sample = _sample(found)
    shape = _shape(found, sample, stated.geometry)
    manifest = Manifest(
        kind="latents",
        encoding=encoding,
        shape=shape,
        num_views=1,
        num_clips=len(plan.clip_ids),
        records_per_shard=RECORDS_PER_SHARD,
        provenance=_provenance(found, stated, split, names, unreadable),
        token_order="time,row,column" if stated.geometry else "",
    )
    measured = _int8_cost(manifest, sample, found) | _teacher_r2(compare, found, plan, stated)
    finished = _write(folder, manifest, found, plan, measured)
    return Imported(folder, finished, plan.left_out, tuple(_warnings(finished, found)))


def _write(
    folder: Path, manifest: Manifest, found: ForeignFolder, plan: _Plan, measured: dict[str, float]
) -> Manifest:
    with CacheWriter(folder, manifest, plan.clip_ids) as writer, stop_on_signals() as stop:

        def check() -> None:
            stop.check("while importing latents")

        def approve(contents: Contents) -> None:
            bad = len(contents.quarantine) - len(plan.unreadable)
            cure = f"mend them, remove {folder} and import again"
            refuse_too_many_bad(bad, len(plan.clip_ids), folder, cure)

        total, done = writer.num_keys, writer.num_keys_done
        if done < total:
            require_disk(folder, (total - done) * manifest.record.record_bytes, "the imported cache")
            if measured:
                writer.note(measured)
            with progress("Importing latents", total, "clips", done=done) as advance:
                for shard in writer.pending(lambda _: check()):
                    writer.write_shard(shard, _records(found, plan, shard.keys, manifest.shape))
                    advance(len(shard.keys))
                    check()
        return writer.finish(lambda _: check(), approve)


def _of_split(source: Path, split: str | None) -> Path:
    """The earlier attempt kept a folder for each split, with a metadata.json of its own."""
    return source / split if split is not None and (source / split).is_dir() else source


def _split(found: ForeignFolder, stated: Stated) -> str:
    said = found.said.get("split")
    if stated.split is None and not isinstance(said, str):
        raise ConfigError("nothing says which split these latents are of; give --split train (or validation)")
    if stated.split is not None and isinstance(said, str) and said != stated.split:
        raise ConfigError(
            f"{found.folder}/metadata.json says that these are latents of split {said!r}, not "
            f"{stated.split!r}; give the folder of that split"
        )
    return str(stated.split or said)


def _plan(found: ForeignFolder, table: ClipTable | None, names: Names, unreadable: Sequence[str]) -> _Plan:
    if table is None:
        if names == "rows" and not found.listed:
            raise ConfigError("--names rows needs the clip table whose order the rows follow; give --data")
        paired = pair(found, (), names, unreadable)
        listed = [clip for clip in found.listed if clip in paired]
        if 2 * len(listed) <= len(paired):  # A list of something else.
            return _Plan(found.in_order(()), paired)
        name_of = {clip: paired[clip] for clip in listed}
        return _Plan(list(found.listed), name_of, len(found.files) - len(listed), frozenset(unreadable))
    known = {*found.listed, *unreadable} | (set() if names == "rows" else set(found.files))
    called = names_of_maker(table, known)
    if not called and names != "rows" and not found.numbered:
        raise CacheError(
            f"no file of {found.folder} is named for a clip of {table.name}: {min(found.files)!r} there, "
            f"{table.clip_ids[0]!r} here; give the clip table that the latents were made of, or map files to "
            "its clip ids in metadata.json"
        )
    called = called or {clip_id: clip_id for clip_id in table.clip_ids}
    paired = pair(found, list(called), names, unreadable)
    name_of = {clip: paired[name] for name, clip in called.items() if name in paired}
    skipped = frozenset(clip for name, clip in called.items() if name in set(unreadable))
    return _Plan(table.clip_ids, name_of, len(found.files) - len(name_of), skipped)


def names_of_maker(table: ClipTable, known: set[str]) -> dict[str, str]:
    """What the maker called each clip → its id: the id, the id within the data set, the film's path or its
    name, whichever tells clips apart and is known best; empty where none is known."""
    columns = [table.rows[name].to_pylist() for name in ("clip_id", "dataset", "file")]
    rows = list(zip(*columns, strict=True))
    callings = (
        [clip for clip, _, _ in rows],
        [clip.removeprefix(f"{dataset}/") for clip, dataset, _ in rows],
        [str(PurePosixPath(file).with_suffix("")) for _, _, file in rows],
        [PurePosixPath(file).stem for _, _, file in rows],
        [clip.replace("/", "_") for clip, _, _ in rows],
    )
    unique = [calling for calling in callings if len(set(calling)) == len(calling)]
    best = max(unique, key=lambda calling: len(known.intersection(calling)))
    return dict(zip(best, table.clip_ids, strict=True)) if known.intersection(best) else {}


def _sample(found: ForeignFolder) -> list[np.ndarray]:
    """The latents of some files spread over the folder. Raises `CacheError` when none can be read."""
    listed = list(found.files)
    places = np.unique(np.linspace(0, len(listed) - 1, min(LOOKED_AT, len(listed))).astype(int))
    sample, reasons = [], []
    for place in places:
        try:
            sample.append(read_latents(found.files[listed[place]], listed[place]))
        except CacheError as error:
            reasons.append(str(error))
    if not sample:
        raise CacheError(
            f"none of {len(places)} files of {found.folder} can be read; the first: {reasons[0]}"
        )
    return sample


def _shape(found: ForeignFolder, sample: list[np.ndarray], geometry: ClipGeometry | None) -> tuple[int, int]:
    """(tokens, width) of most of the sample. Raises `CacheError` when the stated clips have another number of
    tokens."""
    ((tokens, width), _) = Counter((len(array), array.shape[1]) for array in sample).most_common(1)[0]
    if geometry is not None and tokens != geometry.num_tokens:
        extra = " (one more: a class token, which is none of the clip's)"
        raise CacheError(
            f"{found.folder} holds {tokens} tokens a clip, and a clip of {geometry} has "
            f"{geometry.num_tokens}{extra * (tokens == geometry.num_tokens + 1)}; state the geometry that "
            "the latents were made with"
        )
    return tokens, width


def _int8_cost(manifest: Manifest, sample: list[np.ndarray], found: ForeignFolder) -> dict[str, float]:
    """What int8 costs on the sample; empty for other encodings. Raises `CacheError` when too much."""
    if manifest.encoding != "int8":
        return {}
    usual = [array.astype(np.float32) for array in sample if array.shape == manifest.shape]
    usual = [array for array in usual if np.isfinite(array).all()]
    if not usual:
        raise CacheError(f"none of {len(sample)} files of {found.folder} holds numbers only; look into them")
    return int8_cost_of(usual, str(found.folder))


def _teacher_r2(compare: str | None, found: ForeignFolder, plan: _Plan, stated: Stated) -> dict[str, float]:
    if compare is None:
        return {}
    if stated.table is None or stated.view is None or stated.geometry is None:
        raise ConfigError("--compare runs the teacher on the clips: state them with --data and --recipe")
    clips = Clips(stated.table, stated.view, stated.geometry, plan.name_of)
    return {"teacher_r2": teacher_r2(found, clips, compare, stated.layer)}


def _provenance(
    found: ForeignFolder, stated: Stated, split: str, names: Names, unreadable: Sequence[str]
) -> dict[str, Any]:
    table, view, geometry = stated.table, stated.view, stated.geometry
    claimed = next((str(found.said[key]) for key in SAID if key in found.said), None)
    facts: dict[str, Any] = {
        "teacher": stated.teacher or claimed,
        "layer": stated.layer,
        "split": split,
        "clip_table": table.hash if table else None,
        "files": table.files_hash if table else None,
        "view_hash": view_hash(view, geometry) if view and geometry else None,
        "view": view_settings(view) if view else None,
        "geometry": asdict(geometry) if geometry else None,
        **dict.fromkeys(NEVER_KNOWN),
    }
    claims = [name for name, own in (("teacher", stated.teacher), ("split", stated.split)) if own is None]
    unknown = sorted(name for name, value in facts.items() if value is None)
    return facts | {
        "stated": sorted(name for name in facts if name not in unknown and name not in claims),
        "claimed": sorted(name for name in claims if name not in unknown),
        "unknown": unknown,
        "imported": {
            "names": names,
            "moved_past": sorted(unreadable),
            "files": _hash_of_files(found),
            "metadata": _plain(found.said),
        },
    }


def _plain(said: Mapping[str, Any]) -> dict[str, Any]:
    """The maker's own single values, as far as JSON and a page hold them."""
    kept = [
        (key, value) for key, value in said.items() if not isinstance(value, float) or math.isfinite(value)
    ]
    return {key[:80]: value[:200] if isinstance(value, str) else value for key, value in kept[:MOST_SAID]}


def _hash_of_files(found: ForeignFolder) -> str:
    """Of names and sizes: an import goes on with the folder that it began with."""
    digest = xxhash.xxh3_128()
    for name in sorted(found.files):
        try:
            size = found.files[name].stat().st_size
        except OSError:  # A link that leads nowhere, to be quarantined.
            size = -1
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _records(
    found: ForeignFolder, plan: _Plan, keys: Sequence[Key], shape: tuple[int, ...]
) -> Iterator[Record]:
    for key in keys:
        name = plan.name_of.get(key[0])
        if name is None:
            yield Record(key, None, UNREADABLE if key[0] in plan.unreadable else MISSING)
            continue
        try:
            yield Record(key, read_latents(found.files[name], name, shape))
        except CacheError as error:
            yield Record(key, None, str(error))


def _warnings(manifest: Manifest, found: ForeignFolder) -> Iterator[str]:
    counted = next((found.said[key] for key in COUNTS if key in found.said), None)
    if isinstance(counted, int) and counted != len(found.files):
        yield f"metadata.json counts {counted:,} files, and there are {len(found.files):,}"
    claim = claim_in(str(manifest.provenance["teacher"] or ""))
    width = manifest.shape[1]
    if claim is not None and claim.dim != width:
        yield f"{claim.name} is {claim.dim} wide, these latents {width}: they are another model's"
    if manifest.provenance["imported"]["names"] == "clip-ids":
        yield "that each file is of the clip it is named for was stated, not checked"


def read_ids(path: Path) -> list[str]:
    """Clips named in a file: a line each, or a JSON list of ids or of objects that hold one."""
    try:
        text = path.read_text(encoding="utf-8")
        if not text.lstrip().startswith("["):
            return [line.strip() for line in text.splitlines() if line.strip()]
        rows = [_id_in(row) for row in json.loads(text)]
    except (OSError, ValueError, StopIteration, RecursionError) as error:
        raise ConfigError(f"{path} names no clips ({error}); write one id a line") from error
    return list(dict.fromkeys(map(str, rows)))


def _id_in(row: Any) -> Any:
    return next(row[key] for key in IDS if key in row) if isinstance(row, dict) else row
