"""Runs that belong to no terminal: whatever is killed around them they go on, and what kills them is told.

All processes, signals and terminals here are real. Where any long-lived command will do it is the queue's
runner, which starts quickest.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from salt_vla.identity import ProcessId, identity
from salt_vla.operations.heartbeat import last_heartbeat
from salt_vla.operations.launch import Attempt, Launch, Supervision, events, launch, supervision, take_over
from salt_vla.operations.processes import descendants
from salt_vla.rundir import RunDirectory

PATIENCE = 300.0  # Seconds; others may use this machine too.
Command = Callable[..., list[object]]
IDLE = ("queue", "run", "--slot", "cpu")
LONG = {"steps": 4000, "runtime__checkpoint_every": 20, "runtime__validate_every": 1000}


def wait_until(holds: Callable[[], Any]) -> Any:
    until = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
    return found


def launched(folder: Path) -> Supervision:
    found = supervision(folder)
    assert found is not None
    return found


def over(folder: Path) -> Supervision:
    return wait_until(lambda: (now := launched(folder)).is_over and now)


def steps_of(run: RunDirectory) -> int:
    return len(run.metrics("train"))


def happened(folder: Path, what: str) -> int:
    return sum(event["event"] == what for event in events(folder))


@pytest.fixture
def begin(salt: Any) -> Callable[..., Path]:
    """`begin(command, **of_the_launch)`: launched under a root of its own; its folder."""

    def start(command: list[object] | tuple[str, ...], name: str = "", **more: Any) -> Path:
        words = tuple(map(str, command))
        name = name or (words[words.index("--name") + 1] if "--name" in words else "job")
        wanted = Launch(name, words, uuid4().hex, **{"backoff_seconds": 0.05} | more)
        with salt.here():
            launch(wanted)
            return wanted.folder

    return start


# A shell in a terminal of its own starts a command; then terminal, session or family of the shell go.
SHELL = """
import os, pty, signal, sys
import psutil
how, command = sys.argv[1], sys.argv[2]
shell, terminal = pty.fork()
if shell == 0:
    os.execvp("bash", ["bash", "--norc", "-i"])
os.write(terminal, (command + "; echo do''ne $?\\n").encode())
said = b""
while b"done 0" not in said:
    said += os.read(terminal, 4096)
    assert b"done 2" not in said, said
family = [shell, *(child.pid for child in psutil.Process(shell).children(recursive=True))]
session = [pid for pid in psutil.pids() if psutil.pid_exists(pid) and os.getsid(pid) == shell]
if how == "exit":
    os.write(terminal, b"exit\\n")
elif how == "terminal":
    os.close(terminal)
else:
    for pid in session if how == "session" else family:
        os.kill(pid, signal.SIGKILL)
