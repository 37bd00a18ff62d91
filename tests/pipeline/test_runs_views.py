"""Lists, logs, the live view and comparisons over runs that were really trained, and over one at work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

PATIENCE = 240.0  # Seconds; others may use this machine too.
LONG = {"steps": 4000, "runtime__checkpoint_every": 50, "runtime__validate_every": 1000}


def _wait_until(holds: Callable[[], Any]) -> Any:
    until = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="module")
def studied(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A root with two experiments of three seeds each, one of them probed."""
    salt = type(workshop.salt)(tmp_path_factory.mktemp("studied"))
    data = ("--data", workshop.table, "--cache", workshop.cache)
    for name, more in (("slow", {}), ("fast", {"optimizer__lr": 1e-2})):
        for seed in range(3):
            settings = {"runtime__validate_every": 3} | more
            salt.ok(
                *salt.train(
                    "demo_student", f"{name}{seed}", *data, "--seed", seed, "--max-steps", 6, **settings
                )
            )
    salt.ok("eval", "slow0", "--data", workshop.table, "--frame-stride", 2)
    return salt


@dataclass
class AtWork:
    """A run that trains for as long as somebody looks at it."""

    salt: Any
    process: subprocess.Popen[str]


def _start(salt: Any, workshop: Any) -> AtWork:
    process = salt.start(*salt.train("demo_teacher", "working", "--data", workshop.table, **LONG))
    _wait_until(lambda: len(salt.at("working").metrics("train")) > 2 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return AtWork(salt, process)


@pytest.fixture(scope="module")
def at_work(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AtWork]:
    found = _start(type(workshop.salt)(tmp_path_factory.mktemp("at_work")), workshop)
    yield found
    for process in found.salt.started:
        process.kill()
        process.communicate()


# Lists


def test_lists_are_of_a_state_in_an_order_and_of_the_last_few(studied: Any) -> None:
    def names(*options: object) -> list[str]:
        return [row["name"] for row in studied.json("runs", "ls", *options)]

    everyone = [f"{name}{seed}" for name in ("fast", "slow") for seed in range(3)]
    assert names() == names("--state", "finished") == everyone
    assert names("--state", "failed") == []
    assert names("--last", 2) == ["fast1", "fast2"]
    assert names("--last", 2, "--sort", "updated") == ["fast1", "fast2"]
    rows = {row["name"]: row["last_val"] for row in studied.json("runs", "ls")}
    assert names("--sort", "loss") == sorted(everyone, key=lambda name: rows[name]["loss"])
    assert names("--sort", "r2") == sorted(everyone, key=lambda name: -rows[name]["r2_position_mean"])
    assert "at least 0" in studied("runs", "ls", "--last", -1).sentence


def test_the_best_of_every_run_is_in_the_list_where_it_is_asked_for(studied: Any) -> None:
    for row in studied.json("runs", "ls", "--best"):
        losses = {line["loss"]: line["step"] for line in studied.at(row["name"]).metrics("val")}
        assert row["best"]["val.loss"] == {"value": min(losses), "step": losses[min(losses)]}
    assert "best R²" in studied.ok("runs", "ls", "--best").out


def test_a_run_shows_what_its_steps_cost(studied: Any) -> None:
    cost = studied.json("runs", "show", "slow0")["cost"]
    config = json.loads(studied.at("slow0").config_file.read_text())
    assert cost["clips_a_step"] == config["batch_size"] and cost["flops_a_step"] > 0
    shown = studied.ok("runs", "show", "slow0").out
    for word in ("parameters", "TFLOP a step", "masked", "finished at step 6", "val.loss"):
        assert word in shown, word


# Comparisons


def test_two_experiments_of_three_seeds_are_compared_seed_by_seed(studied: Any, tmp_path: Path) -> None:
    names = [f"{name}{seed}" for name in ("slow", "fast") for seed in range(3)]
    page = tmp_path / "compared.html"
    found = studied.json("runs", "compare", *names, "--html", page)
    assert {row["field"] for row in found["settings"]} == {"optimizer.lr", "seed"}
    assert found["incomparable"] == [] and found["notes"] == []
    assert [group["runs"] for group in found["groups"]] == [names[:3], names[3:]]
    (pair,) = found["paired"]
    last = {name: studied.at(name).metrics("val")[-1]["r2_position_mean"] for name in names}
    assert pair["differences"] == [pytest.approx(last[f"fast{s}"] - last[f"slow{s}"]) for s in range(3)]
    assert pair["low"] < pair["mean"] < pair["high"]
    # Same shapes: at equal steps, clips and FLOPs they are the same figures, whatever seed drew the masks.
    assert {row["axis"] for row in found["equal"]} == {"steps", "clips", "flops"}
    by_axis = {row["axis"]: row["values"] for row in found["equal"]}
    assert by_axis["steps"] == by_axis["clips"] == [last[name] for name in names]
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>") and text.count("<img") == 3
    assert "http" not in re.sub(r"http-equiv|https?://www\.w3\.org", "", text)


def test_a_comparison_for_people_has_every_table(studied: Any) -> None:
    said = studied.ok("runs", "compare", "slow0", "fast0", "--column", "val.loss").out
    for word in (
        "What was run",
        "optimizer.lr",
        "Held-out loss at equal steps",
        "at equal PFLOP",
        "Seed by seed",
    ):
        assert word in said, word
    assert "one seed" in said and "cannot be said" in said
    assert "Probes, front/grid" in said and "action" in said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("slow0",), "needs two runs"),
        (("slow0", "slow0"), "needs two runs"),
        (("slow0", "nobody"), "there is no run at"),
        (("slow0", "../x"), "run name '../x' may hold only"),
        (("slow0", "fast0", "--column", "val.los"), "perhaps val.loss"),
        (("slow0", "fast0", "--html", "."), "it is a folder"),
    ],
)
def test_what_cannot_be_compared_is_a_sentence(studied: Any, arguments: tuple[str, ...], named: str) -> None:
    assert named in studied("runs", "compare", *arguments).sentence


