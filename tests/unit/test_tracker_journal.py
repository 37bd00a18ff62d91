"""What a tracker has been sent: everything, nothing twice, whatever is cut off, trimmed or computed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from salt_vla.errors import ConfigError, RunError
from salt_vla.operations.trackers.base import TRACKERS, Entry, Opening, Row, flat, require_trackers
from salt_vla.operations.trackers.journal import TIMINGS, Journal, Mirror, Place, Tail
from salt_vla.operations.trackers.sender import Sender
from salt_vla.rundir import RunDirectory, Status
from salt_vla.training.clock import MACHINE_COLUMNS

OUTSIDE: dict[str, list[tuple[int, Row]]] = {}  # What the tests' tracker holds, by its name for the run.


class Outside:
    """A tracker that keeps what it is sent in memory; `loses` rows of a session that is not closed."""

    destination = "outside"
    keeps = False
    knows = True

    def __init__(self, opening: Opening) -> None:
        self.rows = OUTSIDE.setdefault(opening.identifier, [])
        self.opening = opening
        self.rewinds: list[int] = []
        self.sessions: list[Row] = []

    def held(self) -> int | None:
        return len(self.rows) if self.knows else None

    def send(self, rows: Sequence[tuple[int, Row]]) -> None:
        self.rows += rows

    def rewind(self, step: int) -> None:
        self.rewinds.append(step)

    def close(self, status: Status) -> None:
        self.ended = status


class Forgetful(Outside):
    """Cannot say what it holds."""

    knows = False


class Elsewhere(Outside):
    destination = "elsewhere"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    OUTSIDE.clear()
    for kind in (Outside, Forgetful, Elsewhere):
        monkeypatch.setitem(TRACKERS, kind.__name__, Entry(f"{__name__}:{kind.__name__}", "json"))
    # By import mode `importlib` this module is found under no name of its own.
    monkeypatch.setattr(Entry, "open", lambda entry, opening: globals()[entry.factory.split(":")[1]](opening))
    made = RunDirectory(tmp_path / "runs" / "a")
    made.path.mkdir(parents=True)
    made.config_file.write_text('{"steps": 9}')
    return made


@pytest.fixture
def log(run: RunDirectory) -> Callable[..., None]:
    def write(*steps: int, kind: str = "train", loss: float = 1.0, wait: float = 0.1) -> None:
        for step in steps:
            run.log_metrics({"kind": kind, "step": step, "loss": loss / step, "step_s": wait})

    return write


def sent(mirror: Mirror) -> list[tuple[int, int]]:
    """(number, step) of each row that the tracker holds."""
    return [(number, row["step"]) for number, row in OUTSIDE[mirror.place().identifier]]


def test_timings_are_those_of_the_training_loop() -> None:
    assert TIMINGS == MACHINE_COLUMNS


def test_rows_are_named_by_kind_and_what_is_no_number_is_left_out() -> None:
    row = {"kind": "val", "step": 3, "loss": 0.5, "r2_position_mean": None}
    assert flat(row) == {"val/loss": 0.5}


# The growing file


def test_rows_come_once_and_only_whole(run: RunDirectory, log: Callable[..., None]) -> None:
    tail = Tail(run.metrics_file)
    assert tail.read() == []
    log(1, 2)
    assert [row["step"] for row in tail.read()] == [1, 2]
    with run.metrics_file.open("a") as file:
        file.write('{"kind": "train", "st')
    assert tail.read() == []
    with run.metrics_file.open("a") as file:
        file.write('ep": 3}\n')
    assert [row["step"] for row in tail.read()] == [3]


def test_a_file_that_was_trimmed_is_read_from_its_beginning(
    run: RunDirectory, log: Callable[..., None]
) -> None:
    tail = Tail(run.metrics_file)
    log(1, 2, 3)
    tail.read()
    run.trim_metrics(2)
    log(3, 4, 5)
    assert [row["step"] for row in tail.read()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("line", ["no json", "[1]", "3", '{"step": 1}', '{"kind": "train", "step": "x"}'])
def test_a_damaged_line_hides_no_other(line: str, run: RunDirectory, log: Callable[..., None]) -> None:
    log(1)
    with run.metrics_file.open("a") as file:
        file.write(line + "\n")
    log(2)
    assert [row["step"] for row in Tail(run.metrics_file).read()] == [1, 2]


# What has been sent


def rows_of(*steps: int, **figures: Any) -> list[Row]:
    return [{"kind": "train", "step": step, "loss": 1.0} | figures for step in steps]


def test_a_journal_remembers_across_processes(tmp_path: Path) -> None:
    file = tmp_path / "sent"
    Journal(file).add(rows_of(1, 2))
    again = Journal(file)
    assert again.count == 2
    assert [row["step"] for row in again.unsent(rows_of(1, 2, 3))] == [3]


def test_the_same_step_computed_again_is_the_same_whatever_it_took(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "sent")
    journal.add(rows_of(1, 2, step_s=0.1, memory_gb=1.0))
    again = rows_of(1, 2, step_s=9.9, memory_gb=2.0)
    assert journal.rewind_of(again) is None and journal.unsent(again) == []


def test_the_first_step_with_other_figures_is_where_it_was_set_back(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "sent")
    journal.add(rows_of(1, 2, 3, 4))
    again = rows_of(1, 2) + rows_of(3, 4, 5, loss=7.0)
    assert journal.rewind_of(again) == 3
    journal.rewind(3)
    assert [row["step"] for row in Journal(tmp_path / "sent").unsent(again)] == [3, 4, 5]
    assert journal.count == 4  # Numbers go on: the tracker has been sent four rows.


def test_kinds_of_the_same_step_are_two_rows(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "sent")
    journal.add(rows_of(4))
    assert len(journal.unsent(rows_of(4) + rows_of(4, kind="val"))) == 1


def test_a_line_cut_off_by_a_crash_counts_as_not_sent(tmp_path: Path) -> None:
    file = tmp_path / "sent"
    Journal(file).add(rows_of(1, 2))
    file.write_bytes(file.read_bytes()[:-3])
    journal = Journal(file)
    assert [row["step"] for row in journal.unsent(rows_of(1, 2))] == [2]
    journal.add(rows_of(2))
    assert Journal(file).unsent(rows_of(1, 2)) == []


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 9])
def test_only_what_is_known_to_be_there_is_kept(kept: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path / "sent")
    journal.add(rows_of(1, 2, 3, 4))
    journal.keep(kept)
    for same in (journal, Journal(tmp_path / "sent")):
        assert same.count == min(kept, 4)
        assert [row["step"] for row in same.unsent(rows_of(1, 2, 3, 4))] == [1, 2, 3, 4][kept:]


def test_what_is_kept_may_lie_behind_a_rewind(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "sent")
    journal.add(rows_of(1, 2))
    journal.rewind(2)
    journal.add(rows_of(2, 3, loss=5.0))
    journal.keep(3)
    assert [row["step"] for row in journal.unsent(rows_of(1, 2, 3))] == [3]
    journal.keep(2)
    assert journal.count == 2


# A session of sending


def send(run: RunDirectory, tracker: str = "Outside", close: bool = True) -> Sender:
    sender = Sender(run, tracker)
    sender.look()
    if close:
        sender.close()
    return sender


def test_a_run_without_rows_has_no_page(run: RunDirectory) -> None:
    send(run)
    assert not OUTSIDE and not Mirror(run, "Outside").place_file.exists()


def test_each_row_is_sent_once_with_its_number(run: RunDirectory, log: Callable[..., None]) -> None:
    log(1, 2)
    sender = send(run, close=False)
    log(3)
    log(3, kind="val")
    sender.look()
    sender.close()
    send(run)
    mirror = Mirror(run, "Outside")
    assert sent(mirror) == [(0, 1), (1, 2), (2, 3), (3, 3)]
    assert mirror.left() == 0 and mirror.place().is_closed
    assert sender.open is not None and sender.open.tracker.opening.config == {"steps": 9}


def test_a_resume_that_computes_the_same_sends_nothing_again(
    run: RunDirectory, log: Callable[..., None]
) -> None:
    log(1, 2, 3)
    send(run)
    run.trim_metrics(1)
    log(2, 3, 4, wait=5.0)
    send(run)
    assert [step for _, step in sent(Mirror(run, "Outside"))] == [1, 2, 3, 4]


def test_after_a_rollback_everything_from_there_on_comes_again(
    run: RunDirectory, log: Callable[..., None]
) -> None:
    log(1, 2, 3)
    sender = send(run, close=False)
    run.trim_metrics(1)
    log(2, 3, 4, loss=9.0)
    sender.look()
    assert sender.open is not None and sender.open.tracker.rewinds == [2]
    assert sent(sender.mirror) == [(0, 1), (1, 2), (2, 3), (3, 2), (4, 3), (5, 4)]


def test_what_a_killed_sender_has_not_brought_there_is_sent_again(
    run: RunDirectory, log: Callable[..., None]
) -> None:
    log(1, 2, 3)
    sender = send(run, close=False)
    held = OUTSIDE[sender.mirror.place().identifier]
    del held[1:]  # Killed while its library was still at it.
    assert sender.mirror.left() == 3  # As far as anybody knows who does not ask the tracker.
    send(run)
    assert sent(sender.mirror) == [(0, 1), (1, 2), (2, 3)]


def test_a_tracker_that_cannot_say_what_it_holds_is_sent_what_was_not_confirmed(
    run: RunDirectory, log: Callable[..., None]
) -> None:
    log(1, 2)
    send(run, "Forgetful")
    log(3)
    send(run, "Forgetful", close=False)
    send(run, "Forgetful")
    # Nothing is missing; what comes twice has the same number.
    assert sent(Mirror(run, "Forgetful")) == [(0, 1), (1, 2), (2, 3), (2, 3)]


def test_another_destination_is_sent_everything_under_the_same_name(
    run: RunDirectory, log: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    log(1, 2)
    send(run)
    mirror = Mirror(run, "Outside")
    name, before = mirror.place().identifier, sent(mirror)
    OUTSIDE.clear()
    monkeypatch.setattr(Outside, "destination", "a server")
    log(3)
    send(run)
    assert mirror.place() == Place(name, "a server", 3, True)
    assert sent(mirror) == [*before, (2, 3)]


def test_rows_left_are_counted_without_opening_the_tracker(
    run: RunDirectory, log: Callable[..., None]
) -> None:
    mirror = Mirror(run, "Outside")
    assert mirror.left() == 0
    log(1, 2)
    assert mirror.left() == 2
    send(run)
    log(3)
    assert mirror.left() == 1 and len(OUTSIDE) == 1


def test_how_the_run_ended_is_told(run: RunDirectory, log: Callable[..., None]) -> None:
    log(1)
    run.set_status(Status("failed", exit_reason="hung: step 2"))
    sender = send(run)
    assert sender.open is not None and sender.open.tracker.ended.exit_reason == "hung: step 2"
    (run.path / "status.json").write_text("{")
    log(2)
    sender = send(run)
    assert sender.open is not None and sender.open.tracker.ended.state == "damaged"


@pytest.mark.parametrize("text", ["{", "[]", '{"unknown": 1}', '{"identifier": "x", "more": 1}'])
def test_a_damaged_note_is_a_sentence_with_its_cure(text: str, run: RunDirectory) -> None:
    mirror = Mirror(run, "Outside")
    mirror.place_file.write_text(text)
    with pytest.raises(RunError, match=r"remove it, and everything is sent again"):
        mirror.place()


# Which trackers there are


def test_an_unknown_tracker_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no tracker 'mlflow'; trackers: tensorboard, trackio, wandb"):
        require_trackers(["mlflow"])


def test_one_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(TRACKERS, "absent", Entry("x:y", "salt_vla_has_no_such_package", "pip install x"))
    with pytest.raises(ConfigError, match="absent is not installed; install it with: pip install x"):
        require_trackers(["absent"])


def test_every_tracker_is_one_file_and_one_line() -> None:
    import salt_vla.operations.trackers as package

    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")}
    named = {entry.factory.partition(":")[0].rpartition(".")[2] for entry in TRACKERS.values()}
    assert named == files - {"__init__", "base", "journal", "keeper", "sender"}


def test_a_journal_is_appended_to_not_written_anew(tmp_path: Path) -> None:
    file = tmp_path / "sent"
    journal = Journal(file)
    journal.add(rows_of(1))
    inode = file.stat().st_ino
    journal.add(rows_of(2))
    assert file.stat().st_ino == inode
    assert [json.loads(line.split()[0]) for line in file.read_text().splitlines()] == [1, 2]
