"""A run is shown as it is, whatever state its files are in, and a list of runs never shows what was."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salt_vla.config import TrainConfig
from salt_vla.errors import RunError
from salt_vla.identity import identity
from salt_vla.operations import index
from salt_vla.operations.overview import FEW, Overview, best_of, curve, glance, overview, overviews, with_best
from salt_vla.rundir import RunDirectory, Status, all_runs

WriteRun = Callable[..., RunDirectory]
Rows = Callable[..., list[dict[str, Any]]]


def _running() -> dict[str, Any]:
    me = identity()
    return {"state": "running", "pid": me.pid, "started": me.started, "boot": me.boot, "ticks": me.ticks}


def test_a_run_at_work_says_how_fast_it_is_and_how_long_it_takes(write_run: WriteRun, rows_of: Rows) -> None:
    run = write_run("some", rows_of(60), TrainConfig(steps=100, batch_size=4), **_running(), step=40)
    seen = overview(run)
    assert (seen.state, seen.step, seen.total_steps, seen.share) == ("running", 60, 100, 0.6)
    assert (seen.clips_per_s, seen.rate, seen.eta_seconds) == (
        pytest.approx(40),
        pytest.approx(10),
        pytest.approx(4),
    )
    assert (seen.data_wait_share, seen.memory_gb) == (0.05, 1.5)
    assert seen.figure("val", "loss") == seen.last_val["loss"]
    assert glance(run) == seen.__class__(**vars(seen) | {"best": {}})


def test_the_rate_is_over_the_time_of_the_last_lines_not_the_mean_of_their_rates(write_run: WriteRun) -> None:
    rows = [{"kind": "train", "step": n, "clips_per_s": rate} for n, rate in enumerate([10.0, 30.0], start=1)]
    seen = overview(write_run("some", rows, **_running()))
    assert seen.clips_per_s == pytest.approx(2 / (1 / 10 + 1 / 30))
    assert overview(write_run("ended", rows)).clips_per_s == 30
    assert overview(write_run("lost", rows, state="running", pid=2**22 + 1)).eta_seconds is None


def test_the_best_figures_are_the_lowest_loss_and_the_highest_r2(write_run: WriteRun) -> None:
    rows = [
        {"kind": "val", "step": step, "loss": loss, "r2_position_mean": 1 - loss}
        for step, loss in ((1, 0.5), (2, 0.3), (3, 0.4))
    ]
    run = write_run("some", [*rows, {"kind": "val", "step": 4, "loss": None}])
    assert best_of(rows) == {"val.loss": (0.3, 2), "val.r2_position_mean": (0.7, 2)}
    assert overview(run).best == best_of(rows)
    assert curve(run, "val", "loss") == ([1, 2, 3], [0.5, 0.3, 0.4])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"data_wait_share": 0.5}, "waits for its data 50% of the time"),
        ({"collapse": True}, "collapsed (step 7)"),
        ({"corrupt_records": 3}, "3 damaged records skipped"),
        ({"bad_steps": 2}, "2 bad steps"),
    ],
)
def test_what_a_person_should_know_is_a_warning(write_run: WriteRun, row: dict[str, Any], said: str) -> None:
    run = write_run("some", [{"kind": "train", "step": 7} | row])
    assert [said in warning for warning in overview(run).warnings] == [True]
    assert overview(write_run("well", [{"kind": "train", "step": 7, "data_wait_share": 0.1}])).warnings == ()


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("status.json", "{"),
        ("status.json", '{"state": "finished", "step": -1}'),
        ("status.json", '{"nothing": "known"}'),
        ("status.json", '{"state": 5}'),
        ("status.json", '{"state": "running", "pid": 1.5}'),
        ("status.json", '{"state": "finished", "resumed_from": "abc"}'),
        ("status.json", '{"state": "finished", "ended": 1e300}'),
        ("status.json", '{"state": "finished", "branched_from": null}'),
        ("recipe.json", "[]"),
        ("verdict.json", '{"verdict": 1}'),
    ],
)
def test_a_damaged_run_hides_no_other_and_says_which_file(write_run: WriteRun, file: str, text: str) -> None:
    for name in ("a", "b", "c"):
        write_run(name)
    (RunDirectory.named("b").path / file).write_text(text)
    found = {run.name: run for run in overviews()}
    assert [found[name].state for name in "abc"] == ["finished", "damaged", "finished"]
    assert file in found["b"].status.exit_reason
    assert overview(RunDirectory.named("b")).state == "damaged"


@pytest.mark.parametrize(
    "status",
    [
        *(
            {"state": state, "step": 3, "exit_reason": "why"}
            for state in ("finished", "running", "new", "queued")
        ),
        {"state": "finished", "step": True, "exit_reason": ""},
        {"state": "finished", "pid": "7", "exit_reason": ""},
        {"state": "finished", "seconds": 1e400, "exit_reason": ""},
        {"state": "finished", "exit_reason": "", "of_a_later_version": 1},
        {
            "state": "stopped",
            "exit_reason": "",
            "resumed_from": [1, 2],
            "branched_from": "other",
            "boot": "x",
        },
        {"state": "finished"},
        {"step": 3},
        [],
        "x" * (1 << 21),
    ],
)
def test_a_status_is_read_as_the_run_itself_reads_it(write_run: WriteRun, status: Any) -> None:
    run = write_run("some")
    (run.path / "status.json").write_text(json.dumps(status))
    try:
        wanted = run.status()
    except RunError as error:
        wanted = Status("damaged", exit_reason=str(error))
    assert glance(run).status == wanted


def test_damage_beside_the_figures_hides_no_figure(write_run: WriteRun) -> None:
    run = write_run("some")
    for name in ("masks.json", "cost.json"):
        (run.path / name).write_text("{")
    with run.metrics_file.open("a") as file:
        file.write('rubbish\n{"kind": "tr')
    run.config_file.write_text("{")
    seen = overview(run)
    assert (seen.state, seen.step, seen.masks, seen.cost) == ("finished", 100, {}, {})
    assert seen.best["val.loss"] == (0.5, 100)


def test_metrics_that_the_disk_does_not_give_are_a_warning_and_hide_no_run(write_run: WriteRun) -> None:
    write_run("a")
    run = write_run("b")
    run.metrics_file.unlink()
    run.metrics_file.mkdir()
    found = with_best(overviews())
    assert [(each.name, each.state, bool(each.best)) for each in found] == [
        ("a", "finished", True),
        ("b", "finished", False),
    ]
    for seen in (found[1], overview(run)):
        assert seen.warnings == ("metrics.jsonl cannot be read (Is a directory)",)


def test_a_run_that_this_user_may_not_look_into_hides_no_other(write_run: WriteRun) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may look anywhere")
    write_run("a")
    folder = write_run("b").path
    folder.chmod(0)
    try:
        assert [run.name for run in overviews()] == [run.name for run in all_runs()] == ["a"]
    finally:
        folder.chmod(0o755)


def test_a_run_of_an_earlier_version_has_what_it_has(write_run: WriteRun) -> None:
    run = write_run("old", [{"kind": "val", "step": 3, "loss": 0.4}])
    (run.path / "status.json").write_text('{"state": "finished", "step": 3}')
    seen = overview(run)
    assert (seen.step, seen.total_steps, seen.share, seen.rate) == (3, 0, 0.0, None)
    assert json.loads(json.dumps(seen.to_json()))["last_val"]["loss"] == 0.4


def test_a_run_that_failed_before_it_had_settings_is_listed(write_run: WriteRun) -> None:
    run = write_run("some", [], state="failed", exit_reason="ImportError: no such module")
    run.config_file.unlink()
    run.metrics_file.unlink()
    (seen,) = overviews()
    assert (seen.state, seen.status.exit_reason) == ("failed", "ImportError: no such module")


def test_what_is_no_run_is_not_listed(write_run: WriteRun, tmp_path: Path) -> None:
    assert overviews() == []
    write_run("some")
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "file").write_text("")
    (tmp_path / "runs" / "gone").symlink_to(tmp_path / "nowhere")
    assert [run.name for run in overviews()] == ["some"]


# What is kept of ended runs


@pytest.fixture
def settled(write_run: WriteRun, tmp_path: Path) -> Path:
    """The folder of enough ended runs, whose files changed long ago, as an index keeps them."""
    for number in range(FEW):
        write_run(f"run{number:03d}")
    _age(tmp_path / "runs")
    return tmp_path / "runs"


def _age(folder: Path, seconds: float = 60.0) -> None:
    then = time.time() - seconds
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (then, then))


def _by_name() -> dict[str, Overview]:
    return {run.name: run for run in overviews()}


def test_a_second_list_says_the_same_and_reads_no_run(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = overviews()
    assert len(index.read(settled)) == FEW
    monkeypatch.setattr(RunDirectory, "status", lambda run: pytest.fail(f"{run.name} is read again"))
    assert overviews() == first


def test_best_figures_are_read_once(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = with_best(overviews())
    assert all(run.best["val.loss"] == (0.5, 100) for run in first)
    with monkeypatch.context() as patched:
        patched.setattr("salt_vla.operations.overview.all_rows", lambda run: pytest.fail("read again"))
        assert with_best(overviews()) == first
    (settled / "run003" / "metrics.jsonl").write_text('{"kind": "val", "step": 7, "loss": 0.25}\n')
    again = {run.name: run.best for run in with_best(overviews()[:5])}
    assert again.pop("run003") == {"val.loss": (0.25, 7)}
    assert again == {run.name: run.best for run in first[:5] if run.name != "run003"}


def test_best_figures_of_a_run_at_work_are_those_of_now(write_run: WriteRun, rows_of: Rows) -> None:
    run = write_run("some", rows_of(50), **_running())
    assert with_best(overviews())[0].best["val.loss"] == (0.5, 50)
    run.log_metrics({"kind": "val", "step": 60, "loss": 0.1})
    assert with_best(overviews())[0].best["val.loss"] == (0.1, 60)


@pytest.mark.parametrize("file", ["status.json", "recipe.json", "verdict.json", "metrics.jsonl"])
def test_a_run_whose_file_changed_is_read_again(settled: Path, file: str) -> None:
    """Also where size and folder stay as they were: written over, not replaced."""
    run = settled / "run007"
    texts = {
        "recipe.json": '{"name": "%s", "parent": "", "hypothesis": "", "target": "", "criterion": "", '
        '"changed": [], "differs_from_parent": []}',
        "verdict.json": '{"verdict": "%s", "reason": "because"}',
        "metrics.jsonl": '{"kind": "val", "step": 1, "%s": 1}\n',
        "status.json": '{"state": "finished", "exit_reason": "%s"}',
    }
    (run / file).write_text(texts[file] % "before")
    _age(settled)
    before = _by_name()["run007"].to_json()
    with (run / file).open("r+") as same:
        same.write(texts[file] % "after_")
    after = _by_name()["run007"].to_json()
    assert "before" in json.dumps(before) and "after_" in json.dumps(after)
    assert "before" not in json.dumps(after)


def test_what_may_still_change_is_never_kept(write_run: WriteRun, tmp_path: Path) -> None:
    for number in range(FEW):
        write_run(f"run{number}", **_running())
    _age(tmp_path / "runs")
    overviews()
    assert index.read(tmp_path / "runs") == {}
    for number in range(FEW):
        write_run(f"fresh{number}")
    overviews()
    assert index.read(tmp_path / "runs") == {}, "their files may change without their times doing so"


def test_a_removed_run_is_forgotten_and_a_new_one_found(settled: Path, write_run: WriteRun) -> None:
    overviews()
    for path in (settled / "run000").iterdir():
        path.unlink()
    (settled / "run000").rmdir()
    write_run("zzz")
    names = [run.name for run in overviews()]
    assert names == [f"run{number:03d}" for number in range(1, FEW)] + ["zzz"]


@pytest.mark.parametrize("damage", ["rubbish", "version", "folder", "text"])
def test_an_index_that_cannot_be_used_costs_time_alone(settled: Path, damage: str) -> None:
    first = overviews()
    file = settled / index.FILE
    if damage == "rubbish":
        file.write_bytes(b"no data base" * 1000)
    elif damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        with sqlite3.connect(file) as database:
            if damage == "version":
                database.execute("PRAGMA user_version = 99")
            else:
                database.execute("UPDATE runs SET glance = 'no JSON'")
    assert overviews() == first
    assert overviews() == first


def test_a_list_of_runs_in_a_place_that_cannot_be_written_is_whole(settled: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    settled.chmod(0o555)
    try:
        assert len(overviews()) == FEW
    finally:
        settled.chmod(0o755)
