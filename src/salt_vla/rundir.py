"""A run's directory: who is running it, what it measured, and how it ended.

Knows nothing of models or training; `operations` reads runs through this module alone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from salt_vla.errors import ResourceError, RunError
from salt_vla.files import flush_folder as flush_folder
from salt_vla.files import read_json as read_json
from salt_vla.files import remove_left_parts
from salt_vla.files import require_place as require_place
from salt_vla.files import to_json_line as to_json_line
from salt_vla.files import void as void
from salt_vla.files import write_atomically as write_atomically
from salt_vla.files import write_bytes as write_bytes
from salt_vla.files import write_text as write_text
from salt_vla.files import writing_to as writing_to
from salt_vla.identity import ProcessId, boot_id, identity
from salt_vla.redaction import without_secrets

DECODER = "SALT_VLA_DECODER"
DASHBOARD_TOKEN = "SALT_VLA_DASHBOARD_TOKEN"
ROOT = "SALT_VLA_ROOT"
DETACHED = "SALT_VLA_DETACHED"  # A mark of processes that shall outlive the one that started them.
SUPERVISED = "SALT_VLA_SUPERVISED"  # The folder of the run or job that a process was started for.
RUN_NAME, RUN_LOG_DIR = "RUN_NAME", "RUN_LOG_DIR"
LONGEST_NAME = 100
LARGEST_COUNT = 2**53  # From here on a float no longer tells a count from the next.
ENDINGS = (
    "finished",
    "stopped",  # by `salt-vla runs stop`
    "signal",
    "exception",
    "watchdog",
    "time_limit",
    "killed",
    "out_of_memory",
    "machine",
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BEFORE_CONFIG = ("status.json", "launch.json")
_NAME = re.compile(rf"(?=.{{1,{LONGEST_NAME}}}\Z)[A-Za-z0-9][A-Za-z0-9._-]*")


def root() -> Path:
    """The folder that holds `runs/` and `caches/`: `SALT_VLA_ROOT`, or the current folder."""
    return Path(os.environ.get(ROOT) or ".").expanduser().resolve()


def num_cores() -> int:
    """Cores that this process may use, where the system tells, or else all that there are; its share of them
    where a launcher started several on the machine."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, cores // launched().local_size)


def wanted_decoder() -> str:
    """Which library reads video: the variable `DECODER`, or `auto`."""
    return os.environ.get(DECODER) or "auto"


def dashboard_token() -> str:
    """What lets a page act: the variable `DASHBOARD_TOKEN`; empty where it is not set."""
    return os.environ.get(DASHBOARD_TOKEN, "")


def default_name(otherwise: str) -> str:
    """Of a run whose command gives none: the variable `RUN_NAME`."""
    return os.environ.get(RUN_NAME) or otherwise


def second_log(name: str) -> Path | None:
    """Where the run's log is to be, too: in the folder of the variable `RUN_LOG_DIR`, under a name that no
    other start of it has. The file is made here, with its folder. Raises `ResourceError`."""
    folder = os.environ.get(RUN_LOG_DIR)
    if not folder:
        return None
    path = Path(folder).absolute() / f"{name}_{time.strftime('%Y%m%d_%H%M%S')}_pid{os.getpid()}.log"
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return path


def require_name(name: str, what: str) -> None:
    """A name becomes a folder's or a file's: a `RunError` for one that could lead elsewhere."""
    if not _NAME.fullmatch(name):
        shown = repr(name) if len(name) <= LONGEST_NAME else f"{name[:20]!r}… ({len(name)} characters)"
        raise RunError(
            f"{what} name {shown} may hold only letters, digits, '.', '_' and '-', at most {LONGEST_NAME} of "
            f"them, the first a letter or digit; a new {what} takes another name with "
            f"{'--as' if what == 'recipe' else '--name'}"
        )


