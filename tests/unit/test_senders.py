"""Who sent a signal is known, and all else is as without: with real signals to real processes."""

from __future__ import annotations

import os
import pty
import pwd
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from salt_vla import senders

ME = f"process {os.getpid()} ({{name}}, user {pwd.getpwuid(os.getuid()).pw_name})"
PRELUDE = """
import os, signal, subprocess, sys, threading, time
from salt_vla import senders
from salt_vla.interrupts import Stopped, stop_on_signals

def say(*words):
    print(*words, flush=True)

def farewell(number, sender):
    say("farewell", number.name, sender)

BLOCKED = "{%s}" % ",".join(str(int(n)) for n in sorted(senders.WAITED_FOR))
SHOW = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
senders.listen(farewell)
"""


def from_me() -> str:
    with open("/proc/self/comm") as file:  # noqa: PTH123
        return ME.format(name=file.read().strip())


class Child:
    """A Python process that listens, and says where it stands, a line each time."""

    def __init__(self, code: str, **options: Any) -> None:
        pipes: dict[str, Any] = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
        }
        command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
        self.process = subprocess.Popen(command, bufsize=0, **(pipes | options))

    def hear(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60)[0]
        return self.process.stdout.readline().decode().strip()

    def send(self, number: signal.Signals) -> None:
        """Once its main thread waits: what comes just before a wait begins does not end it, in any Python."""
        states, until = "", time.monotonic() + 10
        while not states.endswith("SSSSS") and time.monotonic() < until:
            time.sleep(0.02)
            states += Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors.decode()


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        with child.process:
            child.process.kill()


@pytest.mark.parametrize("number", senders.POLITE)
def test_a_stop_names_who_sent_the_signal_and_a_second_one_ends_at_once(
    number: signal.Signals, children: list[Child]
) -> None:
    code = """
        with stop_on_signals() as stop:
            say("ready")
            while not stop:
                time.sleep(0.02)
            try:
                stop.check("at step 3")
            except Stopped as stopped:
                say(stopped)
            time.sleep(60)
    """
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.send(number)
    said = f"stopped by {number.name} at step 3, from {from_me()}; the same command goes on from there"
    assert child.hear() == said
    child.send(number)
    if number != signal.SIGINT:  # Python itself handles that one: KeyboardInterrupt.
        assert child.hear() == f"farewell {number.name} , from {from_me()}"
    code_, errors = child.end()
    assert code_ == -number and ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


@pytest.mark.parametrize("number", sorted(set(senders.WAITED_FOR) - {signal.SIGINT}))
def test_a_signal_that_nothing_handles_ends_the_process_with_a_farewell(
    number: signal.Signals, children: list[Child]
) -> None:
    children.append(child := Child('say("ready"); time.sleep(60)', cwd="/"))
    assert child.hear() == "ready"
    child.send(number)
    assert child.hear() == f"farewell {number.name} , from {from_me()}"
    assert child.end() == (-number, "")


def test_an_interrupt_ends_a_wait_of_the_main_thread(children: list[Child]) -> None:
    code = """
        lock = threading.Lock(); lock.acquire()
        try:
            say("ready")
            lock.acquire()
        except KeyboardInterrupt:
            say("interrupted", senders.sender_of(signal.SIGINT))
    """
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.send(signal.SIGINT)
    assert child.hear() == f"interrupted , from {from_me()}"
    assert child.end() == (0, "")


def test_what_is_ignored_stays_ignored(children: list[Child]) -> None:
    """As SIGHUP under nohup."""
    code = (
        'signal.signal(signal.SIGHUP, signal.SIG_IGN); say("ready"); sys.stdin.readline(); say("still here")'
    )
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.send(signal.SIGHUP)
    assert child.process.stdin is not None
    child.process.stdin.write(b"\n")
    assert child.hear() == "still here"
    assert child.end() == (0, "")


def test_the_keyboard_is_named(children: list[Child]) -> None:
    """Ctrl-C of a terminal is the kernel's, and no process'."""
    code = """
        import fcntl, termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        with stop_on_signals() as stop:
            say("ready")
            while not stop:
                time.sleep(0.02)
            say(senders.sender_of(signal.SIGINT))
    """
    ours, theirs = pty.openpty()
    children.append(child := Child(code, stdin=theirs, start_new_session=True))
    os.close(theirs)
    assert child.hear() == "ready"
    os.write(ours, b"\x03")
    assert child.hear() == ", from the keyboard"
    child.process.wait(timeout=60)
    os.close(ours)


