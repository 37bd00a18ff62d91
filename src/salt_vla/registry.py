"""The parts that are chosen by name: one table a kind, name → "module:factory", imported only when asked for.

A new teacher or source is one file and one line here. Knows no part's signature; the contract tests do.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from salt_vla.errors import UserError

Table = Mapping[str, str]

TEACHERS: Table = {
    "pixel": "salt_vla.teachers.pixel:load",
    "random": "salt_vla.teachers.random:load",
    "videomae": "salt_vla.teachers.videomae:load",
    "vjepa2": "salt_vla.teachers.vjepa2:load",
    "image": "salt_vla.teachers.image:load",
}
SOURCES: Table = {
    "folder": "salt_vla.data.sources.folder:segments",
    "intphys2": "salt_vla.data.sources.intphys2:segments",
    "kinetics": "salt_vla.data.sources.kinetics:segments",
    "lerobot": "salt_vla.data.sources.lerobot:segments",
    "sim": "salt_vla.data.sources.sim:segments",
    "ssv2": "salt_vla.data.sources.ssv2:segments",
    "table": "salt_vla.data.sources.table:segments",
    "ucf101": "salt_vla.data.sources.ucf101:segments",
}
# What was recorded beside the video, for the sources that have such a thing.
SIGNALS: Table = {
    "lerobot": "salt_vla.data.sources.lerobot_signals:read_signals",
    "sim": "salt_vla.data.sources.lerobot_signals:read_signals",
}
# The same of whole episodes, for what is asked about moments.
RECORDINGS: Table = {
    "lerobot": "salt_vla.data.sources.lerobot_signals:read_recordings",
    "sim": "salt_vla.data.sources.lerobot_signals:read_recordings",
}
# A hash of the files it is read from: figures are of what was recorded then.
RECORDED_FILES: Table = {
    "lerobot": "salt_vla.data.sources.lerobot_signals:recorded_hash",
    "sim": "salt_vla.data.sources.lerobot_signals:recorded_hash",
}
# Regressions of predictions on targets: `objective.loss`.
LOSSES: Table = {
    "power": "salt_vla.objectives.regression:power",
    "smooth_l1": "salt_vla.objectives.regression:smooth_l1",
    "cosine": "salt_vla.objectives.regression:cosine",
}
# What reads frozen features: `eval --probe`.
PROBES: Table = {
    "linear": "salt_vla.evaluation.linear:LinearProbe",
    "knn": "salt_vla.evaluation.neighbours:NeighboursProbe",
    "attentive": "salt_vla.evaluation.attentive:attentive",
    "attentive-small": "salt_vla.evaluation.attentive:attentive_small",
}
# What is asked of frozen encoders: `eval --suite`.
SUITES: Table = {
    "action-prediction": "salt_vla.evaluation.suites.actions:score",
    "events": "salt_vla.evaluation.suites.events:score",
    "forward-dynamics": "salt_vla.evaluation.suites.dynamics:forward",
    "inverse-dynamics": "salt_vla.evaluation.suites.dynamics:inverse",
    "state": "salt_vla.evaluation.suites.state:score",
    "success": "salt_vla.evaluation.suites.success:score",
    "dense": "salt_vla.evaluation.suites.dense:score",
    "frame-order": "salt_vla.evaluation.suites.frame_order:score",
    "probes": "salt_vla.evaluation.suites.signals:score",
    "classification": "salt_vla.evaluation.suites.classification:score",
    "retrieval": "salt_vla.evaluation.suites.retrieval:score",
    "time-arrow": "salt_vla.evaluation.suites.time_arrow:score",
}
# Suites of film pairs of their own (`--data`), which need a predictor and learn nothing:
# (encoders by name → path or name, data, settings, tag of what they leave) → list[Scored].
SURPRISE: Table = {
    "intphys2": "salt_vla.jobs.surprise:score",
    "violations": "salt_vla.jobs.violations:score",
}


def resolve(table: Table, name: str) -> Any:
    """The factory that `name` stands for in `table`, its module imported now.

    Raises `UserError` with the known names when there is no such entry.
    """
    if name not in table:
        raise UserError(f"{name!r} is not known here; known names: {', '.join(sorted(table))}")
    module, _, factory = table[name].partition(":")
    return getattr(importlib.import_module(module), factory)
