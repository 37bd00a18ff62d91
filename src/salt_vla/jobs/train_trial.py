"""Training steps that are really done, in a process of its own, to see what memory and time they take.

Random pixels and targets: neither data nor a cache is read, and no run is touched.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from salt_vla.config import TrainConfig, from_json, to_json
from salt_vla.data.workers import signals_left_to_parent
from salt_vla.errors import ResourceError, UserError
from salt_vla.jobs.resources import Fitting, does_not_fit, memory_of, room_for_step, target_size

STEPS = 2  # The optimizer's moments are made at the end of the first.
MEASURED_STEPS = 20
TRIALS = 4
SMALLER = 0.9  # of the batch, where one did not fit


@dataclass(frozen=True)
class Measured:
    """What steps took: the median's `seconds`, the peak's `bytes` of the device, of which `room` was free."""

    steps: int
    seconds: float
    bytes: int
    room: int
    device: str
    precision: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measured_steps(config: TrainConfig, steps: int = MEASURED_STEPS) -> Measured:
    """So many steps of the run's batch on this machine, after a few to warm up. Raises `ResourceError` where
    they would not fit, or did not."""
    from salt_vla.training.runtime import resolve_device

    config = resolve_device(config)
    needed, (room, where) = memory_of(config), room_for_step(config)
    if needed.total > room:
        raise ResourceError(does_not_fit(config, needed, where))
    said = _said_by_trial(config, steps)
    if not said["peak"]:
        raise ResourceError(does_not_fit(config, needed, "a step that was tried ran out of memory"))
    seconds = statistics.median(said["seconds"][STEPS:])
    return Measured(steps, seconds, said["peak"], room, config.runtime.device, said["precision"])


def peak_of_step(config: TrainConfig) -> int:
    """Bytes of the run's device at most, of a step of its batch in one process; 0 where it did not fit.
    Raises `ResourceError` where no step could be tried for another reason."""
    return int(_said_by_trial(config)["peak"])


def _said_by_trial(config: TrainConfig, measured: int = 0) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_trial, args=(theirs, to_json(config), measured), daemon=True)
    with signals_left_to_parent():
        process.start()
    theirs.close()
    try:
        said: dict[str, Any] = json.loads(ours.recv_bytes())
    except EOFError:
        process.join()
        if (process.exitcode or 0) < 0:
            return {"peak": 0}  # The system has ended it for what it took, or torch has.
        raise ResourceError(
            "the step that was tried ended with an error of its own, which stands above: nothing was measured"
        ) from None
    finally:
        process.kill()
        process.join()
    if "problem" in said:
        raise ResourceError(f"no step could be tried: {said['problem']}")
    return said


def confirmed(config: TrainConfig, found: Fitting, gpus: int = 1) -> tuple[int, int]:
    """(batch size, bytes): the largest of `find_batch` that a step was really seen to fit with, made smaller
    until one does; (0, 0) when none did."""
    each = found.batch_size // gpus
    for _ in range(TRIALS):
        if each < 1:
            break
        peak = peak_of_step(replace(config, batch_size=each, grad_accum_steps=1))
        if 0 < peak <= found.limit:
            return each * gpus, peak
        each = int(each * SMALLER)
    return 0, 0


def _trial(connection: Connection, text: str, measured: int) -> None:
    import torch

    from salt_vla.batches import Batch
    from salt_vla.masks import build_masks
    from salt_vla.targets import FrozenTargets, TargetSpace, Task
    from salt_vla.training.learner import build_learner
    from salt_vla.training.out_of_memory import is_out_of_memory
    from salt_vla.training.runtime import apply_runtime, resolve_precision
    from salt_vla.training.step import train_step

    config = from_json(TrainConfig, text)
    geometry, device, rows = config.geometry, config.runtime.device, config.batch_size
    width = target_size(config).dim

    class Constant(FrozenTargets):
        dim = width
        needs_records = False

        def targets(self, frames: torch.Tensor, records: torch.Tensor | None) -> torch.Tensor:
            return torch.ones(len(frames), geometry.num_tokens, width, device=frames.device)

    if measured:
        apply_runtime(config)
    elif config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    shape = (rows, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    masks = build_masks(config.masks, geometry)
    try:
        means = torch.zeros(geometry.num_tokens, width, device=device)
        task = Task(Constant(), TargetSpace(config.objective.targets, means))
        learner = build_learner(config, width, device)
        seconds = []
        for step in range(STEPS + measured):
            frames = torch.zeros(shape, dtype=torch.uint8)
            batch = Batch([("trial", 0)] * rows, frames, None, masks.sample(rows, config.seed, step))
            if measured and not step:
                config = resolve_precision(config, batch.to(device), task)
            _wait_for(device)
            began = time.perf_counter()
            train_step(learner, batch.to(device), task, config, step, scored=False)
            _wait_for(device)
            seconds.append(time.perf_counter() - began)
        said = {"peak": _peak(device), "seconds": seconds, "precision": config.runtime.precision}
        connection.send_bytes(json.dumps(said).encode())
    except UserError as error:
        connection.send_bytes(json.dumps({"problem": str(error)}).encode())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        connection.send_bytes(json.dumps({"peak": 0}).encode())


def _wait_for(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _peak(device: str) -> int:
    import torch

    if device.startswith("cuda"):
        free, whole = torch.cuda.mem_get_info(device)
        others = whole - free - torch.cuda.memory_reserved(device)  # The context; and who else is there.
        return others + torch.cuda.max_memory_reserved(device)
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(peak.split()[1]) * 1024
