"""The queue's file: what may be done to a job and what not, whole or not at all, with its line of history."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from salt_vla.errors import ResourceError, RunError
from salt_vla.operations.conditions import Condition
from salt_vla.operations.processes import identity
from salt_vla.operations.queue import Job, Queue, Wanted
from salt_vla.operations.queue_store import VERSION, changing

COMMAND = ("recipes", "ls")


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    return Queue()


@pytest.fixture
def add(queue: Queue, tmp_path: Path) -> Callable[..., Job]:
    """`add(name, *names)`: a job that waits for the jobs of those names to end well."""

    def added(name: str = "", *after: str, slot: str = "any") -> Job:
        conditions = tuple(Condition("after", other, queue.job(other).id) for other in after)
        return queue.add(Wanted(COMMAND, str(tmp_path), name, slot, conditions=conditions))

    return added


def states(queue: Queue) -> dict[str, str]:
    return {job.name: job.state for job in queue.jobs()}


def line(queue: Queue) -> list[str]:
    return [job.name for job in queue.jobs() if job.state == "waiting"]


def end(queue: Queue, name: str, state: str) -> None:
    job = queue.take(queue.job(name), "cpu")
    assert job is not None
    queue.mark_running(job, "under way")
    queue.end(job, state, f"made to be {state}")  # type: ignore[arg-type]


def test_a_job_is_read_as_it_was_added(queue: Queue, tmp_path: Path) -> None:
    waits = Condition("at", "+2h", number=12.5)
    wanted = Wanted(("train", "demo_student", "--name", "e1"), str(tmp_path), "e1", "gpu1", 3, 2, (waits,))
    added = queue.add(wanted)
    assert queue.jobs() == [added]
    assert (added.command, added.directory, added.slot) == (wanted.command, str(tmp_path), "gpu1")
    assert (added.restarts, added.conditions, added.state, added.attempt) == (3, (waits,), "waiting", 0)
    assert added.folder == tmp_path / "runs" / "e1"
    assert (added.launch.restarts, added.launch.processes) == (3, 2)


def test_jobs_without_a_name_are_named_after_their_command(add: Callable[..., Job]) -> None:
    assert [add().name, add().name] == ["recipes-ls-1", "recipes-ls-2"]


def test_what_a_runner_looks_at_does_not_grow_with_what_has_ended(
    queue: Queue, add: Callable[..., Job]
) -> None:
    for name in ("meant", "forgotten"):
        add(name)
        queue.cancel(name)
    add("a")
    add("b", "meant", "a")
    assert [job.name for job in queue.jobs(ended=False)] == ["a", "b", "meant"]
    assert len(queue.jobs()) == 4


def test_a_queue_that_is_not_there_is_empty_and_reading_makes_none(queue: Queue) -> None:
    assert (queue.jobs(), queue.history(), queue.runners(), queue.is_paused()) == ([], [], [], False)
    assert not queue.file.exists()


def test_a_name_is_in_the_line_once_and_free_again_when_its_job_has_ended(
    queue: Queue, add: Callable[..., Job]
) -> None:
    add("a")
    with pytest.raises(RunError, match=r"'a' is in the queue already, and waiting; .*queue cancel a"):
        add("a")
    queue.cancel("a")
    assert add("a").id == 2
    assert queue.job("a").state == "waiting"


def test_a_cancelled_job_stays_on_record_and_one_that_has_begun_is_not_cancelled(
    queue: Queue, add: Callable[..., Job]
) -> None:
    add("a")
    queue.cancel("a")
    assert states(queue) == {"a": "cancelled"}
    with pytest.raises(RunError, match="no job 'a' waits or runs"):
        queue.cancel("a")
    queue.take(add("b"), "cpu")
    with pytest.raises(RunError, match="'b' is starting; stop it with `salt-vla runs stop b`"):
        queue.cancel("b")


def test_the_line_is_in_the_order_asked_for(queue: Queue, add: Callable[..., Job]) -> None:
    for name in "abcd":
        add(name)
    queue.move("c")
    assert line(queue) == ["c", "a", "b", "d"]
    queue.move("c", before="d")
    assert line(queue) == ["a", "b", "c", "d"]
    queue.move("a", last=True)
    assert line(queue) == ["b", "c", "d", "a"]
    queue.move("b", before="b")
    add("e")
    assert line(queue) == ["b", "c", "d", "a", "e"]
    for name, before in (("x", None), ("b", "x")):
        with pytest.raises(RunError, match="no job 'x' waits"):
            queue.move(name, before)


def test_a_job_is_taken_once_and_a_slot_has_one(queue: Queue, add: Callable[..., Job]) -> None:
    first, second = add("a"), add("b")
    taken = queue.take(first, "cpu")
    assert taken is not None
    assert (taken.state, taken.ran_on, taken.attempt) == ("starting", "cpu", 1)
    assert queue.take(first, "gpu0") is None
    assert queue.take(second, "cpu") is None
    assert queue.take(second, "gpu0") is not None


def test_one_slot_never_has_two_jobs_even_by_hand(queue: Queue, add: Callable[..., Job]) -> None:
    queue.take(add("a"), "cpu")
    second = add("b")
    with pytest.raises(RunError, match="UNIQUE"), changing(queue.file) as connection:
        connection.execute("UPDATE jobs SET state = 'running', ran_on = 'cpu' WHERE id = ?", (second.id,))
    assert states(queue) == {"a": "starting", "b": "waiting"}


def test_nothing_is_taken_of_a_paused_queue_or_of_a_paused_job(queue: Queue, add: Callable[..., Job]) -> None:
    job = add("a")
    queue.pause()
    assert queue.is_paused()
    assert queue.take(job, "cpu") is None
    queue.pause(resume=True)
    queue.pause("a")
    assert queue.job("a").held
    assert queue.take(job, "cpu") is None
    queue.pause("a", resume=True)
    assert queue.take(job, "cpu") is not None
    with pytest.raises(RunError, match="'a' is starting, not waiting"):
        queue.pause("a")


def test_an_end_is_written_down_once_whoever_sees_it(queue: Queue, add: Callable[..., Job]) -> None:
    job = queue.take(add("a"), "cpu")
    assert job is not None
    queue.mark_running(job, "")
    queue.end(job, "finished", "finished")
    queue.end(job, "failed", "somebody else saw it later")
    assert (queue.job("a").state, queue.job("a").reason) == ("finished", "finished")
    assert [event.event for event in queue.history("a")] == ["added", "taken", "started", "finished"]


def test_what_is_said_of_an_earlier_start_does_not_touch_a_later_one(
    queue: Queue, add: Callable[..., Job]
) -> None:
    before = queue.take(add("a"), "cpu")
    assert before is not None
    queue.end(before, "failed", "")
    queue.retry("a")
    again = queue.take(queue.job("a"), "cpu")
    assert again is not None
    assert again.token != before.token
    queue.end(before, "finished", "")
    queue.mark_running(before, "")
    assert queue.job("a").state == "starting"


def test_a_job_that_could_not_be_started_waits_again(queue: Queue, add: Callable[..., Job]) -> None:
    job = queue.take(add("a"), "cpu")
    assert job is not None
    queue.put_back(job, "its name is in use")
    assert (queue.job("a").state, queue.job("a").ran_on, queue.job("a").started) == ("waiting", "", None)
    assert queue.history("a")[-1].why == "its name is in use"


def test_retry_brings_back_what_was_skipped_on_its_account(queue: Queue, add: Callable[..., Job]) -> None:
    add("a")
    add("b", "a")
    add("c", "b")
    add("other")
    end(queue, "a", "failed")
    for name in ("b", "c", "other"):
        queue.skip(queue.job(name), "cannot be")
    assert queue.retry("a") == ["a", "b", "c"]
    assert states(queue) == {"a": "waiting", "b": "waiting", "c": "waiting", "other": "skipped"}
    assert line(queue) == ["a", "b", "c"]
    assert queue.job("a").reason == ""


@pytest.mark.parametrize(
    ("state", "sentence"), [("finished", "'a' ended well; add it again"), ("waiting", "'a' is waiting")]
)
def test_retry_is_for_what_did_not_end_well(
    queue: Queue, add: Callable[..., Job], state: str, sentence: str
) -> None:
    add("a")
    if state == "finished":
        end(queue, "a", "finished")
    with pytest.raises(RunError, match=sentence):
        queue.retry("a")
    with pytest.raises(RunError, match="no job 'b' was in the queue"):
        queue.retry("b")


def test_retry_does_not_double_a_name(queue: Queue, add: Callable[..., Job]) -> None:
    add("a")
    add("b", "a")
    end(queue, "a", "failed")
    queue.skip(queue.job("b"), "a failed")
    add("b")
    assert queue.retry("a") == ["a"]
    assert sorted((job.name, job.id, job.state) for job in queue.jobs()) == [
        ("a", 1, "waiting"), ("b", 2, "skipped"), ("b", 3, "waiting"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "order",
    [
        "UPDATE history SET why = 'nothing happened'",
        "DELETE FROM history",
        "DELETE FROM jobs",
        "INSERT INTO history (time, job, event, why) VALUES (0, 99, 'x', 'y')",
        "UPDATE jobs SET state = 'lost'",
    ],
)
def test_history_and_jobs_are_only_added_to_whoever_asks(
    queue: Queue, add: Callable[..., Job], order: str
) -> None:
    add("a")
    before = queue.history()
    with pytest.raises(RunError), changing(queue.file) as connection:
        connection.execute(order)
    assert queue.history() == before
    assert states(queue) == {"a": "waiting"}


def test_a_change_that_is_broken_off_leaves_no_trace(queue: Queue, add: Callable[..., Job]) -> None:
    add("a")
    with pytest.raises(KeyboardInterrupt), changing(queue.file) as connection:
        connection.execute("UPDATE jobs SET state = 'running'")
        raise KeyboardInterrupt
    assert states(queue) == {"a": "waiting"}


KILLED_WITHIN = """
import os, signal
from salt_vla.operations.queue import Queue
from salt_vla.operations.queue_store import changing
with changing(Queue().file) as connection:
    connection.execute("UPDATE jobs SET state = 'running', ran_on = 'cpu'")
    connection.execute("INSERT INTO history (time, job, event, why) VALUES (0, 1, 'started', '')")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_killed_within_a_change_leaves_no_trace(queue: Queue, add: Callable[..., Job]) -> None:
    add("a")
    done = subprocess.run([sys.executable, "-c", KILLED_WITHIN], check=False)
    assert done.returncode == -signal.SIGKILL
    assert states(queue) == {"a": "waiting"}
    assert [event.event for event in queue.history()] == ["added"]


