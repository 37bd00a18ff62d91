"""`salt-vla runs watch` and `tail`."""

from __future__ import annotations

import json as to_json
import sys
import time
from typing import Annotated

import tyro

from salt_vla.cli.printing import printable
from salt_vla.errors import UserError
from salt_vla.operations.tail import follow as lines_to_come
from salt_vla.operations.tail import place_of
from salt_vla.operations.tail import tail as last_lines
from salt_vla.operations.watch import Moment, Watch

SLOWEST, FASTEST = 3600.0, 0.1  # Seconds between two frames.


def watch(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    every: float = 2.0,
    once: bool = False,
    json: bool = False,
) -> None:
    """Runs as they go: progress, rate, time left, curves, what they wait for, and the head of the queue.

    Without names: the runs at work and those that ended within the last hour, until Ctrl-C; with names, until
    all of them have ended. Where the output is no terminal it says it once.

    Example: salt-vla runs watch demo_student

    Args:
        names: of runs; default: those at work.
        every: seconds from one look to the next.
        once: say how it is now, and end.
        json: a line of JSON at every look.
    """
    if not FASTEST <= every <= SLOWEST:
        raise UserError(f"--every must lie in {FASTEST:g} … {SLOWEST:g} seconds, not {every}")
    eyes = Watch(names)
    try:
        if json:
            _as_lines(eyes, every, once)
        elif once or not sys.stdout.isatty():
            _print(eyes.look())
        else:
            _live(eyes, every)
    except KeyboardInterrupt:
        return


def _as_lines(eyes: Watch, every: float, once: bool) -> None:
    while True:
        moment = eyes.look()
        print(to_json.dumps(moment.to_json()), flush=True)
        if once or (eyes.names and moment.is_over):
            return
        time.sleep(every)


def _print(moment: Moment) -> None:
    from rich.console import Console

    from salt_vla.operations.watch_frame import frame

    console = Console(markup=False, emoji=False, highlight=False)
    with console.capture() as captured:  # Else it would end the program when its reader has left.
        console.print(frame(moment, console.width))
    print(captured.get(), end="")


def _live(eyes: Watch, every: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from salt_vla.operations.watch_frame import frame

    console = Console(markup=False, emoji=False, highlight=False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            moment = eyes.look()
            live.update(frame(moment, console.width), refresh=True)
            if eyes.names and moment.is_over:
                return
            time.sleep(every)


def tail(
    name: Annotated[str, tyro.conf.Positional],
    follow: Annotated[bool, tyro.conf.arg(aliases=["-f"])] = False,
    lines: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 10,
) -> None:
    """The last lines of a run's log, and its last metrics as sentences.

    Example: salt-vla runs tail demo_student -f

    Args:
        name: of the run, or of a job that --detach or the queue started.
        follow: go on with what comes until the run has ended, or until Ctrl-C.
        lines: so many lines of the log.
    """
    if lines < 0:
        raise UserError(f"--lines must be at least 0, not {lines}")
    run = place_of(name)
    try:
        for line in lines_to_come(run, lines) if follow else last_lines(run, lines):
            print(printable(line), flush=True)
    except KeyboardInterrupt:
        return