@dataclass(frozen=True)
class Launched:
    """This process' number among all `size` that a launcher such as torchrun started, and among those of its
    machine; alone where there was none."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def launched() -> Launched:
    """What torchrun's variables say. Raises `RunError` where they contradict each other."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return Launched()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        found = Launched(*(int(os.environ[name]) for name in names))
    except (KeyError, ValueError) as error:
        raise RunError(
            f"RANK and WORLD_SIZE are set, but {' and '.join(names[2:])} are not ({error}); start several "
            "processes with torchrun, or unset RANK for one"
        ) from error
    if not (0 <= found.rank < found.size and 0 <= found.local_rank < found.local_size <= found.size):
        raise RunError(f"{found} contradicts itself; start several processes with torchrun")
    return found


def run_or_directory(name: str | os.PathLike[str]) -> Path:
    """The folder that a command's argument means: a directory as it is, else the run of that name, which may
    be written as its folder below the root (`runs/NAME`)."""
    path = Path(name)
    is_below_root = path.parts[:1] == ("runs",) and (root() / path).is_dir()
    return path if path.is_dir() else root() / path if is_below_root else root() / "runs" / path


@dataclass(frozen=True)
class Status:
    """What `status.json` holds. `pid`, `started` (process start, seconds since the epoch), `boot` and `ticks`
    name a process beyond doubt, since a pid alone is used again. `ending` is one word for how it ended, one
    of `ENDINGS`, and `exit_reason` a sentence; `ended` is when, in seconds since the epoch. All three are
    empty while it runs."""

    state: str
    step: int = 0
    total_steps: int = 0
    pid: int = 0
    started: float = 0.0
    resumed_from: list[int] = field(default_factory=list)
    exit_reason: str = ""
    seconds: float = 0.0
    branched_from: str = ""
    ending: str = ""
    ended: float = 0.0
    boot: str = ""
    ticks: int = 0

    @property
    def process(self) -> ProcessId:
        """Who wrote it."""
        return ProcessId(self.pid, self.started, self.boot, self.ticks)

    def over(self, state: str, ending: str, reason: str) -> Status:
        """The same run, ended now."""
        return replace(self, state=state, ending=ending, exit_reason=reason, ended=time.time())


def is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_COUNT


def is_time(value: Any) -> bool:
    """Whether it may be a number of seconds."""
    return type(value) in (int, float) and 0 <= value < LARGEST_COUNT


_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("state", "exit_reason", "branched_from", "ending", "boot"), lambda v: type(v) is str),
    **dict.fromkeys(("step", "total_steps", "pid", "ticks"), is_count),
    **dict.fromkeys(("started", "seconds", "ended"), is_time),
    "resumed_from": lambda value: type(value) is list and all(map(is_count, value)),
}


def status_from(held: dict[str, Any]) -> Status:
    """What a file's object says; fields of an earlier version may lack. Raises `TypeError` naming those that
    are not of their kind."""
    wrong = [name for name, value in held.items() if name in _KINDS and not _KINDS[name](value)]
    if wrong:
        raise TypeError(", ".join(wrong))
    return Status(**held)


def _lost(status: Status) -> Status:
    """What there is to say of a run whose process is gone without a word."""
    if status.boot and status.boot != boot_id():
        reason = "the machine was restarted or lost its power while the run worked"
        return replace(status, state="killed", ending="machine", exit_reason=reason)
    reason = "killed without a word (the process is gone)"
    return replace(status, state="killed", ending="killed", exit_reason=reason)


