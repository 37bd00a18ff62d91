"""The demonstration at a tiny size: every stage once, whatever interrupts it, and a report at the end."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.config import TrainConfig, override
from salt_vla.errors import RunError
from salt_vla.jobs.demo import run_demo
from salt_vla.jobs.demo_plan import Demo, plan_demo

STAGES = ("views", "teacher", "cache", "student", "evaluation", "report")
SETTINGS = (
    "encoder.name=vit_micro",
    "encoder.depth=1",
    "encoder.geometry.num_frames=4",
    "encoder.geometry.image_size=32",
    "encoder.geometry.patch_size=8",
    "predictor.depth=1",
    "predictor.dim=24",
    "predictor.num_heads=3",
    "data.view.num_views=2",
    "data.view.max_shift=2",
    "masks.max_targets=0",
    "optimizer.warmup_steps=2",
    "steps=12",
    "batch_size=4",
    "runtime.device=cpu",
    "runtime.precision=float32",
    "runtime.threads=1",
    "runtime.log_every=2",
    "runtime.checkpoint_every=3",
    "runtime.validate_every=6",
)
# The demonstration as a process: data set and settings as arguments.
PROCESS = """
import sys
from dataclasses import replace
from salt_vla.config import override
from salt_vla.jobs.demo import run_demo
from salt_vla.jobs.demo_plan import plan_demo
demo = plan_demo("demo", 0, sys.argv[1], lambda config: override(config, sys.argv[2:]))
run_demo(replace(demo, scenes=2))
"""


def tiny(config: TrainConfig) -> TrainConfig:
    return override(config, SETTINGS)


def plan(data: Path, seed: int = 0, name: str = "demo") -> Demo:
    return replace(plan_demo(name, seed, str(data), tiny), scenes=2)


def settled_files(root: Path) -> dict[Path, int]:
    """When what lasts was written: shards of whole caches, the last checkpoints of finished runs, results."""
    lasting: list[Path] = []
    for manifest in root.glob("caches/**/manifest.json"):
        if json.loads(manifest.read_text())["complete"]:
            lasting += [manifest, manifest.parent / "index.arrow", *manifest.parent.glob("shards/*.bin")]
    for status in root.glob("runs/*/status.json"):
        if json.loads(status.read_text())["state"] == "finished":
            lasting += [status, status.parent / "metrics.jsonl", status.parent / "config.json"]
            lasting += max(status.parent.glob("checkpoints/step_*")).iterdir()
    for results in root.glob("runs/*/evaluated.json"):
        lasting += [results, results.parent / "report.json", results.parent / "scores.npz"]
    for violations in root.glob("runs/*/violations.json"):
        lasting += [violations, *violations.parent.glob("violations_*.png")]
    return {path.relative_to(root): path.stat().st_mtime_ns for path in lasting}


def results_of(root: Path) -> dict[str, bytes]:
    """What a demonstration computed: weights, latents and rows."""
    files = [
        root / "runs/demo/report.json",
        root / "runs/demo/violations.json",
        *root.glob("caches/demo/**/*.bin"),
    ]
    for run in ("demo_teacher", "demo_student"):
        files += max((root / "runs" / run).glob("checkpoints/step_*")).iterdir()
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """An uninterrupted demonstration (its command line), and what it printed."""
    salt = type(workshop.salt)(tmp_path_factory.mktemp("demo"))
    with salt.here() as (out, _):
        report = run_demo(plan(workshop.dataset))
    assert report == salt.root / "runs" / "demo" / "report.html"
    return salt, out.getvalue()


def test_every_stage_is_announced_and_on_record(whole: tuple[Any, str]) -> None:
    salt, said = whole
    assert [line.removeprefix("── ") for line in said.splitlines() if line.startswith("──")] == list(STAGES)
    stages = json.loads((salt.root / "runs/demo/stages.json").read_text())
    assert list(stages) == list(STAGES)
    for stage in stages.values():
        assert stage["seconds"] >= 0 and 0 < stage["peak_memory_gb"] < 4


def test_its_rows_are_those_of_the_contract(whole: tuple[Any, str]) -> None:
    salt, _ = whole
    rows = json.loads((salt.root / "runs/demo/report.json").read_text())
    assert {row["encoder"] for row in rows} == {"student", "teacher", "random", "pixels", "constant"}
    for row in rows:
        assert row.keys() >= {"encoder", "suite", "target", "metric", "value", "low", "high", "seed"}
        assert row["low"] <= row["high"] and row["seed"] == 0
    tables = {(row["suite"], row["target"]) for row in rows}
    assert len(rows) == 5 * len(tables)
    assert {suite for suite, _ in tables} == {
        f"{camera}/{pooling}" for camera in ("front", "side") for pooling in ("grid", "step", "mean")
    }
    assert rows[0]["suite"] == "front/grid", "what reads out most is what the report begins with"
    assert {row["metric"] for row in rows} == {"r2", "accuracy"}


def test_its_report_is_one_page_that_stands_alone(whole: tuple[Any, str]) -> None:
    salt, said = whole
    page = (salt.root / "runs/demo/report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>") and "</html>" in page
    for part in ("Time per stage", "reconstruct", "Held-out", "stage 1", "stage 2", "seed", "fingerprint"):
        assert part in page, part
    assert page.count("data:image/png;base64,") >= 6
    assert "<script src" not in page and "<link" not in page and 'src="http' not in page
    assert "• " in said and str(salt.root / "runs/demo/report.html") in said.replace("\n", "")


def test_its_report_holds_the_check_of_its_teacher(whole: tuple[Any, str]) -> None:
    """Verdict, a line for everything that was looked at, the figures, and one picture more."""
    salt, _ = whole
    checked = json.loads((salt.root / "runs/demo/teacher_check.json").read_text())
    page = (salt.root / "runs/demo/report.html").read_text()
    section = page[page.index('id="is-the-teacher-fit-to-teach"') :]
    section = section[: section.index("</section>")]
    assert html.escape(f"Verdict: {checked['verdict']}.") in section
    assert checked["findings"] and not [f for f in checked["findings"] if f["severity"] == "bad"]
    for finding in checked["findings"]:
        assert html.escape(finding["text"]) in section, finding
    for words in (checked["fingerprint"], "MSE of predicting the channel means", "effective rank (RankMe"):
        assert words in section
    assert section.count("data:image/png;base64,") == 1
    assert checked["stored_name"] == "demo_teacher/block1/norm" and checked["clips"] > 0


def test_its_report_says_what_surprised_it_beside_pixels_and_random_weights(whole: tuple[Any, str]) -> None:
    salt, _ = whole
    said = json.loads((salt.root / "runs/demo/violations.json").read_text())
    page = (salt.root / "runs/demo/report.html").read_text()
    section = page[page.index('id="does-the-impossible-surprise-it"') :]
    section = section[: section.index("</section>")]
    shown = {(score["set"], score["part"], score["encoder"]) for score in said["scores"]}
    assert {name for _, _, name in shown} == {"student", "random", "copy-last-frame", "pixel-difference"}
    assert {kind for kind, _, _ in shown} == {"rooms", "films"}
    for _, condition, encoder in shown:
        assert condition in section and encoder in section
    assert "In no condition does the student" in section or "where neither pixels nor random" in section
    assert section.count("data:image/png;base64,") == 4, "two pictures, each for light and dark pages"


def test_its_runs_are_runs_like_any_other(whole: tuple[Any, str]) -> None:
    salt, _ = whole
    assert {row["name"] for row in salt.json("runs", "ls")} == {"demo_teacher", "demo_student"}
    shown = salt.json("runs", "show", "demo_student")
    assert (shown["state"], shown["step"], shown["resumed_from"]) == ("finished", 12, [])
    assert shown["last_val"].keys() >= {"r2_channel_mean", "r2_position_mean", "r2_copy_nearest"}
    assert salt.json("cache", "show", salt.root / "caches/demo")["provenance"]["teacher"].startswith(
        "demo_teacher/block"
    )
    for cache in (salt.root / "caches/demo", salt.root / "caches/demo/validation"):
        assert salt.json("cache", "verify", cache)["bad"] == []


def test_run_again_it_redoes_nothing(whole: tuple[Any, str], workshop: Any) -> None:
    salt, _ = whole
    before = settled_files(salt.root)
    assert {path.parts[0] for path in before} == {"runs", "caches"} and len(before) > 20
    with salt.here() as (out, _):
        run_demo(plan(workshop.dataset))
    assert settled_files(salt.root) == before
    assert "finished at step 12 already" in out.getvalue() and "done already" in out.getvalue()


def test_another_seed_under_the_same_name_is_refused(whole: tuple[Any, str], workshop: Any) -> None:
    """Its results are not those of the seed that is on disk."""
    salt, _ = whole
    before = settled_files(salt.root)
    with salt.here(), pytest.raises(RunError, match="seed: 0, not 1"):
        run_demo(plan(workshop.dataset, seed=1))
    assert settled_files(salt.root) == before


def test_killed_in_every_stage_it_goes_on_and_redoes_nothing_finished(
    salt: Any, whole: tuple[Any, str], workshop: Any, tmp_path: Path
) -> None:
    student = salt.at("demo_student")
    settled: dict[Path, int] = {}
    for stage in STAGES:
        process = salt.start_python(PROCESS, workshop.dataset, *SETTINGS)
        heard = []
        while f"── {stage}\n" not in heard:
            heard.append(process.stdout.readline())
            assert heard[-1], process.communicate()
        begun = {
            "cache": (tmp_path / "caches/demo", "manifest.json"),
            "student": (student.checkpoints, "step_*"),
        }
        if stage in begun:  # In the middle of its shards, or of its steps.
            while not list(begun[stage][0].glob(begun[stage][1])):
                assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        now = settled_files(tmp_path)
        assert {path: now.get(path) for path in settled} == settled, stage
        settled = now
    with salt.here():
        report = run_demo(plan(workshop.dataset))
    now = settled_files(tmp_path)
    assert {path: now[path] for path in settled} == settled
    assert report.is_file()
    assert results_of(tmp_path) == results_of(whole[0].root)
    assert not [path for path in tmp_path.rglob("*.part") if "runs/demo/" not in str(path)]


@pytest.mark.parametrize("name", ["a/b", "..", "", ".hidden", "a b"])
def test_a_name_that_is_no_folders_name_is_refused_before_anything_is_written(salt: Any, name: str) -> None:
    assert "may hold only letters" in salt("demo", "--name", name).sentence
    assert salt.files() == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--seed", "-1"), "seed must lie in 0 … 4294967295, not -1"),
        (("--seeds", "0"), "--seeds must be at least 1, not 0"),
        (("--seeds", "2", "--seed", "1"), "not both"),
        (("--data", "nowhere"), "nowhere"),
    ],
)
def test_settings_that_cannot_work_are_refused(salt: Any, arguments: tuple[str, ...], named: str) -> None:
    assert named in salt("demo", *arguments).sentence
    assert salt.files() == []


def test_changes_reach_teacher_and_student_alike(salt: Any, workshop: Any) -> None:
    change: Callable[[TrainConfig], TrainConfig] = tiny
    with salt.here():
        demo = plan(workshop.dataset, seed=3, name="mine")
        assert replace(plan_demo("mine", 3, str(workshop.dataset), change), scenes=2) == demo
    assert demo.teacher.seed == demo.student.seed == 3
    assert demo.teacher.steps == demo.student.steps == 12
    assert demo.teacher.data == demo.student.data
    assert demo.student.target.source == "caches/mine"  # Relative: a root can be moved.
    assert (demo.teacher_run.name, demo.student_run.name) == ("mine_teacher", "mine_student")
