"""`--detach` of the commands that work long: the same command line again, under a supervisor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from salt_vla.errors import ConfigError
from salt_vla.operations.launch import Launch, fresh_name, launch, require_free, supervision
from salt_vla.rundir import RunDirectory, launched, root

_OPTIONS = {"--restarts": 1, "--processes": 1, "--detach": 0, "--no-detach": 0}  # and how many words follow
EMBEDDED = "metaworld-mini"  # A data set that is no path.
_typed: ContextVar[tuple[str, ...]] = ContextVar("_typed", default=())


@contextmanager
def typed(args: Sequence[str]) -> Iterator[None]:
    """Within the block, that is the command line which `--detach` starts again."""
    token = _typed.set(tuple(args))
    try:
        yield
    finally:
        _typed.reset(token)


@dataclass(frozen=True)
class Apart:
    """Whether a command goes on without its terminal.

    Attributes:
        detach: return at once; it goes on under a supervisor, without this terminal.
        restarts: with --detach, how often it is started again after a failure, from where it stood.
    """

    detach: bool = False
    restarts: int = 0

    def starts(
        self,
        noun: str,
        name: str = "",
        paths: Mapping[str, str | None] = {},
        processes: int = 1,
    ) -> bool:
        """Start the command apart if that was asked for, under a name of its own or one made from `noun`, and
        say so; false where it is to be done here and now. `paths`: what its options name, to be there now.
        Raises `ConfigError` for what has no meaning."""
        if not self.detach:
            for option, is_given in (("--restarts", self.restarts), ("--processes", processes != 1)):
                if is_given:
                    raise ConfigError(f"{option} would do nothing without --detach: give both")
            return False
        if launched().size > 1:
            raise ConfigError("--detach starts the processes itself: give it --processes, without torchrun")
        for option, path in paths.items():
            if path is not None and path != EMBEDDED and not (path.strip() and Path(path).exists()):
                raise ConfigError(
                    f"{option} {path!r}: there is no such file or folder; give one that is there"
                )
        command = without_options(_typed.get())
        wanted = Launch(name or fresh_name(noun), command, uuid4().hex, self.restarts, processes=processes)
        if wanted.is_run:
            wanted = replace(wanted, command=with_name(command, name))
            RunDirectory(wanted.folder).require_idle()
        require_free(wanted.name, supervision(wanted.folder))
        now = launch(wanted)
        log = (wanted.folder / "log.txt").relative_to(root())
        print(f"{wanted.name}: started, under supervisor {now.supervisor.pid}; what it says is in {log}")
        print(f"`salt-vla runs stop {wanted.name}` ends it")
        return True


def without_options(args: Sequence[str]) -> tuple[str, ...]:
    """The command line without what `--detach` and its companions say."""
    kept, skipped = [], 0
    for word in args:
        option, _, value = word.partition("=")
        if skipped:
            skipped -= 1
        elif option in _OPTIONS:
            skipped = 0 if value else _OPTIONS[option]
        else:
            kept.append(word)
    return tuple(kept)


def with_name(command: Sequence[str], name: str) -> tuple[str, ...]:
    """The command line of a run with its name in it: what a run is called by default may be another word
    where it is started again."""
    is_said = any(word.partition("=")[0] == "--name" for word in command)
    return (*command, *(() if is_said else ("--name", name)))
