"""What a process says is in its log, whatever becomes of it, of its terminal, the disk and the companion."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from salt_vla import capture, companion

PRELUDE = """
import ctypes, os, signal, subprocess, sys, threading, time
from pathlib import Path
from salt_vla import capture
def say(text, file=None):
    print(str(text) + chr(10), end="", file=file, flush=True)  # In one piece, also where nothing is buffered.
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder / "log.txt"


def companions(log: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if companion.__file__ in words and f'"{log}"' in words[-1] and process.status() != "zombie":
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not come")


@pytest.fixture
def start(log: Path) -> Iterator[Start]:
    """`start(code, **options)`: a process that captures into `log`; both end with the test."""
    started = []

    def begin(code: str, copy: Path | None = None, **options: Any) -> subprocess.Popen[str]:
        first = f"capture.start(Path({str(log)!r}), {f'Path({str(copy)!r})' if copy else None})\n"
        pipes: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "stdin": subprocess.PIPE,
        }
        program = PRELUDE + first + textwrap.dedent(code)
        started.append(
            subprocess.Popen([sys.executable, "-c", program], **(pipes | {"text": True} | options))
        )
        return started[-1]

    yield begin
    for process in started:
        with process:
            process.kill()
    wait_for(lambda: not companions(log))


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def log_of(path: Path) -> list[str]:
    """Its lines, when the companion has written them all."""
    wait_for(lambda: not companions(path))
    return path.read_text().splitlines()


def test_what_a_process_and_its_children_say_is_in_the_log_and_goes_where_it_went(
    start: Start, log: Path
) -> None:
    code = """
        say("from Python")
        say("an error", sys.stderr)
        os.write(1, b"from below\\n")
        subprocess.run(["sh", "-c", "echo of a child; echo and its error >&2"])
        capture.last_words("finished")
    """
    code_, out, err = ended(start(code))
    assert (code_, out) == (0, "from Python\nfrom below\nof a child\n")
    assert err == "an error\nand its error\n"
    lines = log_of(log)
    assert sorted(lines[:-1]) == sorted((out + err).splitlines()) and lines[-1] == "finished"


def test_where_both_streams_go_to_one_place_their_order_is_kept(start: Start, log: Path) -> None:
    code = """
        for number in range(500):
            say(number, sys.stdout if number % 2 else sys.stderr)
    """
    _, out, _ = ended(start(code, stderr=subprocess.STDOUT))
    assert out.splitlines() == [str(number) for number in range(500)] == log_of(log)[:500]


def test_a_native_crash_leaves_its_stack_and_a_last_line(start: Start, log: Path) -> None:
    code = """
        def deep_inside():
            ctypes.string_at(0)
        deep_inside()
    """
    process = start(code)
    code_, _, err = ended(process)
    assert code_ == -signal.SIGSEGV and "Segmentation fault" in err
    lines = log_of(log)
    assert "Fatal Python error: Segmentation fault" in lines
    assert any("in deep_inside" in line for line in lines)
    assert lines[-1].endswith(f"process {process.pid} is gone without a word: killed, or crashed")


def test_a_python_child_that_crashes_leaves_its_stack(start: Start, log: Path) -> None:
    ended(start('subprocess.run([sys.executable, "-c", "import os; os.abort()"])'))
    assert "Fatal Python error: Aborted" in log_of(log)


def test_a_process_that_is_killed_has_said_all_and_the_log_says_that_it_is_gone(
    start: Start, log: Path
) -> None:
    process = start('say("x" * 50_000); say("the last"); os.kill(os.getpid(), signal.SIGKILL)')
    process.communicate()
    lines = log_of(log)
    assert lines[:2] == ["x" * 50_000, "the last"]
    assert "is gone without a word" in lines[-1] and len(lines) == 3


def test_an_exception_is_in_the_log_before_the_last_words(start: Start, log: Path) -> None:
    code_, _, err = ended(start('capture.last_words("failed: of this")\nraise KeyError("of this")'))
    assert code_ == 1 and "KeyError: 'of this'" in err
    assert log_of(log)[-2:] == ["KeyError: 'of this'", "failed: of this"]


