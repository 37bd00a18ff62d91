"""`eval`: what frozen encoders know, on held-out episodes, beside baselines: from the command to its tables.

Knows how encoders, suites and seeds come together, not what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from salt_vla.config import DataConfig, RuntimeConfig, TrainConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import ConfigError, UserError
from salt_vla.evaluation.bench import Bench
from salt_vla.evaluation.features import TokenModel
from salt_vla.evaluation.probing import load_probe
from salt_vla.evaluation.results import PIXELS, SuiteResult, tabulate, to_objects
from salt_vla.evaluation.seeds import aggregate_seeds
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.evaluation.texts import read_texts
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import open_table
from salt_vla.jobs.eval_encoders import (
    RANDOM,
    Entry,
    Spec,
    is_of,
    load_entries,
    models_of,
    parse_specs,
    random_twin,
    seeds_of,
    split_random,
    training_cost,
)
from salt_vla.jobs.eval_encoders import load_model as load_model
from salt_vla.jobs.eval_encoders import random_model as random_model
from salt_vla.jobs.eval_kept import leave_probes
from salt_vla.jobs.eval_score import measure, open_benches, require_read
from salt_vla.jobs.eval_surprise import WITHOUT_SEED, require_surprise, surprise_results
from salt_vla.jobs.teacher import data_settings
from salt_vla.registry import PROBES, SUITES, SURPRISE
from salt_vla.reports.evaluation import EvaluationTables
from salt_vla.teachers.pixel import EncoderTeacher
from salt_vla.teachers.random import PREFIX
from salt_vla.training.runtime import resolve_device

Objects = list[dict[str, Any]]


@dataclass
class Evaluation:
    """Tables as plain objects: `rows` and `comparisons` of one seed, or joined over seeds; `compute` an
    object an encoder, suite and seed. `results`: every seed's own. `names`: the encoders asked for."""

    names: list[str]
    rows: Objects = field(default_factory=list)
    comparisons: Objects = field(default_factory=list)
    compute: Objects = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    results: list[SuiteResult] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def tables(self) -> EvaluationTables:
        return EvaluationTables(self.names, self.rows, self.comparisons, self.compute, self.notes, self.about)


def evaluate(
    models: Mapping[str, TokenModel],
    table: ClipTable,
    data: DataConfig,
    geometry: ClipGeometry,
    settings: EvalSettings = EvalSettings(),  # noqa: B008
    suites: Sequence[str] = ("probes",),
) -> list[SuiteResult]:
    """Every suite's tables over `models`, `pixels` and `constant`. Views are the canonical ones."""
    found = measure(models, table, data, settings, suites, geometry)
    return tabulate(found.scored, settings.seed)


def evaluate_encoders(
    arguments: Sequence[str],
    suites: Sequence[str],
    data: str,
    settings: EvalSettings,
    frame_stride: int | None = None,
    against: Sequence[str] = (),
    pictures: Path | None = None,
) -> Evaluation:
    """The command: encoders by their specs, beside a random one of the first's architecture, pixels and the
    constant predictor. A label given several times stands for seeds, and tables are joined over them."""
    settings, specs = asked(arguments, suites, settings)
    names = [*dict.fromkeys(spec.label for spec in specs), RANDOM, PIXELS]
    for name in against:
        if name not in names:
            raise UserError(f"--against {name}: no encoder of this call is called so, but {', '.join(names)}")
    require_surprise(specs, suites, settings, frame_stride)
    films = [suite for suite in suites if suite in SURPRISE]
    clips = [suite for suite in suites if suite in SUITES]
    if pictures is not None and not clips:
        raise UserError(
            "--pictures shows clips of a data set; suites of film pairs have reports of their own"
        )
    evaluation = Evaluation(list(dict.fromkeys(spec.label for spec in specs)))
    about: dict[str, Any] = {"data": data}
    surprises = surprise_results(specs, films, data, settings, against) if films else []
    if clips:
        about = _measure_clips(evaluation, specs, clips, data, settings, frame_stride, against, pictures)
    evaluation.results += surprises
    labels = [spec.label for spec in specs]
    single = {label for label in labels if labels.count(label) == 1} | set(WITHOUT_SEED)
    return _joined(evaluation, about | {"settings": asdict(settings), "suites": list(suites)}, single)


def _measure_clips(
    evaluation: Evaluation,
    specs: Sequence[Spec],
    suites: Sequence[str],
    data: str,
    settings: EvalSettings,
    frame_stride: int | None,
    against: Sequence[str],
    pictures: Path | None,
) -> dict[str, Any]:
    """Suites that ask about clips, into `evaluation`; what was seen of which."""
    entries = load_entries(specs, settings.device)
    first = entries[0]
    config = data_of(first, data, frame_stride)
    table = open_table(data, config.view, first.model.geometry)
    config = replace(config, store_views=False)
    for seed in seeds_of(entries, settings.seed):
        here = [entry for entry in entries if is_of(seed, entry, entries)]
        models = with_random(models_of(here), first, seed, evaluation.notes, settings.device)
        found = measure(models, table, config, replace(settings, seed=seed), suites, first.model.geometry)
        results = tabulate(found.scored, seed, against=against)
        costs = {entry.label: training_cost(entry.spec.what) for entry in here}
        evaluation.compute += [each | costs.get(each["encoder"], {}) for each in found.compute]
        evaluation.notes += found.notes
        evaluation.results += results
        places = {entry.label: entry.place for entry in here if entry.place is not None}
        if settings.fraction == 1:  # What compares runs is what all episodes teach.
            try:
                steps = {name: int(cost["training_steps"]) for name, cost in costs.items() if cost}
                leave_probes(results, places, table, settings, frame_stride, steps)
            except UserError as error:  # The figures are what was asked for.
                print(f"salt-vla: these figures are not kept beside the run: {error}", file=sys.stderr)
        if pictures is not None and seed == seeds_of(entries, settings.seed)[0]:
            bench = open_benches(models, table, config, first.model.geometry, settings)[0]
            evaluation.notes += _draw(bench, pictures)
    return {"data": table.name, "clip_table": table.hash, "view": asdict(config.view)}


