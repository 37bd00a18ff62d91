"""Checkpoints: a snapshot taken at once, written in the background, visible only when whole.

`best` is a link to the one whose held-out R² was largest; the state in each says which that was.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from salt_vla.config import EncoderConfig
from salt_vla.errors import ResourceError, RunError
from salt_vla.models.loading import (
    WEIGHTS,
    DamagedWeightsError,
    read_tensors,
    save_encoder,
    step_directories,
    write_tensors,
)
from salt_vla.rundir import flush_folder, read_json, writing_to
from salt_vla.targets import Task
from salt_vla.training.average import WeightAverage
from salt_vla.training.joint_files import OPTIMIZER, Joint, read_optimizer
from salt_vla.training.learner import Learner
from salt_vla.training.sharding import alike, own_rows, whole
from salt_vla.training.state import RunState

PREDICTOR = "predictor.safetensors"
TASK = "task.safetensors"  # of targets that change while a run goes on; else absent
PROBE = "online_probe.safetensors"  # the features that the online probe is fitted to; only where there is one
AVERAGE = "average"  # a folder: an encoder like any other, and its predictor; only with optimizer.average
STATE = "state.json"
BEST = "best"
UNFINISHED = ".writing-"


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything a resume needs, taken between two steps. `state`: a `RunState` as JSON, and the
    hash of the configuration. `joint`: who else writes rows of the optimizer's state; a process that is not
    the first has only these."""

    step: int
    encoder_config: EncoderConfig
    encoder: dict[str, Tensor]
    predictor: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    task: dict[str, Tensor] = field(default_factory=dict)
    average: dict[str, Tensor] = field(default_factory=dict)
    probe: Mapping[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    joint: Joint | None = None


def take_snapshot(
    learner: Learner,
    task: Task,
    state: RunState,
    average: WeightAverage | None = None,
    config_hash: str = "",
    probe: Mapping[str, Tensor] | None = None,
) -> Snapshot:
    """In a world of several processes every one has to ask, where parameters are shared out. `probe`: what
    the online probe needs, on the CPU, and not written to any more."""

    def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}

    def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
        return copied({name: tensor for name, tensor in rows if learner.world.is_first})

    optimizer = {
        f"{name}/{key}": own_rows(value)
        for name, parameter in learner.named_parameters()
        for key, value in learner.optimizer.state[parameter].items()
    }
    return Snapshot(
        step=state.step,
        encoder_config=learner.encoder.config,
        encoder=gathered(learner.encoder.state_dict()),
        predictor=gathered(learner.predictor.state_dict()),
        optimizer=copied(optimizer),
        task=gathered(task.state()),
        average=gathered(average.tensors) if average is not None else {},
        probe=probe or {},
        state=state.as_json() | {"config_hash": config_hash},
        joint=Joint(learner.world) if learner.is_sharded else None,
    )


def write_snapshot(snapshot: Snapshot, folder: Path) -> Path:
    """Write to a temporary folder, flush, rename to `step_…`: a crash leaves old or new, never half."""
    target = folder / f"step_{snapshot.step:08d}"
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder, prefix=UNFINISHED))
        try:
            if snapshot.joint is not None:
                snapshot.joint.invite(temporary)
            _fill(temporary, snapshot)
            if snapshot.joint is not None:
                snapshot.joint.wait_for_others()
            for file in [path for path in temporary.rglob("*") if path.is_file()]:
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
            temporary.chmod(0o755)
            if target.exists():
                _discard(target)
            for inner in {file.parent for file in temporary.rglob("*")}:
                flush_folder(inner)
            temporary.replace(target)
            flush_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def write_rows(snapshot: Snapshot, folder: Path) -> None:
    """A process' share of the checkpoint that the first writes."""
    joint = snapshot.joint
    assert joint is not None
    file = joint.invited_to(folder) / joint.file
    try:
        with writing_to(folder):
            write_tensors(snapshot.optimizer, file)
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    except ResourceError as error:
        joint.report(str(error))
        raise
    joint.report()


