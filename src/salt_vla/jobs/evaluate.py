"""`eval`: probe frozen encoders on a data set's recorded signals, on held-out episodes, beside baselines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from salt_vla.config import DataConfig, EncoderConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import ConfigError, DataError, UserError
from salt_vla.evaluation.features import TokenModel, extract_features
from salt_vla.evaluation.seeds import scores_to_arrays
from salt_vla.evaluation.suites import ProbeSet, SuiteResult, run_probe_suite, to_objects
from salt_vla.evaluation.targets import build_targets
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import open_views, split_table
from salt_vla.models import build_encoder
from salt_vla.models.loading import encoder_directory, load_encoder
from salt_vla.progress import progress
from salt_vla.registry import SIGNALS, resolve
from salt_vla.rundir import RunDirectory, read_json, root, run_or_directory, write_atomically, write_text
from salt_vla.teachers.pixel import EncoderTeacher
from salt_vla.view_store import ViewSource

if TYPE_CHECKING:
    from salt_vla.evaluation.features import FeatureTable

BATCH_SIZE = 64
POOLINGS = ("grid", "step", "mean")
SUITES = ("probes",)
RESULTS = ("report.json", "comparisons.json", "scores.npz")
PROBES = "probes.json"


def load_model(path: str, name: str) -> EncoderTeacher:
    """An encoder by run name or directory, ready to be probed."""
    return EncoderTeacher(load_encoder(run_or_directory(path)), name)


def random_model(config: EncoderConfig, seed: int) -> EncoderTeacher:
    """The same architecture, freshly initialised: what the inductive bias alone is worth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EncoderTeacher(build_encoder(config), "random")


def evaluate(
    models: Mapping[str, TokenModel], table: ClipTable, data: DataConfig, geometry: ClipGeometry, seed: int
) -> list[SuiteResult]:
    """Every camera × pooling as a suite `camera/pooling`: probes fit on training episodes, read once on
    held-out ones. Views are the canonical ones; features of a clip see all of its frames (not causal).
    """
    check_seed(seed)
    for name, model in models.items():
        if model.geometry != geometry:
            raise ConfigError(f"encoder {name!r} takes clips of {model.geometry}, not {geometry}")
    splits = split_table(table)
    cameras = list(dict.fromkeys(table.rows["camera"].to_pylist()))
    results = []
    for camera in cameras:
        sides = [part.select(camera=camera) for part in (splits.train, splits.validation)]
        features, targets = [], []
        stores = ((splits.train, data.view.num_views), (splits.validation, 1))
        for part, (whole, num_views) in zip(sides, stores, strict=True):
            views, readable = open_views(whole, data, geometry, num_views)
            clips = part.only(readable)
            features.append(_features(models, clips, views, camera))
            targets.append(_targets(clips, data, geometry))
        for pooling in POOLINGS:
            train, test = (
                ProbeSet(table_[pooling], values, episodes)
                for table_, (values, episodes) in zip(features, targets, strict=True)
            )
            results.append(run_probe_suite(f"{short_name(camera)}/{pooling}", train, test, seed))
    return results