ADDING = """
import sys
from salt_vla.operations.queue import Queue, Wanted
queue = Queue()
for n in range(5):
    queue.add(Wanted(("recipes", "ls"), "/", f"{sys.argv[1]}-{n}"))
"""


def test_many_processes_make_one_queue_and_no_job_is_lost(queue: Queue) -> None:
    started = [subprocess.Popen([sys.executable, "-c", ADDING, f"p{n}"]) for n in range(6)]
    assert [process.wait(120) for process in started] == [0] * 6
    assert sorted(states(queue)) == sorted(f"p{n}-{m}" for n in range(6) for m in range(5))
    places = [event.job for event in queue.history()]
    assert [job.name for job in sorted(queue.jobs(), key=lambda job: job.id)] == places


def test_two_queues_never_mean_the_same_start(queue: Queue, add: Callable[..., Job]) -> None:
    """The folder of a run outlives a queue's file, and with it the token of who started it."""
    first = queue.take(add("a"), "cpu")
    queue.file.unlink()
    second = queue.take(add("a"), "cpu")
    assert first is not None
    assert second is not None
    assert (first.id, first.attempt) == (second.id, second.attempt)
    assert first.token != second.token


def test_what_a_queue_that_was_moved_away_left_behind_is_not_read_into_a_new_one(
    queue: Queue, add: Callable[..., Job]
) -> None:
    add("old")
    with closing(sqlite3.connect(queue.file)) as held:  # Else the last one to leave would tidy up.
        held.execute("SELECT * FROM jobs").fetchone()
        add("older")
        left = Path(f"{queue.file}-wal")
        assert left.stat().st_size > 0
        queue.file.rename(queue.file.with_name("away.db"))
        add("new")
    assert states(queue) == {"new": "waiting"}


