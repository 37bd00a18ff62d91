"""`doctor`: each finding with its cure, none hidden by another; other machines by what they would say."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from salt_vla.cli import main
from salt_vla.identity import identity
from salt_vla.operations import doctor, doctor_machine, doctor_programs, doctor_work
from salt_vla.operations.doctor import CHECKS, Finding, examine
from salt_vla.operations.launch import Supervision, record
from salt_vla.operations.processes import UserManager
from salt_vla.operations.queue import Queue, Wanted
from salt_vla.rundir import RunDirectory, Status

CPU = {"version": "2.13.0+cpu", "cuda": "", "usable": False, "gpus": [], "archs": []}
CUDA = CPU | {"version": "2.13.0+cu130", "cuda": "13.0"}
H100 = {"name": "NVIDIA H100", "memory": 85 * 10**9, "works": True}
DRIVER = ["NVIDIA H100, 570.1"]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def gone() -> Any:
    """The identity of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    made = identity(process.pid)
    process.communicate()
    return made


def verdicts(findings: Any) -> list[str]:
    return [finding.verdict for finding in findings]


def run_of(root: Path, name: str, status: Status) -> RunDirectory:
    run = RunDirectory(root / "runs" / name)
    run.path.mkdir(parents=True)
    run.config_file.write_text("{}")
    run.set_status(status)
    return run


# The whole


def broken() -> Iterator[Finding]:
    yield Finding("first", "ok", "fine so far")
    raise ZeroDivisionError("a driver\nwith a long story")


def test_a_check_that_fails_is_a_line_and_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "memory", broken)
    chosen = ("cores", "memory", "limits")
    table = {name: CHECKS[name] for name in chosen} | {"absent": "salt_vla.no_such_module:check"}
    found = list(examine(table))
    assert Finding("memory", "warn", "could not be checked: ZeroDivisionError: a driver") in found
    assert found[0].check == "cores"
    assert "limits" in [finding.check for finding in found]
    assert found[-1].check == "absent" and "No module named" in found[-1].what


def test_every_warning_of_this_machine_has_a_cure_and_every_check_a_line(root: Path) -> None:
    found = list(examine())
    assert {finding.check for finding in found} == set(CHECKS)
    assert not [finding for finding in found if finding.verdict != "ok" and not finding.cure]
    assert not [finding for finding in found if "could not be checked" in finding.what]
    assert list(root.iterdir()) == []


def test_the_command_answers_with_the_worst(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for verdict, code in (("ok", 0), ("warn", 0), ("refuse", 1)):
        said = [Finding("torch", "ok", "there"), Finding("disk", verdict, "full [red]", "rm")]  # type: ignore[arg-type]
        monkeypatch.setattr("salt_vla.cli.doctor.examine", lambda said=said: iter(said))
        assert main(["doctor"]) == code
        out = capsys.readouterr().out
        assert "full [red]" in out and verdict in out
        assert main(["doctor", "--json"]) == code
        assert json.loads(capsys.readouterr().out)[1] == {
            "check": "disk",
            "verdict": verdict,
            "what": "full [red]",
            "cure": "rm",
        }


def test_the_doctor_needs_no_torch() -> None:
    names = sorted({place.partition(":")[0] for place in CHECKS.values()})
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Programs


@pytest.mark.parametrize(
    ("about", "driver", "verdict", "said"),
    [
        (CPU, [], "ok", "no GPU: everything runs on the CPU"),
        (CUDA, [], "ok", "no GPU: everything runs on the CPU"),
        (CPU, DRIVER, "warn", "is a CPU build beside NVIDIA H100, 570.1"),
        (CUDA, DRIVER, "refuse", "cannot use NVIDIA H100, 570.1 (driver too old"),
        (CUDA | {"usable": True, "gpus": [H100]}, DRIVER, "ok", "GPU 0: NVIDIA H100, 85 GB"),
        (CUDA | {"usable": True, "gpus": [H100 | {"works": False}]}, DRIVER, "refuse", "GPU 0: NVIDIA H100"),
    ],
)
def test_torch_is_judged_beside_the_driver(
    about: dict[str, Any], driver: list[str], verdict: str, said: str
) -> None:
    (finding,) = doctor_programs.judge_torch(about, driver)
    assert finding.verdict == verdict and said in finding.what


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import no_such_library", "exit code 1: ModuleNotFoundError: No module named 'no_such_library'"),
        ("import os; os.abort()", "exit code -6: without a word"),
    ],
)
def test_a_library_that_crashes_is_a_finding(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_programs, "_TORCH", program)
    (finding,) = doctor_programs.torch()
    assert finding.verdict == "refuse" and said in finding.what and finding.cure
    monkeypatch.setattr(doctor_programs, "_PYAV", program)
    assert next(iter(doctor_programs.decoders())).verdict == "refuse"


