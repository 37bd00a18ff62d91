"""`eval --fractions` and `--diagnose`: figures by share of the training episodes; what features are like.

Knows how encoders and benches are opened; neither probes nor how results are printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from salt_vla.errors import UserError
from salt_vla.evaluation.bench import Bench
from salt_vla.evaluation.diagnostics import latency, likeness, spectrum, vary
from salt_vla.evaluation.features import Reading, TokenModel
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.jobs.data import open_table
from salt_vla.jobs.eval_compute import cost_of, peak_memory_gb
from salt_vla.jobs.eval_encoders import RANDOM, Entry, at_layer, load_entries, models_of, parse_specs
from salt_vla.jobs.eval_score import open_benches
from salt_vla.jobs.evaluate import data_of, evaluate_encoders, placed, with_random
from salt_vla.reports.diagnosis import Diagnosis
from salt_vla.reports.label_curve import LabelCurve

MEAN = Reading("mean")
MOST_CLIPS = 2048  # Products of all pairs of clips are held for every block.
SHARES_KEPT = 256
MOST_LAYERS = 6
SMALL = 50_000_000  # parameters of all encoders together


def label_curve(
    encoders: Sequence[str],
    suites: Sequence[str],
    data: str,
    settings: EvalSettings,
    frame_stride: int | None,
    fractions: Sequence[float],
    against: Sequence[str] = (),
) -> LabelCurve:
    """Rows and comparisons as of `eval`, each with the `fraction` of the training episodes that its probe
    learned from; smaller shares lie within larger ones, and all are scored on the same held-out clips."""
    if len(set(fractions)) < len(fractions):
        raise UserError("--fractions takes each share once")
    every = [replace(settings, fraction=fraction) for fraction in sorted(fractions)]
    found = {
        each.fraction: evaluate_encoders(encoders, suites, data, each, frame_stride, against)
        for each in every
    }
    first = next(iter(found.values()))
    return LabelCurve(
        first.names,
        [{"fraction": share} | row for share, each in found.items() for row in each.rows],
        [{"fraction": share} | pair for share, each in found.items() for pair in each.comparisons],
        list(
            dict.fromkeys(
                f"{100 * share:g} %: {note}" for share, each in found.items() for note in each.notes
            )
        ),
        first.about | {"fractions": sorted(fractions)},
    )


def diagnose(
    encoders: Sequence[str], data: str, settings: EvalSettings, frame_stride: int | None
) -> Diagnosis:
    """Of every encoder, its random init and pixels, on the held-out clips, tokens averaged to one vector:
    effective rank and spectrum, CKA with every other and between blocks, operations, seconds of a clip and
    frames a second of a stream on this machine."""
    settings = placed(settings)
    entries = load_entries(parse_specs(encoders), settings.device)
    first = entries[0]
    config = data_of(first, data, frame_stride)
    table = open_table(data, config.view, first.model.geometry)
    opened = partial(
        open_benches,
        table=table,
        data=replace(config, store_views=False),
        geometry=first.model.geometry,
        settings=settings,
    )
    notes: list[str] = []
    models = with_random(models_of(entries), first, settings.seed, notes, settings.device)
    groups = list(_blocks(entries, settings))
    # Each block is a network. Where they are small, one pass over the films serves all.
    are_small = sum(entry.model.num_parameters for entry in entries) <= SMALL
    first_ones = {name: load() for group in groups for name, load in group.items()} if are_small else {}
    benches = opened(models | first_ones)
    features = _mean_tokens(benches)
    layers = {name: features.pop(name) for name in first_ones}
    for group in () if are_small else groups:
        found = _mean_tokens(opened({name: load() for name, load in group.items()}))
        layers |= {name: found[name] for name in group}
    seen = {name: model for bench in benches for name, model in bench.encoders.items()}
    rows = [_row(name, seen[name], values) for name, values in features.items()]
    return Diagnosis(
        len(features[first.label]),
        len(benches[0].test.clips),
        rows,
        _pairs(features, notes),
        list(layers),
        _pairs(layers, notes),
        notes,
        {"data": table.name, "clip_table": table.hash, "view": asdict(config.view)}
        | {"seed": settings.seed, "device": settings.device},
    )


def _mean_tokens(benches: Sequence[Bench]) -> dict[str, np.ndarray]:
    """(clips, dims) by encoder, of held-out clips that are spread evenly."""
    found: dict[str, np.ndarray] = {}
    for bench in benches:
        ids = bench.test.clips.clip_ids
        chosen = np.unique(np.linspace(0, len(ids) - 1, min(len(ids), MOST_CLIPS)).astype(np.int64))
        side = bench.test.only([ids[place] for place in chosen.tolist()])
        of_mean = bench.features(side, [MEAN])[MEAN]
        found |= {name: np.asarray(of_mean[name], np.float64) for name in bench.encoders}
    return found


def _row(name: str, model: TokenModel, features: np.ndarray) -> dict[str, Any]:
    seen = spectrum(features)
    shape = {"encoder": name, "dims": seen.dims, "effective_rank": seen.effective_rank}
    spent = asdict(latency(model)) | {"peak_memory_gb": peak_memory_gb()}
    return shape | cost_of(model) | spent | {"spectrum": seen.shares[:SHARES_KEPT].tolist()}


def _pairs(features: Mapping[str, np.ndarray], notes: list[str]) -> list[dict[str, Any]]:
    varying = {name: each for name, each in features.items() if vary(each)}
    notes += [
        f"{name} gives every clip the same features: it is like nothing, and has no CKA"
        for name in features
        if name not in varying
    ]
    return [{"encoder": a, "other": b, "cka": value} for (a, b), value in likeness(varying).items()]


def _blocks(
    entries: Sequence[Entry], settings: EvalSettings
) -> Iterator[dict[str, Callable[[], TokenModel]]]:
    """Of every encoder that was asked for whole, and of the first one's random init: some of its blocks by
    name, evenly spread, its output the last, and how each is loaded."""
    whole = [(entry.label, entry) for entry in entries if entry.spec.layer is None]
    twins = [(RANDOM, whole[0][1])] if whole and RANDOM not in dict(whole) else []
    for name, entry in [*whole, *twins]:
        depth = entry.model.depth
        numbers = np.unique(np.linspace(1, depth, min(depth, MOST_LAYERS)).round().astype(np.int64))
        seed = None if name == entry.label else settings.seed
        yield {
            f"{name}@{block}": partial(at_layer, entry, block, settings.device, seed)
            for block in numbers.tolist()
        }
