"""`demo`: the whole path on one machine, each stage resumable, ending in a report.

films → views → teacher (stage 1) → latent cache → student (stage 2) → probes → report.
"""

from __future__ import annotations

import json
from pathlib import Path

from salt_vla.config import TrainConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.evaluation.bench import EvalSettings
from salt_vla.jobs.build_cache import build_cache, canonical_only
from salt_vla.jobs.data import open_table, open_views, split_table
from salt_vla.jobs.demo_plan import Demo, demo_models, stage
from salt_vla.jobs.demo_report import write_report
from salt_vla.jobs.demo_violations import evaluate_violations
from salt_vla.jobs.eval_kept import RESULTS, leave_probes, write_results
from salt_vla.jobs.evaluate import evaluate
from salt_vla.jobs.train import train
from salt_vla.rundir import RunDirectory, read_json, write_text
from salt_vla.teachers import load_teacher
from salt_vla.training.resume import same_config


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
        evaluate_violations(demo)
    with stage(demo, "report"):
        return write_report(demo, table)


def train_unless_finished(run: RunDirectory, config: TrainConfig) -> None:
    """Train or resume; a run that has reached its last step is left alone, unless it was another one."""
    status = run.status()
    if run.config_file.is_file():
        same_config(run, config)
    if status.state == "finished" and status.step >= config.steps and run.config_file.is_file():
        print(f"{run.name}: finished at step {status.step} already")
        return
    train(config, run.name)


def evaluate_demo(demo: Demo, table: ClipTable) -> None:
    """Probe unless the results at hand are of these very encoders."""
    models = demo_models(demo)
    wanted = {name: model.fingerprint for name, model in models.items()}
    record = demo.folder / "evaluated.json"
    written = all((demo.folder / name).exists() for name in RESULTS)
    if written and record.exists() and read_json(record, dict) == wanted:
        print("probes: done already for these encoders")
        return
    results = evaluate(
        models, table, demo.student.data, demo.student.geometry, EvalSettings(demo.student.seed)
    )
    write_results(results, demo.folder)
    leave_probes(results, {"student": demo.student_run.path, "teacher": demo.teacher_run.path}, table)
    write_text(record, json.dumps(wanted, indent=2))
