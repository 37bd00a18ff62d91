"""`PROGRESS.md` and `PROGRESS.html`: gathered, put between the marks, and in place as whole files.

Its reader may be a person or a program that has nothing else; what people wrote on the page is theirs.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from salt_vla.errors import ResourceError, UserError
from salt_vla.operations.handoff.effects import effects
from salt_vla.operations.handoff.facts import facts_of_all, newest_runs
from salt_vla.operations.handoff.marks import by_hand, merged
from salt_vla.operations.handoff.next_steps import next_steps
from salt_vla.operations.handoff.project import caches, machine, tables
from salt_vla.operations.handoff.sections import Project, conclusions, sections
from salt_vla.operations.launch import LAUNCH
from salt_vla.operations.queue import Job, Queue
from salt_vla.redaction import redacted, without_secrets
from salt_vla.reports.html import Block, Checks, Code, Facts, ReportContent, Section, render
from salt_vla.reports.tables import Cell, Table, to_markdown
from salt_vla.rundir import RunDirectory, require_place, root, write_bytes, writing_to

PAGE, HTML, LOCK = "PROGRESS.md", "PROGRESS.html", ".PROGRESS.lock"
SECONDS_TO_WAIT = 60.0  # for another process that writes the page
NO_GOAL = "Say here what this project is after, and what would count as an answer; this section is yours."
FIRST = f"""# Progress

## Goal

<!-- goal:begin -->
{NO_GOAL}
<!-- goal:end -->

<!-- generated:begin state -->
<!-- generated:end state -->

## Notes

<!-- notes:begin -->
Sections between `generated` marks are written anew whenever a run ends; everything else on this page is kept
byte for byte.
<!-- notes:end -->

"""


def gather() -> Project:
    """What is known of the project at the root, without secrets: before any of it is shortened or escaped."""
    chosen, others = newest_runs()
    runs = facts_of_all(chosen)
    jobs: list[Job] = []
    problem, has_runner = "", False
    try:
        queue = Queue()
        jobs = queue.jobs()
        has_runner = any(runner.process.is_alive() for runner in queue.runners())
    except UserError as error:
        problem = str(error)
    found, held = effects(runs), caches(runs)
    steps = next_steps(runs, jobs, held, found, has_runner)
    return redacted(
        Project(runs, others, jobs, held, tables(runs), machine(), found, steps, time.time(), problem)
    )


def write_handoff(folder: Path | None = None, project: Project | None = None) -> tuple[Path, Path]:
    """Both pages in `folder` (by default the root), what was written there by hand kept; their paths.

    Raises `MarkError` where the marks of the page that is there are damaged: nothing is written then."""
    folder = root() if folder is None else folder
    page, html = folder / PAGE, folder / HTML
    with _alone(folder):
        project = project or gather()  # Within the lock: who comes last has seen the newest.
        said = sections(project)
        for file in (page, html):
            require_place(file)
        before = page.read_bytes() if page.is_file() else FIRST.encode()
        # Bytes that are no UTF-8 come back as they were.
        text = before.decode("utf-8", errors="surrogateescape")
        written = {name: to_page(section) for name, section in said.items()}
        after = merged(text, written, str(page)).encode("utf-8", errors="surrogateescape")
        goal, notes = map(without_secrets, by_hand(text, str(page)))
        _put(page, after)
        _put(html, _as_html(project, said, goal, notes).encode("utf-8", errors="replace"))
    return page, html


def refresh(run: RunDirectory) -> None:
    """When a run has ended: both pages anew, where there is one already or the run was launched apart.

    Never ends the run: what is wrong is a line in the run's log."""
    if not ((root() / PAGE).is_file() or (run.path / LAUNCH).is_file()):
        return
    try:
        write_handoff()
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        run.log(f"{PAGE} was not written anew: {type(error).__name__}: {error}")


def _put(path: Path, content: bytes) -> None:
    # A page that is a link stays one.
    write_bytes(path.resolve(), content)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time; a `ResourceError` where another does not come to an end."""
    with writing_to(folder):
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            raise ResourceError(f"cannot write into {folder}: {there} is no folder; choose another one")
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    with lock:
        until = time.monotonic() + SECONDS_TO_WAIT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ResourceError(
                        f"another process has been writing {folder / PAGE} for {SECONDS_TO_WAIT:.0f} s; look "
                        "for a `salt-vla runs report` that hangs, and give the command again"
                    ) from None
                time.sleep(0.05)
        yield


def to_page(section: Section) -> str:
    """As Markdown."""
    return (
        "\n\n".join([f"## {section.heading}", *(_markdown(block).strip() for block in section.blocks)]) + "\n"
    )


def _markdown(block: Block) -> str:
    match block:
        case str():
            return _plain(block)
        case Table():
            note = f"\n\n{_plain(block.note)}" if block.note else ""
            return f"**{_plain(block.title)}**\n\n{to_markdown(_plain_table(block))}{note}"
        case Code():
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", block.text)), default=0))
            return f"{fence}sh\n{block.text}\n{fence}"
        case Facts():
            return "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in block.items)
        case Checks():
            return "\n".join(f"- {_MARKS[mark]} {_plain(topic)}: {_plain(text)}" for mark, topic, text in
                             block.items)  # fmt: skip
        case _:
            raise TypeError(type(block))


_MARKS = {"ok": "✓", "warn": "·", "bad": "✗"}


def _plain(text: str) -> str:
    """One line that is no HTML, whatever it says."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split()).replace("<", "&lt;")


def _plain_table(table: Table) -> Table:
    names = tuple((_plain(name), _plain(unit)) for name, unit in table.names)
    cells = tuple(
        tuple(Cell(_plain(c.figure), _plain(c.interval), c.mark) for c in line) for line in table.cells
    )
    return Table(table.title, table.corner, table.columns, names, cells, table.note)


def _as_html(project: Project, said: dict[str, Section], goal: str, notes: str) -> str:
    rest = [section for name, section in said.items() if name != "state"]
    hand = [Section("Notes", _paragraphs(notes))] if notes else []
    return render(
        ReportContent(
            title="Progress",
            lead="Written anew at the end of every run; PROGRESS.md is the page that is edited.",
            conclusions=conclusions(project),
            answer=_paragraphs(f"Goal: {goal}") if goal and goal != NO_GOAL else (),
            sections=[*rest, *hand],
        )
    )


def _paragraphs(text: str) -> Sequence[Block]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
