"""What is watched is read once and fits its terminal; a log is followed until its run has ended."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from salt_vla.errors import RunError
from salt_vla.identity import identity
from salt_vla.operations.queue import Queue, Wanted
from salt_vla.operations.tail import follow, last_lines, tail
from salt_vla.operations.watch import MOST_RUNS, Moment, Watch, Watched
from salt_vla.operations.watch_frame import frame
from salt_vla.rundir import RunDirectory, to_json_line

WriteRun = Callable[..., RunDirectory]
Rows = Callable[..., list[dict[str, Any]]]


def _running() -> dict[str, Any]:
    me = identity()
    return {"state": "running", "pid": me.pid, "started": me.started, "boot": me.boot, "ticks": me.ticks}


def _lines(moment: Moment, width: int) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=width, markup=False, emoji=False, highlight=False)
    console.print(frame(moment, width))
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_a_look_at_a_long_run_reads_only_what_came_since(write_run: WriteRun, rows_of: Rows) -> None:
    run = write_run("long", rows_of(50_000), **_running())
    eyes = Watch(["long"])
    first = eyes.look().runs[0]
    read = eyes.bytes_read
    assert read == run.metrics_file.stat().st_size > 500_000
    assert (len(first.loss), len(first.r2)) == (5000, 2500)
    eyes.look()
    assert eyes.bytes_read == read
    more = {"kind": "train", "step": 50_010, "loss": 0.1}
    run.log_metrics(more)
    second = eyes.look().runs[0]
    assert eyes.bytes_read == read + len(to_json_line(more)) + 1
    assert (second.overview.step, second.loss[-1]) == (50_010, 0.1)


def test_a_resume_that_trims_the_metrics_is_seen(write_run: WriteRun, rows_of: Rows) -> None:
    run = write_run("some", rows_of(100), **_running(), step=50)
    eyes = Watch(["some"])
    assert eyes.look().runs[0].overview.step == 100
    run.trim_metrics(50)
    assert eyes.look().runs[0].overview.step == 50


def test_without_names_those_at_work_come_first_and_old_ones_are_left_out(write_run: WriteRun) -> None:
    write_run("ended")
    write_run("working", **_running())
    old = write_run("old")
    for file in old.path.iterdir():
        _set_back(file)
    assert [run.overview.name for run in Watch().look().runs] == ["working", "ended"]


@pytest.mark.parametrize("name", ["some copy", "ünï", "<script>x"])
def test_a_copy_under_a_name_that_no_run_takes_hides_nothing(write_run: WriteRun, name: str) -> None:
    run = write_run("some")
    shutil.copytree(run.path, run.path.with_name(name))
    moment = Watch().look()
    assert {run.overview.name for run in moment.runs} == {"some", name}
    assert name in "\n".join(_lines(moment, 80))


@pytest.mark.parametrize("file", ["status.json", "metrics.jsonl", "launch.json", "log.txt", "config.json"])
def test_a_run_whose_file_cannot_be_read_hides_no_other(write_run: WriteRun, file: str) -> None:
    write_run("sound")
    strange = write_run("strange").path / file
    strange.unlink(missing_ok=True)
    strange.mkdir()
    moment = Watch().look()
    assert {run.overview.name for run in moment.runs} == {"sound", "strange"}
    assert "sound" in "\n".join(_lines(moment, 80))


def test_where_nothing_happens_the_last_run_is_shown(write_run: WriteRun, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for number, name in enumerate(("older", "old")):
        for file in write_run(name).path.iterdir():
            _set_back(file, 9000.0 - number)
    assert [run.overview.name for run in Watch().look().runs] == ["old"]


def _set_back(file: Path, seconds: float = 9000.0) -> None:
    os.utime(file, (time.time() - seconds,) * 2)


def test_of_many_at_work_some_are_shown_and_the_rest_counted(write_run: WriteRun) -> None:
    for number in range(MOST_RUNS + 2):
        write_run(f"run{number}", **_running())
    moment = Watch().look()
    assert (len(moment.runs), moment.more) == (MOST_RUNS, 2)
    assert "and 2 more at work" in "\n".join(_lines(moment, 80))


@pytest.mark.parametrize("width", [60, 80, 133, 200])
def test_a_frame_fits_its_terminal(write_run: WriteRun, rows_of: Rows, width: int) -> None:
    recipe = {
        "name": "a_recipe_of_a_long_name" * 3,
        "parent": "",
        "hypothesis": "",
        "target": "",
        "criterion": "",
    }
    run = write_run("x" * 100, rows_of(52_780), **_running(), total_steps=52_780)
    (run.path / "recipe.json").write_text(json.dumps(recipe | {"changed": [], "differs_from_parent": []}))
    failed = write_run("failed", rows_of(100), state="failed", exit_reason="RuntimeError: " + "memory " * 40)
    Queue().add(Wanted(("train", "exp1_higher_lr", "--name", "next"), "/", "next"))
    lines = _lines(Watch([run.name, failed.name]).look(), width)
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    assert text.count("memory") == 40, "what is said of a failure is never cut"
    for word in (
        "52780/52780",
        "100%",
        "running",
        "failed",
        "waits for data 5%",
        "1.5 GB",
        "next",
        "best 0.5",
    ):
        assert word in text, word


def test_a_frame_without_runs_says_how_to_start_one(write_run: WriteRun) -> None:
    assert "salt-vla train" in "\n".join(_lines(Watch().look(), 80))


def test_a_terminal_is_given_no_orders(write_run: WriteRun) -> None:
    run = write_run("bad", state="failed", exit_reason="\x1b[2J[red]gone\x07\nnext")
    text = "\n".join(_lines(Watch([run.name]).look(), 80))
    assert "\x1b" not in text and "\x07" not in text and "[red]gone" in text


def test_a_damaged_queue_or_run_hides_no_other(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("well")
    (write_run("torn").path / "status.json").write_text("{")
    (tmp_path / "queue.db").write_bytes(b"rubbish" * 1000)
    moment = Watch(["torn", "well"]).look()
    assert [run.overview.state for run in moment.runs] == ["damaged", "finished"]
    assert "queue.db" in moment.queue_problem
    assert json.loads(json.dumps(moment.to_json()))["queue"]["problem"]
    assert moment.is_over


def test_a_name_that_is_no_run_is_a_sentence(write_run: WriteRun) -> None:
    with pytest.raises(RunError, match="there is no run at"):
        Watch(["nobody"])


def test_a_moment_ends_with_the_last_of_its_runs(write_run: WriteRun) -> None:
    write_run("ended")
    write_run("working", **_running())
    assert not Watch(["ended", "working"]).look().is_over
    assert Watch(["ended"]).look().is_over
    shown = Watched(Watch(["ended"]).look().runs[0].overview, is_over=False)
    assert not replace(Watch(["ended"]).look(), runs=(shown,)).is_over


# Logs


def test_the_last_lines_and_figures_of_a_run(write_run: WriteRun) -> None:
    run = write_run("some")
    run.log_file.write_text("one\ntwo\n 10%\r 50%\r100%\nlast")
    assert last_lines(run.log_file, 2) == ["two", "100%"]
    assert list(tail(run, 1)) == [
        "100%",
        "step 100: loss 0.5, R² over place means +0.500, 40 clips/s, waits for data 5%",
        "step 100: held out: loss 0.5, R² over place means +0.500",
    ]
    run.log_file.unlink()
    assert list(tail(write_run("empty", []), 5)) == []


def test_a_run_is_followed_until_it_has_ended(write_run: WriteRun) -> None:
    """Lines of the log and of the metrics as they come, also those that were written with the end; over a log
    that was rotated, and metrics that a resume trimmed."""
    run = write_run("some", [{"kind": "train", "step": 1, "loss": 0.5}], **_running())
    run.log_file.write_text("before\n")
    steps: list[Callable[[], None]] = [
        lambda: run.log("more"),
        lambda: run.log_metrics({"kind": "train", "step": 2, "loss": 0.4}),
        lambda: (run.log_file.replace(run.path / "log.1"), run.log("rotated"))[1],
        lambda: (run.trim_metrics(1), run.log_metrics({"kind": "train", "step": 2, "loss": 0.3}))[1],
        lambda: (run.log("the end"), run.set_status(replace(run.status(), state="finished")))[1],
    ]

    def wait(seconds: float) -> None:
        steps.pop(0)()

    said = list(follow(run, 1, wait))
    assert said == [
        *("before", "step 1: loss 0.5", "more", "step 2: loss 0.4", "rotated"),
        *("step 1: loss 0.5", "step 2: loss 0.3", "the end"),
    ]
    assert steps == []


def test_a_run_that_has_ended_is_not_waited_for(write_run: WriteRun) -> None:
    run = write_run("some", [])
    run.log_file.write_text("one\n")
    assert list(follow(run, 5, lambda seconds: pytest.fail("waits"))) == ["one"]
