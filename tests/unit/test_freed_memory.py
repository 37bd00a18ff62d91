"""Memory that was freed is used again, and given back when asked: by what the kernel counts of a process."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys

import pytest

PAGES = 64 * 2**20 // 4096
CODE = """
import json, resource, sys
import psutil
from salt_vla.freed_memory import give_back_freed_memory, keep_freed_memory

def faults_of_a_block():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"7" * (64 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = {"left": [faults_of_a_block() for _ in range(3)], "is_kept": keep_freed_memory()}
found["kept"] = [faults_of_a_block() for _ in range(3)]
held = psutil.Process().memory_info().rss
give_back_freed_memory()
found["given_back"] = held - psutil.Process().memory_info().rss
found["anew"] = faults_of_a_block()
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_blocks_that_were_freed_are_kept_and_given_back_when_asked() -> None:
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    found = json.loads(said)
    assert found["is_kept"]
    small = min(found["left"])
    if small < PAGES // 2:
        pytest.skip("this system hands out large pages: faults say nothing of bytes")
    assert found["kept"][0] >= PAGES // 2, "the first block grows the heap"
    assert max(found["kept"][1:]) < PAGES // 100
    assert found["given_back"] > 32 * 2**20 and found["anew"] >= PAGES // 2


def test_a_c_library_without_these_calls_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from salt_vla import freed_memory

    monkeypatch.setattr(freed_memory.ctypes, "CDLL", lambda _: object())
    assert freed_memory.keep_freed_memory() is False
    freed_memory.give_back_freed_memory()