def _fill(folder: Path, snapshot: Snapshot) -> None:
    save_encoder(snapshot.encoder, snapshot.encoder_config, folder)
    write_tensors(snapshot.predictor, folder / PREDICTOR)
    write_tensors(snapshot.optimizer, folder / (snapshot.joint.file if snapshot.joint else OPTIMIZER))
    if snapshot.task:
        write_tensors(snapshot.task, folder / TASK)
    if snapshot.probe:
        write_tensors(dict(snapshot.probe), folder / PROBE)
    if snapshot.average:
        (folder / AVERAGE).mkdir()
        save_encoder(_below("encoder.", snapshot.average), snapshot.encoder_config, folder / AVERAGE)
        write_tensors(_below("predictor.", snapshot.average), folder / AVERAGE / PREDICTOR)
    (folder / STATE).write_text(json.dumps({"step": snapshot.step} | snapshot.state))


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _discard(checkpoint: Path) -> None:
    """Remove a checkpoint so that a crash cannot leave half of it under its name."""
    aside = Path(tempfile.mkdtemp(dir=checkpoint.parent, prefix=UNFINISHED)) / checkpoint.name
    checkpoint.replace(aside)
    shutil.rmtree(aside.parent)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the last `last`, those at multiples of `every` (0: none), and those that the
    state names: the best, and the one that a rollback goes back to."""

    last: int
    every: int = 0

    def discards(self, steps: Iterable[int], state: RunState) -> list[int]:
        """Which of `steps` may go."""
        named = {state.best_step, state.safe_step, state.planned_step}
        old = sorted(steps)[: -self.last]
        return [step for step in old if step not in named and not (self.every and step % self.every == 0)]


class CheckpointWriter:
    """Writes snapshots in a thread, one at a time, and removes what `keep` does not hold.

    An error in the thread is raised at the next `save` or `wait`: it is never lost.
    """

    def __init__(self, folder: Path, keep: Keep, config_hash: str = "") -> None:
        self.folder = folder
        self.keep = keep
        self.config_hash = config_hash
        self.longest = 0.0  # seconds that a checkpoint has taken, from the snapshot on
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        learner: Learner,
        task: Task,
        state: RunState,
        average: WeightAverage | None = None,
        probe: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.wait()
        self._is_first = learner.world.is_first
        if not (self._is_first or learner.is_sharded):
            return
        began = time.monotonic()
        snapshot = take_snapshot(learner, task, state, average, self.config_hash, probe)
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, replace(state), began), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, snapshot: Snapshot, state: RunState, began: float) -> None:
        try:
            if not self._is_first:
                return write_rows(snapshot, self.folder)
            write_snapshot(snapshot, self.folder)
            self.longest = max(self.longest, time.monotonic() - began)
            point_to_best(self.folder, state.best_step)
            there = dict(step_directories(self.folder))
            for step in self.keep.discards(there, state):
                _discard(there[step])
        except BaseException as error:  # noqa: BLE001 - handed to the training thread, which raises it.
            self._error = error


def point_to_best(folder: Path, best: int) -> None:
    """Let `best` be a link to the checkpoint of step `best`, in one rename; none where there is no such."""
    name, link = f"step_{best:08d}", folder / BEST
    if not (folder / name).is_dir():
        link.unlink(missing_ok=True)
    elif not link.is_symlink() or link.readlink() != Path(name):
        temporary = folder / f"{UNFINISHED}{BEST}"
        with writing_to(link):
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(name)
            temporary.replace(link)


def sweep_unfinished(folder: Path) -> None:
    """Remove what a killed writer left behind."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        with suppress(NotADirectoryError):
            shutil.rmtree(leftover) if not leftover.is_symlink() else leftover.unlink()


def discard_after(folder: Path, last_step: int) -> None:
    """Remove the checkpoints of later steps, which are given up."""
    for step, path in step_directories(folder):
        if step > last_step:
            _discard(path)


