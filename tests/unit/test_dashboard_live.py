"""What pages are told of the runs: everything once, then what has changed, whatever else lies there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from salt_vla.identity import identity
from salt_vla.operations.dashboard.curves import columns_of, curves_of
from salt_vla.operations.dashboard.live import FOLLOWED, Live
from salt_vla.operations.dashboard.tails import last_events, tail
from salt_vla.rundir import RunDirectory, Status

MakeRun = Callable[..., RunDirectory]


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """`make_run(name, rows=3, **status)`: a run directory as a training leaves it."""
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))

    def make(name: str, rows: int = 3, **status: Any) -> RunDirectory:
        run = RunDirectory(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        given = {
            "state": "finished",
            "step": rows,
            "total_steps": 2 * rows,
            "exit_reason": "finished",
        } | status
        run.set_status(Status(**given))
        for step in range(1, rows + 1):
            run.log_metrics({"kind": "train", "step": step, "loss": 1 / step, "note": "a word", "on": True})
        run.log_metrics({"kind": "val", "step": rows, "loss": 0.5, "r2_position_mean": 0.25})
        (run.path / "cost.json").write_text(json.dumps({"clips_a_step": 32, "flops_a_step": 2e12}))
        return run

    return make


@pytest.fixture
def live() -> Live:
    """One that looks again at every question."""
    return Live(oldest=0)


def _names(rows: list[dict[str, Any]] | None) -> list[str]:
    return [row["name"] for row in rows or []]


def test_everything_once_then_only_changes(make_run: MakeRun, live: Live) -> None:
    first, _ = make_run("a"), make_run("b")
    everything = live.changes(None)
    assert _names(everything.all_rows) == ["a", "b"] and everything.all_rows is not None
    assert everything.all_rows[0]["loss"] == 1 / 3 and everything.all_rows[0]["share"] == 0.5
    quiet = live.changes(everything.mark)
    assert quiet.all_rows is None and not quiet.updates
    first.log_metrics({"kind": "train", "step": 4, "loss": 0.01})
    changed = live.changes(quiet.mark)
    assert changed.all_rows is None and [(r["name"], r["loss"]) for r in changed.updates] == [("a", 0.01)]
    assert not live.changes(changed.mark).updates
    # Another page, which has seen less, is told the same.
    assert _names(live.changes(quiet.mark).updates) == ["a"]


def test_runs_that_come_and_go_are_told_anew(make_run: MakeRun, live: Live) -> None:
    make_run("a")
    mark = live.changes(None).mark
    gone = make_run("b")
    assert _names(live.changes(mark).all_rows) == ["a", "b"]
    mark = live.changes(None).mark
    shutil.rmtree(gone.path)
    assert _names(live.changes(mark).all_rows) == ["a"]


@pytest.mark.parametrize("mark", [["another server's", 3], [], None])
def test_whoever_has_seen_another_counting_is_told_everything(
    make_run: MakeRun, live: Live, mark: Any
) -> None:
    make_run("a")
    assert _names(live.changes(mark).all_rows) == ["a"]


def test_a_process_that_ends_without_a_word_is_noticed(make_run: MakeRun, live: Live) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        who = identity(process.pid)
        about = {"pid": who.pid, "started": who.started, "boot": who.boot, "ticks": who.ticks}
        make_run("a", state="running", exit_reason="", **about)
        before = live.changes(None)
        assert before.all_rows is not None and before.all_rows[0]["state"] == "running"
        process.kill()
    changes = live.changes(before.mark)
    assert [row["state"] for row in changes.updates] == ["killed"] and changes.updates[0]["reason"]


@pytest.fixture
def _rubbish(tmp_path: Path) -> Iterator[None]:
    runs = tmp_path / "runs"
    (runs / "empty").mkdir(parents=True)
    (runs / "no name <script>").mkdir()
    (runs / "no name <script>" / "status.json").write_text('{"state": "finished"}')
    (runs / "a file").write_text("")
    (runs / "damaged").mkdir()
    (runs / "damaged" / "status.json").write_text('{"state": ')
    (runs / "damaged" / "metrics.jsonl").write_bytes(b"\xff\xfe not json\n")
    (runs / "nowhere").symlink_to(runs / "missing")
    yield


@pytest.mark.usefixtures("_rubbish")
def test_one_bad_run_never_hides_the_others(make_run: MakeRun, live: Live) -> None:
    make_run("good")
    rows = {row["name"]: row for row in live.changes(None).all_rows or []}
    assert sorted(rows) == ["damaged", "good"]
    assert rows["damaged"]["state"] == "damaged" and "damaged" in rows["damaged"]["reason"]


def test_no_runs_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: Live) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path / "new"))
    assert live.changes(None).all_rows == [] and not (tmp_path / "new").exists()


def test_reading_takes_a_small_share_of_the_time(make_run: MakeRun) -> None:
    """Many pages that ask at once make one look."""
    live = Live()
    run = make_run("a")
    mark = live.changes(None).mark
    run.log_metrics({"kind": "train", "step": 9, "loss": 0.1})
    assert not live.changes(mark).updates


def test_a_stamp_changes_with_whatever_a_page_shows(make_run: MakeRun, live: Live) -> None:
    run = make_run("a")
    stamps = [live.stamp(run)]
    run.log("a line")
    stamps.append(live.stamp(run))
    run.pictures.mkdir()
    stamps.append(live.stamp(run))
    (run.pictures / "masks.png").write_bytes(b"")
    stamps.append(live.stamp(run))
    run.log_metrics({"kind": "train", "step": 9, "loss": 0.1})
    stamps.append(live.stamp(run))
    assert len({tuple(stamp) for stamp in stamps}) == len(stamps)
    assert live.stamps(["a", "nobody"]) == [stamps[-1]]


def test_metrics_of_many_runs_are_followed_without_end_of_memory(make_run: MakeRun, live: Live) -> None:
    runs = [make_run(f"r{number}", rows=1) for number in range(FOLLOWED + 3)]
    for run in (*runs, runs[0]):
        assert len(live.metrics(run)) == 2
    assert len(live._followers) == FOLLOWED


def test_curves_of_the_runs_that_are_there(make_run: MakeRun, live: Live) -> None:
    make_run("a"), make_run("b")
    (found,) = curves_of(live, ["gone", "a"], ["train.loss", "val.nothing"])
    assert found.name == "a" and found.per_step == {"clips": 32, "flops": 2e12}
    assert found.columns == {"train.loss": ([1, 2, 3], [1, 0.5, 1 / 3]), "val.nothing": ([], [])}


def test_only_numbers_are_offered_as_columns(make_run: MakeRun, live: Live) -> None:
    make_run("a")
    offered = [each["value"] for each in columns_of(live, ["a", "gone"], ["train.lr"])]
    assert offered == ["train.loss", "val.r2_position_mean", "train.lr", "val.loss"]


def test_the_end_of_a_log_is_text_and_bounded(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert tail(log) == ""
    log.write_bytes(b"x" * 200_000 + b"\n" + b"".join(b"line %d\n" % n for n in range(1000)))
    assert tail(log, 5).splitlines() == [f"line {number}" for number in range(996, 1000)]
    assert "xxx" not in tail(log)


def test_what_a_terminal_obeys_is_taken_out_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_bytes(b"\x1b[31mred\x1b[0m\x07 \x1b]0;title\x07end\n 1%\r 50%\r100% done\r\n\xff\n")
    assert tail(log) == "red end\n100% done\n\N{REPLACEMENT CHARACTER}\n"


def test_a_log_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.mkdir()
    assert "cannot be read" in tail(log)


def test_a_history_is_read_backwards_past_damage(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    assert last_events(file) == []
    file.write_text('{"event": "one"}\n[1]\nhalf a li\n{"event": "two"}\n' + "[" * 3000 + '\n{"event": "th')
    assert [event["event"] for event in last_events(file)] == ["two", "one"]
    assert [event["event"] for event in last_events(file, 1)] == ["two"]


def test_of_thousands_of_runs_the_one_that_changed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: Live
) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    status = json.dumps({"state": "finished", "step": 2, "total_steps": 2, "exit_reason": "finished"})
    for number in range(2000):
        folder = tmp_path / "runs" / f"r{number:05d}"
        folder.mkdir(parents=True)
        (folder / "status.json").write_text(status)
    everything = live.changes(None)
    assert len(everything.all_rows or []) == 2000
    RunDirectory(tmp_path / "runs" / "r01234").log_metrics({"kind": "train", "step": 2, "loss": 0.5})
    assert _names(live.changes(everything.mark).updates) == ["r01234"]
