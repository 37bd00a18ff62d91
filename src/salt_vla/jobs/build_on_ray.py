"""`cache build --ray`: the shards of a cache made by builders all over a Ray cluster.

Ray Data hands out the shards, starts the builders, and starts them again when they die; each is the pipeline
that a single process would run, under the same leases. The one place that knows Ray.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from salt_vla.cache import CacheWriter
from salt_vla.errors import ConfigError, ResourceError, UserError
from salt_vla.jobs.pipeline import Pipeline
from salt_vla.progress import Advance
from salt_vla.rundir import DECODER, ROOT, num_cores, root, wanted_decoder

LOCAL = "local"
NO_RAY = "--ray needs Ray, which is not installed; install the extra: pip install 'salt-vla[scale]'"
SHARDS_A_TASK = 16  # made in one go, at most; of those that a dead builder had in hand the finished ones stay
TASKS_A_BUILDER = 4  # at least, where there are shards enough: the slow ones get fewer
STORE_BYTES = 80 * 2**20  # of memory that a local Ray takes, near its least: a task is a few numbers
SECONDS_TO_ANSWER = 10.0
DEATHS_AT_START = 3  # of builders, one after another, before it is no accident

# The cache under construction, opened once more, in another process, which decodes in so many of its own.
OpenAgain = Callable[[int], AbstractContextManager[tuple[CacheWriter, Pipeline | None]]]


@dataclass(frozen=True)
class OnRay:
    """How `build_cache` makes shards on the Ray cluster at `address`, or (`LOCAL`) on this machine.

    `builders` work at a time; 0: one a GPU, if they may use them (`device` is not "cpu"), else one for every
    two cores. Each decodes in `num_workers` processes; None: in as many as it has cores beside its own. They
    see the disk under the same paths as this process.
    """

    open_again: OpenAgain
    address: str
    builders: int = 0
    num_workers: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.builders < 0:
            raise ConfigError(f"--ray-builders must be 0 (as many as fit) or more, not {self.builders}")
        _import_ray()

    def __call__(self, pipeline: Pipeline, advance: Advance) -> None:
        """Make what is missing. Raises the builders' `UserError`s, and `ResourceError` where Ray fails."""
        done = pipeline.writer.ledger.done
        missing = [number for number in range(pipeline.writer.manifest.num_shards) if number not in done]
        with _connected(self.address, self.builders) as ray, _in_a_sentence(ray):
            builders, cpus, gpus = self.share(ray.cluster_resources())
            tasks = cut(missing, builders)
            workers = max(cpus - 1, 0) if self.num_workers is None else self.num_workers
            environment = {ROOT: str(root()), DECODER: wanted_decoder()}
            made = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map(
                Builder,
                fn_constructor_args=(self.open_again, str(Path.cwd()), environment, workers),
                compute=ray.data.ActorPoolStrategy(
                    size=min(builders, len(tasks)), max_tasks_in_flight_per_actor=1
                ),
                num_cpus=cpus,
                num_gpus=gpus,
            )
            count(made.iter_rows(), pipeline, advance)

    def share(self, there_is: dict[str, float]) -> tuple[int, int, int]:
        """Builders, and the cores and GPUs of each."""
        cores, gpus = int(there_is.get("CPU", 1)), int(there_is.get("GPU", 0))
        gpu = int(gpus > 0 and self.device != "cpu")
        builders = self.builders or (gpus if gpu else max(cores // 2, 1))
        cpus = max(cores // builders, 1) if self.num_workers is None else self.num_workers + 1
        return builders, cpus, gpu


def cut(missing: list[int], builders: int) -> list[dict[str, list[int]]]:
    """Shards, some to a task."""
    size = min(max(len(missing) // (TASKS_A_BUILDER * builders), 1), SHARDS_A_TASK)
    return [{"numbers": missing[at : at + size]} for at in range(0, len(missing), size)]


def count(answers: Iterable[dict[str, Any]], pipeline: Pipeline, advance: Advance) -> None:
    """Follow the builders' answers as they come. Raises the first `UserError` that one of them tells of."""
    for answer in answers:
        if answer["wrong"]:
            raise UserError(answer["wrong"])
        advance(answer["keys"])
        pipeline.check()


class Builder:
    """A process on the cluster: it loads the teacher once and makes the shards that it is handed."""

    def __init__(self, open_again: OpenAgain, cwd: str, environment: dict[str, str], workers: int) -> None:
        os.chdir(cwd)
        os.environ.update(environment)
        self._open = partial(open_again, workers)
        self._opened = ExitStack()

    @cached_property
    def _begun(self) -> tuple[CacheWriter, Pipeline | None]:
        """Opened with the first task, whose answer can say what was wrong."""
        return self._opened.enter_context(self._open())

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        """{"keys": how many the task's shards hold, "wrong": why they could not be made}."""
        numbers = [int(number) for number in task["numbers"]]
        try:
            writer, pipeline = self._begun
            if pipeline is not None:
                pipeline.run(_in_silence, numbers)
        except UserError as error:
            return {"keys": 0, "wrong": str(error)}  # An exception would come back wrapped in pages of Ray's.
        return {"keys": sum(len(writer.ledger.keys_of(number)) for number in numbers), "wrong": ""}


def _in_silence(amount: int = 1, note: str = "") -> None:
    """Progress is shown where the command was given."""


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Read when it is imported.
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"{NO_RAY} ({error})") from error
    return ray


@contextmanager
def _connected(address: str, builders: int) -> Iterator[Any]:
    """Ray, on the cluster or as a small one of our own that listens on this machine alone."""
    ray = _import_ray()
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        cores = max(builders, num_cores())
        options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes, and then end the process.
            socket.create_connection((host, int(port)), SECONDS_TO_ANSWER).close()
        ray.init(**options)
    except (OSError, OverflowError, ValueError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address!r} ({str(error).strip().splitlines()[0]}); start one with "
            "`ray start --head`, or give --ray local"
        ) from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    settings = ray.data.DataContext.get_current()
    settings.enable_progress_bars = settings.print_on_execution_start = False
    settings.execution_no_progress_timeout_s = -1  # Shards take as long as they take.
    settings.max_consecutive_actor_init_deaths = DEATHS_AT_START
    try:
        with redirect_stdout(sys.stderr):  # Where Ray says which builder has died.
            yield ray
    finally:
        ray.shutdown()


@contextmanager
def _in_a_sentence(ray: Any) -> Iterator[None]:
    """What happened to Ray: a machine that is gone, memory that is full."""
    try:
        yield
    except ray.exceptions.RayTaskError:
        raise  # A mistake of ours, with its traceback.
    except ray.exceptions.RayError as error:
        raise ResourceError(
            f"the builders on Ray failed ({str(error).strip().splitlines()[-1]}); the same command goes on "
            "from there"
        ) from error