def test_a_terminal_that_closes_is_named(children: list[Child]) -> None:
    code = """
        import fcntl, termios
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        with stop_on_signals() as stop:
            say("ready")
            while not stop:
                time.sleep(0.02)
            say(senders.sender_of(signal.SIGHUP))
    """
    ours, theirs = pty.openpty()
    children.append(child := Child(code, stdin=theirs, start_new_session=True))
    os.close(theirs)
    assert child.hear() == "ready"
    os.close(ours)
    assert child.hear() == ", from the terminal, which was closed"
    child.process.wait(timeout=60)


STARTS = {
    "subprocess": "subprocess.run([sys.executable, '-c', SHOW])",
    "system": "os.system(f'{sys.executable} -c \"{SHOW}\"')",
    "fork": (
        "pid = os.fork()\nif pid == 0:\n    exec(SHOW); sys.stdout.flush(); os._exit(0)\nos.waitpid(pid, 0)"
    ),
    "posix_spawn": (
        "os.waitpid(os.posix_spawn(sys.executable, [sys.executable, '-c', SHOW], os.environ), 0)"
    ),
}


@pytest.mark.parametrize("how", STARTS)
def test_children_do_not_inherit_the_block_and_the_next_signal_is_named_again(
    how: str, children: list[Child]
) -> None:
    code = STARTS[how] + textwrap.dedent("""
        with stop_on_signals() as stop:
            say("ready")
            while not stop:
                time.sleep(0.02)
            say(senders.sender_of(stop.signal_number))
    """)
    children.append(child := Child(code))
    assert child.hear() == "[]"
    assert child.hear() == "ready"
    child.send(signal.SIGTERM)
    assert child.hear() == f", from {from_me()}"


def test_between_a_start_and_the_next_look_signals_work_without_a_name(children: list[Child]) -> None:
    code = """
        with stop_on_signals() as stop:
            subprocess.run(["true"])
            say("ready")
            while not stop:
                time.sleep(0.02)
            say(stop.signal_number, repr(senders.sender_of(stop.signal_number)))
    """
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.send(signal.SIGTERM)
    assert child.hear() == f"{int(signal.SIGTERM)} ''"
    assert child.end() == (0, "")


def test_threads_that_are_started_later_leave_signals_to_the_one_that_waits(children: list[Child]) -> None:
    code = """
        threads = [threading.Thread(target=time.sleep, args=(60,), daemon=True) for _ in range(20)]
        [thread.start() for thread in threads]
        with stop_on_signals() as stop:
            say("ready")
            for _ in range(10):
                while not stop:
                    time.sleep(0.02)
                told = bool(senders.sender_of(stop.signal_number))
                stop.signal_number = 0
                signal.signal(signal.SIGUSR1, lambda number, frame: setattr(stop, "signal_number", number))
                say(told)  # Only now the next one is sent.
    """
    children.append(child := Child(code))
    assert child.hear() == "ready"
    for _ in range(10):
        child.send(signal.SIGUSR1)
        assert child.hear() == "True"
    assert child.end() == (0, "")


def test_after_listening_all_is_as_before(children: list[Child]) -> None:
    code = """
        senders.stop_listening()
        senders.listen_again()  # Nothing to be heard again.
        say(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        time.sleep(60)
    """
    children.append(child := Child(code))
    assert child.hear() == "[]"
    child.send(signal.SIGTERM)
    assert child.hear() == ""  # No farewell.
    assert child.end() == (-signal.SIGTERM, "")


def test_who_listens_twice_has_the_second_farewell(children: list[Child]) -> None:
    code = 'senders.listen(lambda number, sender: say("second")); say("ready"); time.sleep(60)'
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.send(signal.SIGTERM)
    assert child.hear() == "second"
    assert child.end()[0] == -signal.SIGTERM


def test_a_program_that_ends_while_it_listens_ends_well(children: list[Child]) -> None:
    children.append(child := Child('say("done")'))
    assert child.hear() == "done"
    assert child.end() == (0, "")


def test_another_thread_than_the_main_one_changes_nothing() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    heard: list[object] = []

    def work() -> None:
        senders.listen(lambda number, sender: heard.append(number))
        heard.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [before] == [signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    assert senders.sender_of(signal.SIGTERM) == ""


@pytest.mark.parametrize(
    ("number", "told", "words"),
    [
        (signal.SIGXCPU, {"si_code": senders.SENT_BY_KERNEL, "si_pid": 0}, "the kernel"),
        (signal.SIGTERM, {"si_code": 0, "si_pid": 0}, "a process outside of this container"),
        (
            signal.SIGTERM,
            {"si_code": 0, "si_pid": 2**30, "si_uid": 2**31},
            rf"process {2**30} (gone since, user",
        ),
    ],
)
def test_senders_that_cannot_be_looked_at_are_described(
    number: signal.Signals, told: dict[str, int], words: str
) -> None:
    described: str = senders._described(number, SimpleNamespace(**told))  # type: ignore[arg-type]
    assert described.startswith(words)
