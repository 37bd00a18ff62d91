"""Checkpoints: a snapshot taken at once, written in the background, visible only when whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from salt_vla.config import EncoderConfig
from salt_vla.errors import RunError
from salt_vla.models.loading import WEIGHTS, read_tensors, save_encoder, step_directories, write_tensors
from salt_vla.rundir import read_json, writing_to
from salt_vla.targets import Task
from salt_vla.training.learner import Learner

PREDICTOR = "predictor.safetensors"
OPTIMIZER = "optimizer.safetensors"
TASK = "task.safetensors"  # of targets that change while a run goes on; else absent
STATE = "state.json"
UNFINISHED = ".writing-"


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything a resume needs, taken between two steps; `corrupt_records` as `skipped.Tally`."""

    step: int
    encoder_config: EncoderConfig
    encoder: dict[str, Tensor]
    predictor: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    task: dict[str, Tensor]
    corrupt_records: int = 0


def take_snapshot(learner: Learner, task: Task, step: int, corrupt_records: int = 0) -> Snapshot:
    def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}

    optimizer = {
        f"{name}/{key}": value
        for name, parameter in learner.named_parameters()
        for key, value in learner.optimizer.state[parameter].items()
    }
    encoder, predictor = learner.encoder.state_dict(), learner.predictor.state_dict()
    states = copied(encoder), copied(predictor), copied(optimizer), copied(task.state())
    return Snapshot(step, learner.encoder.config, *states, corrupt_records)


def write_snapshot(snapshot: Snapshot, folder: Path) -> Path:
    """Write to a temporary folder, flush, rename to `step_…`: a crash leaves old or new, never half."""
    target = folder / f"step_{snapshot.step:08d}"
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED))
        try:
            save_encoder(snapshot.encoder, snapshot.encoder_config, temporary)
            write_tensors(snapshot.predictor, temporary / PREDICTOR)
            write_tensors(snapshot.optimizer, temporary / OPTIMIZER)
            if snapshot.task:
                write_tensors(snapshot.task, temporary / TASK)
            state = {"step": snapshot.step, "corrupt_records": snapshot.corrupt_records}
            (temporary / STATE).write_text(json.dumps(state))
            for file in temporary.iterdir():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            temporary.chmod(0o755)
            if target.exists():
                _discard(target)
            temporary.replace(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that a crash cannot leave half of it under its name."""
    aside = Path(tempfile.mkdtemp(dir=checkpoint.parent, prefix=UNFINISHED)) / checkpoint.name
    checkpoint.replace(aside)
    shutil.rmtree(aside.parent)


class CheckpointWriter:
    """Writes snapshots in a thread, one at a time, and keeps the last `keep` of them.

    An error in the thread is raised at the next `save` or `wait`: it is never lost.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, learner: Learner, task: Task, step: int, corrupt_records: int = 0) -> None:
        self.wait()
        snapshot = take_snapshot(learner, task, step, corrupt_records)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write_snapshot(snapshot, self.folder)
            for _, old in step_directories(self.folder)[: -self.keep]:
                _discard(old)
        except BaseException as error:  # noqa: BLE001 - handed to the training thread, which raises it.
            self._error = error


def sweep_unfinished(folder: Path) -> None:
    """Remove what a killed writer left behind."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover)


def restore_latest(learner: Learner, task: Task, folder: Path) -> int:
    """Load the newest checkpoint into `learner` and `task`; its step, or 0 when there is none."""
    steps = step_directories(folder)
    if not steps:
        return 0
    step, path = steps[-1]
    try:
        learner.encoder.load_state_dict(read_tensors(path / WEIGHTS))
        learner.predictor.load_state_dict(read_tensors(path / PREDICTOR))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"checkpoint {path} does not fit this run's configuration: {reason}") from error
    _restore_optimizer(learner, path, step)
    task.restore(read_tensors(path / TASK) if (path / TASK).is_file() else {})
    return step


def corrupt_records_until(folder: Path) -> int:
    """How many damaged records the newest checkpoint had met; 0 for none, and for those that did not say."""
    steps = step_directories(folder)
    state = read_json(steps[-1][1] / STATE, dict) if steps else {}
    return int(state["corrupt_records"]) if "corrupt_records" in state else 0


def _restore_optimizer(learner: Learner, path: Path, step: int) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(path / OPTIMIZER).items():
        name, _, entry = key.rpartition("/")
        states.setdefault(name, {})[entry] = value
    counted = {int(state["step"]) for state in states.values()}
    if counted != {step}:
        raise RunError(f"checkpoint {path} says step {step}, but its optimizer has counted {sorted(counted)}")
    parameters = dict(learner.named_parameters())
    if states.keys() != parameters.keys():
        differing = ", ".join(sorted(states.keys() ^ parameters.keys()))
        raise RunError(
            f"checkpoint {path} does not fit this run's configuration: optimizer state of {differing}"
        )
    for name, state in states.items():
        device = parameters[name].device  # The count too: the fused optimizer wants it beside the parameters.
        learner.optimizer.state[parameters[name]] = {key: value.to(device) for key, value in state.items()}