def test_an_exception_in_a_thread_is_in_the_log(start: Start, log: Path) -> None:
    ended(start("thread = threading.Thread(target=lambda: 1 / 0); thread.start(); thread.join()"))
    assert any(line.startswith("ZeroDivisionError") for line in log_of(log))


def test_last_words_are_one_line_and_none_are_needed(start: Start, log: Path) -> None:
    ended(start('capture.last_words("one\\ntwo")'))
    assert log_of(log) == ["one two"]
    ended(start('say("only this")'))
    assert log_of(log) == ["one two", "only this"]


def test_words_of_a_process_that_ends_at_once_are_the_last(start: Start, log: Path) -> None:
    code_, _, _ = ended(start('say("a"); capture.last_words("hung"); capture.say_at_once(); os._exit(70)'))
    assert (code_, log_of(log)) == (70, ["a", "hung"])


def test_without_its_folder_there_is_no_log_and_with_it_all_of_it(start: Start, log: Path) -> None:
    log.parent.rmdir()
    code_, out, _ = ended(start('say("refused")'))
    assert (code_, out) == (0, "refused\n")
    wait_for(lambda: not companions(log))
    assert not log.parent.exists()
    process = start('say("early"); sys.stdin.readline(); say("late")')
    assert process.stdout is not None and process.stdout.readline() == "early\n"
    log.parent.mkdir()
    wait_for(log.exists)  # Though nothing is said.
    assert log.read_text() == "early\n"
    ended(process)
    assert log_of(log) == ["early", "late"]


