"""`eval --fractions` and `--diagnose`: figures by share of the training episodes; what features are like.

Knows how encoders and benches are opened; neither probes nor how results are printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from salt_vla.errors import UserError
from salt_vla.evaluation.diagnostics import latency, likeness, spectrum
from salt_vla.evaluation.features import Reading
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.jobs.data import open_table
from salt_vla.jobs.eval_compute import cost_of, peak_memory_gb
from salt_vla.jobs.eval_encoders import load_entries, models_of, parse_specs
from salt_vla.jobs.eval_score import open_benches
from salt_vla.jobs.evaluate import evaluate_encoders, placed
from salt_vla.jobs.teacher import data_settings

MEAN = Reading("mean")
SHARES_SHOWN = 32


def label_curve(
    encoders: Sequence[str],
    suites: Sequence[str],
    data: str,
    settings: EvalSettings,
    frame_stride: int | None,
    fractions: Sequence[float],
) -> list[dict[str, Any]]:
    """Rows as of `eval`, each with the `fraction` of the training episodes that its probe learned from;
    smaller shares lie within larger ones, and all are scored on the same held-out clips."""
    if len(set(fractions)) < len(fractions):
        raise UserError("--fractions takes each share once")
    every = [replace(settings, fraction=fraction) for fraction in sorted(fractions)]
    return [
        {"fraction": each.fraction} | row
        for each in every
        for row in evaluate_encoders(encoders, suites, data, each, frame_stride).rows
    ]


def diagnose(
    encoders: Sequence[str], data: str, settings: EvalSettings, frame_stride: int | None
) -> dict[str, Any]:
    """Of every encoder on the held-out clips, tokens averaged to one vector: effective rank and spectrum, CKA
    with every other, operations, seconds of a clip and frames a second of a stream on this machine."""
    settings = placed(settings)
    entries = load_entries(parse_specs(encoders), settings.device)
    first = entries[0]
    config = data_settings(first.spec.what, data)
    if frame_stride is not None:
        config = replace(config, view=replace(config.view, frame_stride=frame_stride))
    table = open_table(data, config.view, first.model.geometry)
    features: dict[str, np.ndarray] = {}
    rows = []
    models = models_of(entries)
    config = replace(config, store_views=False)
    for bench in open_benches(models, table, config, first.model.geometry, settings):
        found = bench.features(bench.test, [MEAN])[MEAN]
        for name, model in bench.encoders.items():
            features[name] = np.asarray(found[name], np.float64)
            seen = spectrum(features[name])
            shape = {"dims": seen.dims, "effective_rank": seen.effective_rank}
            spent = asdict(latency(model)) | {"peak_memory_gb": peak_memory_gb()}
            shares = seen.shares[:SHARES_SHOWN].tolist()
            rows.append({"encoder": name} | shape | cost_of(model) | spent | {"spectrum": shares})
    alike = [{"encoder": a, "other": b, "cka": value} for (a, b), value in likeness(features).items()]
    return {"clips": len(next(iter(features.values()))), "encoders": rows, "cka": alike}