def check_seed(seed: int) -> None:
    """The probes' folds are drawn by a generator that takes 32 bits."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed must lie in 0 … {2**32 - 1}, not {seed}")


def short_name(camera: str) -> str:
    """`observation.images.front` → `front`."""
    return camera.rsplit(".", 1)[-1]


def _features(
    models: Mapping[str, TokenModel], part: ClipTable, views: ViewSource, camera: str
) -> FeatureTable:
    ids = part.clip_ids

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        with progress(f"Reading features, {short_name(camera)}", len(ids), "clips") as advance:
            for start in range(0, len(ids), BATCH_SIZE):
                chosen = ids[start : start + BATCH_SIZE]
                yield np.arange(start, start + len(chosen)), views.read_many([(clip, 0) for clip in chosen])
                advance(len(chosen))

    return extract_features(models, batches(), len(ids), POOLINGS)


def _targets(
    part: ClipTable, data: DataConfig, geometry: ClipGeometry
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    sources = set(part.rows["source"].to_pylist())
    if not sources <= SIGNALS.keys() or len(part.roots) != 1:
        raise DataError(
            f"{part.name} ({', '.join(sorted(sources))}): probes read recorded signals, which need one data "
            f"set of: {', '.join(SIGNALS)}"
        )
    signals = resolve(SIGNALS, min(sources))(part, geometry.num_frames, data.view)
    return build_targets(signals), signals.episodes


def write_results(results: list[SuiteResult], folder: Path) -> None:
    """`report.json` (rows), `comparisons.json` (paired differences) and the sums that seeds are joined by."""
    rows = [row for result in results for row in to_objects(result.rows)]
    pairs = [pair for result in results for pair in to_objects(result.comparisons)]
    write_atomically(folder / "scores.npz", lambda path: _save_npz(path, scores_to_arrays(results)))
    write_text(folder / "comparisons.json", json.dumps(pairs, indent=1))
    write_text(folder / "report.json", json.dumps(rows, indent=1))


def _save_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def leave_probes(
    results: Sequence[SuiteResult], paths: Mapping[str, str | Path], table: ClipTable
) -> list[RunDirectory]:
    """Write each encoder's own rows and comparisons into `probes.json` of the run that it is the last
    checkpoint of, in place of what that said of the same suite and clips; those runs. `paths`: where each
    encoder was read from, by its name in the results."""
    left = []
    for name, path in paths.items():
        place = run_or_directory(path)
        run = RunDirectory(root() / "runs" / place.absolute().name)
        if not run.config_file.is_file() or not place.samefile(run.path):
            continue  # A checkpoint or an export: whether it is some run's last, nobody says.
        about = {"clip_table": table.hash, "step": int(encoder_directory(place).name.removeprefix("step_"))}
        now = [
            {"suite": result.suite}
            | about
            | {"rows": to_objects(row for row in result.rows if row.encoder == name)}
            | {"comparisons": to_objects(pair for pair in result.comparisons if pair.encoder == name)}
            for result in results
        ]
        replaced = {(each["suite"], each["clip_table"]) for each in now}
        file = run.path / PROBES
        before = read_json(file, dict).get("suites", []) if file.is_file() else []
        kept = [each for each in before if (each["suite"], each["clip_table"]) not in replaced]
        write_text(file, json.dumps({"suites": kept + now}, indent=1))
        left.append(run)
    return left


def encoder_names(paths: Sequence[str]) -> list[str]:
    """What each is called in tables: its folder, with those above it as far as namesakes differ (`a/best`
    and `b/best`; `checkpoints` tells nothing). Raises `UserError` for one that is given twice."""
    places = [run_or_directory(path).absolute() for path in paths]
    parts = [[part for part in place.parts if part != "checkpoints"] for place in places]
    names = []
    for mine in parts:
        length = 1
        while length < len(mine) and sum(mine[-length:] == other[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(mine[-length:]))
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(
            f"two encoders are called {Path(twice[0]).name!r}: they are one folder; leave one out"
        )
    return names


def evaluate_encoders(
    paths: list[str], suite: str, data: DataConfig, table: ClipTable, seed: int
) -> list[SuiteResult]:
    """The command: encoders by path, beside a random one of the first's architecture, pixels and constant."""
    if suite not in SUITES:
        raise UserError(f"there is no suite {suite!r}; suites: {', '.join(SUITES)}")
    if not paths:
        raise UserError("eval needs at least one encoder: a run's name, a checkpoint or an export")
    names = encoder_names(paths)
    if "random" in names:
        raise UserError("'random' is the name of a baseline; evaluate a run under another name")
    models: dict[str, TokenModel] = {
        name: load_model(path, name) for name, path in zip(names, paths, strict=True)
    }
    first = next(iter(models.values()))
    assert isinstance(first, EncoderTeacher)
    models["random"] = random_model(first.encoder.config, seed)
    return evaluate(models, table, replace(data, store_views=False), first.geometry, seed)