# A run at work


def test_a_run_is_watched_and_followed_until_it_ends(salt: Any, workshop: Any) -> None:
    run = _start(salt, workshop)
    watching = salt.start("runs", "watch", "working", "--json", "--every", 0.2)
    following = salt.start("runs", "tail", "working", "-f", "--lines", 2)
    first = json.loads(watching.stdout.readline())["runs"][0]
    assert (first["state"], first["is_over"]) == ("running", False)
    assert first["rate"] > 0 and first["eta_seconds"] > 0
    before = first["current_step"]
    _wait_until(lambda: json.loads(watching.stdout.readline())["runs"][0]["current_step"] > before)
    assert _wait_until(lambda: re.match(r"step (\d+): loss", following.stdout.readline()))
    run.process.send_signal(signal.SIGTERM)
    frames, err = watching.communicate(timeout=PATIENCE)
    last = json.loads(frames.splitlines()[-1])["runs"][0]
    assert (watching.returncode, err) == (0, "")
    assert (last["state"], last["is_over"]) == ("stopped", True)
    lines, err = following.communicate(timeout=PATIENCE)
    assert (following.returncode, err) == (0, "")
    assert f"step {salt.at('working').status().step}: " in lines, "also what came with the end"


def test_where_there_is_no_terminal_a_run_is_shown_once(at_work: AtWork) -> None:
    answer = at_work.salt.run("runs", "watch")
    assert answer.code == 0
    assert "working" in answer.out and "clips/s" in answer.out and "left" in answer.out
    assert "\x1b" not in answer.out


@pytest.mark.parametrize(
    "command", [("runs", "tail", "working", "-f"), ("runs", "watch", "working", "--json")]
)
def test_ctrl_c_ends_looking_on_without_a_word(at_work: AtWork, command: tuple[str, ...]) -> None:
    looking = at_work.salt.start(*command)
    assert looking.stdout is not None
    assert looking.stdout.readline()
    looking.send_signal(signal.SIGINT)
    _, err = looking.communicate(timeout=PATIENCE)
    assert (looking.returncode, err) == (0, "")
    assert at_work.process.poll() is None, "the run goes on"


def test_a_terminal_is_drawn_anew(at_work: AtWork) -> None:
    """In a real pseudo-terminal of 70 columns."""
    mine, theirs = os.openpty()
    os.set_blocking(mine, False)
    program = [sys.executable, "-m", "salt_vla", "runs", "watch", "working", "--every", "0.2"]
    environment = os.environ | {
        "SALT_VLA_ROOT": str(at_work.salt.root),
        "COLUMNS": "70",
        "TERM": "xterm-256color",
    }
    looking = subprocess.Popen(program, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    drawn = b""

    def frames() -> int:
        nonlocal drawn
        with suppress(BlockingIOError):
            drawn += os.read(mine, 65536)
        return drawn.count(b"left") > 2

    try:
        _wait_until(frames)
    finally:
        psutil.Process(looking.pid).send_signal(signal.SIGINT)
        looking.wait(PATIENCE)
        os.close(mine)
    assert looking.returncode == 0
    assert b"Traceback" not in drawn and "─".encode() in drawn


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("runs", "tail", "nobody"), "there is no run or job 'nobody'"),
        (("runs", "tail", "nobody", "--lines", "-1"), "--lines must be at least 0"),
        (("runs", "watch", "nobody"), "there is no run at"),
        (("runs", "watch", "--every", "0"), "--every must lie in"),
        (("runs", "watch", "--every", "nan"), "--every must lie in"),
    ],
)
def test_what_cannot_be_watched_is_a_sentence(salt: Any, command: tuple[str, ...], named: str) -> None:
    assert named in salt(*command).sentence