os.waitpid(shell, 0)
print(len(session), len(family))
"""


def test_a_run_outlives_its_shell(salt: Any, pixels: Command, times: Any) -> None:
    """However the shell ends: once, 20 times in the long form."""
    ways = ("session", "terminal", "family", "exit")
    shells = []
    for number in range(times(1, 20)):
        command = " ".join(map(str, pixels(f"r{number}", "--detach")))
        shells.append(salt.start_python(SHELL, ways[number % 4], f"{sys.executable} -m salt_vla {command}"))
        assert shells[-1].wait(PATIENCE) == 0, shells[-1].stderr.read()
    for number in range(len(shells)):
        assert over(salt.root / "runs" / f"r{number}").ended_well
    for number in range(len(shells)):
        status = salt.at(f"r{number}").status()
        assert (status.state, status.step) == ("finished", 40)
        assert len(launched(salt.root / "runs" / f"r{number}").attempts) == 1
    print(f"{len(shells)} of {len(shells)} detached runs went on to their end without their shells")


def test_what_is_killed_is_started_again_and_ends_in_the_same_bits(
    salt: Any, pixels: Command, begin: Any, curve: Any, weights: Any, times: Any
) -> None:
    kills = times(1, 10)
    settings = {"steps": 60, "runtime__validate_every": 10, "runtime__checkpoint_every": 3}
    salt.ok(*pixels("whole", **settings))
    folder, run = begin(pixels("killed", **settings), restarts=kills), salt.at("killed")
    for number in range(kills):
        wait_until(lambda n=number: launched(folder).living() and len(launched(folder).attempts) == n + 1)
        wait_until(lambda n=number: steps_of(run) > 50 * (n + 0.2) / kills)
        process = launched(folder).living()
        assert process is not None and process.send(signal.SIGKILL)
    end = over(folder)
    assert [attempt.code for attempt in end.attempts] == [-signal.SIGKILL] * kills + [0]
    assert "SIGKILL" in end.attempts[0].reason and end.exit_reason == "finished"
    assert curve(run) == curve(salt.at("whole"))
    assert weights(run) == weights(salt.at("whole"))
    assert len(run.status().resumed_from) > 0
    waits = [event["seconds"] for event in events(folder) if event["event"] == "waiting"]
    assert waits == [pytest.approx(0.05 * 2**n) for n in range(kills)]


def test_a_loader_that_crashes_is_one_failure_and_the_run_goes_on(
    salt: Any, pixels: Command, begin: Any, curve: Any, times: Any
) -> None:
    """SIGSEGV in the process that reads clips."""
    if not times(0, 1):
        pytest.skip("starts six processes with torch: with --torture")
    settings = {"data__num_workers": 1, "data__store_views": "false", "steps": 60}
    salt.ok(*pixels("whole", **settings))
    folder, run = begin(pixels("run", **settings), restarts=1), salt.at("run")
    process = wait_until(lambda: launched(folder).living())
    wait_until(lambda: steps_of(run) > 2)
    loaders = [each for each in descendants(process) if "spawn_main" in " ".join(cmdline(each))]
    assert loaders and loaders[0].send(signal.SIGSEGV)
    end = over(folder)
    assert end.ended_well and curve(run) == curve(salt.at("whole"))
    assert [attempt.code for attempt in end.attempts] == [2, 0]
    assert "loader process" in end.attempts[0].reason and "SIGSEGV" in end.attempts[0].reason
    assert not any(each.is_alive() for each in loaders)


def cmdline(process: ProcessId) -> list[str]:
    return psutil.Process(process.pid).cmdline()


def test_a_run_goes_on_without_its_supervisor_and_another_one_takes_its_place(
    salt: Any, pixels: Command, begin: Any
) -> None:
    """Twice; the second time the run ends while nobody looks, and its end is told all the same."""
    folder, run = (
        begin(pixels("run", steps=100, runtime__validate_every=50, runtime__checkpoint_every=20)),
        salt.at("run"),
    )
    wait_until(lambda: steps_of(run) > 0)
    before = launched(folder)
    assert before.supervisor.send(signal.SIGKILL)
    wait_until(lambda: not before.is_at_work)
    worker = before.living()
    assert worker is not None and salt.json("runs", "show", "run")["state"] == "running"
    assert "under supervisor" in salt.ok("runs", "restart", "run").out
    now = launched(folder)
    assert now.is_at_work and now.supervisor != before.supervisor and now.living() == worker
    wait_until(lambda: happened(folder, "taken over") == 1)
    assert now.supervisor.send(signal.SIGKILL)
    wait_until(lambda: run.status().state == "finished" and not worker.is_alive())
    assert salt.json("runs", "show", "run")["exit_reason"] == "finished"
    assert not launched(folder).is_over
    with salt.here():
        take_over(folder)
    end = over(folder)
    assert end.ended_well and len(end.attempts) == 1 and happened(folder, "started") == 1


def test_a_lost_process_is_started_again_by_the_next_supervisor(begin: Any, salt: Any) -> None:
    """As after a power cut: nobody saw the end of the one, and the other is gone too."""
    folder = begin(IDLE, restarts=1)
    process = wait_until(lambda: last_heartbeat(folder) and launched(folder).living())
    launched(folder).supervisor.send(signal.SIGKILL)
    process.send(signal.SIGKILL)
    wait_until(lambda: not process.is_alive())
    with salt.here():
        take_over(folder)
    wait_until(lambda: len(launched(folder).attempts) == 2 and launched(folder).living())
    assert launched(folder).attempts[0].code is None and launched(folder).restarts_left == 0
    assert "without a word" in launched(folder).attempts[0].reason


def test_of_two_supervisors_of_one_folder_one_works(begin: Any, salt: Any) -> None:
    folder = begin(IDLE)
    wait_until(lambda: launched(folder).living())
    assert "has a supervisor already" in salt.run("runs", "supervise", folder).sentence
    assert happened(folder, "started") == 1


def test_of_two_launches_of_one_name_one_wins(salt: Any) -> None:
    both = [salt.start(*IDLE, "--detach") for _ in range(2)]
    said = [process.communicate(timeout=PATIENCE)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    assert "'queue-cpu' is under way" in "".join(said)
    assert happened(salt.root / "jobs" / "queue-cpu", "started") == 1


# Launches, and is killed with SIGKILL at the named stage, or its supervisor is.
KILLED_AT = """
import os, signal, sys
from pathlib import Path
from salt_vla.operations import launch, processes, supervisor
from salt_vla.operations.launch import Launch
stage, token = sys.argv[1:]