class RunDirectory:
    """`runs/<name>/` under a root; all of a run's files and the rules for touching them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.log_file = path / "log.txt"
        self.checkpoints = path / "checkpoints"
        self.pictures = path / "pictures"

    @classmethod
    def named(cls, name: str) -> RunDirectory:
        require_name(name, "run")
        return cls(root() / "runs" / name)

    @property
    def name(self) -> str:
        return self.path.name

    def exists(self) -> bool:
        """Whether anything ever worked or shall work here, also what failed before it had settings."""
        names = (self.config_file.name, *BEFORE_CONFIG)
        # Not pathlib's, which complains of a folder that this user may not look into.
        return any(os.path.isfile(self.path / name) for name in names)  # noqa: PTH113

    def require(self) -> RunDirectory:
        if not self.exists():
            raise RunError(f"there is no run at {self.path}; `salt-vla runs ls` lists the runs")
        return self

    def status(self) -> Status:
        """What `status.json` says, except that a running process which is gone was killed."""
        path = self.path / "status.json"
        try:
            recorded = status_from(read_json(path, dict, "remove it to let the run resume"))
        except (FileNotFoundError, NotADirectoryError):
            return Status(state="queued")
        except TypeError as error:
            raise RunError(f"{path} is damaged ({error}); remove it to let the run resume") from error
        if recorded.state == "running" and not recorded.process.is_alive():
            return _lost(recorded)
        return recorded

    def set_status(self, status: Status) -> None:
        said = asdict(status) | {"exit_reason": without_secrets(status.exit_reason)}
        write_text(self.path / "status.json", json.dumps(said, indent=2))

    def require_idle(self) -> Status:
        """The run's status; a `RunError` while another process works on it."""
        status = self.status()
        if status.state == "running" and status.pid != os.getpid():
            raise RunError(f"run {self.name!r} is being worked on by process {status.pid}; stop it first")
        return status

    def claim(self, total_steps: int) -> Status:
        """Take the run for this process; refuse while another works on it. Of several at once one wins."""
        me = identity()
        with self._one_at_a_time():
            status = replace(
                self.require_idle(),
                state="running",
                total_steps=total_steps,
                pid=me.pid,
                started=me.started,
                boot=me.boot,
                ticks=me.ticks,
                exit_reason="",
                ending="",
                ended=0.0,
            )
            remove_left_parts(self.path)  # A living writer is a process that is about to be refused.
            self.set_status(status)
        return status

    def settle(self, found: Status, before: Status | None = None) -> Status:
        """Write down how the run's process was lost, unless another one has taken the run meanwhile, or
        nothing but `before` is to be replaced; the status that holds."""
        with self._one_at_a_time():
            now = self.status()
            is_loss = now.state == "killed" and not now.ended and now.process == found.process
            if not (is_loss if before is None else now == before):
                return now
            self.set_status(found)
        return found

    @contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        lock = self.path / ".claim"
        with writing_to(lock):
            self.path.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
            fcntl.flock(file, fcntl.LOCK_EX)  # Released by closing, and by the death of the process.
        with file:
            yield

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, in order; a last line cut off by a crash is ignored."""
        if not self.metrics_file.is_file():
            return []
        lines = self.metrics_file.read_text(errors="replace").split("\n")
        rows = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                row = json.loads(line)
                rows += [row] if kind in (None, row["kind"]) and isinstance(row["step"], int) else []
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise RunError(
                    f"{self.metrics_file} is damaged in line {number} ({error}: {line[:40]!r}); "
                    "remove that line and run the same command again"
                ) from error
        return rows

    def log_metrics(self, row: dict[str, Any]) -> None:
        """On disk when this returns: after a power cut no checkpoint is there without the lines before it."""
        with writing_to(self.metrics_file), self.metrics_file.open("a") as file:
            file.write(to_json_line(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def trim_metrics(self, last_step: int, is_kept: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """Drop rows after `last_step`, which will be computed again, and those that `is_kept` denies."""
        rows = [row for row in self.metrics() if row["step"] <= last_step and (not is_kept or is_kept(row))]
        write_text(self.metrics_file, "".join(to_json_line(row) + "\n" for row in rows))

    def log(self, line: str) -> None:
        """Without secrets. A full disk under the log ends no run: the line is said on standard error then."""
        line = without_secrets(line)
        try:
            with writing_to(self.log_file), self.log_file.open("a") as file:
                file.write(line + "\n")
        except ResourceError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL):
                raise
            print(line, file=sys.stderr, flush=True)


class Onlooker(RunDirectory):
    """The same directory for one of several processes that work on the run without writing its files."""

    def set_status(self, status: Status) -> None:
        """The first process' business, as all below."""

    def claim(self, total_steps: int) -> Status:
        return replace(self.status(), total_steps=total_steps)

    def log_metrics(self, row: dict[str, Any]) -> None:
        """No line."""

    def trim_metrics(self, last_step: int, is_kept: Callable[[dict[str, Any]], bool] | None = None) -> None:
        """No line."""

    def log(self, line: str) -> None:
        """No line."""


def all_runs() -> list[RunDirectory]:
    """Every run under the root, by name."""
    folder = root() / "runs"
    found = [RunDirectory(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    return [run for run in found if run.exists()]
