"""What the C library does with memory that was freed: kept for the next batch, or given back to the system.

Knows glibc's calls; where another C library has none of them, nothing happens.
"""

from __future__ import annotations

import ctypes
import gc

# mallopt(3): parameters of glibc's malloc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**31 - 1  # free at the heap's end: the largest value that mallopt takes
LARGEST_KEPT = 512 * 2**20  # A block of more is mapped and unmapped by itself.


def keep_freed_memory() -> bool:
    """From now on blocks that are freed stay with this process, up to 2 GB of them; whether they do.

    By itself glibc maps every block of 32 MB and more anew, and the system fills its pages with zeros at each
    batch. `benchmarks/allocator.py` says what that costs, and what keeping them takes at the peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, KEPT_BYTES))


def give_back_freed_memory() -> None:
    """To the system: memory that earlier work has freed, used again, would not be seen as a need."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
