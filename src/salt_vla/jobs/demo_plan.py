"""What the demonstration is made of: its places and settings, its stages on record, and what it ran on."""

from __future__ import annotations

import json
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from salt_vla.config import TrainConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.jobs.data import split_table
from salt_vla.jobs.data_index import EMBEDDED
from salt_vla.jobs.evaluate import check_seed, load_model, random_model
from salt_vla.jobs.train import with_paths
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, num_cores, read_json, root, write_text
from salt_vla.teachers.pixel import EncoderTeacher


@dataclass(frozen=True)
class Demo:
    """Names and settings of one demonstration; everything it makes lies at these places. `scenes`: of each
    kind, in which something impossible happens."""

    name: str
    teacher: TrainConfig
    student: TrainConfig
    scenes: int = 20

    @property
    def folder(self) -> Path:
        return root() / "runs" / self.name

    @property
    def teacher_run(self) -> RunDirectory:
        return RunDirectory.named(f"{self.name}_teacher")

    @property
    def student_run(self) -> RunDirectory:
        return RunDirectory.named(f"{self.name}_student")

    @property
    def cache(self) -> Path:
        return root() / "caches" / self.name


def plan_demo(
    name: str, seed: int, data: str = EMBEDDED, change: Callable[[TrainConfig], TrainConfig] = lambda c: c
) -> Demo:
    """The recipes `demo_teacher` and `demo_student` at a seed; `change` edits both."""
    check_seed(seed)
    RunDirectory.named(name)  # Refuses a name that would lead out of the runs' folder.
    teacher, student = (
        change(replace(get_recipe(recipe).config, seed=seed)) for recipe in ("demo_teacher", "demo_student")
    )
    demo = Demo(name, with_paths(teacher, data, None), student)
    return replace(demo, student=with_paths(student, data, str(demo.cache)))


def demo_models(demo: Demo) -> dict[str, EncoderTeacher]:
    """Student, its teacher, and the student's architecture at random init."""
    return {
        "student": load_model(str(demo.student_run.path), "student"),
        "teacher": load_model(str(demo.teacher_run.path), "teacher"),
        "random": random_model(demo.student.encoder, demo.student.seed),
    }


@contextmanager
def stage(demo: Demo, name: str) -> Iterator[None]:
    """Announce a stage, and add its seconds and peak memory to `stages.json`, over interruptions."""
    print(f"── {name}", flush=True)
    began = time.monotonic()
    try:
        yield
    finally:
        stages = read_stages(demo)
        before = stages[name]["seconds"] if name in stages else 0.0
        stages[name] = {
            "seconds": round(before + time.monotonic() - began, 1),
            "peak_memory_gb": round(_peak_memory_gb(), 2),
        }
        write_text(demo.folder / "stages.json", json.dumps(stages, indent=2))


def read_stages(demo: Demo) -> dict[str, Any]:
    file = demo.folder / "stages.json"
    return read_json(file, dict) if file.exists() else {}


def _peak_memory_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def splits_facts(table: ClipTable) -> Mapping[str, str]:
    """How many clips and episodes were learned from and held out."""
    splits = split_table(table)
    return {
        f"{name} clips": f"{len(part)} of {len(set(part.rows['episode'].to_pylist()))} episodes"
        for name, part in (("training", splits.train), ("held-out", splits.validation))
    }


def machine_facts() -> Mapping[str, str]:
    """What the demonstration ran on and with."""
    packages = ("salt-vla", "torch", "numpy", "av", "scikit-learn")
    return {
        "cores": str(num_cores()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }
