"""What `doctor` asks of the work: runs that nobody carries on, caches left half built, jobs without a runner,
rows that trackers were never sent. Reads, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from salt_vla.cache.format import LEASES, MANIFEST, manifests_below
from salt_vla.cache.leases import living
from salt_vla.errors import UserError
from salt_vla.operations.doctor import Finding, Verdict
from salt_vla.operations.launch import LAUNCH, supervision
from salt_vla.operations.queue import Queue
from salt_vla.operations.trackers.base import TRACKERS
from salt_vla.operations.trackers.journal import Mirror
from salt_vla.rundir import RunDirectory, all_runs, read_json, root

SHOWN = 5  # Findings of one kind: ten thousand runs may have the same thing.
DEEPEST = 4  # Folders below caches/.


def runs() -> Iterable[Finding]:
    """Whoever was at work must be at work still, or have said how it ended."""
    found = all_runs()
    lost, damaged, working = [], [], 0
    for run in found:
        try:
            working += run.status().state == "running"
            if why := _lost(run):
                lost.append(f"{run.name} ({why})")
        except UserError as error:
            damaged.append(str(error))
    for folder in _jobs():
        try:
            if _has_lost_supervisor(folder):
                lost.append(f"{folder.name} (its supervisor is gone)")
        except UserError as error:
            damaged.append(str(error))
    restart = f"salt-vla runs restart {lost[0].split()[0]}" if lost else ""
    yield from _some("runs", "warn", lost, restart)
    yield from _damaged("runs", damaged)
    yield Finding("runs", "ok", f"{len(found)} below {root()}, {working} at work")


def _lost(run: RunDirectory) -> str:
    """Why nobody carries on what was begun; empty where somebody does, or where it has ended."""
    if _has_lost_supervisor(run.path):
        return "its supervisor is gone"
    file = run.path / "status.json"
    said = read_json(file, dict)["state"] if file.is_file() else ""
    under = supervision(run.path)
    if said == "running" and run.status().state != "running" and not (under and under.is_at_work):
        return "its process is gone, and nobody has written down how it ended"
    return ""


def _has_lost_supervisor(folder: Path) -> bool:
    now = supervision(folder)
    return now is not None and not now.is_over and not now.is_at_work


def _jobs() -> list[Path]:
    folder = root() / "jobs"
    return [path for path in sorted(folder.iterdir()) if (path / LAUNCH).is_file()] if folder.is_dir() else []


def trackers() -> Iterable[Finding]:
    """Runs that have ended, and of which a tracker does not have everything."""
    behind = []
    for run in all_runs():
        there = [name for name in TRACKERS if (run.path / f"tracker_{name}.json").is_file()]
        try:
            if there and run.status().state != "running":
                behind += [f"{run.name} ({name})" for name in there if Mirror(run, name).left()]
        except UserError as error:
            behind.append(f"{run.name} ({error})")
    yield from _some("trackers", "warn", behind, "salt-vla runs sync", "have not been sent everything: ")
    if not behind:
        yield Finding("trackers", "ok", "every run that is tracked has been sent")


def caches() -> Iterable[Finding]:
    """Half-built ones that nobody builds, and the leases of builders that are gone."""
    complete, building, unfinished, stale, damaged = 0, 0, [], [], []
    for folder in manifests_below(root() / "caches", DEEPEST):
        name = str(folder.relative_to(root()))
        try:
            is_complete = bool(
                read_json(folder / MANIFEST, dict, "salt-vla cache verify says more").get("complete")
            )
        except UserError as error:
            damaged.append(str(error))
            continue
        builders = living(folder / LEASES) if (folder / LEASES).is_dir() else []
        complete += is_complete
        building += bool(builders) and not is_complete
        if not is_complete and not builders:
            unfinished.append(name)
        if is_complete and not builders and (folder / LEASES).is_dir():
            stale.append(name)
    cure = "run the same `salt-vla cache build` again, or salt-vla cache prune"
    yield from _some("caches", "warn", unfinished, cure, "half built, and nobody builds: ")
    yield from _some("caches", "warn", stale, "salt-vla cache prune", "locks of builders that are gone: ")
    yield from _damaged("caches", damaged)
    yield Finding("caches", "ok", f"{complete} complete, {building} being built, below {root() / 'caches'}")


def queue() -> Iterable[Finding]:
    """Jobs wait for a runner that must be started once."""
    there = Queue()
    jobs = there.jobs()
    waiting = [job.name for job in jobs if job.state == "waiting"]
    living_runners = [runner.slot for runner in there.runners() if runner.process.is_alive()]
    if waiting and not living_runners:
        text = f"{len(waiting)} jobs wait ({', '.join(waiting[:SHOWN])}), and no runner is at work"
        yield Finding("queue", "warn", text, "salt-vla queue run --detach")
    elif there.is_paused() and waiting:
        yield Finding(
            "queue", "warn", f"{len(waiting)} jobs wait: the queue is paused", "salt-vla queue resume"
        )
    else:
        at_work = ", ".join(living_runners) or "none"
        yield Finding("queue", "ok", f"{len(waiting)} jobs wait; runners at work: {at_work}")


def _some(
    check: str, verdict: Verdict, names: list[str], cure: str = "", what: str = ""
) -> Iterator[Finding]:
    """One finding for all of them, the first few by name."""
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield Finding(check, verdict, what + ", ".join(names[:SHOWN]) + more, cure)


def _damaged(check: str, sentences: list[str]) -> Iterator[Finding]:
    """One for each of the first few; such a sentence ends with its cure."""
    for sentence in sentences[:SHOWN]:
        what, _, cure = sentence.rpartition("; ")
        yield Finding(check, "warn", what, cure)
    if len(sentences) > SHOWN:
        yield Finding(check, "warn", f"{len(sentences) - SHOWN} more are damaged", "mend those above first")
