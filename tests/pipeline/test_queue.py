"""The queue as it is used: jobs that really run, one after another, when what they wait for is there."""

from __future__ import annotations

import json
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.operations.endings import ending_of
from salt_vla.operations.launch import Attempt, Launch, Supervision, launch, record, supervision
from salt_vla.operations.processes import ProcessId
from salt_vla.operations.queue import Job, Queue, Wanted
from salt_vla.operations.runner import Runner
from salt_vla.recipes import get_recipe
from salt_vla.recipes.stored import store
from salt_vla.rundir import RunDirectory, Status

Salt = Any  # tests/pipeline/conftest.py
QUICK = ("recipes", "ls", "--json")
FAILS = ("sweep", "show", "nothing")
GONE = ProcessId(2**22 - 1, 1.0)
IDLE = ("runs", "tail", "-f", "watched")  # Works until it is asked to end; imports little.
SECONDS = 120  # that anything here may take at most


@pytest.fixture
def salt(quick_salt: Salt) -> Salt:
    return quick_salt


@pytest.fixture
def queue(salt: Salt) -> Queue:
    return Queue(salt.root / "queue.db")


@pytest.fixture
def runner(salt: Salt, queue: Queue) -> Callable[..., list[str]]:
    """`runner(slot="cpu", looks=0)`: a runner in this process until the queue is empty, or for so many looks;
    what it said."""

    def run(slot: str = "cpu", looks: int = 0) -> list[str]:
        said: list[str] = []
        made = Runner(slot, queue, said.append, seconds=0.02)
        with salt.here():
            if looks:
                for _ in range(looks):
                    made.look()
            else:
                made.run(until_empty=True)
        return said

    return run


@pytest.fixture
def idle(salt: Salt, queue: Queue) -> Callable[..., Job]:
    """A job that works until it is ended: it follows the log of a run that this process works on."""
    with salt.here():
        RunDirectory.named("watched").claim(total_steps=1)
    return lambda name="idle", slot="any": queue.add(Wanted(IDLE, str(salt.root), name, slot))


def add(salt: Salt, name: str, *options: object, command: tuple[str, ...] = QUICK) -> None:
    salt.ok("queue", "add", *options, "--name", name, "--", *command)


def states(queue: Queue) -> dict[str, str]:
    return {job.name: job.state for job in queue.jobs()}


def until(holds: Callable[[], object]) -> None:
    """Wait for it; a runner or a job of its own process needs its time."""
    end = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def test_jobs_run_in_their_order_and_say_how_they_ended(
    salt: Salt, queue: Queue, runner: Callable[..., list[str]]
) -> None:
    add(salt, "a")
    add(salt, "b", command=FAILS)
    add(salt, "c")
    salt.ok("queue", "move", "c", "--before", "b")
    said = runner()
    assert states(queue) == {"a": "finished", "b": "failed", "c": "finished"}
    started = [event.job for event in queue.history() if event.event == "started"]
    assert started == ["a", "c", "b"]
    assert queue.job("b").reason.startswith("there is no sweep at ")
    assert said[0].startswith("a: started: salt-vla recipes ls")
    assert said[1].startswith("a: finished")


