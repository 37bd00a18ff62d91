"""`salt-vla queue …`"""

from __future__ import annotations

import shlex
import time
from typing import Annotated, Any
from uuid import uuid4

import tyro

from salt_vla.cli.printing import print_json, print_table
from salt_vla.errors import ConfigError, RunError
from salt_vla.operations.conditions import in_clock
from salt_vla.operations.conditions_now import Now, answer, ending_of, may_start
from salt_vla.operations.launch import Launch, launch
from salt_vla.operations.queue import Event, Job, Queue
from salt_vla.operations.queue_jobs import IN_WORK
from salt_vla.operations.runner import Runner
from salt_vla.operations.slots import first_slot, require_slot, runner_name, suits
from salt_vla.progress import duration
from salt_vla.rundir import root

SHOWN_OF_THE_PAST = 10


def run(
    slot: str | None = None, until_empty: bool = False, detach: bool = False, seconds: float = 1.0
) -> None:
    """Run the queue's jobs in one device slot, one after another. May be stopped or killed at any moment: its
    job goes on, and the next runner of the slot finds it.

    Example: salt-vla queue run --slot gpu0 --detach

    Args:
        slot: cpu, gpu0, gpu1, …; its jobs see that GPU alone, or none. Default: gpu0, or cpu without a GPU.
        until_empty: end when nothing is left for this slot.
        detach: return at once; the runner goes on without this terminal, and is started again if it dies.
        seconds: between two looks at the queue.
    """
    slot = require_slot(slot) if slot is not None else first_slot()
    if seconds <= 0:
        raise ConfigError(f"--seconds must be more than 0, not {seconds:g}")
    queue = Queue()
    if not detach:
        Runner(slot, queue, _say, seconds).run(until_empty)
        return
    if _is_at_work(queue, slot):
        raise RunError(f"a runner is at work in slot {slot} already; `salt-vla queue ls` shows it")
    words = ("queue", "run", "--slot", slot, "--seconds", f"{seconds:g}", *["--until-empty"] * until_empty)
    started = launch(Launch(runner_name(slot), words, uuid4().hex, restarts=100, backoff_seconds=1.0))
    print(
        f"the runner of {slot} is at work (supervisor {started.supervisor.pid}); `salt-vla queue ls` shows "
        f"what it does, {root() / 'jobs' / runner_name(slot) / 'log.txt'} what it says, and "
        f"`salt-vla runs stop {runner_name(slot)}` ends it"
    )


def ls(all: bool = False, json: bool = False) -> None:
    """The queue: what runs, what waits and for what, what ended last.

    Example: salt-vla queue ls

    Args:
        all: everything that ever was in it.
        json: print JSON instead of a table.
    """
    queue = Queue()
    jobs = queue.jobs()
    ended = [job for job in jobs if job.is_over]
    shown = [job for job in jobs if not job.is_over] + ended[: None if all else SHOWN_OF_THE_PAST]
    now = Now({job.id: job for job in jobs}, "", time.time())
    rows = [_row(job, now) for job in shown]
    runners = [r for r in queue.runners() if r.process.is_alive()]
    paused = queue.is_paused()
    if json:
        at_work = [{"slot": r.slot, "pid": r.process.pid, "since": r.since} for r in runners]
        print_json({"paused": paused, "runners": at_work, "jobs": rows})
        return
    for row in rows:
        row["expected"] = in_clock(row["expected"]) if row["expected"] else ""
        row["slot"] = row["ran_on"] or row["slot"]
        row["command"] = shlex.join(row["command"])
    print_table(rows, ["name", "state", "slot", "why", "expected", "command"])
    if paused:
        print("\nThe queue is paused; `salt-vla queue resume` lets it go on.")
    if runners:
        print("\nRunners: " + ", ".join(f"{r.slot} (process {r.process.pid})" for r in runners))
    elif any(not job.is_over for job in jobs):
        print("\nNo runner is at work; `salt-vla queue run --detach` starts one.")


def show(name: Annotated[str, tyro.conf.Positional], json: bool = False) -> None:
    """One job: its command, each condition and whether it holds, and all that happened to it.

    Example: salt-vla queue show e1 --json

    Args:
        name: the job's.
        json: print JSON instead of a table.
    """
    queue = Queue()
    jobs = queue.jobs()
    now = Now({job.id: job for job in jobs}, "", time.time())
    job = queue.job(name)
    answers = [answer(condition, now) for condition in job.conditions]
    row = _row(job, now) | {
        "conditions": [
            {"condition": str(c), "state": a.state, "why": a.why}
            for c, a in zip(job.conditions, answers, strict=True)
        ],
        "folder": str(job.folder),
        "history": [_event(event) for event in queue.history(name)],
    }
    if json:
        print_json(row)
        return
    row["command"] = shlex.join(row["command"])
    row["conditions"] = "\n".join(f"{each['condition']}: {each['state']}" for each in row["conditions"])
    row["history"] = "\n".join(f"{each['when']} {each['event']}: {each['why']}" for each in row["history"])
    for key in ("added", "started", "ended", "expected"):
        row[key] = in_clock(row[key]) if row[key] else ""
    print_table([{"field": key, "value": value} for key, value in row.items()], ["field", "value"])


