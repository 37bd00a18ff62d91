"""`teacher check`: what a teacher is, what its targets are like, and which clips it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from salt_vla.config import DataConfig, TrainConfig, from_json
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.latent_statistics import LatentStatistics, LatentSums
from salt_vla.evaluation.teacher_findings import (
    Claim,
    Finding,
    TeacherFacts,
    claim_in,
    findings_of,
    verdict_of,
)
from salt_vla.evaluation.teacher_inspection import position_order, query_value_biases, token_order
from salt_vla.jobs.data import open_views, read_or_quarantine
from salt_vla.jobs.data_index import cutting_of
from salt_vla.jobs.teacher_train import EXPORT, checkpoint_of, read_export
from salt_vla.progress import Advance, progress
from salt_vla.rundir import RunDirectory
from salt_vla.teachers import Teacher, family_of, load_teacher, place_of
from salt_vla.teachers.names import NAMED, require_directory
from salt_vla.view_store import ViewSource

CLIPS = 32
BATCH_SIZE = 8
PROBES = 12  # grey clips, for the order of tokens and positions: they count in the bar


def data_settings(name: str, data: str = "") -> DataConfig:
    """Those that a teacher was trained with; for one that no run of ours has made, those that the clip table
    `data` was cut with, else the defaults."""
    folder = place_of(name).resolve()
    if not folder.is_dir() or family_of(folder) != "pixel":
        return _as_cut(data)  # A published checkpoint's config.json is none of ours.
    if (folder / EXPORT).is_file():
        return read_export(folder).config.data
    checkpoint = checkpoint_of(folder)
    if checkpoint.parent.name == "checkpoints":
        folder = checkpoint.parent.parent  # A checkpoint's settings are its run's.
    run = RunDirectory(folder)
    if not run.config_file.is_file():
        return _as_cut(data)
    return from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file)).data


def _as_cut(data: str) -> DataConfig:
    cutting = cutting_of(data)
    return DataConfig() if cutting is None else DataConfig(view=cutting.view)


@dataclass(frozen=True)
class Inspected:
    """A teacher as it was found, and the size that the name it was called by stands for."""

    name: str
    teacher: Teacher
    claim: Claim | None


def load_to_inspect(
    name: str,
    layer: int = -1,
    final_norm: Literal["model", "none"] = "model",
    device: str = "cpu",
    dtype: str = "float32",
    num_frames: int | None = None,
) -> Inspected:
    """The teacher called `name`, also where it is not what its name says: that is for the check to report.

    `NAME=DIRECTORY` holds a directory against a published teacher's name, as `load_teacher` does.
    `num_frames`: for teachers that take clips of any length.
    """
    called, equals, place = name.partition("=")
    request: dict[str, Any] = {"layer": layer, "final_norm": final_norm, "device": device, "dtype": dtype}
    source: str | Path = name
    claim = claim_in(name)
    if called in NAMED:
        named = NAMED[called]
        if equals:
            require_directory(place, called)
        source = Path(place) if place else named.fetch()
        claim = Claim(called, named.dim, named.parameters, named.depth, named.heads)
    teacher = load_teacher(source, **request)
    if num_frames not in (None, teacher.geometry.num_frames):
        request["geometry"] = replace(teacher.geometry, num_frames=num_frames)
        teacher = load_teacher(source, **request)
    return Inspected(name, teacher, claim)


@dataclass(frozen=True)
class TeacherCheck:
    """All that a check found; `film` (T, H, W, 3) and `tokens` (N, D) are the first clip's, to be drawn."""

    inspected: Inspected
    facts: TeacherFacts
    findings: list[Finding]
    film: np.ndarray
    tokens: np.ndarray

    @property
    def is_bad(self) -> bool:
        return any(finding.severity == "bad" for finding in self.findings)

    @property
    def verdict(self) -> str:
        return verdict_of(self.findings)

    def figures(self) -> dict[str, Any]:
        """Everything that is a single value, under the names that `--json` prints."""
        teacher, facts = self.inspected.teacher, self.facts
        return {
            "name": self.inspected.name,
            "stored_name": teacher.name,
            "dim": teacher.dim,
            "depth": teacher.depth,
            "parameters": teacher.num_parameters,
            "claimed_dim": facts.claim.dim if facts.claim else None,
            "claimed_parameters": facts.claim.parameters or None if facts.claim else None,
            "geometry": str(teacher.geometry),
            "fingerprint": teacher.fingerprint,
            "qv_biases": facts.biases.total,
            "qv_biases_zero": facts.biases.zero,
            **asdict(facts.statistics),
            "places_in_order": f"{facts.token_order.found} of {facts.token_order.tried}",
            "positions": facts.positions.judgement,
            "unreadable_clips": facts.unreadable,
        }

    def to_json(self) -> dict[str, Any]:
        found = [asdict(finding) for finding in self.findings]
        return self.figures() | {"findings": found, "verdict": self.verdict}

    def picture(self) -> bytes:
        """The first clip, and the first three principal components of its tokens as colours: a PNG."""
        from salt_vla.reports.sheets import (
            pca_strip,
        )  # Matplotlib, which the other users of this file do without.

        teacher = self.inspected.teacher
        return pca_strip(self.film, {f"tokens of {teacher.name}": self.tokens}, teacher.geometry)


