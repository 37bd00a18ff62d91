"""What `doctor` asks of the software: Python, torch and its GPU, decoders, extras, the terminal. Libraries
are tried in processes of their own, so that one that crashes while it loads is a finding.
"""

from __future__ import annotations

import json
import locale
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from salt_vla.operations.doctor import Finding

SECONDS_TO_LOAD = 120.0
SECONDS_TO_ANSWER = 10.0
OLDEST_PYTHON = (3, 11)
_TORCH = """
import json, torch
about = {"version": torch.__version__, "cuda": torch.version.cuda or torch.version.hip or "", "gpus": []}
about["archs"] = torch.cuda.get_arch_list() if about["cuda"] else []
about["usable"] = torch.cuda.is_available()
if about["usable"]:
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        sum = float(torch.ones(8, device=f"cuda:{number}").sum())
        about["gpus"].append({"name": found.name, "memory": found.total_memory, "works": sum == 8})
print(json.dumps(about))
"""
_PYAV = "import av, json; print(json.dumps({'version': av.__version__}))"
_TORCHCODEC = """
import json, torchcodec, importlib.metadata
from torchcodec.decoders import VideoDecoder
print(json.dumps({"version": importlib.metadata.version("torchcodec")}))
"""


def _asked(program: str) -> tuple[dict[str, Any], str]:
    """What a Python program says as JSON in its last line, or how it ended without."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_LOAD,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {}, f"does not answer within {SECONDS_TO_LOAD:.0f} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["without a word"])[-1]
        return {}, f"exit code {done.returncode}: {last}"
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found, ""


def python() -> Iterable[Finding]:
    """Old Pythons do not even install the package; but an environment may be started with another one."""
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        yield Finding(
            "python", "refuse", f"{version}; 3.11 or newer is needed", "make setup PYTHON=python3.12"
        )
    else:
        yield Finding("python", "ok", f"{version}, {sys.executable}")


def torch() -> Iterable[Finding]:
    """Does it load, and does it compute on the GPUs that the driver shows?"""
    about, problem = _asked(_TORCH)
    if problem:
        yield Finding("torch", "refuse", f"cannot be loaded: {problem}", "rm -r .venv && make setup")
        return
    yield from judge_torch(about, driver_gpus())


def driver_gpus() -> list[str]:
    """Name and driver version of each GPU, as the driver's own tool lists them; empty without any."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return said.stdout.strip().splitlines() if said.returncode == 0 else []


def judge_torch(about: dict[str, Any], driver: list[str]) -> Iterable[Finding]:
    """`about` as `_TORCH` prints it."""
    build = f"torch {about['version']}" + (f", CUDA {about['cuda']}" if about["cuda"] else "")
    if not driver and not about["usable"]:
        yield Finding("torch", "ok", f"{build}; no GPU: everything runs on the CPU")
    elif not about["cuda"]:
        yield Finding("torch", "warn", f"{build} is a CPU build beside {driver[0]}", "make setup GPU=1")
    elif not about["usable"]:
        old = f"{build} cannot use {driver[0]} (driver too old, or another process holds it)"
        yield Finding("torch", "refuse", old, "install a newer driver, or a torch built for an older CUDA")
    else:
        for number, gpu in enumerate(about["gpus"]):
            says = f"{build}; GPU {number}: {gpu['name']}, {gpu['memory'] / 1e9:.0f} GB"
            yield Finding("torch", "ok" if gpu["works"] else "refuse", says)


def decoders() -> Iterable[Finding]:
    """PyAV is what films are read with; torchcodec a faster way for some of them."""
    about, problem = _asked(_PYAV)
    if problem:
        cure = "pip install -c constraints.txt --force-reinstall av"
        yield Finding("decoders", "refuse", f"PyAV cannot be loaded: {problem}", cure)
    else:
        yield Finding("decoders", "ok", f"PyAV {about['version']}")
    if not _is_installed("torchcodec"):
        yield Finding("decoders", "ok", "torchcodec is not installed; PyAV reads everything")
        return
    about, problem = _asked(_TORCHCODEC)
    if problem:
        text = f"torchcodec cannot be loaded, PyAV is used instead: {problem}"
        yield Finding("decoders", "warn", text, "apt install ffmpeg, or pip uninstall torchcodec")
    else:
        yield Finding("decoders", "ok", f"torchcodec {about['version']}")


def ffmpeg() -> Iterable[Finding]:
    """Only torchcodec needs its libraries."""
    program = shutil.which("ffmpeg")
    if program is None:
        yield Finding("ffmpeg", "ok", "not there; only torchcodec would need its libraries")
        return
    done = subprocess.run(
        [program, "-version"], capture_output=True, text=True, timeout=SECONDS_TO_ANSWER, check=False
    )
    yield Finding("ffmpeg", "ok", (done.stdout.splitlines() or [program])[0])


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def extras() -> Iterable[Finding]:
    """Which of the package's extras are there; none is needed for the core."""
    about = metadata.metadata("salt-vla")
    there: list[str] = []
    lacking: list[str] = []
    for extra in about.get_all("Provides-Extra") or []:
        needs = [text.split(";")[0] for text in metadata.requires("salt-vla") or [] if _asks(text, extra)]
        names = [_name_of(text) for text in needs]
        (there if all(map(_is_installed, names)) else lacking).append(extra)
    if there:
        yield Finding("extras", "ok", f"installed: {', '.join(there)}")
    if lacking:
        cure = f"pip install 'salt-vla[{lacking[0]}]'"
        yield Finding("extras", "ok", f"not installed, and not needed: {', '.join(lacking)}", cure)


def _asks(requirement: str, extra: str) -> bool:
    _, _, marker = requirement.partition(";")
    return any(f"extra == {quote}{extra}{quote}" in marker for quote in "\"'")


def _name_of(requirement: str) -> str:
    end = next((n for n, c in enumerate(requirement) if not (c.isalnum() or c in "-_.")), len(requirement))
    return requirement[:end]


def terminal() -> Iterable[Finding]:
    """Tables and bars are drawn with characters beyond ASCII."""
    encoding = locale.getpreferredencoding(False)
    if encoding.lower().replace("-", "") == "utf8":
        name = os.environ.get("TERM", "no terminal")
        yield Finding("terminal", "ok", f"{encoding}, {name}")
    else:
        yield Finding("terminal", "warn", f"the locale's encoding is {encoding}", "export LC_ALL=C.UTF-8")