def history(name: Annotated[str | None, tyro.conf.Positional] = None, json: bool = False) -> None:
    """All that ever happened to the queue's jobs, in order, and why.

    Example: salt-vla queue history e1

    Args:
        name: of one job; default: all.
        json: print JSON instead of a table.
    """
    rows = [_event(event) for event in Queue().history(name)]
    if json:
        print_json(rows)
    else:
        print_table(rows, ["when", "job", "event", "why"])


def cancel(names: Annotated[tuple[str, ...], tyro.conf.Positional], json: bool = False) -> None:
    """Take waiting jobs out of the queue; those that wait for them to end well are skipped.

    Example: salt-vla queue cancel e2 e3

    Args:
        names: the jobs'.
        json: print what was cancelled as JSON.
    """
    if not names:
        raise ConfigError("give the name of a job; `salt-vla queue ls` lists them")
    for name in names:
        Queue().cancel(name)
    _done(list(names), "cancelled", json)


def move(
    name: Annotated[str, tyro.conf.Positional],
    before: str | None = None,
    last: bool = False,
    json: bool = False,
) -> None:
    """Move a waiting job to the head of the line, in front of another, or to the end.

    Example: salt-vla queue move e3 --before e2

    Args:
        name: the job's.
        before: the job in front of which it goes.
        last: to the end.
        json: print the new order as JSON.
    """
    if before is not None and last:
        raise ConfigError("give --before or --last, not both")
    queue = Queue()
    queue.move(name, before, last)
    _done([job.name for job in queue.jobs() if job.state == "waiting"], "is the order now", json)


def retry(name: Annotated[str, tyro.conf.Positional], json: bool = False) -> None:
    """Put a job that failed, was stopped, skipped or cancelled at the end of the line again, and after it
    those that were skipped on its account. A run goes on from its last checkpoint.

    Example: salt-vla queue retry e1

    Args:
        name: the job's.
        json: print the jobs that wait again as JSON.
    """
    _done(Queue().retry(name), "in the queue again", json)


def pause(name: Annotated[str | None, tyro.conf.Positional] = None, json: bool = False) -> None:
    """Start no further job, or not this one, until `queue resume`; what runs goes on.

    Example: salt-vla queue pause

    Args:
        name: of one job; default: the whole queue.
        json: print what is paused as JSON.
    """
    Queue().pause(name)
    _done([name or "the queue"], "paused", json)


def resume(name: Annotated[str | None, tyro.conf.Positional] = None, json: bool = False) -> None:
    """Undo `queue pause`.

    Example: salt-vla queue resume

    Args:
        name: of one job; default: the whole queue.
        json: print what goes on as JSON.
    """
    Queue().pause(name, resume=True)
    _done([name or "the queue"], "goes on", json)


def _row(job: Job, now: Now) -> dict[str, Any]:
    """As the job is, with why it is where it is, and when that is expected to change."""
    row = job.to_json() | {"why": job.reason, "expected": None}
    if job.state == "waiting":
        found = may_start(job, now)
        why, expected = _turn(job, now) if found.state == "holds" else (found.why, found.expected)
        why = f"will be skipped: {why}" if found.state == "never" else why
        row |= {"why": f"paused by name; {why}" if job.held else why, "expected": expected}
    elif not job.is_over:
        row |= {"expected": ending_of(job, now.clock)}
        if row["expected"]:
            row["why"] += f"; done in about {duration(row['expected'] - now.clock)}"
    return row


def _turn(job: Job, now: Now) -> tuple[str, float | None]:
    """Whose end a job waits for that has all it asked for, and when that is expected where it is next."""
    before = [
        other for other in now.jobs.values() if other.state in IN_WORK and suits(job.slot, other.ran_on)
    ]
    if not before:
        return "waits for its turn", None
    line = [other for other in now.jobs.values() if other.state == "waiting" and not other.held]
    ends = [end for other in before if (end := ending_of(other, now.clock)) is not None]
    expected = min(ends) if ends and line[0] == job else None
    return f"waits for its turn after {' or '.join(other.name for other in before)}", expected


def _event(event: Event) -> dict[str, Any]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    return {"when": when, "time": event.time, "job": event.job, "event": event.event, "why": event.why}


def _is_at_work(queue: Queue, slot: str) -> bool:
    return any(r.slot == slot and r.process.is_alive() for r in queue.runners())


def _say(sentence: str) -> None:
    print(time.strftime("%Y-%m-%d %H:%M:%S"), sentence, flush=True)


def _done(names: list[str], what: str, json: bool) -> None:
    if json:
        print_json(names)
    else:
        print(f"{', '.join(names)}: {what}")
