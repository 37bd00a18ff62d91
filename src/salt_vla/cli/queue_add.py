"""`salt-vla queue add`: a command line that is checked at once, and what it is to wait for."""

from __future__ import annotations

import functools
import importlib
import inspect
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from salt_vla.cli.detach import EMBEDDED, Apart, without_options
from salt_vla.cli.printing import print_json
from salt_vla.config import override
from salt_vla.errors import ConfigError, RunError
from salt_vla.operations.conditions import (
    OF_A_JOB,
    Condition,
    Kind,
    cache_condition,
    figure_condition,
    parse_free,
    parse_time,
)
from salt_vla.operations.launch import LAUNCH, Launch
from salt_vla.operations.queue import Job, Queue, Wanted
from salt_vla.operations.slots import require_wish, suits
from salt_vla.operations.trackers import require_trackers
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, default_name, require_name, root

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
NOT_QUEUED = ("queue", "runs", "dashboard")


def add(
    command: Annotated[tuple[str, ...], tyro.conf.Positional],
    after: Repeated = (),
    after_any: Repeated = (),
    after_cache: Repeated = (),
    at: str | None = None,
    when_free: Repeated = (),
    if_: Annotated[Repeated, tyro.conf.arg(name="if")] = (),
    unless: Repeated = (),
    slot: str = "any",
    name: str | None = None,
    restarts: int = 0,
    json: bool = False,
) -> None:
    """Put a command of salt-vla into the queue; it starts when every condition holds and a slot is free.

    A job that waits for what cannot come any more, since the other one failed or the figure says no, is
    skipped, with the reason. Relative paths are those of the folder that this is called in.

    Example: salt-vla queue add --after-cache caches/ssv2 -- train exp1_higher_lr --name e1

    Args:
        command: everything behind --, as one would give it to salt-vla.
        after: a job or run that must have ended well; repeatable.
        after_any: a job or run that must have ended, however; repeatable.
        after_cache: the folder of a cache that must be complete; repeatable.
        at: not before this time, as '2026-11-24 03:00' or +2h.
        when_free: gpu:20GB, ram:8GB or disk:50GB that must be free; repeatable.
        if_: a figure of a finished run, as 'e1.val.loss < 10.76' or 'min(e1.train.loss) < 10.76'; repeatable.
        unless: as --if, and the opposite of it; repeatable.
        slot: any, cpu, gpu, or one GPU: gpu0, gpu1, …
        name: the job's name; default: the run's, or the command's with a number.
        restarts: how often it is started again when it fails; a run goes on from its last checkpoint.
        json: print the job as JSON.
    """
    if restarts < 0:
        raise ConfigError(f"--restarts must be at least 0, not {restarts}")
    if name is not None:
        require_name(name, "job")
    queue = Queue()
    conditions = (
        *(_condition("after", text, queue) for text in after),
        *(_condition("after_any", text, queue) for text in after_any),
        *(cache_condition(text) for text in after_cache),
        *([Condition("at", at, number=parse_time(at, time.time()))] if at is not None else []),
        *(parse_free(text) for text in when_free),
        *(figure_condition("if", text, lambda run: _number_of(run, queue)) for text in if_),
        *(figure_condition("unless", text, lambda run: _number_of(run, queue)) for text in unless),
    )
    wanted = Wanted(command, str(Path.cwd()), name or "", require_wish(slot), restarts, conditions=conditions)
    job = queue.add(_checked(wanted))
    if json:
        print_json(job.to_json())
        return
    waits = "; ".join(f"waits for {condition}" for condition in job.conditions)
    print(f"{job.name}: in the queue; {waits or 'waits for its turn'}")
    _say_who_works(queue, job)


