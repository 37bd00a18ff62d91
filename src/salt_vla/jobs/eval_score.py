"""Suites over encoders: what cells hold is taken, the rest is measured, one encoder after the other.

Knows benches and cells; not how encoders are named, nor what tables are made.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from salt_vla.config import DataConfig, parse_bytes
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import view_hash
from salt_vla.errors import DataError, UserError
from salt_vla.evaluation.bench import Bench, Side
from salt_vla.evaluation.copies import note_copies
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore, UnreadableClips
from salt_vla.evaluation.features import Pixels, TokenModel
from salt_vla.evaluation.fractions import share_of
from salt_vla.evaluation.leaks import require_no_leak
from salt_vla.evaluation.results import CONSTANT, PIXELS, WITHOUT_ENCODER, Scored
from salt_vla.evaluation.settings import OF_FILM_PAIRS, OF_SUITES, EvalSettings
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import open_views, split_table
from salt_vla.jobs.data_index import MAX_BAD_SHARE
from salt_vla.jobs.eval_cells import FOLDER, Cell, Cells, cell_key, hash_of
from salt_vla.jobs.eval_compute import cost_of, peak_memory_gb
from salt_vla.jobs.pipeline import num_decoders
from salt_vla.registry import RECORDED_FILES, SUITES, SURPRISE, resolve
from salt_vla.rundir import root


@dataclass
class Measured:
    """What was found of all encoders: sums, sentences on what was left out, and what it cost, an object an
    encoder and suite."""

    scored: list[Scored] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compute: list[dict[str, Any]] = field(default_factory=list)


def measure(
    models: Mapping[str, TokenModel],
    table: ClipTable,
    data: DataConfig,
    settings: EvalSettings,
    suites: Sequence[str],
    geometry: ClipGeometry | None = None,
) -> Measured:
    """Every suite over `models`, `pixels` and `constant`; encoders of other patches or image sizes see the
    same clips on benches of their own. Clips that one cannot be given are left out for all."""
    geometry = geometry or next(iter(models.values())).geometry
    left_out: dict[str, str] = {}
    while True:
        benches = open_benches(models, table, data, geometry, settings, left_out)
        found = Measured()
        try:
            for suite in suites:
                with _named(suite, len(suites) > 1):
                    _measure_suite(suite, benches, found)
        except UnreadableClips as error:
            left_out |= error.left_out
            _require_few(left_out, table)
            continue
        if left_out:
            first = next(iter(left_out.values()))
            found.notes.insert(
                0, f"{len(left_out)} clips cannot be read and are left out; the first: {first}"
            )
        found.notes = list(dict.fromkeys(found.notes))
        return found


@contextmanager
def _named(suite: str, has_others: bool) -> Iterator[None]:
    """Within the block what ends a suite says which one, and how to get the others' figures."""
    try:
        yield
    except UnreadableClips:
        raise
    except DataError as error:
        cure = f"; leave {suite} out for the figures of the others" if has_others else ""
        raise DataError(f"suite {suite}: {error}{cure}") from error


def _require_few(left_out: Mapping[str, str], table: ClipTable) -> None:
    if len(left_out) > MAX_BAD_SHARE * len(table):
        raise DataError(
            f"{len(left_out)} of {len(table)} clips cannot be read, more than {MAX_BAD_SHARE:.0%}; the "
            f"first: {next(iter(left_out.values()))}; `salt-vla data check` names each"
        )


def open_benches(
    models: Mapping[str, TokenModel],
    table: ClipTable,
    data: DataConfig,
    geometry: ClipGeometry,
    settings: EvalSettings,
    left_out: Mapping[str, str] = {},
) -> list[Bench]:
    """One bench for every geometry; that of `geometry` first, with `pixels`."""
    by_geometry: dict[ClipGeometry, dict[str, TokenModel]] = {geometry: {}}
    for name, model in models.items():
        by_geometry.setdefault(model.geometry, {})[name] = model
    by_geometry[geometry][PIXELS] = Pixels(geometry)
    return [
        open_bench(encoders, table, data, each, settings, left_out) for each, encoders in by_geometry.items()
    ]


def open_bench(
    encoders: Mapping[str, TokenModel],
    table: ClipTable,
    data: DataConfig,
    geometry: ClipGeometry,
    settings: EvalSettings,
    left_out: Mapping[str, str] = {},
) -> Bench:
    """What suites work with: encoders of one geometry and the table's split, without the clips left out."""
    kinds = set(table.rows["split"].to_pylist())
    if "validation" in kinds and "train" not in kinds:
        raise DataError(f"{table.name} has clips of the split validation and none of train; index both")
    splits = split_table(table)
    sides = []
    for part, num_views in ((splits.train, data.view.num_views), (splits.validation, 1)):
        views, readable = open_views(part, data, geometry, num_views)
        clips = part.only([clip for clip in readable if clip not in left_out])
        if not len(clips):
            raise DataError(f"{table.name} has no clip that can be read on one side of its split")
        pixels = f"{part.hash} {part.files_hash} {view_hash(data.view, geometry)}"
        sides.append(Side(clips, ClipViews(clips.clip_ids, views, pixels)))
    device = next((str(getattr(model, "device", "cpu")) for model in encoders.values()), "cpu")
    workers = num_decoders(data.num_workers or None, len(table), device)
    limit = parse_bytes(settings.memory_limit) if settings.memory_limit else 0
    store = FeatureStore(root() / "features", num_workers=workers, memory_limit=limit)
    train, test = sides
    require_no_leak(train.clips, test.clips)
    train = train.only(share_of(train.clips, settings.fraction, settings.seed).clip_ids)
    return Bench(encoders, train, test, data, geometry, settings, store)


