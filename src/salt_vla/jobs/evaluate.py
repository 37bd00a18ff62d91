"""`eval`: probe frozen encoders on a data set's recorded signals, on held-out episodes, beside baselines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from salt_vla.config import DataConfig, EncoderConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import view_hash
from salt_vla.errors import UserError
from salt_vla.evaluation.bench import Bench, EvalSettings, Side
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore
from salt_vla.evaluation.features import Pixels, TokenModel
from salt_vla.evaluation.results import PIXELS, SuiteResult, tabulate, to_objects
from salt_vla.evaluation.seeds import scores_to_arrays
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import open_views, split_table
from salt_vla.models import build_encoder
from salt_vla.models.loading import encoder_directory, load_encoder
from salt_vla.registry import SUITES, resolve
from salt_vla.rundir import RunDirectory, read_json, root, run_or_directory, write_atomically, write_text
from salt_vla.teachers.pixel import EncoderTeacher

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
    models: Mapping[str, TokenModel],
    table: ClipTable,
    data: DataConfig,
    geometry: ClipGeometry,
    settings: EvalSettings = EvalSettings(),  # noqa: B008
    suites: Sequence[str] = ("probes",),
) -> list[SuiteResult]:
    """Every suite's tables over `models`, `pixels` and `constant`. Views are the canonical ones."""
    bench = open_bench(models, table, data, geometry, settings)
    scored = [one for suite in suites for one in resolve(SUITES, suite)(bench)]
    return tabulate(scored, settings.seed)


def open_bench(
    models: Mapping[str, TokenModel],
    table: ClipTable,
    data: DataConfig,
    geometry: ClipGeometry,
    settings: EvalSettings,
) -> Bench:
    """What suites work with: `models` and `pixels`, the table's split, features below the root."""
    splits = split_table(table)
    sides = []
    for part, num_views in ((splits.train, data.view.num_views), (splits.validation, 1)):
        views, readable = open_views(part, data, geometry, num_views)
        clips = part.only(readable)
        pixels = f"{part.hash} {part.files_hash} {view_hash(data.view, geometry)}"
        sides.append(Side(clips, ClipViews(clips.clip_ids, views, pixels)))
    store = FeatureStore(root() / "features")
    train, test = sides
    return Bench({**models, PIXELS: Pixels(geometry)}, train, test, data, geometry, settings, store)


def check_seed(seed: int) -> None:
    """The probes' folds are drawn by a generator that takes 32 bits."""
    EvalSettings(seed=seed)


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
    paths: list[str], suites: Sequence[str], data: DataConfig, table: ClipTable, settings: EvalSettings
) -> list[SuiteResult]:
    """The command: encoders by path, beside a random one of the first's architecture, pixels and constant."""
    for suite in suites:
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
    models["random"] = random_model(first.encoder.config, settings.seed)
    return evaluate(models, table, replace(data, store_views=False), first.geometry, settings, suites)
