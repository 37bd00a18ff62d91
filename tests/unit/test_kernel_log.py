"""What the kernel says of processes that it killed or saw crash, in the lines of several of its versions."""

from __future__ import annotations

import os

import pytest

from salt_vla.operations.kernel_log import (
    KernelLine,
    crashes,
    end_of_boot,
    kernel_lines,
    last_lines_of_boot,
    out_of_memory,
    parse_kmsg,
    parse_printed,
    start_since_boot,
)

PID = 48213
# Linux 5.15 and 6.1, /dev/kmsg, a control group's limit (systemd, Slurm, containers).
GROUP_KMSG = (
    "4,1201,8130123456,-;python invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0\n",
    "6,1214,8130123999,-;memory: usage 33554432kB, limit 33554432kB, failcnt 812\n",
    "6,1219,8130124107,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,"
    f"oom_memcg=/slurm/uid_1000/job_42,task_memcg=/slurm/uid_1000/job_42/step_0,task=python,"
    f"pid={PID},uid=1000\n",
    f"3,1220,8130124155,-;Memory cgroup out of memory: Killed process {PID} (python) total-vm:61234564kB, "
    "anon-rss:32212254kB, file-rss:104860kB, shmem-rss:1048576kB, UID:1000 pgtables:68000kB "
    "oom_score_adj:0\n",
    "6,1221,8130984101,-;oom_reaper: reaped process 48213 (python), now anon-rss:0kB, "
    "file-rss:0kB\n SUBSYSTEM=x\n",
)
# Linux 6.8, dmesg, the whole machine.
MACHINE_PRINTED = (
    "[ 9120.430011] pt_main_thread invoked oom-killer: gfp_mask=0x140cca(GFP_HIGHUSER_MOVABLE|__GFP_COMP)",
    "[ 9120.430588] oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=user.slice,mems_allowed=0,"
    f"global_oom,task_memcg=/user.slice/user-1000.slice/session-3.scope,task=pt_main_thread,pid={PID},uid=1000",
    f"[ 9120.430611] Out of memory: Killed process {PID} (pt_main_thread) total-vm:98113428kB, "
    "anon-rss:60123400kB, file-rss:2048kB, shmem-rss:0kB, UID:1000 pgtables:120000kB oom_score_adj:200",
)
# Linux 4.15 (Ubuntu 18.04): two lines, and no summary.
OLD_PRINTED = (
    f"[ 811.112233] Out of memory: Kill process {PID} (python3) score 931 or sacrifice child",
    f"[ 811.112301] Killed process {PID} (python3) total-vm:35001000kB, anon-rss:30000000kB, file-rss:0kB, "
    "shmem-rss:0kB",
)
OLD_GROUP = (
    f"[ 911.000233] Memory cgroup out of memory: Kill process {PID} (python3) score 1002 or sacrifice child",
    f"[ 911.000301] Killed process {PID} (python3) total-vm:9000000kB, anon-rss:8000000kB, file-rss:0kB, "
    "shmem-rss:0kB",
)
# Linux 3.10 (CentOS 7), from the journal with -o short-monotonic.
OLDEST_JOURNAL = (
    f"[  512.000100] node7 kernel: Out of memory: Kill process {PID} (python) score 871 or sacrifice child",
    f"[  512.000200] node7 kernel: Killed process {PID} (python), UID 1000, total-vm:8000000kB, "
    "anon-rss:7000000kB, file-rss:100kB, shmem-rss:0kB",
)
CRASHES = (
    f"[  100.5] python[{PID}]: segfault at 0 ip 00007f1 sp 00007ffc error 4 in libtorch_cpu.so[7f0000+1000]",
    f"[  101.5] traps: python[{PID}] general protection fault ip:7f1 sp:7ffc error:0 in libc.so.6[7f0+195]",
    "[  102.5] NVRM: Xid (PCI:0000:65:00): 31, "
    f"pid={PID}, name=python, Ch 00000008, intr 00000000. MMU Fault: ENGINE GRAPHICS",
    f"[  103.5] NVRM: Xid (PCI:0000:65:00): 79, pid='{PID}', name=python, GPU has fallen off the bus.",
)
OTHERS = (
    "[  100.1] python[4821]: segfault at 0 ip 00007f1 sp 00007ffc error 4 in libtorch_cpu.so[7f0000+1000]",
    "[  100.2] NVRM: Xid (PCI:0000:65:00): 31, pid=482130, name=python, Ch 00000008",
    f"[  100.3] usb 1-1: new device number {PID}",
)


