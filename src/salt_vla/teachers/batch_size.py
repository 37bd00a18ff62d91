"""How many clips a teacher takes at once: found by doubling until memory says no, below a given limit.

Knows a teacher's `latents` and where its memory lies, not what the batches are for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from salt_vla.errors import ResourceError
from salt_vla.freed_memory import give_back_freed_memory
from salt_vla.teachers.base import FrozenTeacher

MAX_BATCH = 1024  # Beyond it no device is better used.
CPU_SHARE = 0.5  # Of the memory that is free, where no limit is given: other work goes on there.
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def largest_batch(teacher: FrozenTeacher, limit_bytes: int | None = None, most: int = 0) -> int:
    """The largest power of two of clips, up to `most` (0: `MAX_BATCH`), whose latents need at most
    `limit_bytes` beside the loaded teacher.

    Each batch is really run, and the next is tried only if twice the need of the last would fit. Without a
    limit: what a GPU has free, or half of what the computer has. Raises `ResourceError` when not even one
    clip fits.
    """
    on_gpu = torch.device(teacher.device).type == "cuda"
    if limit_bytes is None:
        free = torch.cuda.mem_get_info(teacher.device)[0] if on_gpu else psutil.virtual_memory().available
        limit_bytes = free if on_gpu else int(CPU_SHARE * free)
    measure = _peak_of_gpu if on_gpu else _peak_of_process
    measure(
        lambda: teacher.latents(_clips(teacher, 1)), teacher.device
    )  # What a first call allocates for good.
    fitting, batch, needed = 0, 1, 0
    while batch <= (most or MAX_BATCH) and 2 * needed <= limit_bytes:
        frames = _clips(teacher, batch)
        peak = measure(lambda frames=frames: teacher.latents(frames), teacher.device)  # type: ignore[misc]
        if peak is None:
            break
        # Clips and pixels are needed for certain, also where the C library gives nothing back.
        peak = max(peak, batch * teacher.geometry.clip_bytes * (1 + teacher.dtype.itemsize))
        if peak > limit_bytes:
            break
        fitting, batch, needed = batch, 2 * batch, peak
    if fitting == 0:
        raise ResourceError(
            f"one clip of {teacher.geometry} needs more than {limit_bytes / 1e6:,.3g} MB with teacher "
            f"{teacher.name}; raise the limit, or take a smaller teacher or a lower precision"
        )
    return fitting


def _clips(teacher: FrozenTeacher, batch: int) -> Tensor:
    g = teacher.geometry
    return torch.zeros(batch, g.num_frames, g.image_size, g.image_size, 3, dtype=torch.uint8)


def _peak_of_gpu(work: Callable[[], Tensor], device: str) -> int | None:
    """Bytes that `work` took at most beside what was there; None when the device ran out."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        work()
        torch.cuda.synchronize(device)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_of_process(work: Callable[[], Tensor], device: str) -> int | None:
    """The same by the high-water mark that Linux keeps of resident memory; None when an allocation fails."""
    give_back_freed_memory()
    before = psutil.Process().memory_info().rss
    try:
        CLEAR_REFS.write_text("5")  # Sets the mark back to what is resident now: proc_pid_clear_refs(5).
    except OSError as error:
        raise ResourceError(
            f"memory cannot be measured here ({CLEAR_REFS}: {error.strerror}); leave the limit out"
        ) from error
    try:
        work()
    except MemoryError:
        return None
    except RuntimeError as error:  # What torch's allocator raises on a CPU.
        if "memory" not in str(error):
            raise
        return None
    mark = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(mark.split()[1]) * 1024 - before