def restore_latest(
    learner: Learner,
    task: Task,
    folder: Path,
    average: WeightAverage | None = None,
    last_step: int | None = None,
) -> RunState:
    """Load the newest checkpoint (up to `last_step`) into `learner`, `task` and `average`; where the run
    stood then, which is at step 0 when there is none. Raises `RunError` where it is damaged or does not fit
    them, or where there is none although `last_step` is a later one than 0."""
    steps = [each for each in step_directories(folder) if last_step is None or each[0] <= last_step]
    if not steps and last_step:
        raise RunError(
            f"the run has to go back to step {last_step}, and {folder} holds no checkpoint of it or of an "
            "earlier one; put one back, or begin anew under another --name"
        )
    if not steps:
        return RunState()
    before = f"from step {steps[-2][0]}" if steps[1:] else "from its beginning"
    cure = f"remove the folder {steps[-1][1]}, and the run goes on {before}"
    try:
        return _restore(learner, task, average, *steps[-1], cure)
    except DamagedWeightsError as error:
        raise RunError(f"{error}; {cure}") from error
    except FileNotFoundError as error:
        raise RunError(f"{error.filename} is missing; {cure}") from error


def _restore(
    learner: Learner, task: Task, average: WeightAverage | None, step: int, path: Path, cure: str
) -> RunState:
    state = RunState.from_json(read_json(path / STATE, dict, cure), path / STATE)
    try:
        for module, file in ((learner.encoder, WEIGHTS), (learner.predictor, PREDICTOR)):
            module.load_state_dict(_placed(read_tensors(path / file), module.state_dict()))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise RunError(f"checkpoint {path} does not fit this run's configuration: {reason}") from error
    _restore_optimizer(learner, path, step, state.missed_updates)
    task.restore(read_tensors(path / TASK) if (path / TASK).is_file() else {})
    if average is not None:
        if not (path / AVERAGE).is_dir():
            raise RunError(
                f"checkpoint {path} holds no average of the weights; optimizer.average is kept from a run's "
                "first step on: give the new settings another --name"
            )
        encoder, predictor = (read_tensors(path / AVERAGE / name) for name in (WEIGHTS, PREDICTOR))
        named = {f"encoder.{name}": tensor for name, tensor in encoder.items()}
        named |= {f"predictor.{name}": tensor for name, tensor in predictor.items()}
        average.restore(_placed(named, average.tensors), path)
    return replace(state, step=step)


def _restore_optimizer(learner: Learner, path: Path, step: int, missed: int) -> None:
    states: dict[str, dict[str, Tensor]] = {}
    parameters = dict(learner.named_parameters())
    for key, value in read_optimizer(path):
        name, _, entry = key.rpartition("/")
        if name in parameters:
            # The count too: the fused optimizer wants it beside the parameters.
            value = (alike(value, parameters[name]) if value.ndim else value).to(parameters[name].device)
        states.setdefault(name, {})[entry] = value
    if not states and step == missed:
        return  # Not one update was sound.
    counted = {int(state["step"]) for state in states.values()}
    if counted != {step - missed}:
        less = f" less {missed} left out" * bool(missed)
        raise RunError(
            f"checkpoint {path} says step {step}{less}, but its optimizer has counted {sorted(counted)}"
        )
    if states.keys() != parameters.keys():
        differing = ", ".join(sorted(states.keys() ^ parameters.keys()))
        raise RunError(
            f"checkpoint {path} does not fit this run's configuration: optimizer state of {differing}"
        )
    for name, state in states.items():
        for entry, value in state.items():
            if value.ndim and value.dtype != parameters[name].dtype:
                raise RunError(
                    f"checkpoint {path} does not fit this run's configuration: {name}/{entry} of its "
                    f"optimizer is {value.dtype}, optimizer.parameters asks for {parameters[name].dtype}"
                )
        learner.optimizer.state[parameters[name]] = state


def _placed(tensors: dict[str, Tensor], models: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each as its namesake is: whole, or this process' rows of it."""
    return {
        name: alike(tensor, models[name]) if name in models else tensor for name, tensor in tensors.items()
    }
