"""Progress is a bar on a terminal and a few lines in a log, and never touches stdout."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time

from salt_vla import progress as module
from salt_vla.progress import Shares, progress

CODE = """
from salt_vla.progress import progress
with progress("caching", total=4, unit="clips", done=1) as advance:
    advance(2, note="shard 1")
    advance()
print("result")
"""


def test_a_log_gets_one_line_at_the_end_of_quick_work(capsys):
    with progress("caching", total=4, unit="clips") as advance:
        for _ in range(3):
            advance()
        assert capsys.readouterr().err == ""
        advance(note="shard 1")
        advance(0, note="said once")
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("caching: 4/4 clips, ")
    assert line.endswith("clips/s, ETA 0 s shard 1")


def test_a_log_gets_a_line_whenever_the_wait_is_over(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOG_LINES", 0.05)
    with progress("training", total=1000, unit="steps") as advance:
        advance()
        assert capsys.readouterr().err == ""
        time.sleep(0.06)
        advance(9)
        advance()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("training: 10/1000 steps, ")


def test_work_that_was_there_already_does_not_count_towards_the_rate(capsys):
    with progress("caching", total=100, unit="clips", done=98) as advance:
        time.sleep(0.1)
        advance(2)
    line = capsys.readouterr().err
    assert line.startswith("caching: 100/100 clips, ")
    assert 0 < float(line.split(", ")[1].split(" ")[0]) <= 20


def test_the_time_that_is_left_is_said_in_words(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOG_LINES", 0.0)
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with progress("caching", total=100_000, unit="clips") as advance:
        now[0] = 100.0
        for amount in (100, 400, 6500, 92_000):
            advance(amount)
    said = [line.split("ETA ")[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["27 h 45 min", "5 h 32 min", "22 min", "1 s"]


def test_shares_say_what_was_waited_for(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    shares = Shares()
    for what, seconds in (("decode", 1), ("teacher", 6), ("decode", 2)):
        with shares.of(what):
            now[0] += seconds
    now[0] += 1
    assert str(shares) == "decode 30%, teacher 60%"
    assert shares.seconds == {"decode": 3, "teacher": 6} and shares.elapsed == 10


def test_an_error_inside_passes_through(capsys):
    try:
        with progress("caching", total=3, unit="clips") as advance:
            advance()
            raise KeyError("inside")
    except KeyError as error:
        assert error.args == ("inside",)
    else:
        raise AssertionError("the error was swallowed")


def test_a_terminal_gets_a_bar_and_stdout_only_the_result():
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "140"}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True
    )
    os.close(theirs)
    drawn = b""
    try:
        while chunk := os.read(ours, 4096):
            drawn += chunk
    except OSError:  # Linux answers EIO when the other side of a pseudo-terminal has closed
        pass
    finally:
        os.close(ours)
    assert process.communicate()[0] == "result\n"
    assert process.returncode == 0
    text = drawn.decode()
    assert "caching" in text and "4/4" in text and "clips/s" in text