def dies(place, name, before):
    original = getattr(place, name)
    def stand_in(*args, **options):
        answer = None if before else original(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return answer
    setattr(place, name, stand_in)

wanted = Launch("job", ("recipes", "ls"), token)
if stage == "folder made": dies(launch, "write_text", before=True)
if stage == "written": dies(launch, "start_apart", before=True)
if stage == "started": dies(launch, "start_apart", before=False)
if stage.startswith("supervisor"):
    launch._start_supervisor = lambda *args: launch.supervision
    launch.launch(wanted)
    if stage == "supervisor: held": dies(supervisor, "start_held", before=False)
    if stage == "supervisor: recorded": dies(processes.Held, "begin", before=True)
    if stage == "supervisor: begun": dies(processes.Held, "begin", before=False)
    supervisor.supervise(wanted.folder)
launch.launch(wanted)
"""
STAGES = (
    "folder made",
    "written",
    "started",
    "supervisor: held",
    "supervisor: recorded",
    "supervisor: begun",
)


@pytest.mark.parametrize("stage", STAGES)
def test_a_launch_that_is_killed_and_repeated_starts_once(stage: str, salt: Any) -> None:
    token, folder = uuid4().hex, salt.root / "jobs" / "job"
    killed = salt.start_python(KILLED_AT, stage, token)
    assert killed.wait(PATIENCE) == -signal.SIGKILL, killed.stderr.read()
    with salt.here():
        for _ in range(2):
            launch(Launch("job", ("recipes", "ls"), token))
    end = over(folder)
    assert (folder / "log.txt").read_text().count("demo_teacher ") == 1
    assert len(end.attempts) == 1
    if stage != "supervisor: begun":  # Then nobody saw its end.
        assert end.ended_well


def test_stop_leaves_a_checkpoint_and_says_who_asked(salt: Any, pixels: Command, begin: Any) -> None:
    folder, run = begin(pixels("run", **LONG), restarts=3), salt.at("run")
    wait_until(lambda: steps_of(run) > 0)
    said = salt.run("runs", "stop", "run")
    assert said.code == 0 and "waiting for the end of its step" in said.err
    status, end = run.status(), over(folder)
    assert (status.state, status.ending) == ("stopped", "stopped")
    assert "by `salt-vla runs stop`, user" in status.exit_reason and status.exit_reason in said.out
    assert len(end.attempts) == 1 and end.restarts_left == 3
    assert f"step_{status.step:07d}" in [path.name for path in run.checkpoints.iterdir()] or any(
        int(path.name[5:]) == status.step for path in run.checkpoints.glob("step_*")
    )
    assert "is not at work: stopped" in salt.run("runs", "stop", "run").sentence
    salt.ok("runs", "restart", "run")
    wait_until(lambda: run.status().state == "running" and run.status().resumed_from == [status.step])
    assert "stop it first" in salt.run("runs", "restart", "run").sentence


# Beside a command: a process that it starts, in a session of its own as torchrun's have one.
HELPER = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True)"


@pytest.fixture
def beside(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """`beside(code)`: the variables with which a command's Python does `code` before all else."""

    def variables(code: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp("beside")
        (folder / "sitecustomize.py").write_text(code)
        return {"PYTHONPATH": str(folder)}

    return variables


def test_kill_takes_all_of_a_run_and_it_is_not_started_again(
    salt: Any, pixels: Command, begin: Any, beside: Any
) -> None:
    folder = begin(pixels("run", **LONG), restarts=3, environment=beside(HELPER))
    run = salt.at("run")
    wait_until(lambda: steps_of(run) > 0)
    process = launched(folder).living()
    assert process is not None
    family = [process, *descendants(process)]
    assert len(family) > 1
    assert "killed by `salt-vla runs kill`, user" in salt.ok("runs", "kill", "run").out
    end, status = over(folder), run.status()
    assert not any(each.is_alive() for each in family)
    assert len(end.attempts) == 1 and (status.state, status.ending) == ("killed", "killed")


def test_stop_and_kill_work_for_runs_that_nobody_supervises(salt: Any, pixels: Command, times: Any) -> None:
    for verb, state in (("kill", "killed"), ("stop", "stopped"))[: times(1, 2)]:
        process = salt.start(*pixels("run", **LONG), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: steps_of(salt.at("run")) > 0 and salt.at("run").status().state == "running")
        assert f"by `salt-vla runs {verb}`, user" in salt.ok("runs", verb, "run").out
        process.wait(PATIENCE)
        status = salt.at("run").status()
        assert status.state == state and f"runs {verb}" in status.exit_reason


def test_nothing_is_done_to_a_process_that_only_has_the_runs_number(salt: Any) -> None:
    """A pid that is used again; as this version writes it down, and as older ones did."""
    with subprocess.Popen(["sleep", "600"]) as other:
        real = identity(other.pid)
        told = {"state": "running", "step": 3, "total_steps": 9, "pid": real.pid, "resumed_from": []}
        for more in (
            {"started": real.started, "boot": real.boot, "ticks": real.ticks - 100},
            {"started": real.started, "boot": "an earlier start of the machine", "ticks": real.ticks},
            {"started": real.started - 3600.0},
        ):
            salt.at("old").path.mkdir(parents=True, exist_ok=True)
            (salt.at("old").path / "status.json").write_text(json.dumps(told | more))
            for verb in ("stop", "kill"):
                assert "is not at work" in salt("runs", verb, "old").sentence
        attempt = Attempt(ProcessId(real.pid, real.started, real.boot, real.ticks - 1))
        lost = Supervision("t", "running", attempt.process, (attempt,))
        assert lost.living() is None and not lost.is_at_work
        assert other.poll() is None
        other.kill()


def test_a_supervisor_that_is_asked_to_end_passes_it_on(begin: Any) -> None:
    """As when the machine shuts down: no restart."""
    folder = begin(IDLE, restarts=5)
    process = wait_until(lambda: launched(folder).living())
    launched(folder).supervisor.send(signal.SIGTERM)
    end = over(folder)
    assert not process.is_alive() and len(end.attempts) == 1 and end.restarts_left == 5


def test_a_job_between_two_attempts_can_be_stopped(begin: Any, salt: Any) -> None:
    folder = begin(IDLE, restarts=5, backoff_seconds=600.0)
    wait_until(lambda: launched(folder).living()).send(signal.SIGKILL)
    wait_until(lambda: launched(folder).state == "waiting")
    assert "not started again: ended by `salt-vla runs stop`" in salt.ok("runs", "stop", "job").out
    assert over(folder).restarts_left == 4 and happened(folder, "started") == 1


@pytest.mark.parametrize(("command", "code"), [(("recipes", "show", "none"), 2), (("recipes", "ls"), 0)])
def test_what_a_restart_cannot_mend_is_not_started_again(
    command: tuple[str, ...], code: int, begin: Any
) -> None:
    end = over(begin(command, restarts=3))
    assert [attempt.code for attempt in end.attempts] == [code] and end.restarts_left == 3
    assert end.exit_reason == "finished" if code == 0 else "no recipe" in end.exit_reason


def test_a_run_that_fails_before_it_begins_is_shown_with_its_reason(
    salt: Any, pixels: Command, begin: Any
) -> None:
    over(begin(("train", "nothing", "--name", "run")))
    shown = salt.json("runs", "show", "run")
    assert shown["state"] == "failed" and "nothing" in shown["exit_reason"]


# Another command under a supervisor of its own, launched where a runner launches its jobs.
LAUNCHES = """
import os, subprocess, sys
if "queue" in sys.orig_argv:
    own = {"SALT_VLA_ROOT": INNER, "PYTHONPATH": ""}
    launch = "launch(Launch('inner', ('queue', 'run', '--slot', 'cpu'), 't'))"
    code = f"from salt_vla.operations.launch import *; {launch}"
    subprocess.run([sys.executable, "-c", code], env=os.environ | own)
"""


def test_leftovers_are_ended_and_a_job_without_its_supervisor_is_none(
    salt: Any, begin: Any, beside: Any, tmp_path: Path
) -> None:
    """First the job's supervisor is killed, then the runner that launched it: the one is left to the
    supervisor of the other then."""
    inner = type(salt)(tmp_path / "inner")
    code = f"{HELPER}\n" + LAUNCHES.replace("INNER", repr(str(inner.root)))
    outer, job = begin(IDLE, environment=beside(code)), inner.root / "jobs" / "inner"
    try:
        worker = wait_until(lambda: (now := supervision(job)) and now.living())
        wait_until(lambda: last_heartbeat(job))
        assert launched(job).supervisor.send(signal.SIGKILL)
        wait_until(lambda: psutil.Process(worker.pid).ppid() == launched(outer).supervisor.pid)
        runner = launched(outer).living()
        helpers = wait_until(lambda: [each for each in descendants(runner) if cmdline(each)[:1] == ["sleep"]])
        assert runner.send(signal.SIGKILL)
        assert over(outer).attempts[0].code == -signal.SIGKILL
        assert worker.is_alive() and not helpers[0].is_alive()
    finally:
        inner.end_all()


def test_a_run_is_started_again_under_the_name_that_it_was_launched_with(
    salt: Any, pixels: Command, monkeypatch: Any
) -> None:
    """Where that came from the environment, which is another one then."""
    words = pixels("x", "--detach", runtime__device="nowhere")
    at = words.index("--name")
    del words[at : at + 2]
    monkeypatch.setenv("RUN_NAME", "nightly")
    salt.ok(*words)
    asked = json.loads((salt.root / "runs" / "nightly" / "launch.json").read_text())
    assert asked["command"][-2:] == ["--name", "nightly"]


def test_bad_input_is_refused_before_anything_is_written(salt: Any, pixels: Command) -> None:
    for wrong, told in (
        (["train", "nothing", "--detach"], "nothing"),
        ([*pixels("run", "--detach", optimizer__lr="fast")], "optimizer.lr"),
        ([*pixels("a/b", "--detach")], "name"),
        (["train", "demo_teacher", "--data", "nowhere", "--detach"], "--data 'nowhere'"),
        (["train", "demo_teacher", "--data", "", "--detach"], "--data ''"),
        ([*pixels("run", "--detach", "--restarts", -1)], "--restarts"),
        ([*pixels("run", "--restarts", 1)], "--restarts would do nothing without --detach"),
        ([*pixels("run", "--processes", 2)], "--processes would do nothing without --detach"),
        ([*pixels("run", "--detach", "--processes", 0)], "--processes must be at least 1"),
        ([*pixels("run", "--detach", "--plan")], "--detach would do nothing here"),
        (["train", "demo_student", "--detach"], "no cache of training latents at"),
        (["train", "demo_student", "--cache", salt.root, "--detach"], "no cache of training latents at"),
        (["train", "exp1_higher_lr", "--detach"], "no data: give --data"),
        ([*pixels("run", "--detach", "--memory-limit", "much")], "memory"),
        ([*pixels("run", "--detach", "--branch", "nobody@3")], "there is no run"),
        (["eval", "x", "--data", "nowhere", "--detach"], "--data 'nowhere'"),
        (["runs", "stop", "nothing"], "there is no run or job 'nothing'"),
        (["runs", "restart", "../x"], "name"),
        (["runs", "supervise", salt.root / "nowhere"], "nowhere"),
    ):
        assert told in salt(*wrong).sentence
        assert salt.files() == []


def test_detach_is_refused_under_torchrun(salt: Any, pixels: Command, monkeypatch: Any) -> None:
    from salt_vla.cli.detach import Apart

    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(Exception, match="without torchrun"):
        Apart(detach=True).starts("train", "run")
    assert salt.files() == []


def test_a_run_that_is_at_work_is_not_launched_again(salt: Any, pixels: Command) -> None:
    """Nor one in a terminal."""
    run = salt.at("run")
    run.path.mkdir(parents=True)
    me = identity()
    told = {"state": "running", "pid": me.pid, "started": me.started, "boot": me.boot, "ticks": me.ticks}
    (run.path / "status.json").write_text(json.dumps(told))
    refused = salt.run(*pixels("run", "--detach")).sentence
    assert f"being worked on by process {me.pid}" in refused
    assert not (run.path / "launch.json").exists()


def test_nothing_of_the_launcher_is_left_in_what_it_launched(salt: Any, tmp_path: Path) -> None:
    """No descriptor, terminal, session or hang-up; folder, umask and environment stay."""
    held, folder = tmp_path / "held", salt.root / "jobs" / "job"
    code = """
import os, sys
from salt_vla.operations.launch import Launch, launch
os.umask(0o027)
os.set_inheritable(os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY), True)
os.environ["OF_THE_LAUNCHER"] = "kept"
launch(Launch("job", ("queue", "run", "--slot", "cpu"), "t", environment={"OF_THE_LAUNCH": "too"}))
"""
    place = tmp_path / "place"
    place.mkdir()
    process = salt.start_python(code, held, cwd=place)
    assert process.wait(PATIENCE) == 0, process.stderr.read()
    now = launched(folder)
    worker = wait_until(lambda: launched(folder).living())
    for each in (worker, now.supervisor):
        files = [str(path.readlink()) for path in Path(f"/proc/{each.pid}/fd").iterdir() if path.exists()]
        assert str(held) not in files and not any(file.startswith("/dev/pts") for file in files)
        assert Path(f"/proc/{each.pid}/fd/0").readlink() == Path("/dev/null")
        assert os.getsid(each.pid) == each.pid
        told = dict(line.split(":\t") for line in Path(f"/proc/{each.pid}/status").read_text().splitlines())
        assert int(told["SigIgn"], 16) >> (signal.SIGHUP - 1) & 1
        assert told["Umask"] == "0027"
        assert psutil.Process(each.pid).cwd() == str(place)
        assert psutil.Process(each.pid).environ()["OF_THE_LAUNCHER"] == "kept"
    assert psutil.Process(worker.pid).environ()["OF_THE_LAUNCH"] == "too"
    assert "OF_THE_LAUNCHER" not in (folder / "launch.json").read_text()


def test_a_supervisor_is_light(begin: Any, salt: Any) -> None:
    """No numerical library, and next to no time: what it takes in all is what it takes to start."""
    folder = begin(IDLE)
    supervisor = launched(folder).supervisor
    wait_until(lambda: last_heartbeat(folder))
    maps = Path(f"/proc/{supervisor.pid}/maps").read_text()
    assert "torch" not in maps and "numpy" not in maps and "python" in maps
    before = sum(psutil.Process(supervisor.pid).cpu_times()[:2])
    first = last_heartbeat(folder)["time"]
    wait_until(lambda: last_heartbeat(folder)["time"] > first)
    beat = sum(psutil.Process(supervisor.pid).cpu_times()[:2]) - before
    assert beat <= 0.05  # Seconds for one heartbeat, as exactly as the system counts; one comes every five.


def test_secrets_are_not_written_down(salt: Any, begin: Any) -> None:
    with pytest.raises(Exception, match="WANDB_API_KEY would be written"):
        begin(IDLE, environment={"WANDB_API_KEY": "canary"})
    assert salt.files() == []


def test_commands_without_a_run_go_on_apart_too(salt: Any, workshop: Any, times: Any) -> None:
    """A cache that is built, as one of those that take long."""
    if not times(0, 1):
        pytest.skip("the queue's runner stands for it elsewhere; with --torture")
    out = salt.root / "caches" / "latents"
    teacher = ("--teacher", workshop.teacher, "--split", "validation", "--data", workshop.table)
    said = salt.run("cache", "build", *teacher, "--out", out, "--detach").out
    name = said.split(":")[0]
    assert name.startswith("cache-build-")
    end = over(salt.root / "jobs" / name)
    assert end.ended_well
    assert json.loads((out / "manifest.json").read_text())["complete"]
    assert "complete" in (salt.root / "jobs" / name / "log.txt").read_text()


def test_several_processes_are_one_run_and_stop_together(salt: Any, pixels: Command, times: Any) -> None:
    """By torchrun, whose own exit code says nothing: the run's word counts."""
    if not times(0, 1):
        pytest.skip("starts six processes with torch: with --torture")
    salt.ok(*pixels("run", "--detach", "--restarts", 2, "--processes", 2, **LONG))
    folder, run = salt.root / "runs" / "run", salt.at("run")
    wait_until(lambda: steps_of(run) > 0)
    parent = launched(folder).living()
    assert parent is not None and run.status().pid != parent.pid
    ranks = [each for each in descendants(parent) if "salt_vla" in cmdline(each)]
    assert len(ranks) == 2
    assert "by `salt-vla runs stop`, user" in salt.ok("runs", "stop", "run").out
    end, status = over(folder), run.status()
    assert len(end.attempts) == 1 and not any(each.is_alive() for each in ranks)
    assert (status.state, status.ending) == ("stopped", "stopped")


def test_what_a_killed_launcher_of_several_processes_leaves_is_ended(
    salt: Any, pixels: Command, begin: Any, times: Any
) -> None:
    """The processes of torchrun have sessions of their own, and would train on beside the next attempt."""
    if not times(0, 1):
        pytest.skip("starts three processes with torch: with --torture")
    folder, run = begin(pixels("run", **LONG), processes=2), salt.at("run")
    wait_until(lambda: steps_of(run) > 0)
    parent = launched(folder).living()
    assert parent is not None
    ranks = [each for each in descendants(parent) if "salt_vla" in cmdline(each)]
    parent.send(signal.SIGKILL)
    over(folder)
    assert len(ranks) == 2 and not any(each.is_alive() for each in ranks)
    assert salt.json("runs", "show", "run")["state"] == "killed"


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
@pytest.mark.parametrize("date", ["2001-01-01 00:00:00", "2041-01-01 00:00:00"])
def test_a_clock_that_jumps_neither_loses_nor_doubles_anything(date: str, begin: Any, salt: Any) -> None:
    """A supervisor that lives decades before or after what it finds. Python cannot sleep under faketime, so
    nothing here needs to."""
    folder = begin(IDLE, restarts=1, backoff_seconds=0.0, environment={"LD_PRELOAD": ""})
    process = wait_until(lambda: last_heartbeat(folder) and launched(folder).living())
    launched(folder).supervisor.send(signal.SIGKILL)
    wait_until(lambda: not launched(folder).is_at_work)
    program = ["faketime", "--exclude-monotonic", date, sys.executable, "-m", "salt_vla"]
    other = salt.start_command(program, "runs", "supervise", folder)
    wait_until(lambda: happened(folder, "taken over"))
    assert launched(folder).living() == process and len(launched(folder).attempts) == 1
    process.send(signal.SIGKILL)
    again = wait_until(lambda: len(launched(folder).attempts) == 2 and launched(folder).living())
    assert again != process and "SIGKILL" not in launched(folder).attempts[0].reason
    assert not salt("runs", "stop", "job").code
    other.wait(PATIENCE)
    assert abs(events(folder)[-1]["time"] - time.time()) > 10**8


def test_a_full_disk_ends_no_supervisor(begin: Any, salt: Any, tmp_path: Path) -> None:
    """It cannot write down what happens, and waits until it can."""
    if os.geteuid():
        pytest.skip("only root can make a disk that is full")
    salt.root = tmp_path / "small"
    salt.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", salt.root], check=True)
    try:
        folder = begin(IDLE, restarts=1)
        process = wait_until(lambda: launched(folder).living())
        wait_until(lambda: last_heartbeat(folder))
        ballast = salt.root / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        process.send(signal.SIGKILL)
        wait_until(lambda: not process.is_alive())
        time.sleep(0.5)  # In which it would fall over.
        supervisor = launched(folder).supervisor
        assert supervisor.is_alive() and launched(folder).attempts[0].code is None
        ballast.unlink()
        wait_until(lambda: len(launched(folder).attempts) == 2 and launched(folder).living())
        assert launched(folder).supervisor == supervisor
    finally:
        salt.end_all()
        subprocess.run(["umount", "--lazy", salt.root], check=True)
