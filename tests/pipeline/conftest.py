"""The command line in folders of its own, and a workshop: a tiny teacher and its cache, made once a session.

`Salt` calls commands in this process where a process of their own would add nothing but its start, and as
real processes where signals, limits or permissions are the point.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cli import main
from salt_vla.errors import RunError
from salt_vla.jobs.data import open_table
from salt_vla.operations.launch import supervision
from salt_vla.operations.processes import ProcessId
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory

MACHINE_COLUMNS = {"data_wait_s", "step_s", "clips_per_s", "data_wait_share", "memory_gb"}

# A recipe cut down to milliseconds a step; everything that is measured at a first start is pinned.
TINY = (
    "encoder.name=vit_micro",
    "encoder.depth=1",
    "encoder.geometry.num_frames=4",
    "encoder.geometry.image_size=32",
    "encoder.geometry.tubelet_size=2",
    "encoder.geometry.patch_size=8",
    "predictor.depth=1",
    "predictor.dim=24",
    "predictor.num_heads=3",
    "data.view.frame_stride=2",
    "data.view.num_views=2",
    "data.view.max_shift=2",
    "masks.max_targets=0",
    "optimizer.lr=3e-3",
    "optimizer.warmup_steps=4",
    "steps=40",
    "batch_size=4",
    "runtime.device=cpu",
    "runtime.precision=float32",
    "runtime.threads=1",
    "runtime.log_every=1",
    "runtime.checkpoint_every=2",
    "runtime.validate_every=4",
    "runtime.validation_clips=6",
)
PROGRAM = "import sys; from salt_vla.cli import main; sys.exit(main())"


@dataclass(frozen=True)
class Answer:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one sentence of a refusal: exit code 2, a last line that begins with the program's name, and
        no traceback."""
        assert self.code == 2, (self.code, self.err)
        assert "Traceback" not in self.err + self.out, self.err
        last = self.err.rstrip("\n").splitlines()[-1]
        assert last.startswith("salt-vla: "), self.err
        assert self.err.count("salt-vla: ") == 1, self.err
        return last.removeprefix("salt-vla: ")


class Salt:
    """`salt-vla` with `root` as its SALT_VLA_ROOT."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.started: list[subprocess.Popen[str]] = []

    def __call__(self, *args: object) -> Answer:
        """The command in this process."""
        with self.here() as (out, err):
            code = _exit_code([str(arg) for arg in args])
        return Answer(code, out.getvalue(), err.getvalue())

    @contextlib.contextmanager
    def here(self) -> Iterator[tuple[io.StringIO, io.StringIO]]:
        """This process with the root, and what it says meanwhile."""
        out, err = io.StringIO(), io.StringIO()
        before = os.environ.get("SALT_VLA_ROOT")
        os.environ["SALT_VLA_ROOT"] = str(self.root)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield out, err
        finally:
            os.environ.pop("SALT_VLA_ROOT")
            if before is not None:
                os.environ["SALT_VLA_ROOT"] = before

    def ok(self, *args: object) -> Answer:
        answer = self(*args)
        assert answer.code == 0, answer.err
        return answer

    def json(self, *args: object) -> Any:
        return json.loads(self.ok(*args, "--json").out)

    def start(self, *args: object, **options: Any) -> subprocess.Popen[str]:
        """The command as a process, which ends with the test at the latest."""
        return self.start_python(PROGRAM, *args, **options)

    def start_python(self, code: str, *args: object, **options: Any) -> subprocess.Popen[str]:
        return self.start_command([sys.executable, "-c", code], *args, **options)

    def start_command(self, program: list[str], *args: object, **options: Any) -> subprocess.Popen[str]:
        command = [*program, *map(str, args)]
        environment = os.environ | {"SALT_VLA_ROOT": str(self.root), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.started.append(subprocess.Popen(command, env=environment, **(pipes | options)))
        return self.started[-1]

    def run(self, *args: object, **options: Any) -> Answer:
        return answer_of(self.start(*args, **options))

    def train(self, recipe: str, name: str, *more: object, **settings: object) -> list[object]:
        """The arguments of a tiny run; `settings` use `__` for the dots of a field's name."""
        overrides = [f"{field.replace('__', '.')}={value}" for field, value in settings.items()]
        return ["train", recipe, *TINY, *overrides, "--name", name, *more]

    def at(self, name: str) -> RunDirectory:
        return RunDirectory(self.root / "runs" / name)

    def end_all(self) -> None:
        """Its processes, and what was launched under the root and belongs to nobody."""
        for process in self.started:
            with process:
                process.kill()
        while left := [each for folder in self.root.glob("*/*/") for each in _working(folder)]:
            for process_id in left:
                process_id.send(signal.SIGKILL)

    def files(self) -> list[str]:
        """Everything below the root but finished view stores, which any run may use again."""
        paths = [str(path.relative_to(self.root)) for path in self.root.rglob("*")]
        return sorted(path for path in paths if path != "caches" and not path.startswith("caches/views-"))