def test_a_reader_that_leaves_ends_nothing(start: Start, log: Path) -> None:
    """As `| head -1` does: without a log the process would die of its next word."""
    process = start('say("first"); sys.stdin.readline(); [say("more" * 1000) for _ in range(100)]')
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.write("go on\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    assert log_of(log) == ["first", *["more" * 1000] * 100]


@pytest.mark.parametrize("how", ["closed", "stopped"])
def test_a_terminal_that_is_gone_or_stands_still_holds_nothing_up(start: Start, log: Path, how: str) -> None:
    """Closed, it answers EIO; stopped with Ctrl-S, or read by nobody, nothing at all."""
    ours, theirs = pty.openpty()
    code = 'say("first"); sys.stdin.readline(); [say("more" * 1000) for _ in range(100)]'
    process = start(code, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert b"first" in os.read(ours, 1000)
    if how == "closed":
        os.close(ours)
    assert process.stdin is not None
    process.stdin.write("go on\n")
    process.stdin.flush()
    wait_for(lambda: log.exists() and log.read_text().count("\n") == 101)
    if how == "stopped":
        os.close(ours)
    assert process.wait(timeout=60) == 0


def test_a_terminal_keeps_its_bar_and_the_log_gets_its_lines(start: Start, log: Path) -> None:
    code = """
        from salt_vla.progress import progress
        with progress("caching", total=3, unit="clips") as advance:
            advance(2, note="so far")
            time.sleep(0.3)
            say("said meanwhile")
            time.sleep(0.3)
            advance()
    """
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "140"}
    process = start(code, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    drawn = b""
    while True:
        try:
            drawn += os.read(ours, 4096)
        except OSError:
            break
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert b"2/3" in drawn and b"3/3" in drawn and b"so far" in drawn and b"said meanwhile\r\n" in drawn
    lines = log_of(log)
    assert lines[0] == "said meanwhile" and lines[1].startswith("caching: 3/3 clips, ") and len(lines) == 2
    assert "\x1b" not in log.read_text()


def test_signals_to_the_group_and_to_the_companion_spare_the_log(start: Start, log: Path) -> None:
    code = """
        signal.signal(signal.SIGINT, lambda *_: say("interrupted"))
        say("ready")
        sys.stdin.readline()
    """
    process = start(code, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n"
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        companions(log)[0].send_signal(number)
    ended(process)
    assert log_of(log) == ["ready", "interrupted"]


def test_the_companion_is_nobodys_child(start: Start, log: Path) -> None:
    """So that who ends the run's children, or waits for them, does not mean it."""
    process = start('say("ready"); sys.stdin.readline()')
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert psutil.Process(process.pid).children(recursive=True) == []
    (beside,) = companions(log)
    assert os.getsid(beside.pid) != os.getsid(process.pid)
    ended(process)


def test_a_companion_that_is_killed_has_a_successor_and_nothing_is_lost(start: Start, log: Path) -> None:
    code = """
        for line in sys.stdin:
            [say(f"{line.strip()} {number}") for number in range(200)]
    """
    process = start(code)
    assert process.stdin is not None and process.stdout is not None
    for round_ in ("a", "b"):
        (beside,) = wait_for(lambda: companions(log))
        beside.kill()
        process.stdin.write(f"{round_}\n")
        process.stdin.flush()
        wait_for(lambda last=f"{round_} 199": log.exists() and last in log.read_text())
    code_, out, _ = ended(process)
    expected = [f"{round_} {number}" for round_ in "ab" for number in range(200)]
    assert code_ == 0 and out.splitlines() == expected
    assert [line for line in log_of(log) if "without a word" not in line] == expected


def test_when_every_companion_is_killed_the_process_goes_on_as_without(start: Start, log: Path) -> None:
    process = start('sys.stdin.readline(); [say("more" * 1000) for _ in range(100)]')
    killed = set()
    for _ in range(capture.MOST_SHORT_LIVES):
        (beside,) = wait_for(lambda: [p for p in companions(log) if p.pid not in killed])
        killed.add(beside.pid)
        beside.kill()
    wait_for(lambda: not companions(log))
    assert process.stdin is not None
    time.sleep(0.2)  # For its thread to give the streams back; a word before that would be nobody's.
    process.stdin.write("go on\n")
    code_, out, _ = ended(process)
    assert code_ == 0 and out == ("more" * 1000 + "\n") * 100


def test_a_second_log_has_all_that_the_first_one_gets(start: Start, log: Path, tmp_path: Path) -> None:
    log.write_text("of an earlier start\n")
    copy = tmp_path / "copy.log"
    code = """
        say("said")
        with open(log, "a") as file:
            file.write("written\\n")
        say("said again")
        capture.last_words("finished")
    """
    ended(start(f"log = {str(log)!r}" + textwrap.dedent(code), copy=copy))
    lines = log_of(log)
    assert sorted(lines) == sorted(["of an earlier start", "said", "written", "said again", "finished"])
    assert copy.read_text().splitlines() == lines[1:]


def test_a_second_log_is_there_where_there_is_no_first(start: Start, log: Path, tmp_path: Path) -> None:
    log.parent.rmdir()
    ended(start('say("refused")', copy=tmp_path / "copy.log"))
    wait_for(lambda: not companions(log))
    assert (tmp_path / "copy.log").read_text() == "refused\n" and not log.parent.exists()


def test_output_that_is_the_log_already_is_in_it_once(start: Start, log: Path) -> None:
    """As a supervisor starts its command, so that it has the imports' failures too."""
    log.write_text("earlier\n")
    with log.open("a") as file:
        process = start('say("once"); say("and this", sys.stderr)', stdout=file, stderr=file)
    assert process.wait(timeout=60) == 0
    assert log_of(log) == ["earlier", "once", "and this"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can be mounted by root alone, and not in every container")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_under_the_log_is_told_and_ends_nothing(
    start: Start, log: Path, small_disk: Path, tmp_path: Path
) -> None:
    log.symlink_to(small_disk / "log.txt")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 900_000)
    code = """
        [say(f"{number} " + "y" * 1000) for number in range(500)]
        sys.stdin.readline()
        say("there is space again")
    """
    copy = tmp_path / "copy.log"
    process = start(code, copy=copy)
    drawn = []
    assert process.stdout is not None and process.stdin is not None
    while len(drawn) < 500:
        drawn.append(process.stdout.readline())
    filler.unlink()
    process.stdin.write("go on\n")
    code_, out, _ = ended(process)
    assert code_ == 0 and out == "there is space again\n"
    wait_for(lambda: not companions(log))
    text = log.read_bytes().decode()
    before, note, after = text.partition("\n[")
    missing = int(note and after.split(" ", 1)[0])
    assert f"[{missing} bytes of the log are missing here: No space left on device]" in text
    assert text.endswith("there is space again\n")
    everything = "".join(drawn) + "there is space again\n"
    kept = before + after.partition("]\n")[2]
    assert len(kept) + missing == len(everything) and everything.startswith(before)
    told = f"\n[{missing} bytes of the log are missing here: No space left on device]\n"
    assert copy.read_text().replace(told, "") == everything  # Its disk is another one.


def test_a_program_that_is_slow_gets_all_of_it(start: Start, log: Path) -> None:
    process = start('[say("z" * 999) for _ in range(1000)]')
    log_lines = wait_for(lambda: log.exists() and log.read_text().count("\n") == 1000)
    assert log_lines and process.stdout is not None
    taken = 0
    while chunk := process.stdout.read(100_000):
        taken += len(chunk)
        time.sleep(0.01)
    assert taken == 1_000_000 and process.wait(timeout=60) == 0


def test_a_second_start_ends_the_first(start: Start, log: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    code = f"""
        say("of the first")
        capture.start(Path({str(other)!r}))
        say("of the second")
        capture.finish()
        say("of none")
    """
    _, out, _ = ended(start(code))
    assert out == "of the first\nof the second\nof none\n"
    wait_for(lambda: not companions(other))
    assert log_of(log) == ["of the first"] and other.read_text() == "of the second\n"


def test_a_process_that_forks_has_one_end(start: Start, log: Path) -> None:
    code = """
        capture.last_words("the end")
        if os.fork() == 0:
            say("of the child")
            sys.exit(0)
        os.wait()
        say("of the parent")
    """
    ended(start(code))
    assert log_of(log) == ["of the child", "of the parent", "the end"]


def test_a_child_that_outlives_the_process_is_heard_and_holds_nothing_up(start: Start, log: Path) -> None:
    code = """
        subprocess.Popen(["sh", "-c", "read line; echo later"], stdin=0)
        capture.last_words("the end")
    """
    process = start(code)
    assert process.wait(timeout=60) == 0
    assert log.read_text() == "the end\n"
    assert process.stdin is not None
    process.stdin.write("now\n")
    process.stdin.close()
    assert log_of(log) == ["the end", "later"]
    assert process.stdout is not None and process.stdout.read() == "later\n"


def test_streams_that_others_have_replaced_are_left_to_them(tmp_path: Path) -> None:
    """As in a notebook, or within tests: standard output there is not this process' own."""
    before = os.fstat(1), os.fstat(2)
    capture.start(tmp_path / "log.txt")
    capture.last_words("unheard")
    capture.note("unheard")
    capture.say_at_once()
    assert capture.terminal() is None
    assert all(os.path.samestat(a, b) for a, b in zip(before, (os.fstat(1), os.fstat(2)), strict=True))
    capture.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_standard_output_is_no_obstacle(start: Start, log: Path) -> None:
    program = PRELUDE + f'capture.start(Path({str(log)!r}))\nos.write(1, b"into the log\\n")'
    done = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, program], timeout=60, check=False)
    assert done.returncode == 0 and log_of(log) == ["into the log"]


def test_a_sink_tells_what_it_could_not_take() -> None:
    read_end, write_end = os.pipe()
    sink = companion.Sink(write_end)
    sink.take(b"x" * (companion.MOST_WAITING + 1))
    sink.take(b"too much")
    while select.select([], [sink.fd], [], 0)[1]:
        sink.push()
    assert sink.dropped == len(b"too much") and len(sink.waiting) < companion.MOST_WAITING
    sink.take(b"after")
    assert bytes(sink.waiting).endswith(b"\n[8 bytes are missing here; the log has them]\nafter")
    os.close(read_end)
    sink.push()
    assert sink.fd == -1 and not sink.waiting
    sink.take(b"to nobody")
    assert not sink.waiting
