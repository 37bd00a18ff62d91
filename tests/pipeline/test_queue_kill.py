"""The queue's runner is killed again and again, at each of its transitions and at any moment: every job runs
exactly once. What counts is what the jobs themselves left behind.

Short in `make test`; `make torture` runs 100 jobs and 50 kills.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salt_vla.operations.queue import Queue
from salt_vla.operations.runner import Point

Salt = Any  # tests/pipeline/conftest.py
POINTS: tuple[Point, ...] = ("free", "taken", "launched", "running", "over", "ended")
ONCE = '"name": "demo_teacher"'  # What `recipes ls --json` says once each time it runs.

# A runner that kills itself when it passes a point of its own for the n-th time, as nothing else could.
KILLED_AT = """
import os, signal, sys
from salt_vla.operations.queue import Queue
from salt_vla.operations.runner import Runner

slot, where, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
left = {where: times}

def passing(point):
    if point in left:
        left[point] -= 1
        if left[point] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

Runner(slot, Queue(), print, seconds=0.05, passing=passing).run(until_empty=True)
"""


def add_jobs(salt: Salt, number: int, rng: random.Random, slots: tuple[str, ...] = ("any",)) -> list[str]:
    """Some of them wait for one before them, some for its end however; the slots in turn."""
    names = [f"j{n:03d}" for n in range(number)]
    for n, name in enumerate(names):
        waits = [rng.choice(["--after", "--after-any"]), names[rng.randrange(n)]] if n % 3 == 2 else []
        slot = slots[n % len(slots)]
        salt.ok("queue", "add", *waits, "--slot", slot, "--name", name, "--", "recipes", "ls", "--json")
    return names


def starts(folder: Path) -> int:
    """By the supervisor's own account."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    return sum(json.loads(line)["event"] == "started" for line in lines)


def outputs(folder: Path) -> int:
    """By what the job has said itself."""
    return (folder / "log.txt").read_text().count(ONCE)


def wait_for(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=1800)  # All that is left of 100 jobs, on a busy machine.
    return process.returncode


def require_once(salt: Salt, names: list[str]) -> None:
    """Each job ended well, ran once by two accounts, and its history tells of one way through."""
    queue = Queue(salt.root / "queue.db")
    jobs = {job.name: job for job in queue.jobs()}
    assert {name: jobs[name].state for name in names} == dict.fromkeys(names, "finished")
    folders = {name: salt.root / "jobs" / name for name in names}
    assert {name: starts(folder) for name, folder in folders.items()} == dict.fromkeys(names, 1)
    assert {name: outputs(folder) for name, folder in folders.items()} == dict.fromkeys(names, 1)
    for name in names:
        told = Counter(event.event for event in queue.history(name))
        assert told == Counter(["added", "taken", "started", "finished"]), name


def test_a_runner_killed_at_any_transition_loses_no_job_and_runs_none_twice(
    quick_salt: Salt, times: Callable[[int, int], int]
) -> None:
    rng = random.Random(8)
    names = add_jobs(quick_salt, times(10, 100), rng)
    kills = times(6, 50)
    for number in range(kills):
        point = POINTS[number % len(POINTS)]
        again = rng.randint(1, 2) if kills > len(POINTS) else 1
        process = quick_salt.start_python(KILLED_AT, "cpu", point, again)
        assert wait_for(process) == -signal.SIGKILL, (point, number)
    assert (
        wait_for(quick_salt.start("queue", "run", "--slot", "cpu", "--until-empty", "--seconds", 0.05)) == 0
    )
    require_once(quick_salt, names)


def test_two_slots_whose_runners_are_killed_at_any_moment_share_the_jobs(
    quick_salt: Salt, times: Callable[[int, int], int]
) -> None:
    rng = random.Random(4)
    names = add_jobs(quick_salt, times(6, 60), rng, ("cpu", "any", "gpu"))
    run = ("queue", "run", "--until-empty", "--seconds", 0.05, "--slot")
    killed = 0
    while killed < times(2, 14):
        runners = [quick_salt.start(*run, slot) for slot in ("cpu", "gpu0")]
        time.sleep(rng.uniform(0.2, 1.2))
        for process in rng.sample(runners, 2):
            killed += process.poll() is None
            process.kill()
            wait_for(process)
        if all(job.is_over for job in Queue(quick_salt.root / "queue.db").jobs()):
            names += add_more(quick_salt, len(names), rng)
    last = [quick_salt.start(*run, slot) for slot in ("cpu", "gpu0")]
    assert [wait_for(process) for process in last] == [0, 0]
    require_once(quick_salt, names)
    assert {job.ran_on for job in Queue(quick_salt.root / "queue.db").jobs()} == {"cpu", "gpu0"}


def add_more(salt: Salt, number: int, rng: random.Random) -> list[str]:
    names = [f"more{number + n}" for n in range(4)]
    for name in names:
        salt.ok("queue", "add", "--name", name, "--", "recipes", "ls", "--json")
    return names


def test_a_job_whose_runner_never_comes_back_is_written_down_by_another_slots(quick_salt: Salt) -> None:
    """What waits for its end would else wait for ever."""
    add_jobs(quick_salt, 1, random.Random(0))
    quick_salt.ok(
        "queue", "add", "--slot", "cpu", "--after", "j000", "--name", "b", "--", "recipes", "ls", "--json"
    )
    assert wait_for(quick_salt.start_python(KILLED_AT, "gpu0", "running", 1)) == -signal.SIGKILL
    assert (
        wait_for(quick_salt.start("queue", "run", "--slot", "cpu", "--until-empty", "--seconds", 0.05)) == 0
    )
    require_once(quick_salt, ["j000", "b"])