def _working(folder: Path) -> list[ProcessId]:
    try:
        launched = supervision(folder)
    except RunError:  # A test has damaged it.
        launched = None
    if launched is None:
        return []
    known = (launched.supervisor, *(attempt.process for attempt in launched.attempts))
    return [process for process in known if process.is_alive()]


def answer_of(process: subprocess.Popen[str]) -> Answer:
    out, err = process.communicate(timeout=300)
    return Answer(process.returncode, out, err)


def _exit_code(args: list[str]) -> int:
    try:
        return main(args)
    except SystemExit as end:  # How the parser ends the program.
        return int(end.code or 0) if not isinstance(end.code, str) else 1


@dataclass(frozen=True)
class Workshop:
    """What students need: a clip table, a run that is a teacher, and the cache of its latents."""

    salt: Salt
    dataset: Path
    table: Path
    teacher: Path
    cache: Path


@pytest.fixture(scope="session")
def workshop(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Shared by all tests of the session, so nobody may write into it."""
    root = tmp_path_factory.mktemp("workshop")
    salt = Salt(root)
    table, cache = root / "clips.parquet", root / "caches" / "latents"
    salt.ok("data", "index", tiny_dataset, "--out", table, "--num-frames", 4, "--frame-stride", 2)
    salt.ok(*salt.train("demo_teacher", "teacher", "--data", table, "--max-steps", 6))
    for split in ("train", "validation"):
        salt.ok(
            *("cache", "build", "--teacher", "teacher", "--split", split, "--data", table, "--out", cache)
        )
    return Workshop(salt, tiny_dataset, table, root / "runs" / "teacher", cache)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory where there is one: a builder waits for the disk at every shard, against power cuts
    that no test makes. Every user may enter it, unlike pytest's own."""
    memory = Path("/dev/shm")
    has_memory = memory.is_dir() and os.access(memory, os.W_OK)
    folder = Path(tempfile.mkdtemp(prefix="salt-vla-", dir=memory if has_memory else None))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def salt(tmp_path: Path) -> Iterator[Salt]:
    """The command line with an empty root; its processes are gone at the end."""
    made = Salt(tmp_path)
    yield made
    made.end_all()


@pytest.fixture
def quick_salt(place: Path) -> Iterator[Salt]:
    """The same in memory, for what flushes many files."""
    made = Salt(place)
    yield made
    made.end_all()


@pytest.fixture
def student(salt: Salt, workshop: Workshop) -> Callable[..., list[object]]:
    """`student(name, *arguments, **settings)`: a tiny student's command line."""

    def command(name: str, *more: object, **settings: object) -> list[object]:
        data = ("--data", workshop.table, "--cache", workshop.cache, "--seed", 1)
        return salt.train("demo_student", name, *data, *more, **settings)

    return command


@pytest.fixture
def pixels(salt: Salt, workshop: Workshop) -> Callable[..., list[object]]:
    """`pixels(name, *arguments, **settings)`: a tiny stage-1 run's command line."""

    def command(name: str, *more: object, **settings: object) -> list[object]:
        return salt.train("demo_teacher", name, "--data", workshop.table, *more, **settings)

    return command


@pytest.fixture
def curve() -> Callable[[RunDirectory], list[dict[str, Any]]]:
    """A run's metrics, timings aside: what two runs that computed the same agree in to the last bit."""
    return lambda run: [
        {name: value for name, value in row.items() if name not in MACHINE_COLUMNS} for row in run.metrics()
    ]


@pytest.fixture
def weights() -> Callable[[RunDirectory], dict[str, bytes]]:
    """Every file of a run's last checkpoint."""

    def read(run: RunDirectory) -> dict[str, bytes]:
        last = max(run.checkpoints.glob("step_*"))
        files = sorted(path for path in last.rglob("*") if path.is_file())
        return {str(path.relative_to(last)): path.read_bytes() for path in files}

    return read


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of three clips of 16 frames at stride 4, of as many episodes: one of them will be held out."""
    config = get_recipe("baseline_tiny").config
    table = open_table("metaworld-mini", config.data.view, config.geometry).select(split="train")
    first = {table.clip(clip_id).episode: clip_id for clip_id in reversed(table.clip_ids)}
    path = tmp_path_factory.mktemp("films") / "clips.parquet"
    table.only(list(first.values())[-3:]).write(path)
    return path
