"""Predictors by name: encoder and predictor of a run with the targets that it learned from, or a V-JEPA 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import VJEPA2Config, VJEPA2Model

from salt_vla.config import TrainConfig, from_json
from salt_vla.errors import RunError, UserError
from salt_vla.evaluation.surprise_models import VJEPA2_FRAMES, RunPredictor, VJEPA2Predictor
from salt_vla.hub import is_hub_id, local_folder
from salt_vla.jobs.teacher_train import EXPORT, checkpoint_of
from salt_vla.models import build_predictor
from salt_vla.models.loading import encoder_directory, load_encoder, read_tensors
from salt_vla.rundir import RunDirectory, read_json
from salt_vla.targets import EmaTargets, PixelTargets, TargetProvider, TeacherTargets
from salt_vla.teachers import Teacher, family_of, load_teacher, place_of, source_of, weights
from salt_vla.teachers.names import NAMED
from salt_vla.teachers.vjepa2 import IGNORED, clip_geometry
from salt_vla.training.checkpoint import PREDICTOR, TASK
from salt_vla.training.resume import stored_task

CACHE_PROVENANCE = "cache_provenance.json"


def load_predictor(name: str, teacher: str = "", device: str = "auto") -> RunPredictor | VJEPA2Predictor:
    """By a run's name or folder, a checkpoint, or a V-JEPA 2 checkpoint in transformers' format (a folder,
    hub id or published name).

    `teacher`: where a run's frozen teacher is, if it is not found by the name that its cache has noted.
    Raises `UserError` for what holds no predictor, and for a teacher that is not at hand.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if name in NAMED:
        folder = NAMED[name].fetch()
    else:
        folder = place_of(name)
        if not folder.is_dir() and is_hub_id(name) and not folder.parent.is_dir():
            folder = local_folder(name, "model")
    if not folder.is_dir():
        raise RunError(f"there is no predictor {name!r}: no run, no checkpoint's folder, no V-JEPA 2")
    family = family_of(folder)
    if family == "vjepa2":
        return _vjepa2(folder, name, device)
    if family != "pixel":
        raise RunError(
            f"{name} is a {family} encoder without a predictor; surprise needs a run of ours or a V-JEPA 2"
        )
    return _of_run(folder, name, teacher, device)


def _of_run(place: Path, name: str, teacher: str, device: str) -> RunPredictor:
    folder = encoder_directory(place).resolve()
    if (folder / EXPORT).is_file() or not (folder / PREDICTOR).is_file():
        raise RunError(
            f"{name} holds an encoder and no {PREDICTOR}: an export has none; give the run that it is of, or "
            "one of its checkpoints"
        )
    checkpoint = checkpoint_of(folder)
    run = RunDirectory(checkpoint.parent.parent)
    if not run.config_file.is_file():
        raise RunError(f"{checkpoint} lies in no run: nothing says what its predictor was trained to predict")
    config = from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))
    config = replace(config, runtime=replace(config.runtime, device=device))
    provider, target = _provider(run, config, teacher, device)
    task = stored_task(run, config, provider)
    task.restore(read_tensors(checkpoint / TASK) if (checkpoint / TASK).is_file() else {})
    encoder = load_encoder(folder)
    predictor = build_predictor(config.predictor, encoder.dim, provider.dim, config.geometry)
    try:
        predictor.load_state_dict(read_tensors(folder / PREDICTOR))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"{folder / PREDICTOR} does not fit the run's configuration: {reason}") from error
    group = config.masks.num_groups - 1
    said = f"{target}, as of step {int(checkpoint.name.removeprefix('step_'))}" * isinstance(
        provider, EmaTargets
    )
    step = config.data.view.frame_stride
    return RunPredictor(encoder, predictor, task, group, said or target, step, device)


def _provider(
    run: RunDirectory, config: TrainConfig, teacher: str, device: str
) -> tuple[TargetProvider, str]:
    """Where the run's targets come from when there is no cache of these films, and that in words."""
    target = config.target
    if target.provider == "pixels":
        return PixelTargets(config.geometry), "normalised pixels of the frames that come"
    if target.provider == "ema":
        provider = EmaTargets(config.encoder, target.momentum, config.steps, device)
        return provider, f"latents of the moving average of {run.name}"
    if target.provider == "teacher":
        found = load_teacher(teacher or source_of(target.source), config.geometry, device)
    else:
        found = _cached_teacher(run, config, teacher, device)
    return TeacherTargets(found), f"latents of {found.name} ({found.fingerprint[:12]})"


def _cached_teacher(run: RunDirectory, config: TrainConfig, teacher: str, device: str) -> Teacher:
    """The teacher whose latents the run's cache holds. Another one's would be another space, and so would the
    student's own: distances to them mean nothing."""
    file = run.path / CACHE_PROVENANCE
    if not file.is_file():
        raise RunError(f"{run.path} lacks {CACHE_PROVENANCE}, which says whose latents it was trained on")
    noted = read_json(file, dict)
    base = str(noted.get("teacher", "")).rsplit("/", 2)[0]
    layer = noted.get("layer", -1)
    try:
        found = load_teacher(
            teacher or base,
            config.geometry,
            device,
            str(noted.get("dtype", "float32")),
            layer,
            "model" if str(noted.get("teacher", "")).endswith("/norm") else "none",
        )
    except UserError as error:
        reason = str(error).partition(": ")[0]  # What else it could be is no help here.
        raise RunError(
            f"{run.name} was trained on latents of {noted.get('teacher')}, which is not at hand ({reason}); "
            "say where it is with --teacher"
        ) from error
    if found.fingerprint != noted.get("fingerprint"):
        raise RunError(
            f"{teacher or base} is not the teacher whose latents {run.name} was trained on: its fingerprint "
            f"is {found.fingerprint[:12]}, not {str(noted.get('fingerprint'))[:12]}; say with --teacher "
            "where that one is"
        )
    return found


def _vjepa2(folder: Path, name: str, device: str) -> VJEPA2Predictor:
    """`VJEPA2_FRAMES` frames a window; rotary positions are counted by the configuration."""
    config = weights.build_config(VJEPA2Config, weights.read_config(folder), folder)
    own = clip_geometry(config, None, name)
    geometry = replace(own, num_frames=min(own.num_frames, VJEPA2_FRAMES))
    config.frames_per_clip = geometry.num_frames
    held = weights.read_weights(folder)
    known = tuple(pattern for pattern in IGNORED if not pattern.startswith("predictor"))
    tensors = weights.mapped(held, ((r"^vjepa2\.", ""),), known, (), folder)
    if not any(key.startswith("predictor.") for key in tensors):
        raise RunError(f"the weights in {folder} ({name}) are an encoder's alone: surprise needs a predictor")
    model = weights.build_module(lambda: VJEPA2Model(config), folder)
    weights.load_weights(model, tensors, folder)
    return VJEPA2Predictor(model, geometry, weights.pixel_statistics(folder), device)
