"""`teacher train` and `teacher export`: stage 1 through the loop of every run, and its encoder as a folder.

An export holds the encoder and the clips that it was made for; nothing of the optimizer or the predictor.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from salt_vla.config import ADDED_LATER, TrainConfig, from_json, to_json
from salt_vla.errors import ConfigError, RunError
from salt_vla.models.loading import CONFIG, WEIGHTS, encoder_directory
from salt_vla.rundir import RunDirectory, read_json, root, run_or_directory, write_text, writing_to
from salt_vla.teachers import load_teacher
from salt_vla.training.checkpoint import AVERAGE

EXPORT = "teacher.json"


@dataclass(frozen=True)
class ExportFacts:
    """`teacher.json`: the run and step that the encoder is of, that run's settings, and what it saw.

    `clip_table` and `files` are hashes (empty where the run has none on record); the table's own path is
    left out, since it means nothing elsewhere. `fingerprint` is that of the teacher as loaded by default.
    `averaged`: of the moving average of the weights.
    """

    name: str
    step: int
    fingerprint: str
    version: str
    clip_table: str
    files: str
    config: TrainConfig
    averaged: bool = field(default=False, metadata=ADDED_LATER)


def require_stage_one(config: TrainConfig, recipe: str) -> None:
    """Raises `ConfigError` for a recipe of stage 2."""
    if config.target.provider != "pixels":
        raise ConfigError(
            f"{recipe} is no stage-1 recipe: its targets are a {config.target.provider}'s latents, not "
            "pixels; use `salt-vla train`, or a recipe such as demo_teacher or vpixel_vitb"
        )


def export_teacher(name: str, out: Path) -> ExportFacts:
    """The encoder of a run (its last checkpoint), of one checkpoint, or of the averaged weights in one, as
    the folder `out`: whole or not at all.

    Raises `RunError` when `out` is there already, or when the source is no run of stage 1 or 2.
    """
    source = run_or_directory(name)
    if not source.is_dir():
        raise RunError(f"there is no run {name!r} in {root()}/runs, nor such a checkpoint's folder")
    if out.exists() or out.is_symlink():
        raise RunError(f"{out} is there already; remove it or export to another folder")
    folder = encoder_directory(source).resolve()
    checkpoint = checkpoint_of(folder)
    run = RunDirectory(checkpoint.parent.parent)
    if checkpoint.parent.name != "checkpoints" or not run.config_file.is_file():
        raise RunError(f"{source} is neither a run nor a checkpoint of one: nothing says how it was trained")
    facts = _facts(run, folder)
    with writing_to(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            _write(folder, facts, unfinished)
            unfinished.chmod(0o755)
            unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return facts


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint that an encoder's folder is, or that it lies in as the average of weights."""
    return folder.parent if folder.name == AVERAGE and (folder.parent / WEIGHTS).is_file() else folder


def read_export(folder: Path) -> ExportFacts:
    """Raises `ConfigError` for a damaged `teacher.json`."""
    file = folder / EXPORT
    return from_json(ExportFacts, file.read_text(errors="replace"), str(file))


def _facts(run: RunDirectory, folder: Path) -> ExportFacts:
    config = from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))
    seen = run.path / "clip_table_provenance.json"
    clips = read_json(seen, dict) if seen.is_file() else {}
    return ExportFacts(
        name=run.name,
        step=int(checkpoint_of(folder).name.removeprefix("step_")),
        fingerprint=load_teacher(folder).fingerprint,
        version=version("salt-vla"),
        clip_table=str(clips["clip_table"]) if "clip_table" in clips else "",
        files=str(clips["files"]) if "files" in clips else "",
        config=replace(config, data=replace(config.data, table="")),
        averaged=folder != checkpoint_of(folder),
    )


def _write(folder: Path, facts: ExportFacts, out: Path) -> None:
    """The three files, flushed to disk; what was written must load as the same teacher."""
    for file in (WEIGHTS, CONFIG):
        shutil.copyfile(folder / file, out / file)
    write_text(out / EXPORT, to_json(facts))
    for path in (*out.iterdir(), out):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if load_teacher(out).fingerprint != facts.fingerprint:
        raise RunError(f"{folder} changed while it was exported, or the disk is failing; export it again")