@pytest.mark.parametrize(
    "content",
    [b"no database, but long enough to be taken for one: " * 40, b"SQLite format 3\0" + b"\xff" * 5000],
)
def test_a_damaged_file_is_one_sentence(queue: Queue, add: Callable[..., Job], content: bytes) -> None:
    queue.file.write_bytes(content)
    for ask in (queue.jobs, queue.history, lambda: add("a"), queue.pause):
        with pytest.raises(RunError, match=r"queue\.db is damaged .*move it away with queue\.db-wal"):
            ask()


def test_a_page_of_rubbish_within_is_one_sentence(queue: Queue, add: Callable[..., Job]) -> None:
    for name in "abc":
        add(name)
    content = bytearray(queue.file.read_bytes())
    content[4096 * 2 : 4096 * 9] = b"\xa5" * (4096 * 7)
    queue.file.write_bytes(content)
    with pytest.raises(RunError, match="is damaged"):
        queue.jobs()


def test_a_field_of_rubbish_within_names_the_job(queue: Queue, add: Callable[..., Job]) -> None:
    add("a")
    with changing(queue.file) as connection:
        connection.execute("UPDATE jobs SET conditions = '[{\"kind\": 1'")
    with pytest.raises(RunError, match="job 'a' is damaged"):
        queue.jobs()


