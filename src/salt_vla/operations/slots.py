"""Device slots: what a runner may use, told to its jobs by CUDA_VISIBLE_DEVICES, and held by one runner."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from salt_vla.errors import ConfigError, RunError
from salt_vla.rundir import root, writing_to

ANY = "any"
_SLOT = re.compile(r"cpu|gpu\d{1,2}")
SECONDS_TO_ANSWER = 20.0


def require_slot(slot: str) -> str:
    """A runner's: `cpu`, or one GPU. Raises `ConfigError`."""
    if not _SLOT.fullmatch(slot):
        raise ConfigError(f"there is no slot {slot!r}; a slot is cpu, gpu0, gpu1, …")
    return slot


def require_wish(slot: str) -> str:
    """A job's: a slot, `gpu` for whichever is free first, or `any`. Raises `ConfigError`."""
    if slot not in (ANY, "gpu") and not _SLOT.fullmatch(slot):
        raise ConfigError(f"--slot {slot!r} is none; a job takes any, cpu, gpu, or one GPU: gpu0, gpu1, …")
    return slot


def suits(wish: str, slot: str) -> bool:
    """Whether a job that asks for `wish` may run in `slot`."""
    return wish in (ANY, slot) or (wish == "gpu" and slot.startswith("gpu"))


def runner_name(slot: str) -> str:
    """Of the slot's runner where it is launched apart."""
    return f"queue-{slot}"


def require_own_name(name: str) -> None:
    """A `ConfigError` for a job with the name of a runner: it would wait for its own runner's end."""
    if _SLOT.fullmatch(name.removeprefix("queue-")) and name.startswith("queue-"):
        raise ConfigError(f"{name} is the name of a slot's runner; give the job another --name")


def environment_of(slot: str) -> dict[str, str]:
    """What a job sees of the machine's GPUs: one, or none."""
    return {"CUDA_VISIBLE_DEVICES": slot.removeprefix("gpu") if slot != "cpu" else ""}


def first_slot() -> str:
    """What a runner takes that was given no slot: the first GPU where there is one."""
    return "gpu0" if free_gpu_bytes("gpu0") is not None else "cpu"


def free_gpu_bytes(slot: str) -> int | None:
    """Memory free on the slot's GPU, as its driver's own tool says; None where there is none to ask."""
    program = shutil.which("nvidia-smi")
    if program is None or slot == "cpu":
        return None
    command = [program, "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    command += [f"--id={slot.removeprefix('gpu')}"]
    try:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    try:
        said = asked.communicate(timeout=SECONDS_TO_ANSWER)[0].strip()
    except subprocess.TimeoutExpired:  # A GPU that has failed lets it hang, and its end is not waited for.
        asked.kill()
        return None
    return int(said) * 2**20 if asked.returncode == 0 and said.isdigit() else None


def lock_file(slot: str) -> Path:
    return root() / f".queue-{slot}.lock"


@contextmanager
def holding(slot: str) -> Iterator[None]:
    """Within the block this process is the slot's one runner; its death, however it comes, frees the slot.
    Raises `RunError` where another holds it."""
    file = lock_file(slot)
    with writing_to(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"a runner is at work in slot {slot} already; `salt-vla queue ls` shows it, and --slot takes "
                "another one"
            ) from None
        yield