def test_a_library_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_programs, "SECONDS_TO_LOAD", 0.5)
    monkeypatch.setattr(doctor_programs, "_TORCH", "import time; time.sleep(60)")
    (finding,) = doctor_programs.torch()
    assert "does not answer within" in finding.what


def test_an_old_python_and_a_narrow_locale_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    (finding,) = doctor_programs.python()
    assert finding.verdict == "refuse" and "3.11" in finding.what
    monkeypatch.setattr("locale.getpreferredencoding", lambda _: "ANSI_X3.4-1968")
    (finding,) = doctor_programs.terminal()
    assert finding.verdict == "warn" and finding.cure == "export LC_ALL=C.UTF-8"


def test_extras_that_are_not_there_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_programs, "_is_installed", lambda name: name == "torchcodec")
    found = list(doctor_programs.extras())
    assert verdicts(found) == ["ok"] * len(found)
    assert "fast-decode" in found[0].what and "sim" in found[-1].what
    assert found[-1].cure.startswith("pip install 'salt-vla[")


# The machine


def memory_of(available: float, total: float = 64e9, swap: float = 0, used: float = 0) -> Any:
    free = SimpleNamespace(available=int(available), total=int(total))
    swapped = SimpleNamespace(total=int(swap), used=int(used), percent=100 * used / swap if swap else 0)
    return SimpleNamespace(virtual_memory=lambda: free, swap_memory=lambda: swapped)


def test_little_memory_and_a_swap_in_use_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine, "memory_limit", lambda: None)
    monkeypatch.setattr(doctor_machine, "psutil", memory_of(32e9))
    assert verdicts(doctor_machine.memory()) == ["ok"]
    monkeypatch.setattr(doctor_machine, "psutil", memory_of(1e9, swap=8e9, used=7e9))
    low, swapping = doctor_machine.memory()
    assert low.verdict == "warn" and "1.0 GB of 64.0 GB" in low.what
    assert swapping.verdict == "warn" and "88%" in swapping.what and swapping.cure
    monkeypatch.setattr(doctor_machine, "psutil", memory_of(32e9))
    monkeypatch.setattr(doctor_machine, "memory_limit", lambda: 2 * 10**9)
    (limited,) = doctor_machine.memory()
    assert limited.verdict == "warn" and "killed above 2.0 GB" in limited.what