def test_a_newer_versions_queue_and_other_databases_are_refused(
    queue: Queue, add: Callable[..., Job], tmp_path: Path
) -> None:
    add("a")
    with closing(sqlite3.connect(queue.file)) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    for ask in (queue.jobs, lambda: queue.cancel("a")):
        with pytest.raises(RunError, match=rf"newer version of salt-vla \(its schema is {VERSION + 1}"):
            ask()
    with closing(sqlite3.connect(tmp_path / "other.db")) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    other = Queue(tmp_path / "other.db")
    with pytest.raises(RunError, match=r"other\.db is no queue"):
        other.pause()


def test_a_full_disk_is_one_sentence_and_changes_nothing(queue: Queue, add: Callable[..., Job]) -> None:
    add("a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (queue.file.stat().st_size // 2, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"cannot use the queue .*make space; no job is lost"):
            queue.pause("a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not queue.job("a").held
    assert [event.event for event in queue.history()] == ["added"]


def test_on_a_full_disk_it_can_still_be_told_what_the_queue_does(
    queue: Queue, add: Callable[..., Job]
) -> None:
    add("a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(ResourceError, match="make space; no job is lost"):
            queue.pause("a")
        seen = states(queue), [event.event for event in queue.history()]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert seen == ({"a": "waiting"}, ["added"])
    queue.pause("a")
    assert queue.job("a").held


def test_a_queue_that_may_only_be_read_is_read(
    queue: Queue, add: Callable[..., Job], as_nobody: Callable[[Callable[[], object]], str]
) -> None:
    add("a")
    assert as_nobody(lambda: [job.name for job in queue.jobs()]) == "['a']"
    assert "check the permissions" in as_nobody(lambda: queue.cancel("a"))
    assert states(queue) == {"a": "waiting"}


@pytest.fixture
def as_nobody(tmp_path: Path) -> Callable[[Callable[[], object]], str]:
    """What comes of it in a process that owns nothing: its value, or the `ResourceError`'s sentence."""
    for folder in (tmp_path, *tmp_path.parents[:3]):
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o755)

    def tried(what: Callable[[], object]) -> str:
        reading_end, writing_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            else:
                tmp_path.chmod(0o555)
            try:
                said = str(what())
            except ResourceError as error:
                said = str(error)
            os.write(writing_end, said.encode())
            os._exit(0)
        os.close(writing_end)
        os.waitpid(pid, 0)
        with os.fdopen(reading_end) as file:
            return file.read()

    return tried


def test_a_runner_is_shown_as_long_as_it_has_not_left(queue: Queue) -> None:
    queue.note_runner("gpu0", identity())
    (seen,) = queue.runners()
    assert (seen.slot, seen.process) == ("gpu0", identity())
    assert seen.process.is_alive()
    queue.note_runner_gone("gpu0", "stopped")
    assert queue.runners() == []
    assert [event.event for event in queue.history()] == ["runner started", "runner ended"]


def test_times_are_the_clocks_and_the_order_is_not(queue: Queue, add: Callable[..., Job]) -> None:
    """A clock that is set back moves no line of history."""
    for time_of_day, name in ((3e9, "a"), (1e9, "b"), (2e9, "c")):
        queue.clock = lambda now=time_of_day: now  # type: ignore[misc]
        add(name)
    assert line(queue) == ["a", "b", "c"]
    assert [(event.job, event.time) for event in queue.history()] == [("a", 3e9), ("b", 1e9), ("c", 2e9)]