def test_the_seeds_morning_can_be_said(
    salt: Salt,
    queue: Queue,
    runner: Callable[..., list[str]],
    workshop: Any,
    pixels: Callable[..., list[object]],
) -> None:
    """exp1 after the cache, then exp3 if it beats the number, else exp2."""
    cache = salt.root / "caches" / "latents"
    cache.mkdir(parents=True)
    manifest = json.loads((workshop.cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    e1 = pixels("e1", "--max-steps", 2)
    with salt.here():
        salt.ok("queue", "add", "--after-cache", cache, "--", *e1)
    beats = "min(e1.train.loss) < 10.76"
    add(salt, "e3", "--if", beats)
    add(salt, "e2", "--unless", beats)
    add(salt, "last", "--after", "e2")
    runner(looks=3)
    assert set(states(queue).values()) == {"waiting"}
    (cache / "manifest.json").write_text(json.dumps(manifest))
    runner()
    assert states(queue) == {"e1": "finished", "e3": "finished", "e2": "skipped", "last": "skipped"}
    loss = min(row["loss"] for row in salt.at("e1").metrics("train"))
    assert queue.job("e2").reason == f"min(e1.train.loss), {loss:.4g}, is < 10.76"
    assert queue.job("last").reason.startswith("e2 was skipped (min(e1.train.loss)")
    assert salt.json("runs", "show", "e1")["state"] == "finished"


def test_ls_says_why_each_job_waits(salt: Salt, queue: Queue, idle: Callable[..., Job]) -> None:
    idle("busy")
    running = queue.take(queue.job("busy"), "gpu0")
    assert running is not None
    queue.mark_running(running, "under supervisor 1")
    add(salt, "turn")
    add(salt, "after", "--after", "busy")
    add(salt, "time", "--at", "2999-01-01 03:00")
    add(salt, "space", "--when-free", "disk:9000TB")
    add(salt, "cache", "--after-cache", salt.root / "caches" / "ssv2")
    add(salt, "doomed", "--after", "busy")
    rows = {row["name"]: row["why"] for row in salt.json("queue", "ls")["jobs"]}
    assert rows["busy"] == "under supervisor 1"
    assert rows["turn"] == "waits for its turn after busy"
    assert rows["after"] == "waits for busy, which is running"
    salt.ok("queue", "pause", "turn")
    queue.end(running, "failed", "exit code 1")
    rows = {row["name"]: row for row in salt.json("queue", "ls")["jobs"]}
    why = {name: row["why"] for name, row in rows.items()}
    assert why["turn"] == "paused by name; waits for its turn"
    assert why["after"] == "will be skipped: busy failed (exit code 1)"
    assert why["time"] == "waits until 2999-01-01 03:00"
    assert why["space"].startswith("waits for 9000TB free of disk; ")
    assert why["cache"] == f"waits for a cache at {salt.root / 'caches' / 'ssv2'}, where none is yet"
    assert rows["time"]["expected"] > time.time()
    assert "No runner is at work; `salt-vla queue run --detach` starts one." in salt.ok("queue", "ls").out


def test_show_and_history_tell_all_of_a_job(
    salt: Salt, queue: Queue, runner: Callable[..., list[str]]
) -> None:
    add(salt, "a")
    add(salt, "b", "--after", "a", "--restarts", 2)
    runner()
    shown = salt.json("queue", "show", "b")
    assert shown["conditions"] == [{"condition": "a to end well", "state": "holds", "why": ""}]
    assert (shown["restarts"], shown["command"], shown["folder"]) == (
        2,
        [*QUICK],
        str(salt.root / "jobs" / "b"),
    )
    assert [row["event"] for row in shown["history"]] == ["added", "taken", "started", "finished"]
    assert [row["event"] for row in salt.json("queue", "history", "b")] == [
        "added", "taken", "started", "finished"
    ]  # fmt: skip
    assert {row["job"] for row in salt.json("queue", "history")} == {"", "a", "b"}
    for command in (("ls",), ("ls", "--all"), ("show", "b"), ("history",), ("history", "a")):
        assert "finished" in salt.ok("queue", *command).out


def test_a_job_begins_where_it_was_added_with_the_slots_device(
    salt: Salt,
    queue: Queue,
    runner: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    add(salt, "a", "--slot", "gpu", "--restarts", 1)
    monkeypatch.chdir("/")
    runner("gpu3")
    asked = json.loads((salt.root / "jobs" / "a" / "launch.json").read_text())
    assert (asked["directory"], asked["restarts"]) == (str(tmp_path), 1)
    assert asked["environment"] == {"CUDA_VISIBLE_DEVICES": "3"}
    assert queue.job("a").ran_on == "gpu3"


def test_what_waits_for_a_job_that_failed_is_skipped_and_retry_brings_all_back(
    salt: Salt, queue: Queue, runner: Callable[..., list[str]]
) -> None:
    add(salt, "a", command=("recipes", "show", "mine"))
    add(salt, "b", "--after", "a")
    add(salt, "c", "--after", "b")
    add(salt, "d", "--after-any", "c")
    runner()
    assert states(queue) == {"a": "failed", "b": "skipped", "c": "skipped", "d": "finished"}
    assert queue.job("c").reason.startswith("b was skipped (a failed (there is no recipe 'mine'")
    with salt.here():
        store(replace(get_recipe("demo_student"), name="mine", parent="demo_student"))
    assert salt.json("queue", "retry", "a") == ["a", "b", "c"]
    runner()
    assert set(states(queue).values()) == {"finished"}
    assert {job.name: job.attempt for job in queue.jobs()} == {"a": 2, "b": 1, "c": 1, "d": 1}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "give the command behind --"),
        ("-- runs ls", "is no command for the queue"),
        ("-- queue ls", "is no command for the queue"),
        ("-- fly away", "is no command for the queue"),
        ("-- cache fly", "is no command for the queue"),
        ("-- train nothing", "there is no recipe 'nothing'"),
        ("-- train demo_student optimizer.lx=3", "there is no field 'optimizer.lx'"),
        ("-- train demo_student optimizer.lr=fast", "optimizer.lr"),
        ("-- train demo_student --max-steps 0", "--max-steps must be at least 1"),
        ("-- train demo_student --processes 0", "--processes must be at least 1"),
        ("-- train demo_student --track nonsense", "there is no tracker 'nonsense'"),
        ("--name queue-gpu0 -- recipes ls", "queue-gpu0 is the name of a slot's runner"),
        ("-- train demo_student --detach", "leave out --detach"),
        ("-- train demo_student --help", "--help answers at once"),
        ("-- train demo_student --name ../x", "may hold only letters"),
        ("--name a -- train demo_student --name b", "differ; give one of them"),
        ("--name ../x -- recipes ls", "may hold only letters"),
        ("--restarts -1 -- recipes ls", "--restarts must be at least 0"),
        ("--slot tpu -- recipes ls", "--slot 'tpu' is none"),
        ("--after e9 -- recipes ls", "there is no job and no run 'e9' to wait for"),
        ("--if 'e9.val.loss < 3' -- recipes ls", "there is no job and no run 'e9' to wait for"),
        ("--if 'loss < 3' -- recipes ls", "does not read as RUN.KIND.COLUMN < NUMBER"),
        ("--at noonish -- recipes ls", "--at 'noonish' is no time"),
        ("--at +999999999999d -- recipes ls", "--at '+999999999999d' is no time"),
        ("--after-cache '' -- recipes ls", "--after-cache '' names no folder"),
        ("--name '' -- recipes ls", "job name '' may hold only letters"),
        ("-- train demo_student --name b --branch long", "'long' is not of the form RUN@STEP"),
        ("-- train demo_student --name b --branch nope@3", "there is no job and no run 'nope'"),
        ("-- train demo_student --plan", "--plan and --find-batch answer at once"),
        ("-- train demo_student --find-batch --gpus 2", "--plan and --find-batch answer at once"),
        ("-- train demo_student --data no/where", "--data 'no/where': there is no such file or folder"),
        ("-- train demo_student --data ''", "--data '': there is no such file or folder"),
        ("--after-cache c -- train demo_student --data no/where", "--data 'no/where': there is no such"),
        ("-- train demo_student --cache nowhere", "--cache 'nowhere': there is no such file or folder"),
        ("-- cache build --teacher t --out c --data no/where", "--data 'no/where': there is no such"),
        ("--when-free 20GB -- recipes ls", "does not read as gpu or ram or disk:20GB"),
    ],
)
def test_what_cannot_run_is_refused_when_it_is_added(
    salt: Salt, queue: Queue, arguments: str, sentence: str
) -> None:
    assert sentence in salt("queue", "add", *shlex.split(arguments)).sentence
    assert queue.jobs() == []