@pytest.mark.parametrize(
    ("lines", "name", "group", "gigabytes"),
    [
        (list(parse_kmsg(GROUP_KMSG)), "python", "/slurm/uid_1000/job_42", 34.17),
        (list(parse_printed(MACHINE_PRINTED)), "pt_main_thread", "", 61.57),
        (list(parse_printed(OLD_PRINTED)), "python3", "", 30.72),
        (list(parse_printed(OLD_GROUP)), "python3", "its control group", 8.19),
        (list(parse_printed(OLDEST_JOURNAL)), "python", "", 7.17),
    ],
    ids=["5.15 group", "6.8 machine", "4.15 machine", "4.15 group", "3.10 journal"],
)
def test_a_kill_for_want_of_memory_is_found(
    lines: list[KernelLine], name: str, group: str, gigabytes: float
) -> None:
    killed = out_of_memory(lines, PID)
    assert killed is not None and (killed.name, killed.group) == (name, group)
    assert killed.resident_gb == pytest.approx(gigabytes, abs=0.01)
    assert killed.lines and all(str(PID) in line for line in killed.lines)
    assert out_of_memory(lines, PID - 1) is None and out_of_memory(lines, PID // 10) is None


def test_a_line_from_before_the_process_is_about_another_one() -> None:
    lines = list(parse_printed(MACHINE_PRINTED))
    assert out_of_memory(lines, PID, not_before=9000.0) is not None
    assert out_of_memory(lines, PID, not_before=9200.0) is None
    assert crashes(list(parse_printed(CRASHES)), PID, not_before=104.0) == []


def test_records_and_prints_carry_their_time() -> None:
    assert next(parse_kmsg(GROUP_KMSG)).seconds == pytest.approx(8130.123456)
    last = list(parse_kmsg(GROUP_KMSG))[-1]
    assert last.text.endswith("file-rss:0kB")  # Not the fields below it.
    assert next(parse_printed(OLDEST_JOURNAL)) == KernelLine(512.0001, OLDEST_JOURNAL[0].split("kernel: ")[1])
    assert list(parse_kmsg(["", "6,1", "a,b,c,-;text", "6,1,x,-;text"])) == []
    assert list(parse_printed(["", "no time", "[x] text"])) == []


def test_faults_and_errors_of_the_gpu_are_those_of_the_process() -> None:
    found = crashes(list(parse_printed([*OTHERS, *CRASHES])), PID)
    assert found == [line.split("] ", 1)[1] for line in CRASHES]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((), "it was restarted, or it lost its power"),
        (("Reached target Shutdown.", "systemd-shutdown[1]: Sending SIGTERM"), "it was shut down in order"),
        (("Stopping User Manager", "System is rebooting."), "it was shut down in order"),
        (("Kernel panic - not syncing: Fatal exception", "System is rebooting"), "its kernel panicked"),
        (
            ("CRON[1]: (root) CMD (x)", "python[2]: step 12"),
            "it went down without a shutdown: power was lost, or it was reset, or it hung",
        ),
    ],
)
def test_how_a_machine_went_down_is_told_by_its_journal(lines: tuple[str, ...], said: str) -> None:
    assert end_of_boot(lines) == said


def test_a_boot_that_is_none_has_no_lines() -> None:
    assert last_lines_of_boot("") == [] and last_lines_of_boot("--vacuum-size=1") == []


def test_a_process_started_at_the_time_that_its_ticks_say() -> None:
    with open("/proc/self/stat") as file:  # noqa: PTH123
        ticks = int(file.read().rpartition(")")[2].split()[19])
    assert 0 < start_since_boot(ticks) <= ticks / os.sysconf("SC_CLK_TCK")
    assert start_since_boot(0) == 0


@pytest.mark.skipif(not os.access("/dev/kmsg", os.R_OK), reason="the kernel's log is root's")
def test_the_kernel_is_heard() -> None:
    times = [line.seconds for line in kernel_lines()]
    assert times and times == sorted(times)