def placed(settings: EvalSettings) -> EvalSettings:
    """With the device that `auto` stands for here. Raises `ConfigError` for one that is not there."""
    try:
        chosen = resolve_device(TrainConfig(runtime=RuntimeConfig(device=settings.device)))
    except ConfigError as error:
        raise ConfigError(str(error).replace("runtime.device", "--device", 1)) from error
    return replace(settings, device=chosen.runtime.device)


def _draw(bench: Bench, folder: Path) -> list[str]:
    """Sheets into `folder`; what cannot be drawn is said: the figures are what was asked for."""
    from salt_vla.jobs.eval_pictures import draw_evaluation

    try:
        drawn = draw_evaluation(bench, folder)
    except UserError as error:
        return [f"no pictures: {error}"]
    for path in drawn:
        print(path, file=sys.stderr)
    return []


def asked(
    arguments: Sequence[str], suites: Sequence[str], settings: EvalSettings
) -> tuple[EvalSettings, list[Spec]]:
    """What can be known before anything is loaded: settings with their device, and encoders by their labels.
    Raises `UserError`."""
    _require_known(suites, settings)
    return placed(settings), parse_specs(arguments)


def _require_known(suites: Sequence[str], settings: EvalSettings) -> None:
    known = (*SUITES, *SURPRISE)
    for suite in suites:
        if suite not in known:
            raise UserError(f"there is no suite {suite!r}; suites: {', '.join(known)}")
    if not suites or len(set(suites)) < len(suites):
        raise UserError("--suite needs one suite or several, each once")
    if settings.probe not in PROBES:
        raise UserError(f"there is no probe {settings.probe!r}; probes: {', '.join(PROBES)}")
    load_probe(settings.probe, settings.protocol)
    require_read(suites, settings)
    if settings.text:
        read_texts(Path(settings.text))


def data_of(entry: Entry, data: str, frame_stride: int | None) -> DataConfig:
    """How clips of `data` are seen: as the encoder was trained, unless another stride is asked for."""
    what = entry.spec.what
    config = data_settings(split_random(what)[0] if what.startswith(PREFIX) else what, data)
    if frame_stride is not None:
        if frame_stride < 1:
            raise ConfigError(f"--frame-stride must be at least 1, not {frame_stride}")
        config = replace(config, view=replace(config.view, frame_stride=frame_stride))
    return config


def with_random(
    models: dict[str, TokenModel], first: Entry, seed: int, notes: list[str], device: str
) -> dict[str, TokenModel]:
    """And the first one's architecture, freshly initialised; `notes` say why, where there is none."""
    if RANDOM in models:
        return models
    layer = -1 if first.spec.layer is None else first.spec.layer
    if isinstance(first.model, EncoderTeacher):
        return models | {RANDOM: random_model(first.model.encoder.config, seed, layer, device)}
    try:
        twin = random_twin(first.spec.what, seed, layer, first.model.geometry, device)
    except UserError as error:  # The figures asked for can do without.
        notes.append(f"no random init stands beside: {error}")
        return models
    return models | {RANDOM: twin}


def _joined(evaluation: Evaluation, about: dict[str, Any], single: Collection[str] = ()) -> Evaluation:
    """With rows as they are, or joined where there are several seeds; `single`: see `aggregate_seeds`."""
    evaluation.about, results = about, evaluation.results
    evaluation.notes = list(dict.fromkeys(evaluation.notes))
    evaluation.rows = [row for result in results for row in to_objects(result.rows)]
    evaluation.comparisons = [pair for result in results for pair in to_objects(result.comparisons)]
    if len({result.seed for result in results}) > 1:
        rows, pairs = aggregate_seeds(results, single)
        evaluation.rows = _with_what_stays(to_objects(rows), evaluation.rows)
        evaluation.comparisons = to_objects(pairs)
    return evaluation


def _with_what_stays(
    joined: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows over seeds with what each seed's row says of itself, and every note of any seed."""
    of: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault((row["encoder"], row["suite"], row["target"]), []).append(row)
    said = []
    for row in joined:
        seeds = of[row["encoder"], row["suite"], row["target"]]
        kept = {name: seeds[0][name] for name in ("clips", "episodes", "probe", "protocol", "causal")}
        notes = dict.fromkeys(each["note"] for each in seeds if each["note"])
        said.append(row | kept | {"note": "; ".join(notes)})
    return said


def check_seed(seed: int) -> None:
    """The probes' folds are drawn by a generator that takes 32 bits."""
    EvalSettings(seed=seed)
