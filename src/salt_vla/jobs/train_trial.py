"""A training step that is really done, in a process of its own, to see what memory it takes.

Random pixels and targets: neither data nor a cache is read, and no run is touched.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from salt_vla.config import TrainConfig, from_json, to_json
from salt_vla.data.workers import signals_left_to_parent
from salt_vla.errors import ResourceError, UserError
from salt_vla.jobs.resources import Fitting, target_size

STEPS = 2  # The optimizer's moments are made at the end of the first.
TRIALS = 4
SMALLER = 0.9  # of the batch, where one did not fit


def peak_of_step(config: TrainConfig) -> int:
    """Bytes of the run's device at most, of a step of its batch in one process; 0 where it did not fit.
    Raises `ResourceError` where no step could be tried for another reason."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_trial, args=(theirs, to_json(config)), daemon=True)
    with signals_left_to_parent():
        process.start()
    theirs.close()
    try:
        said = ours.recv_bytes().decode()
    except EOFError:
        process.join()
        if (process.exitcode or 0) < 0:
            return 0  # The system has ended it for what it took, or torch has.
        raise ResourceError(
            "the step that was tried ended with an error of its own, which stands above: nothing was measured"
        ) from None
    finally:
        process.kill()
        process.join()
    if not said.isdecimal():
        raise ResourceError(f"no step could be tried: {said}")
    return int(said)


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


def _trial(connection: Connection, text: str) -> None:
    import torch

    from salt_vla.batches import Batch
    from salt_vla.masks import build_masks
    from salt_vla.targets import FrozenTargets, TargetSpace, Task
    from salt_vla.training.learner import build_learner
    from salt_vla.training.out_of_memory import is_out_of_memory
    from salt_vla.training.step import train_step

    config = from_json(TrainConfig, text)
    geometry, device, rows = config.geometry, config.runtime.device, config.batch_size
    width = target_size(config).dim

    class Constant(FrozenTargets):
        dim = width
        needs_records = False

        def targets(self, frames: torch.Tensor, records: torch.Tensor | None) -> torch.Tensor:
            return torch.ones(len(frames), geometry.num_tokens, width, device=frames.device)

    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    shape = (rows, geometry.num_frames, geometry.image_size, geometry.image_size, 3)
    masks = build_masks(config.masks, geometry)
    try:
        means = torch.zeros(geometry.num_tokens, width, device=device)
        task = Task(Constant(), TargetSpace(config.objective.targets, means))
        learner = build_learner(config, width, device)
        for step in range(STEPS):
            frames = torch.zeros(shape, dtype=torch.uint8)
            batch = Batch([("trial", 0)] * rows, frames, None, masks.sample(rows, config.seed, step))
            train_step(learner, batch.to(device), task, config, step, scored=False)
        connection.send_bytes(str(_peak(device)).encode())
    except UserError as error:
        connection.send_bytes(str(error).encode())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        connection.send_bytes(b"0")


def _peak(device: str) -> int:
    import torch

    if device.startswith("cuda"):
        free, whole = torch.cuda.mem_get_info(device)
        others = whole - free - torch.cuda.memory_reserved(device)  # The context; and who else is there.
        return others + torch.cuda.max_memory_reserved(device)
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(peak.split()[1]) * 1024