def test_paths_may_be_missing_where_something_is_waited_for_that_may_bring_them(
    salt: Salt, queue: Queue
) -> None:
    add(salt, "index")
    train = ("--", "train", "demo_student", "--name")
    salt.ok("queue", "add", "--after-cache", "c", *train, "a", "--cache", "c")
    salt.ok("queue", "add", "--after", "index", *train, "b", "--cache", "c", "--data", "made.parquet")
    salt.ok("queue", "add", "--if", "a.val.loss < 3", *train, "c", "--cache", "c")
    salt.ok("queue", "add", *train, "d", "--branch", "a@5")
    assert set(states(queue)) == {"index", "a", "b", "c", "d"}


def test_a_command_that_cannot_be_read_is_refused_when_it_is_added(salt: Salt, queue: Queue) -> None:
    answer = salt("queue", "add", "--", "train", "demo_student", "--sed", "3")
    assert answer.code == 2
    assert "--sed" in answer.err
    assert queue.jobs() == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("show a", "no job 'a' is or was in the queue"),
        ("cancel", "give the name of a job"),
        ("cancel a", "no job 'a' waits or runs"),
        ("retry a", "no job 'a' was in the queue"),
        ("move a", "no job 'a' waits"),
        ("move a --before b --last", "give --before or --last, not both"),
        ("pause a", "no job 'a' waits or runs"),
        ("run --slot tpu", "there is no slot 'tpu'"),
        ("run --slot cpu --seconds 0", "--seconds must be more than 0"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(salt: Salt, arguments: str, sentence: str) -> None:
    assert sentence in salt("queue", *arguments.split()).sentence


def test_a_queued_run_takes_the_recipes_name_and_is_there_once(salt: Salt, queue: Queue) -> None:
    answer = salt.ok("queue", "add", "--", "train", "demo_student")
    assert answer.out.startswith("demo_student: in the queue; waits for its turn\nNo runner is at work")
    assert (
        "'demo_student' is in the queue already"
        in salt("queue", "add", "--", "train", "demo_student").sentence
    )
    salt.ok("queue", "add", "--", "train", "demo_student", "--name", "other", "--processes", "2")
    jobs = {job.name: job for job in queue.jobs()}
    assert list(jobs) == ["demo_student", "other"]
    assert jobs["demo_student"].command == ("train", "demo_student", "--name", "demo_student")
    assert jobs["other"].command == ("train", "demo_student", "--name", "other")
    assert (jobs["demo_student"].processes, jobs["other"].processes) == (1, 2)


def test_changes_answer_with_what_they_did(salt: Salt, queue: Queue) -> None:
    for name in "abc":
        add(salt, name)
    assert salt.json("queue", "move", "c") == ["c", "a", "b"]
    assert salt.json("queue", "cancel", "a", "b") == ["a", "b"]
    assert salt.json("queue", "retry", "b") == ["b"]
    assert salt.json("queue", "pause") == ["the queue"]
    assert "The queue is paused" in salt.ok("queue", "ls").out
    assert salt.json("queue", "resume") == ["the queue"]
    assert not queue.is_paused()
    assert states(queue) == {"c": "waiting", "b": "waiting", "a": "cancelled"}


def test_a_paused_queue_starts_nothing_and_goes_on_when_resumed(
    salt: Salt, queue: Queue, runner: Callable[..., list[str]]
) -> None:
    add(salt, "a")
    salt.ok("queue", "pause")
    runner(looks=2)
    assert states(queue) == {"a": "waiting"}
    salt.ok("queue", "resume")
    runner()
    assert states(queue) == {"a": "finished"}


def test_one_slot_has_one_runner_and_two_slots_work_at_once(
    salt: Salt, queue: Queue, idle: Callable[..., Job]
) -> None:
    idle("one", "cpu")
    idle("two", "gpu")
    run = ("queue", "run", "--seconds", 0.05, "--slot")
    runners = [salt.start(*run, slot) for slot in ("cpu", "gpu0")]
    until(lambda: list(states(queue).values()) == ["running", "running"])
    second = salt.run(*run, "cpu")
    assert "a runner is at work in slot cpu already" in second.sentence
    shown = salt.json("queue", "ls")
    assert {row["slot"]: row["pid"] for row in shown["runners"]} == {
        "cpu": runners[0].pid, "gpu0": runners[1].pid
    }  # fmt: skip
    assert {job.name: job.ran_on for job in queue.jobs()} == {"one": "cpu", "two": "gpu0"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_runner_that_is_asked_to_end_leaves_its_job_at_work(
    salt: Salt, queue: Queue, idle: Callable[..., Job], number: signal.Signals
) -> None:
    idle()
    add(salt, "next")
    process = salt.start("queue", "run", "--slot", "cpu", "--seconds", 0.05)
    until(lambda: queue.job("idle").state == "running")
    process.send_signal(number)
    code, _, err = ended(process)
    assert code == 128 + number
    assert f"stopped by {number.name} in slot cpu, while idle goes on under its supervisor" in err
    works = supervision(salt.root / "jobs" / "idle")
    assert works is not None
    assert works.living()
    assert states(queue) == {"idle": "running", "next": "waiting"}
    assert queue.runners() == []
    assert queue.history()[-1].why == "slot cpu: stopped by a signal"
    salt.start("queue", "run", "--slot", "cpu", "--seconds", 0.05)
    with salt.here():
        salt.ok("runs", "stop", "idle")
    until(lambda: queue.job("next").state == "finished")
    assert queue.job("idle").state == "stopped"
    assert "runs stop" in queue.job("idle").reason


def test_a_detached_runner_that_is_killed_comes_back_and_its_job_never_stops(
    salt: Salt, queue: Queue, idle: Callable[..., Job]
) -> None:
    idle()
    assert "is at work" in salt.ok("queue", "run", "--slot", "cpu", "--seconds", 0.05, "--detach").out
    until(lambda: queue.job("idle").state == "running")
    job, runner = salt.root / "jobs" / "idle", salt.root / "jobs" / "queue-cpu"
    assert "already" in salt("queue", "run", "--slot", "cpu", "--detach").sentence
    works, first = supervision(job), supervision(runner)
    assert works is not None
    assert first is not None
    before, victim = works.living(), first.living()
    assert victim is not None
    assert victim.send(signal.SIGKILL)
    until(lambda: [event.event for event in queue.history()].count("runner started") == 2)
    add(salt, "next")
    after = supervision(job)
    assert after is not None
    assert before is not None
    assert after.living() == before
    assert len(after.attempts) == 1
    salt.ok("runs", "stop", "idle")
    until(lambda: queue.job("next").state == "finished")
    salt.ok("runs", "stop", "queue-cpu")
    until(lambda: not queue.runners())


def test_a_job_that_lost_its_supervisor_gets_another_and_is_not_started_again(
    salt: Salt, queue: Queue, idle: Callable[..., Job], runner: Callable[..., list[str]]
) -> None:
    idle()
    runner(looks=1)
    folder = salt.root / "jobs" / "idle"
    works = supervision(folder)
    assert works is not None
    before = works.living()
    assert works.supervisor.send(signal.SIGKILL)
    until(lambda: not works.supervisor.is_alive())
    said = runner(looks=2)
    assert said == ["idle: its supervisor is gone; another one takes over"]
    now = supervision(folder)
    assert now is not None
    assert now.is_at_work
    assert now.living() == before
    assert queue.job("idle").state == "running"


def test_what_is_under_way_by_hand_is_waited_for(
    salt: Salt, queue: Queue, runner: Callable[..., list[str]]
) -> None:
    with salt.here():
        RunDirectory.named("watched").claim(total_steps=1)
        by_hand = launch(Launch("a", IDLE, "by hand", directory=str(salt.root)))
    add(salt, "a")
    runner(looks=2)
    assert states(queue) == {"a": "waiting"}
    assert "is under way and was not started by the queue" in salt.json("queue", "ls")["jobs"][0]["why"]
    with salt.here():
        salt.ok("runs", "stop", "a")
    until(lambda: not by_hand.supervisor.is_alive())
    runner()
    assert states(queue) == {"a": "finished"}


def test_a_damaged_launch_keeps_its_slot_and_ends_no_runner(
    salt: Salt, queue: Queue, idle: Callable[..., Job], runner: Callable[..., list[str]]
) -> None:
    """Whether the job works cannot be told, so nothing is started beside it."""
    idle("damaged", "cpu")
    add(salt, "next", "--slot", "cpu")
    runner(looks=1)
    file = salt.root / "jobs" / "damaged" / "supervision.json"
    whole = file.read_text()
    file.write_text(whole[:40])
    said = runner(looks=3)
    assert len(said) == 1
    assert f"{file} is damaged" in said[0]
    assert states(queue) == {"damaged": "running", "next": "waiting"}
    file.write_text(whole)
    with salt.here():
        salt.ok("runs", "stop", "damaged")
    runner()
    assert states(queue) == {"damaged": "stopped", "next": "finished"}


def test_a_damaged_launch_of_before_ends_no_runner_and_loses_no_job(
    salt: Salt, queue: Queue, runner: Callable[..., list[str]]
) -> None:
    for name in ("asked", "went"):
        (salt.root / "jobs" / name).mkdir(parents=True)
        add(salt, name)
    add(salt, "next")
    (salt.root / "jobs" / "asked" / "launch.json").write_text("{")
    file = salt.root / "jobs" / "went" / "supervision.json"
    file.write_text("{")
    process = salt.start("queue", "run", "--slot", "cpu", "--seconds", 0.05, "--until-empty")
    until(lambda: queue.job("next").state == "finished")
    assert states(queue) == {"asked": "finished", "went": "waiting", "next": "finished"}
    # Whether somebody works there cannot be told: nothing is started beside it.
    assert "supervision.json is damaged" in salt.json("queue", "ls")["jobs"][0]["why"]
    file.unlink()
    assert ended(process)[0] == 0
    assert queue.job("went").state == "finished"


def test_a_job_whose_folder_breaks_while_it_is_started_waits_and_ends_no_runner(
    salt: Salt, queue: Queue, runner: Callable[..., list[str]]
) -> None:
    add(salt, "a")
    queue.take(queue.job("a"), "cpu")
    folder = salt.root / "jobs" / "a"
    folder.mkdir(parents=True)
    (folder / "supervision.json").write_text("{")
    runner(looks=1)
    assert states(queue) == {"a": "waiting"}
    assert "is damaged" in queue.history("a")[-1].why
    (folder / "supervision.json").unlink()
    runner()
    assert states(queue) == {"a": "finished"}


def test_a_machine_that_refuses_is_asked_again_and_no_job_is_lost(salt: Salt, queue: Queue) -> None:
    (salt.root / "jobs").write_text("a file where folders should be")
    add(salt, "a")
    process = salt.start("queue", "run", "--slot", "cpu", "--seconds", 0.1, "--until-empty")
    until(lambda: queue.job("a").state == "starting")
    time.sleep(0.3)
    assert process.poll() is None
    (salt.root / "jobs").unlink()
    code, out, _ = ended(process)
    assert code == 0
    assert "tried again in" in out
    assert states(queue) == {"a": "finished"}
    assert queue.job("a").attempt == 1


def test_a_disk_that_is_full_at_night_has_space_again_in_the_morning(salt: Salt, queue: Queue) -> None:
    process = salt.start("queue", "run", "--slot", "cpu", "--seconds", 0.1)
    until(queue.runners)
    limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, limits[1]))
    add(salt, "a")
    time.sleep(0.5)
    assert states(queue) == {"a": "waiting"}
    assert process.poll() is None
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
    until(lambda: queue.job("a").state == "finished")
    process.terminate()
    _, out, _ = ended(process)
    assert "make space; no job is lost, and the same command goes on; tried again in" in out
    assert [event.event for event in queue.history("a")] == ["added", "taken", "started", "finished"]


