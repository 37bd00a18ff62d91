"""The command line: parse, call, print. Nouns and their verbs are listed in one table.

Imports torch only inside the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import tyro

from salt_vla.errors import UserError
from salt_vla.interrupts import Stopped
from salt_vla.rundir import launched

_ASSIGNMENT = re.compile(r"[a-z]\w*(\.\w+)*=")
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# noun → verb → "module:function" (verb "" for nouns that are commands themselves), and one line of help.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "demo": {
        "": ("demo:demo", "train a teacher and a student on simulated robots, and report what was learned")
    },
    "doctor": {"": ("doctor:doctor", "is this machine fit, and is anything left undone; each with its cure")},
    "plan": {"": ("plan:plan", "what a run will take, and what looks wrong with it, before it begins")},
    "train": {"": ("train:train", "run a recipe, or resume the run of that name")},
    "sweep": {
        "run": ("sweep:run", "run a recipe at many points of its fields; ends with one table"),
        "ls": ("sweep:ls", "list the sweeps"),
        "show": ("sweep:show", "a sweep's table, the best run first"),
        "promote": ("sweep:promote", "a sweep's best run as a recipe of its own"),
    },
    "eval": {"": ("evaluate:evaluate", "probe encoders on held-out episodes, beside honest baselines")},
    "data": {
        "index": ("data:index", "write the clip table of a data set"),
        "check": ("data:check", "decode every clip; exit code 1 when one is bad"),
        "show": ("data_show:show", "a picture of chosen or random clips, with masks if asked"),
        "mix": ("data:mix", "join clip tables, each with its share"),
        "simulate": ("data:simulate", "render robot episodes in Meta-World (extra: sim)"),
    },
    "cache": {
        "plan": ("cache:plan", "what a cache will take: bytes, hours, disk; exit code 2 when it cannot fit"),
        "build": ("cache:build", "cache a teacher's latents for one split"),
        "ls": ("cache_care:ls", "list the caches: what they hold, their size, who uses them"),
        "show": ("cache_care:show", "a cache's manifest, statistics and picture"),
        "diff": ("cache_care:diff", "two caches, or a cache and a recipe, field by field"),
        "verify": ("cache_care:verify", "check every byte; exit code 1 when one is damaged"),
        "repair": (
            "cache_care:repair",
            "mend what verify finds, and only that; exit code 1 when some is left",
        ),
        "import": ("cache_import:import_folder", "make a cache of others' latents, one file a clip"),
        "prune": ("cache_care:prune", "remove what killed builds left, and caches that no run uses"),
    },
    "teacher": {
        "check": ("teacher:check", "what a teacher is: sizes, fingerprint, target statistics, verdict"),
        "train": ("teacher:train", "stage 1: train a teacher on pixels"),
        "export": ("teacher:export", "a trained teacher as a folder of its own"),
        "convert": ("teacher_convert:convert", "a pickled checkpoint as a folder with safetensors"),
    },
    "runs": {
        "ls": ("runs:ls", "list the runs"),
        "show": ("runs:show", "one run: how it goes or ended, its figures, masks, cost and last lines"),
        "tail": ("runs_watch:tail", "the last lines of a run's log; -f goes on until it has ended"),
        "watch": ("runs_watch:watch", "a live view of the runs at work and of the queue's head"),
        "compare": (
            "runs_compare:compare",
            "runs at equal steps, clips and FLOPs, and what seeds allow to say",
        ),
        "regress": (
            "runs_regress:regress",
            "does a held-out loss foretell what probes find? A line over runs",
        ),
        "report": ("runs_report:report", "write PROGRESS.md and .html: what was learned, what comes next"),
        "sync": ("runs_sync:sync", "send trackers what they lack; exit code 1 when some is left"),
        "send": ("runs_sync:send", "what sync starts for each tracker"),
        "stop": ("runs_control:stop", "end a run or job after its step, with a checkpoint"),
        "kill": ("runs_control:kill", "end a run or job at once, with all its processes"),
        "restart": ("runs_control:restart", "start a detached run or job again, from where it stands"),
        "pictures": ("runs_pictures:pictures", "draw a run's masks and what its encoder makes of a clip"),
        "supervise": ("runs_control:supervise", "what --detach and the queue start beside a run"),
    },
    "dashboard": {
        "": ("dashboard:dashboard", "a live page of runs, queue and caches for a browser (extra: dashboard)")
    },
    "queue": {
        "add": ("queue_add:add", "a command that starts when its conditions hold and a device is free"),
        "ls": ("queue:ls", "what runs, what waits and for what, what ended"),
        "show": ("queue:show", "one job: its conditions, and all that happened to it"),
        "history": ("queue:history", "all that ever happened in the queue, and why"),
        "cancel": ("queue:cancel", "take waiting jobs out"),
        "move": ("queue:move", "change the order of those that wait"),
        "retry": ("queue:retry", "put a job that did not end well into the line again"),
        "pause": ("queue:pause", "start no further job"),
        "resume": ("queue:resume", "undo `queue pause`"),
        "run": ("queue:run", "run the jobs in one device slot; may be killed at any moment"),
    },
    "recipes": {
        "ls": ("recipes:ls", "list the experiments that run by name"),
        "show": ("recipes:show", "one experiment: why, how long, every field beside its parent's"),
        "diff": ("recipes:diff", "the fields in which two experiments differ"),
    },
}


def usage() -> str:
    lines = [
        "usage: salt-vla COMMAND [ARGS]",
        "",
        "Pretrain video encoders for robots against a frozen teacher.",
        "",
    ]
    for noun, verbs in COMMANDS.items():
        lines += [f"  {f'{noun} {verb}'.strip():<16} {text}" for verb, (_, text) in verbs.items()]
    lines += [
        "",
        "Every command has --help. SALT_VLA_ROOT (default: the current folder) holds runs/ and caches/.",
        "Example: salt-vla demo",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. A `UserError` becomes one sentence on stderr, below the table that some
    have, and exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # As stderr: no name is worth a traceback.
    try:
        try:
            return _dispatch(args) if launched().size == 1 else _dispatch_together(args)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # What cannot be written is said here, not at the program's very end.
    except UserError as error:
        sentence, _, table = str(error).partition("\n")
        print(f"{table}\n\n" * bool(table) + f"salt-vla: {sentence}", file=sys.stderr)
        return 2
    except (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        where = error.filename or "a file"
        print(f"salt-vla: {where}: {error.strerror}; check the path and its permissions", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _drop_output()  # The reader of our output has left (`| head`); nothing is left to say.
        return 141
    except OSError as error:
        if error.filename is None and error.errno in CANNOT_WRITE:
            _drop_output()
            print(
                f"salt-vla: cannot write the output: {error.strerror}; the answer is not whole",
                file=sys.stderr,
            )
            return 2
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        print(f"salt-vla: {str(error.filename)[:200]}: {error.strerror}; check the path", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"salt-vla: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("salt-vla: interrupted; run the same command again: what was finished is kept", file=sys.stderr)
        return 130


def _drop_output() -> None:
    """Let what is still to be written vanish, also at the program's end."""
    with suppress(io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch_together(args: list[str]) -> int:
    """As one of several processes, of which the first alone is heard."""
    from salt_vla.training.distributed import joined

    with joined() as world, Path(os.devnull).open("w") as nowhere, ExitStack() as stack:
        if not world.is_first:
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        return _dispatch(args)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(usage())
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        print(version("salt-vla"))
        return 0
    noun, rest = args[0], args[1:]
    if noun not in COMMANDS:
        raise UserError(f"there is no command {noun!r}; commands: {', '.join(COMMANDS)}")
    verbs = COMMANDS[noun]
    verb = ""
    if "" not in verbs:
        if not rest or rest[0] in ("-h", "--help"):
            print(usage_of(noun))
            return 0
        verb, rest = rest[0], rest[1:]
        if verb not in verbs:
            raise UserError(f"`salt-vla {noun}` has no verb {verb!r}; verbs: {', '.join(verbs)}")
    target, _ = verbs[verb]
    module, _, function = target.partition(":")
    command = getattr(importlib.import_module(f"salt_vla.cli.{module}"), function)
    from salt_vla.cli.detach import typed

    try:
        with typed(args):
            result = tyro.cli(command, prog=f"salt-vla {noun} {verb}".strip(), args=rest)
    except SystemExit as end:
        if end.code and any(_ASSIGNMENT.match(word) for word in _behind_options(rest)):
            print(
                "salt-vla: put all field=value together, right after the name, before any --option",
                file=sys.stderr,
            )
        raise
    return int(result or 0)


def _behind_options(args: list[str]) -> list[str]:
    """The words behind the first option, where positional ones are not looked for any more."""
    return args[next((place for place, word in enumerate(args) if word.startswith("-")), len(args)) :]


def usage_of(noun: str) -> str:
    rows = [f"  {noun} {verb:<10} {text}" for verb, (_, text) in COMMANDS[noun].items()]
    return "\n".join([f"usage: salt-vla {noun} VERB [ARGS]", "", *rows])