@pytest.mark.parametrize(
    ("file", "text", "limit"),
    [
        ("memory.max", "1000000\n", 1_000_000),
        ("memory.max", "max\n", None),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ("memory/memory.limit_in_bytes", "2000000\n", 2_000_000),
        ("other", "1", None),
    ],
)
def test_the_limit_of_a_container_is_read(file: str, text: str, limit: int | None, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    assert doctor_machine.memory_limit(tmp_path) == limit


def test_a_quota_below_the_cores_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor_machine.cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor_machine.cpu_quota(tmp_path) == 1.5
    monkeypatch.setattr(doctor_machine, "num_cores", lambda: 16)
    monkeypatch.setattr(doctor_machine, "cpu_quota", lambda: 1.5)
    (finding,) = doctor_machine.cores()
    assert finding.verdict == "warn" and finding.cure == "export OMP_NUM_THREADS=2"


def usage(free: float, total: float = 1e12) -> Any:
    return lambda place: SimpleNamespace(free=int(free), total=int(total))


def test_a_small_shared_memory_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", usage(64e6, 64e6))
    (finding,) = doctor_machine.shared_memory()
    assert finding.verdict == "warn" and "--shm-size" in finding.cure
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", usage(16e9))
    assert verdicts(doctor_machine.shared_memory()) == ["ok"]
    monkeypatch.setattr(doctor_machine, "SHARED_MEMORY", tmp_path / "nowhere")
    assert verdicts(doctor_machine.shared_memory()) == ["warn"]


def test_the_shells_limits_are_told_with_the_command_that_lifts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = resource.RLIM_INFINITY
    held = dict.fromkeys((resource.RLIMIT_NPROC, resource.RLIMIT_CORE, resource.RLIMIT_AS), endless)
    held |= {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_FSIZE: 10**6}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (held[which], endless))
    few, small, rest = doctor_machine.limits()
    assert few.what == "open files: 1024, 4096 are wanted" and few.cure == "ulimit -n 65536"
    assert small.what == "size of a file: 1000000" and small.cure == "ulimit -f unlimited"
    assert "processes unlimited" in rest.what and rest.verdict == "ok"


@pytest.mark.parametrize(("free", "verdict"), [(0.5e9, "refuse"), (5e9, "warn"), (500e9, "ok")])
def test_a_full_disk_is_refused(free: float, verdict: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", usage(free))
    monkeypatch.setattr(doctor_machine, "write_speed", lambda folder: 1e9)
    found = list(doctor_machine.disk())
    assert verdicts(found) == [verdict, "ok"] and bool(found[0].cure) == (verdict != "ok")


def test_the_disks_speed_is_measured_and_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor_machine.write_speed(root) > 1e5 and list(root.iterdir()) == []
    monkeypatch.setattr(doctor_machine, "write_speed", lambda folder: 3e6)
    slow = list(doctor_machine.disk())[-1]
    assert slow.verdict == "warn" and "3 MB/s" in slow.what and slow.cure


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(root: Path) -> None:
    root.chmod(0o500)
    (finding,) = doctor_machine.disk()
    assert finding.verdict == "refuse" and "SALT_VLA_ROOT" in finding.cure


def test_a_clock_that_is_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    monkeypatch.setattr(doctor_machine, "_is_synchronised", lambda: True)
    assert verdicts(doctor_machine.clock()) == ["ok"]
    monkeypatch.setattr(doctor_machine, "_is_synchronised", lambda: False)
    assert verdicts(doctor_machine.clock()) == ["warn"]
    monkeypatch.setattr(time, "time", lambda: real() + 100)
    ahead = next(iter(doctor_machine.clock()))
    assert ahead.verdict == "warn" and "-100 s off" in ahead.what
    monkeypatch.setattr(time, "time", lambda: 0.0)
    (finding,) = doctor_machine.clock()
    assert finding.verdict == "refuse" and finding.cure == "timedatectl set-ntp true"


@pytest.mark.parametrize(
    ("manager", "verdict", "cure"),
    [
        (None, "ok", ""),
        (UserManager(255, True), "ok", ""),
        (UserManager(255, False), "warn", "loginctl enable-linger"),
    ],
)
def test_what_a_logout_ends_is_said(
    manager: UserManager | None, verdict: str, cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_machine, "user_manager", lambda: manager)
    (finding,) = doctor_machine.logout()
    assert (finding.verdict, finding.cure) == (verdict, cure)


# The work


def at_work(process: Any, state: str = "running") -> Status:
    return Status(state, pid=process.pid, started=process.started, boot=process.boot, ticks=process.ticks)


def test_runs_that_nobody_carries_on_are_named_with_the_command_that_does(root: Path, gone: Any) -> None:
    run_of(root, "fine", Status("finished", exit_reason="finished"))
    run_of(root, "here", at_work(identity()))
    assert verdicts(doctor_work.runs()) == ["ok"]
    run_of(root, "lost", at_work(gone))
    lost, rest = doctor_work.runs()
    assert "lost (its process is gone" in lost.what and lost.cure == "salt-vla runs restart lost"
    assert rest.what.startswith("3 below") and "1 at work" in rest.what


def test_a_supervisor_that_is_gone_is_named(root: Path, gone: Any) -> None:
    run = run_of(root, "a", Status("stopped"))
    record(run.path, Supervision("token", "running", gone))
    job = root / "jobs" / "b"
    job.mkdir(parents=True)
    (job / "launch.json").write_text("{}")
    record(job, Supervision("token", "waiting", gone))
    lost, _ = doctor_work.runs()
    assert "a (its supervisor is gone), b (its supervisor is gone)" in lost.what
    record(run.path, Supervision("token", "ended", gone))
    record(job, Supervision("token", "running", identity()))
    assert verdicts(doctor_work.runs()) == ["ok"]


def test_damaged_runs_hide_no_others_and_many_are_counted(root: Path, gone: Any) -> None:
    for number in range(8):
        run_of(root, f"lost{number}", at_work(gone))
    damaged = run_of(root, "damaged", Status("finished"))
    (damaged.path / "status.json").write_text("{")
    lost, broken, _ = doctor_work.runs()
    assert "lost0" in lost.what and "and 3 more" in lost.what
    assert "is damaged" in broken.what and broken.cure


def test_rows_that_a_tracker_was_never_sent_are_named(root: Path) -> None:
    assert verdicts(doctor_work.trackers()) == ["ok"]
    run = run_of(root, "a", Status("finished"))
    (run.path / "tracker_wandb.json").write_text('{"identifier": "x"}')
    assert verdicts(doctor_work.trackers()) == ["ok"]
    run.log_metrics({"kind": "train", "step": 1, "loss": 1.0})
    (finding,) = doctor_work.trackers()
    assert "a (wandb)" in finding.what and finding.cure == "salt-vla runs sync"


def cache_of(root: Path, name: str, complete: bool, leases: bool = False) -> Path:
    folder = root / "caches" / name
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"complete": complete}))
    if leases:
        (folder / ".leases").mkdir()
    return folder