def check_teacher(
    inspected: Inspected, table: ClipTable, data: DataConfig, clips: int = CLIPS
) -> TeacherCheck:
    """Look at a teacher, and at its raw latents of up to `clips` clips spread over the table.

    Raises `DataError` when none of them can be read.
    """
    if clips < 1:
        raise ConfigError(f"--clips must be at least 1, not {clips}")
    teacher = inspected.teacher
    views, readable = open_views(table, data, teacher.geometry, num_views=1)
    if not readable:
        raise DataError(f"there are no clips to check a teacher with in {table.name}")
    places = np.linspace(0, len(readable) - 1, min(clips, len(readable))).astype(int)
    chosen = [readable[place] for place in np.unique(places)]
    with progress(f"Checking {inspected.name}", len(chosen) + PROBES, "clips") as advance:
        statistics, film, tokens, unreadable = _measure(teacher, views, chosen, advance)
        with torch.inference_mode():
            order = token_order(teacher.latents, teacher.geometry, teacher.own_rows)
            positions = position_order(teacher.latents, teacher.module, teacher.geometry)
        advance(PROBES)
    facts = TeacherFacts(
        dim=teacher.dim,
        depth=teacher.depth,
        heads=teacher.heads,
        dtype=str(teacher.dtype).removeprefix("torch."),
        parameters=teacher.num_parameters,
        is_raw=not teacher.normed,
        is_random=teacher.name.startswith("random:"),
        biases=query_value_biases(teacher.module),
        statistics=statistics,
        token_order=order,
        positions=positions,
        claim=inspected.claim,
        unreadable=unreadable,
    )
    return TeacherCheck(inspected, facts, findings_of(facts), film, tokens)


def _measure(
    teacher: Teacher, views: ViewSource, chosen: Sequence[str], advance: Advance
) -> tuple[LatentStatistics, np.ndarray, np.ndarray, int]:
    """Statistics over the clips that can be read; the first one's film and tokens; how many cannot."""
    sums = LatentSums(teacher.geometry.num_tokens, teacher.dim)
    first: tuple[np.ndarray, np.ndarray] | None = None
    reasons = []
    for start in range(0, len(chosen), BATCH_SIZE):
        keys = [(clip, 0) for clip in chosen[start : start + BATCH_SIZE]]
        records = list(read_or_quarantine(views, keys))
        reasons += [record.reason for record in records if record.array is None]
        films = [record.array for record in records if record.array is not None]
        if films:
            latents = teacher.latents(torch.from_numpy(np.stack(films)))
            sums.add(latents)
            first = first or (films[0], latents[0].float().cpu().numpy())
        advance(len(keys))
    if first is None:
        raise DataError(f"none of the {len(chosen)} chosen clips can be read; the first: {reasons[0]}")
    return sums.statistics(), *first, len(reasons)