def _checked(wanted: Wanted) -> Wanted:
    """With a command line that can be read, whose recipe and fields there are, and with the name of the run
    that it means."""
    from salt_vla.cli import COMMANDS

    command = wanted.command
    if not command:
        raise ConfigError("give the command behind --, as in `salt-vla queue add -- train demo_student`")
    noun, rest = command[0], list(command[1:])
    verbs = {} if noun in NOT_QUEUED else COMMANDS.get(noun, {})
    verb = "" if "" in verbs or not rest else rest.pop(0)
    if verb not in verbs:
        raise ConfigError(
            f"`{shlex.join(command[:2])}` is no command for the queue; `salt-vla --help` lists them all"
        )
    module, _, function = verbs[verb][0].partition(":")
    target = getattr(importlib.import_module(f"salt_vla.cli.{module}"), function)
    if {"-h", "--help"} & set(rest):
        raise ConfigError("--help answers at once: leave the queue out of it")
    given = tyro.cli(_recorded(target), prog=f"salt-vla {noun} {verb}".strip(), args=rest)
    if given.get("apart", Apart()) != Apart():
        raise ConfigError(
            "the queue starts every job on its own, without a terminal: leave out --detach, and give "
            "--restarts in front of the --"
        )
    _require_sense(given)
    _require_paths(given, wanted.conditions)
    if not Launch("x", command, "").is_run:
        return wanted
    name = default_name(given["recipe"]) if given["name"] is None else given["name"]
    require_name(name, "run")
    if wanted.name not in ("", name):
        raise ConfigError(
            f"--name {wanted.name} in front of the -- and the run's name {name} differ; give one of them"
        )
    if given.get("branch") is not None and not RunDirectory.named(name).config_file.exists():
        _require_origin(given["branch"])
    # Said in the command itself: what a run is called by default may be another word where it starts.
    named = () if given["name"] is not None else ("--name", name)
    plain = (*without_options(command), *named)
    return replace(wanted, name=name, command=plain, processes=given.get("processes", 1))


def _require_sense(given: dict[str, Any]) -> None:
    """What a run would be refused for at its start, as far as it can be told without its data."""
    if "recipe" in given and "overrides" in given:
        override(get_recipe(given["recipe"]).config, given["overrides"])
    if given.get("max_steps") is not None and given["max_steps"] < 1:
        raise ConfigError(f"--max-steps must be at least 1, not {given['max_steps']}")
    if "ahead" in given:
        given["ahead"].require_meaning(given["branch"], given["max_steps"])
        if given["ahead"].is_asked:
            raise ConfigError("--plan and --find-batch answer at once: leave the queue out of it")
    require_trackers(given.get("track") or ())


def _require_paths(given: dict[str, Any], conditions: Sequence[Condition]) -> None:
    """Of a command that works long: what it reads is there, or something that the job waits for may bring it.
    Raises `ConfigError`."""
    if "apart" not in given:
        return
    awaited = {condition.kind for condition in conditions}
    data = given.get("data", getattr(given.get("latents"), "data", None))
    for option, path, bringing in (
        ("--data", data, {*OF_A_JOB, "at"}),
        ("--cache", given.get("cache"), {*OF_A_JOB, "at", "after_cache"}),
    ):
        if path is None or path == EMBEDDED or (path.strip() and (awaited & bringing or Path(path).exists())):
            continue
        cure = "--after-cache PATH" if option == "--cache" else "--after JOB"
        raise ConfigError(
            f"{option} {path!r}: there is no such file or folder; give one that is there, or wait for it "
            f"with {cure} in front of the --"
        )


def _require_origin(source: str) -> None:
    """A run that is there, or a job that will make it: whether it keeps that step is known at the start."""
    origin, _, step = source.rpartition("@")
    if not origin or not step.isdigit():
        raise ConfigError(f"--branch {source!r} is not of the form RUN@STEP, such as long@400")
    _number_of(origin, Queue())


def _recorded(function: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """The same command line, which gives back its arguments instead of working."""

    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> dict[str, Any]:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    return record


def _condition(kind: Kind, text: str, queue: Queue) -> Condition:
    return Condition(kind, text, job=_number_of(text, queue))


def _number_of(name: str, queue: Queue) -> int:
    """Of the last job of that name; 0 for a run that the queue does not know. A `RunError` for neither."""
    require_name(name, "run")
    found = [job.id for job in queue.jobs() if job.name == name]
    if found:
        return max(found)
    launched = root() / "jobs" / name / LAUNCH
    if not RunDirectory.named(name).exists() and not launched.is_file():
        raise RunError(f"there is no job and no run {name!r} to wait for; add that one first")
    return 0


def _say_who_works(queue: Queue, job: Job) -> None:
    at_work = [r.slot for r in queue.runners() if r.process.is_alive()]
    if not any(suits(job.slot, slot) for slot in at_work):
        slot = job.slot if job.slot.removeprefix("gpu").isdigit() or job.slot == "cpu" else ""
        option = f" --slot {slot}" if slot else ""
        print(f"No runner is at work for it; `salt-vla queue run{option} --detach` starts one.")
