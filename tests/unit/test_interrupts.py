"""A first signal asks to stop, a second one acts as usual; checked with real signals to real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from salt_vla.interrupts import StopFlag, Stopped, stop_on_signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PRELUDE = """
import signal, sys
from salt_vla.interrupts import Stopped, stop_on_signals

def say(word):
    print(word, flush=True)

def wait_for(condition):
    while not condition():
        signal.sigtimedwait([], 0.01)
"""


class Child:
    """A Python process that says where it stands, one word a line."""

    def __init__(self, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(code)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        """(exit code, standard error)."""
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in started:
        child.process.kill()
        child.process.wait()


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_stops_at_the_next_safe_place(number: signal.Signals, children: list[Child]) -> None:
    code = """
        try:
            with stop_on_signals() as stop:
                say("ready")
                wait_for(lambda: stop)
                say("at a safe place")
                stop.check("at step 3 of 9")
        except Stopped as stopped:
            say(stopped)
            sys.exit(40)
    """
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.process.send_signal(number)
    assert child.hear() == "at a safe place"
    assert child.hear() == f"stopped by {number.name} at step 3 of 9; the same command goes on from there"
    assert child.end() == (40, "")


@pytest.mark.parametrize("number", SIGNALS)
def test_second_signal_acts_as_usual(number: signal.Signals, children: list[Child]) -> None:
    code = """
        with stop_on_signals() as stop:
            say("ready")
            wait_for(lambda: stop)
            say("asked once")
            wait_for(lambda: False)
    """
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.process.send_signal(number)
    assert child.hear() == "asked once"
    child.process.send_signal(number)
    exit_code, errors = child.end()
    assert exit_code == -number
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


def test_the_echo_of_a_signal_is_not_a_second_one(children: list[Child]) -> None:
    """A launcher passes on what the terminal has sent to all; what comes later is meant."""
    code = """
        import time
        with stop_on_signals(echo_seconds=0.3) as stop:
            say("ready")
            wait_for(lambda: stop)
            say("asked once")
            assert sys.stdin.readline() == "echoed\\n"
            say(stop.signal_number)
            time.sleep(0.4)
            say("later")
            wait_for(lambda: False)
    """
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.process.send_signal(signal.SIGTERM)
    assert child.hear() == "asked once"
    child.process.send_signal(signal.SIGINT)
    assert child.process.stdin is not None
    child.process.stdin.write("echoed\n")
    child.process.stdin.flush()
    assert child.hear() == str(int(signal.SIGTERM))
    assert child.hear() == "later"
    child.process.send_signal(signal.SIGTERM)
    assert child.end()[0] == -signal.SIGTERM


def test_a_block_within_a_block_has_its_flag() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with stop_on_signals(echo_seconds=60) as outer:
        with stop_on_signals() as inner:
            assert inner is outer
        signal.raise_signal(signal.SIGTERM)
        assert outer.signal_number == signal.SIGTERM
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with stop_on_signals() as later:
        assert later is not outer and not later


def test_outside_the_block_signals_act_as_usual(children: list[Child]) -> None:
    code = """
        with stop_on_signals():
            pass
        say("ready")
        wait_for(lambda: False)
    """
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.process.send_signal(signal.SIGTERM)
    assert child.end()[0] == -signal.SIGTERM


def test_work_under_nohup_outlives_its_terminal(children: list[Child]) -> None:
    code = """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_on_signals() as stop:
            say("ready")
            sys.stdin.readline()
            say(bool(stop))
    """
    children.append(child := Child(code))
    assert child.hear() == "ready"
    child.process.send_signal(signal.SIGHUP)
    assert child.process.stdin is not None
    child.process.stdin.write("go on\n")
    child.process.stdin.flush()
    assert child.hear() == "False"
    assert child.end() == (0, "")


@pytest.mark.parametrize("fails", [False, True])
def test_handlers_of_before_come_back(fails: bool) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        with stop_on_signals():
            assert [signal.getsignal(number) for number in SIGNALS] != before
            if fails:
                raise ValueError("in the middle of work")
    except ValueError:
        assert fails
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_flag_without_a_signal_lets_work_go_on() -> None:
    with stop_on_signals() as stop:
        assert not stop
        stop.check("anywhere")


def test_flag_with_a_signal_names_it_and_the_place() -> None:
    flag = StopFlag()
    flag.signal_number = signal.SIGTERM
    with pytest.raises(Stopped, match="stopped by SIGTERM at step 7; the same command goes on") as caught:
        flag.check("at step 7")
    assert flag and caught.value.signal_number == signal.SIGTERM


def test_threads_get_a_flag_that_stays_down() -> None:
    """Python lets only the main thread handle signals; work in another one must run all the same."""
    before = [signal.getsignal(number) for number in SIGNALS]
    seen: list[object] = []

    def work() -> None:
        with stop_on_signals() as stop:
            stop.check("anywhere")
            seen.extend([bool(stop), [signal.getsignal(number) for number in SIGNALS]])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False, before]


LOADING = """
import sys, time
import numpy as np
from salt_vla.batches import Batches, Part
from salt_vla.loader import Loading, load_from
from salt_vla.geometry import ClipGeometry
from salt_vla.interrupts import Stopped, stop_on_signals
from salt_vla.masks import RandomMasks

class SlowViews:
    def read_many(self, keys, out=None):
        time.sleep(0.5)
        return np.zeros((len(keys), 2, 8, 8, 3), dtype=np.uint8)

if __name__ == "__main__":
    masks = RandomMasks(ClipGeometry(num_frames=2, image_size=8, tubelet_size=1, patch_size=4), ratio=0.5)
    batches = Batches([Part(("a",))], SlowViews(), masks, batch_size=1, num_views=1, seed=0, steps=1000)
    try:
        with stop_on_signals() as stop:
            for step, _ in enumerate(load_from(batches, 0, Loading(1))):
                print("step", flush=True)
                stop.check("after a step")
    except Stopped as stopped:
        print(stopped, flush=True)
"""


def test_interrupt_from_the_keyboard_spares_the_loaders_workers(tmp_path: Path) -> None:
    """Ctrl-C reaches every process of the terminal; a batch that is waited for must still come."""
    script = tmp_path / "loading.py"
    script.write_text(LOADING)
    command = [sys.executable, str(script)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "step\n"
        os.killpg(process.pid, signal.SIGINT)
        said = process.stdout.read().splitlines()
    finally:
        process.kill()
        process.wait()
    assert said[-1].startswith("stopped by SIGINT after a step")