def _measure_suite(suite: str, benches: Sequence[Bench], found: Measured) -> None:
    """Its cells, those that are missing measured: an encoder's is written as soon as it is done."""
    cells = Cells(root() / FOLDER)
    constant: list[Scored] = []
    for bench in benches:
        key = _keys(suite, bench)
        keys = {name: key(model.fingerprint) for name, model in bench.encoders.items()}
        known = {name: cells.read(key) for name, key in keys.items()}
        missing = {name: bench.encoders[name] for name, cell in known.items() if cell is None}
        lowest = cells.read(key(CONSTANT))
        if lowest is None and not missing:  # It is measured beside an encoder.
            missing = dict(list(bench.encoders.items())[:1])
        for name, model in missing.items():
            cell, beside = _measure_encoder(suite, bench, name, model, missing)
            if lowest is None:
                lowest = beside
                cells.write(key(CONSTANT), beside, bench.settings.seed)
            known[name] = cell
            cells.write(keys[name], cell, bench.settings.seed)
        for name, kept in known.items():
            assert kept is not None
            found.scored += kept.called(name)
            found.notes += kept.notes
            about = {"encoder": name, "suite": suite, "seed": bench.settings.seed}
            found.compute.append(about | kept.compute)
        constant = constant or (lowest.scored if lowest else [])
    found.scored += constant


def _measure_encoder(
    suite: str, bench: Bench, name: str, model: TokenModel, missing: Mapping[str, TokenModel]
) -> tuple[Cell, Cell]:
    """The cells of an encoder and of the constant predictor."""
    others = {other: each for other, each in missing.items() if other != name}
    alone = replace(bench, encoders={name: model}, beside=others, notes=[])
    began = time.monotonic()
    scored: list[Scored] = resolve(SUITES, suite)(alone)
    if not scored:
        raise DataError(f"there is nothing to measure in {bench.train.clips.name}")
    if name == PIXELS:
        note_copies(alone)
    spent = {"seconds": round(time.monotonic() - began, 3), "peak_memory_gb": round(peak_memory_gb(), 3)}
    own = Cell(
        [one for one in scored if one.encoder not in WITHOUT_ENCODER], alone.notes, cost_of(model) | spent
    )
    return own, Cell([one for one in scored if one.encoder in WITHOUT_ENCODER])


def _keys(suite: str, bench: Bench) -> Callable[[str], dict[str, Any]]:
    """By an encoder's fingerprint: what its cell is named by."""
    usual = {name: getattr(EvalSettings(), name) for name in OF_SUITES if name not in _read_by(suite)}
    settings = replace(bench.settings, **usual)
    sides = (bench.train, bench.test)
    data: dict[str, Any] = {"name": bench.train.clips.name}
    data |= {part: side.views.pixels_hash for part, side in zip(("train", "test"), sides, strict=True)}
    data["clips"] = hash_of([clip for side in sides for clip in (*side.clips.clip_ids, "")])
    if kinds := sorted(set(bench.train.clips.rows["source"].to_pylist()) & RECORDED_FILES.keys()):
        data["recorded"] = [resolve(RECORDED_FILES, kind)(bench.train.clips) for kind in kinds]
    if settings.text:
        texts = Path(settings.text)
        data["text"] = hash_of([file.read_bytes().hex() for file in (texts, texts.with_suffix(".json"))])
    suite_version = getattr(_module_of(suite), "VERSION", 1)
    return lambda fingerprint: cell_key(suite, suite_version, fingerprint, settings, data)


def require_read(suites: Sequence[str], settings: EvalSettings) -> None:
    """Raise `UserError` for a setting that was given and that none of these suites reads."""
    read = {name for suite in suites for name in _read_by(suite)}
    usual = EvalSettings()
    unread = [n for n in OF_SUITES if n not in read and getattr(settings, n) != getattr(usual, n)]
    if unread:
        options = " and ".join(f"--{name.replace('_', '-')}" for name in unread)
        raise UserError(f"{options}: no suite of this call ({', '.join(suites)}) reads it; leave it off")


def _read_by(suite: str) -> tuple[str, ...]:
    """Of the settings that not every suite reads; all where its module does not say."""
    if suite in SURPRISE:
        return OF_FILM_PAIRS
    found: tuple[str, ...] = getattr(_module_of(suite), "READS", OF_SUITES)
    return found


def _module_of(suite: str) -> ModuleType:
    return importlib.import_module(SUITES[suite].partition(":")[0])
