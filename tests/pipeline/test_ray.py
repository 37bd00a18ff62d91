"""`cache build --ray`: builders on a cluster, here a small one on this machine, make the very same bytes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import salt_vla.jobs.build_cache as job
from salt_vla.cache import CacheWriter, Key, Manifest
from salt_vla.errors import CacheError, UserError
from salt_vla.jobs.build_on_ray import Builder, OnRay, count, cut
from salt_vla.jobs.pipeline import Pipeline
from salt_vla.rundir import root

SHARDS = 36  # one view each, of 18 clips

# `salt-vla …` whose builders, elsewhere, take their time, and write down who has made which shard.
SLOW = """
import sys
import salt_vla.cli.cache as cli
import salt_vla.jobs.build_cache as job

def slowly(*arguments):
    import os, time
    import salt_vla.cli.cache as cli
    import salt_vla.jobs.build_cache as job
    from salt_vla.cache import CacheWriter

    def telling(self, shard, records):
        time.sleep(0.2)
        is_ours = write(self, shard, records)
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {shard.number} {is_ours}\\n")
        return is_ours

    job.RECORDS_PER_SHARD = 1
    write, CacheWriter.write_shard = CacheWriter.write_shard, telling
    return cli._opened(*arguments)

log = sys.argv.pop(1)
job.RECORDS_PER_SHARD = 1
cli.partial, partial = lambda opened, *arguments: partial(slowly, *arguments), cli.partial
sys.exit(cli_main(sys.argv[1:]))
""".replace("cli_main", "__import__('salt_vla.cli').cli.main")


@pytest.fixture(autouse=True)
def needs_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install -c constraints.txt -e '.[scale]'")


@pytest.fixture
def arguments(workshop: Any) -> Callable[..., list[object]]:
    def of(out: Path, *more: object) -> list[object]:
        source = ("--teacher", workshop.teacher, "--data", workshop.table, "--split", "train")
        return ["cache", "build", *source, "--out", out, *more]

    return of


@pytest.fixture
def on_ray(
    salt: Any, tmp_path: Path, arguments: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`on_ray()` starts a build with two builders in `tmp_path / "cache"`."""
    short = tempfile.mkdtemp(prefix="ray-")  # Ray's sockets need a short path.
    # No secret in the home directory; builders that need not give way to the tests beside this one.
    settings = {"RAY_TMPDIR": short, "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    def start() -> subprocess.Popen[str]:
        command = arguments(tmp_path / "cache", "--ray", "local", "--ray-builders", 2)
        return salt.start_python(SLOW, tmp_path / "log", *command)

    yield start
    shutil.rmtree(short, ignore_errors=True)


def made(log: Path) -> list[tuple[int, int]]:
    """(process, shard), in order."""
    lines = log.read_text().splitlines() if log.exists() else []
    assert all(line.endswith(" True") for line in lines)
    return [(int(line.split()[0]), int(line.split()[1])) for line in lines]


def test_one_of_two_builders_is_killed_and_the_bytes_are_those_of_a_single_process(
    on_ray: Callable[..., subprocess.Popen[str]],
    arguments: Callable[..., list[object]],
    salt: Any,
    tmp_path: Path,
    tree: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = on_ray()
    log = tmp_path / "log"
    while len({pid for pid, _ in made(log)}) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    killed = made(log)[0][0]
    os.kill(killed, signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (0, f"{tmp_path / 'cache'}: complete\n"), err
    assert "Traceback" not in err and "Caching train latents: 36/36 views" in err
    assert sorted(number for _, number in made(log)) == list(range(SHARDS)), "each once"
    assert process.pid not in {pid for pid, _ in made(log)}
    monkeypatch.setattr(job, "RECORDS_PER_SHARD", 1)
    salt.ok(*arguments(tmp_path / "alone"))
    assert tree(tmp_path / "cache") == tree(tmp_path / "alone")


@pytest.fixture
def begun(tmp_path: Path) -> Callable[[int], AbstractContextManager[tuple[CacheWriter, Pipeline]]]:
    """A cache of six numbers in three shards, opened as by one more process; shard 1 cannot be made."""

    def compute(frames: np.ndarray) -> np.ndarray:
        if frames.max() == 3:
            raise CacheError("shard 1 cannot be made; ask for another")
        return frames

    @contextmanager
    def opened(workers: int) -> Iterator[tuple[CacheWriter, Pipeline]]:
        manifest = Manifest("latents", "float16", (1,), 2, 2, {})
        with CacheWriter(tmp_path / "cache", manifest, ["0", "2", "4"]) as writer:
            yield writer, Pipeline(writer, Numbers(), compute, 2, workers)

    return opened


class Numbers:
    """Views that are the number of their key."""

    def read_each(self, keys: Iterable[Key]) -> Iterator[tuple[Key, np.ndarray]]:
        for key in keys:
            yield key, np.array([int(key[0]) + key[1]], dtype=np.float32)


def test_a_builder_says_what_it_has_made_or_what_was_wrong(
    begun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", "elsewhere")
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    builder = Builder(begun, str(elsewhere), {"SALT_VLA_ROOT": str(tmp_path)}, workers=0)
    assert (Path.cwd(), root()) == (elsewhere, tmp_path)
    assert builder({"numbers": [0, 2]}) == {"keys": 4, "wrong": ""}
    assert {path.name for path in (tmp_path / "cache" / "shards").iterdir()} == {"000000.bin", "000002.bin"}
    assert builder({"numbers": [1]}) == {"keys": 0, "wrong": "shard 1 cannot be made; ask for another"}


def test_what_a_builder_found_wrong_is_raised_where_the_command_was_given(begun: Any) -> None:
    shown: list[int] = []
    answers = [{"keys": 4, "wrong": ""}, {"keys": 0, "wrong": "that is wrong"}, {"keys": 2, "wrong": ""}]
    with begun(0) as (_, pipeline), pytest.raises(UserError, match="that is wrong"):
        count(answers, pipeline, lambda amount, note="": shown.append(amount))
    assert shown == [4]


def test_without_ray_its_extra_is_named(
    salt: Any, tmp_path: Path, arguments: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    said = salt(*arguments(tmp_path / "cache", "--ray", "local")).sentence
    assert "pip install 'salt-vla[scale]'" in said
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--ray", "local", "--ray-builders", "-1"), "--ray-builders must be 0"),
        (("--ray", "local", "--shard", "1/2"), "--shard is for builders that are started by hand"),
        (("--ray", "127.0.0.1:1"), "no Ray cluster answers at '127.0.0.1:1'"),
        (("--ray", "nowhere"), "no Ray cluster answers at 'nowhere'"),
    ],
)
def test_what_cannot_work_is_a_sentence(
    salt: Any, tmp_path: Path, arguments: Callable[..., list[object]], more: tuple[str, ...], named: str
) -> None:
    assert named in salt(*arguments(tmp_path / "cache", *more)).sentence


@pytest.mark.parametrize(
    ("asked", "there_is", "share"),
    [
        ({}, {"CPU": 8.0}, (4, 2, 0)),
        ({}, {"CPU": 1.0}, (1, 1, 0)),
        ({}, {"CPU": 64.0, "GPU": 8.0}, (8, 8, 1)),
        ({"device": "cpu"}, {"CPU": 64.0, "GPU": 8.0}, (32, 2, 0)),
        ({"builders": 3}, {"CPU": 8.0}, (3, 2, 0)),
        ({"builders": 3, "num_workers": 5}, {"CPU": 8.0, "GPU": 4.0}, (3, 6, 1)),
        ({"builders": 16}, {"CPU": 8.0}, (16, 1, 0)),
    ],
)
def test_builders_share_what_the_cluster_has(
    asked: dict[str, Any], there_is: dict[str, float], share: tuple[int, int, int]
) -> None:
    assert OnRay(nullcontext, "local", **asked).share(there_is) == share


@pytest.mark.parametrize(
    ("missing", "builders", "sizes"),
    [(0, 2, []), (1, 8, [1]), (36, 2, [4] * 9), (37, 2, [4] * 9 + [1]), (1000, 8, [16] * 62 + [8])],
)
def test_every_missing_shard_is_in_one_task(missing: int, builders: int, sizes: list[int]) -> None:
    numbers = list(range(3, 3 + missing))
    tasks = [task["numbers"] for task in cut(numbers, builders)]
    assert [number for task in tasks for number in task] == numbers
    assert [len(task) for task in tasks] == sizes