def test_caches_left_half_built_and_their_locks_are_named(root: Path) -> None:
    cache_of(root, "a/train", complete=True)
    assert verdicts(doctor_work.caches()) == ["ok"]
    cache_of(root, "b", complete=False)
    cache_of(root, "c", complete=True, leases=True)
    cache_of(root, "d", complete=True).joinpath("manifest.json").write_text("{")
    half, stale, damaged, rest = doctor_work.caches()
    assert "nobody builds: caches/b" in half.what and "cache build" in half.cure
    assert "caches/c" in stale.what and stale.cure == "salt-vla cache prune"
    assert "caches/d" in damaged.what and damaged.cure
    assert rest.what.startswith("2 complete, 0 being built")


def test_a_cache_that_is_being_built_is_no_fault(root: Path) -> None:
    from salt_vla.cache.leases import Leases

    folder = cache_of(root, "a", complete=False)
    with Leases(folder / ".leases"):
        (finding,) = doctor_work.caches()
    assert finding.verdict == "ok" and "1 being built" in finding.what


def test_jobs_without_a_runner_are_said(root: Path, gone: Any) -> None:
    assert verdicts(doctor_work.queue()) == ["ok"]
    queue = Queue()
    queue.add(Wanted(("train", "demo_student", "--name", "x"), str(root), name="x"))
    queue.note_runner("cpu", gone)
    (finding,) = doctor_work.queue()
    assert finding.verdict == "warn" and "1 jobs wait (x)" in finding.what
    assert finding.cure == "salt-vla queue run --detach"
    queue.note_runner("cpu", identity())
    assert verdicts(doctor_work.queue()) == ["ok"]
    queue.pause()
    (finding,) = doctor_work.queue()
    assert finding.verdict == "warn" and finding.cure == "salt-vla queue resume"


def test_a_damaged_queue_is_a_line_of_its_own(root: Path) -> None:
    (root / "queue.db").write_text("no database at all, whatever it is called")
    (finding,) = examine({"queue": doctor.CHECKS["queue"]})
    assert finding.verdict == "warn" and "could not be checked" in finding.what
