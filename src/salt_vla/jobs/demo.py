"""`demo`: the whole path on one machine, each stage resumable, ending in a report.

films → views → teacher (stage 1) → latent cache → student (stage 2) → probes → report.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from salt_vla.config import TrainConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.evaluation.features import TokenModel
from salt_vla.jobs.build_cache import build_cache, canonical_only
from salt_vla.jobs.data import EMBEDDED, open_table, open_views, split_table
from salt_vla.jobs.evaluate import evaluate, load_model, random_model, write_results
from salt_vla.jobs.train import train, with_paths
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, root, write_text
from salt_vla.teachers import load_teacher


@dataclass(frozen=True)
class Demo:
    """Names and settings of one demonstration; everything it makes lies at these places."""

    name: str
    teacher: TrainConfig
    student: TrainConfig

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
    """The recipes `demo_teacher` and `demo_student` at a seed; `change` edits both (tests make them small)."""
    teacher, student = (
        change(replace(get_recipe(recipe).config, seed=seed)) for recipe in ("demo_teacher", "demo_student")
    )
    demo = Demo(name, with_paths(teacher, data, None), student)
    return replace(demo, student=with_paths(student, data, str(demo.cache)))


def run_demo(demo: Demo) -> Path:
    """Run all stages, skipping what is finished; the report's path."""
    table = open_table(demo.teacher.data.table, demo.teacher.data.view, demo.teacher.geometry)
    splits = split_table(table)
    with stage(demo, "views"):
        for part, num_views in ((splits.train, demo.teacher.data.view.num_views), (splits.validation, 1)):
            open_views(part, demo.teacher.data, demo.teacher.geometry, num_views)
    with stage(demo, "teacher"):
        train_unless_finished(demo.teacher_run, demo.teacher)
    with stage(demo, "cache"):
        teacher = load_teacher(demo.teacher_run.path, demo.teacher.geometry)
        build_cache(teacher, splits.train, "train", demo.cache, demo.teacher.data)
        build_cache(teacher, splits.validation, "validation", demo.cache, canonical_only(demo.teacher.data))
    with stage(demo, "student"):
        train_unless_finished(demo.student_run, demo.student)
    with stage(demo, "evaluation"):
        evaluate_demo(demo, table)
    with stage(demo, "report"):
        from salt_vla.jobs.demo_report import write_report

        return write_report(demo, table)


def train_unless_finished(run: RunDirectory, config: TrainConfig) -> None:
    """Train or resume; a run that has reached its last step is left alone."""
    status = run.status()
    if status.state == "finished" and status.step >= config.steps and run.exists():
        print(f"{run.name}: finished at step {status.step} already")
        return
    train(config, run.name)


def demo_models(demo: Demo) -> dict[str, TokenModel]:
    """Student, its teacher, and the student's architecture at random init."""
    return {
        "student": load_model(str(demo.student_run.path), "student"),
        "teacher": load_model(str(demo.teacher_run.path), "teacher"),
        "random": random_model(demo.student.encoder, demo.student.seed),
    }


def evaluate_demo(demo: Demo, table: ClipTable) -> None:
    """Probe unless the results at hand are of these very encoders."""
    models = demo_models(demo)
    wanted = {name: getattr(model, "fingerprint", "") for name, model in models.items()}
    record = demo.folder / "evaluated.json"
    if (
        record.exists()
        and json.loads(record.read_text()) == wanted
        and (demo.folder / "report.json").exists()
    ):
        print("probes: done already for these encoders")
        return
    results = evaluate(models, table, demo.student.data, demo.student.geometry, demo.student.seed)
    write_results(results, demo.folder)
    write_text(record, json.dumps(wanted, indent=2))


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
    stages: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return stages


def _peak_memory_gb() -> float:
    import resource

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
    from importlib.metadata import version

    packages = ("salt-vla", "torch", "numpy", "av", "scikit-learn")
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in packages),
    }