@pytest.fixture
def ended_run(salt: Salt, queue: Queue) -> Callable[[int], Job]:
    """A run of the queue that has written its last word, and whose process then ended with that code."""

    def make(code: int) -> Job:
        job = queue.add(Wanted(("train", "demo_student", "--name", "e1"), str(salt.root), "e1"))
        taken = queue.take(job, "cpu")
        assert taken is not None
        queue.mark_running(taken, "under supervisor 1")
        with salt.here():
            run, folder = RunDirectory.named("e1"), taken.folder
            run.path.mkdir(parents=True)
            said = Status("finished", exit_reason="finished", ending="finished")
            run.set_status(replace(said, pid=GONE.pid, started=GONE.started))
            (folder / "launch.json").write_text(json.dumps(asdict(taken.launch)))
            now = Supervision(taken.token, "ended", GONE, (Attempt(GONE, code),), exit_reason="finished")
            judged = ending_of(folder, now, now.attempts[0])
            record(folder, replace(now, attempts=(Attempt(GONE, judged.code, judged.reason),)))
        return taken

    return make


def test_a_run_that_has_finished_counts_as_finished_whatever_ended_its_process_then(
    salt: Salt, queue: Queue, runner: Callable[..., list[str]], ended_run: Callable[[int], Job]
) -> None:
    ended_run(-signal.SIGKILL)
    add(salt, "next", "--after", "e1")
    runner()
    assert states(queue) == {"e1": "finished", "next": "finished"}


def test_the_report_of_what_ended_does_not_delay_what_comes_next(
    salt: Salt, queue: Queue, ended_run: Callable[[int], Job]
) -> None:
    ended_run(0)
    add(salt, "next", "--after", "e1")
    page, seen = salt.root / "PROGRESS.md", []
    made = Runner("cpu", queue, print, passing=lambda point: seen.append((point, page.is_file())))
    with salt.here():
        made.look()
    assert seen == [(point, False) for point in ("over", "ended", "free", "taken", "launched", "running")]
    assert re.search(r"^\| e1 \| finished \|", page.read_text(), re.MULTILINE)


NO_TORCH = """
import sys
from salt_vla.operations.queue import Queue
from salt_vla.operations.runner import Runner
from salt_vla.recipes import get_recipe
from salt_vla.recipes.stored import store
from salt_vla.rundir import RunDirectory
Runner("cpu", Queue(), print, seconds=0.02).run(until_empty=True)
print("loaded:", *sorted({"torch", "transformers", "av", "sklearn", "matplotlib"} & set(sys.modules)))
"""


def test_the_runner_never_loads_torch(salt: Salt, queue: Queue) -> None:
    add(salt, "a", "--when-free", "ram:1MB", "--when-free", "disk:1MB", "--at", "+0s")
    add(salt, "b", "--after", "a")
    code, out, _ = ended(salt.start_python(NO_TORCH))
    assert code == 0
    assert out.splitlines()[-1] == "loaded:"
    assert states(queue) == {"a": "finished", "b": "finished"}


@pytest.mark.skipif(not shutil.which("faketime"), reason="sets clocks with faketime")
def test_a_clock_that_jumps_neither_loses_a_job_nor_doubles_one(salt: Salt, queue: Queue) -> None:
    """Runners that believe to live tomorrow, yesterday, and today again."""

    shown = subprocess.run(["faketime", "-f", "+0d", "env"], capture_output=True, text=True, check=True)
    library = next(line for line in shown.stdout.splitlines() if line.startswith("LD_PRELOAD="))

    def at(jump: str) -> subprocess.Popen[str]:
        """Not by faketime itself, which would stay between us and the runner."""
        program = [sys.executable, "-m", "salt_vla", "queue", "run", "--slot", "cpu", "--seconds", "0.05"]
        return salt.start_command(["env", library, f"FAKETIME={jump}", *program])

    add(salt, "tonight", "--at", "+2h")
    add(salt, "now")
    early = at("+0d")
    until(lambda: queue.job("now").state == "finished")
    early.kill()
    assert queue.job("tonight").state == "waiting"
    late = at("+1d")
    until(lambda: queue.job("tonight").state == "finished")
    add(salt, "more")
    until(lambda: queue.job("more").state == "finished")
    late.kill()
    back = at("-2d")
    add(salt, "again", "--after", "more")
    until(lambda: queue.job("again").state == "finished")
    back.kill()
    times = [event.time for event in queue.history()]
    assert times != sorted(times)
    for job in queue.jobs():
        told = [event.event for event in queue.history(job.name)]
        assert told == ["added", "taken", "started", "finished"], job.name
        lines = (salt.root / "jobs" / job.name / "events.jsonl").read_text().splitlines()
        assert [json.loads(line)["event"] for line in lines].count("started") == 1
