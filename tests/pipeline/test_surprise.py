"""`salt-vla eval RUN --suite intphys2`: from checkpoints and films to figures, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salt_vla.errors import RunError, UserError
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.jobs.evaluate import evaluate_encoders
from salt_vla.jobs.surprise_models import load_predictor

BASELINES = {"random", "copy-last-frame", "pixel-difference"}


@pytest.fixture(scope="module")
def films(squares: Callable[..., Path]) -> Path:
    return squares({"Debug": 2, "HeldOut": 1}, frames=10, size=32)


@pytest.fixture
def trained(salt: Any, looked: Any) -> Any:
    """A root of its own with a student, and the teacher that it was trained on."""
    shutil.copytree(looked.root / "runs", salt.root / "runs")
    return salt


@pytest.fixture(scope="module")
def looked(workshop: Any, films: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One root, where the student was evaluated already; shared, so nobody may write into it but `eval`."""
    salt = type(workshop.salt)(tmp_path_factory.mktemp("looked"))
    shutil.copytree(workshop.teacher, salt.root / "runs" / "teacher")
    data = ("--data", workshop.table, "--cache", workshop.cache, "--seed", 1)
    salt.ok(*salt.train("demo_student", "student", *data, "--max-steps", 4))
    salt.first = rows(salt, "student", films)
    return salt


def rows(salt: Any, name: str, films: Path, *more: object) -> list[dict[str, Any]]:
    return salt.json("eval", name, "--suite", "intphys2", "--data", films, *more)


def test_a_student_is_scored_beside_its_baselines(looked: Any) -> None:
    found = looked.first
    assert {row["encoder"] for row in found} == {"student", *BASELINES}
    assert {row["metric"] for row in found} == {"relative_accuracy"}
    assert {row["suite"] for row in found} == {"intphys2/Debug", "intphys2/Debug/camera=Fixed"}
    assert {row["target"] for row in found} == {"mean surprise", "max surprise"}
    for row in found:
        assert row["low"] <= row["value"] <= row["high"]
        assert (row["clips"], row["episodes"]) == (4, 2)
    # A jump is what both baselines of pixels see: a violation that proves nothing.
    copied = {row["value"] for row in found if row["encoder"] == "copy-last-frame"}
    assert copied == {1.0}


def test_a_second_call_computes_nothing_and_says_where_things_are(looked: Any, films: Path) -> None:
    folder = looked.root / "surprise"
    kept = {path: path.stat().st_mtime_ns for path in (folder / "films").rglob("*.json")}
    assert len(kept) == 4 * 12  # Models and films.
    answer = looked.ok("eval", "student", "--suite", "intphys2", "--data", films, "--json")
    assert json.loads(answer.out) == looked.first
    assert kept == {path: path.stat().st_mtime_ns for path in (folder / "films").rglob("*.json")}
    (page,) = folder.rglob("index.html")
    assert f"Page: {page}" in answer.err
    assert "held against latents of teacher/block1/norm" in page.read_text()


def test_a_set_without_labels_gets_a_file_of_surprises(looked: Any, films: Path) -> None:
    (file,) = (looked.root / "surprise").rglob("HeldOut-student.csv")
    with file.open(newline="") as handle:
        listed = list(csv.DictReader(handle))
    with (films / "HeldOut" / "metadata.csv").open(newline="") as handle:
        names = [row["name"] for row in csv.DictReader(handle)]
    assert [row["name"] for row in listed] == names
    assert all(float(row["surprise"]) > 0 for row in listed)


def test_steps_and_contexts_are_swept(looked: Any, films: Path) -> None:
    found = rows(looked, "student", films, "--context-frames", 2, "--frame-step", 1, 2)
    suites = {row["suite"].removeprefix("intphys2/Debug") for row in found}
    assert suites == {"", "/camera=Fixed", "/context 2, step 1", "/context 2, step 2"}


@pytest.mark.parametrize("provider", ["pixels", "ema", "teacher", "centred"])
def test_every_kind_of_target_can_be_predicted(provider: str, trained: Any, workshop: Any) -> None:
    """The targets of films that no cache holds come from what the run's own came from."""
    data = ("--data", workshop.table, "--max-steps", 2)
    recipe, options, settings, target = {
        "pixels": ("demo_teacher", (), {}, "pixels"),
        "ema": ("demo_student", (), {"target__provider": "ema"}, "moving average of other, as of step 2"),
        "teacher": (
            "demo_student",
            (),
            {"target__provider": "teacher", "target__source": "runs/teacher"},
            "latents of teacher/block1/norm",
        ),
        "centred": (
            "demo_student",
            ("--cache", workshop.cache),
            {"objective__targets": "centred"},
            "latents of teacher/block1/norm",
        ),
    }[provider]
    trained.ok(*trained.train(recipe, "other", *data, *options, **settings))
    with trained.here():
        model = load_predictor("other")
        checkpoint = load_predictor(str(trained.at("other").path / "checkpoints" / "step_00000002"))
    assert target in model.target
    assert model.frame_step == 2
    assert checkpoint.fingerprint == model.fingerprint


def test_an_export_has_no_predictor(looked: Any, films: Path, tmp_path: Path) -> None:
    looked.ok("teacher", "export", "teacher", "--out", tmp_path / "export")
    answer = looked("eval", tmp_path / "export", "--suite", "intphys2", "--data", films)
    assert "holds an encoder and no predictor.safetensors" in answer.sentence


def test_an_encoder_of_another_family_has_no_predictor(looked: Any, films: Path, tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    (tmp_path / "image" / "model.safetensors").write_bytes(b"")
    answer = looked("eval", tmp_path / "image", "--suite", "intphys2", "--data", films)
    assert "image encoder without a predictor" in answer.sentence


def test_a_teacher_that_has_moved_can_be_named(trained: Any, films: Path, tmp_path: Path) -> None:
    shutil.move(trained.root / "runs" / "teacher", tmp_path / "elsewhere")
    answer = trained("eval", "student", "--suite", "intphys2", "--data", films)
    assert "teacher/block1/norm, which is not at hand" in answer.sentence
    assert "--teacher" in answer.sentence
    with trained.here():
        assert (
            "latents of elsewhere/block1/norm"
            in load_predictor("student", str(tmp_path / "elsewhere")).target
        )


def test_another_teacher_is_refused(trained: Any, workshop: Any, films: Path) -> None:
    """Distances to latents of another space mean nothing."""
    trained.ok(*trained.train("demo_teacher", "stranger", "--data", workshop.table, "--max-steps", 2))
    answer = trained("eval", "student", "--suite", "intphys2", "--data", films, "--teacher", "stranger")
    assert "is not the teacher whose latents student was trained on" in answer.sentence


def test_films_that_are_no_pairs_are_refused(looked: Any, films: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        return looked("eval", "student", "--suite", "intphys2", "--data", folder).sentence

    assert "there is no folder" in refused(tmp_path / "nowhere")
    assert "holds no film pairs" in refused(tmp_path)
    damaged = Path(shutil.copytree(films / "Debug", tmp_path / "Debug"))
    next((damaged / "Videos").iterdir()).unlink()
    assert "1 of 8 films" in refused(damaged)


def test_films_shorter_than_a_window_are_refused(looked: Any, films: Path) -> None:
    answer = looked("eval", "student", "--suite", "intphys2", "--data", films, "--frame-step", 9)
    assert "shorter than one window of 28 frames" in answer.sentence


def test_a_run_called_like_a_baseline_is_refused(trained: Any, films: Path) -> None:
    trained.at("student").path.rename(trained.root / "runs" / "copy-last-frame")
    answer = trained("eval", "copy-last-frame", "--suite", "intphys2", "--data", films)
    assert "the name of a baseline" in answer.sentence


REFUSED = {
    "its own call": (["probes", "intphys2"], {}, "give intphys2 a call of its own"),
    "a share": (["violations"], {"fraction": 0.1}, "do not read --fraction"),
    "a share beside probes": (["probes", "violations"], {"fraction": 0.1}, "do not read --fraction"),
    "a probe": (["intphys2"], {"probe": "knn"}, "do not read --probe"),
    "a pace": (["violations"], {"frame_step": (3,)}, "leave --frame-step off"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_films_cannot_be_asked_is_refused_before_anything_is_measured(case: str, looked: Any) -> None:
    suites, settings, sentence = REFUSED[case]
    with looked.here(), pytest.raises(UserError, match=sentence):
        evaluate_encoders(["student"], suites, "nowhere", EvalSettings(**settings))
    assert not (looked.root / "features").exists()


def test_a_predictor_has_no_layers(looked: Any, films: Path) -> None:
    answer = looked("eval", "student@1", "--suite", "intphys2", "--data", films)
    assert "leave @1 of student@1 off" in answer.sentence


def test_seeds_of_a_label_and_suites_of_clips_stand_in_one_call(
    trained: Any, workshop: Any, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salt_vla.jobs.violations.SCENES", 2)
    data = ("--data", workshop.table, "--cache", workshop.cache, "--seed", 2)
    trained.ok(*trained.train("demo_student", "second", *data, "--max-steps", 2))
    both = ("eval", "ours=student", "ours=second", "teacher", "--suite")
    found = trained.json(*both, "retrieval", "violations", "--poolings", "mean", "--data", workshop.table)
    suites = {row["suite"].partition("/")[0] for row in found}
    assert suites == {"retrieval", "violations"}
    seeds = {row["encoder"]: row["seeds"] for row in found if row["suite"] == "violations/rooms/colour"}
    assert seeds == {"ours": 2, "teacher": 1, "random": 2, "copy-last-frame": 1, "pixel-difference": 1}
    alone = [
        trained.json("eval", name, "--suite", "violations", "--seed", seed, "--data", workshop.table)
        for name, seed in (("student", 1), ("second", 2))
    ]
    values = [[r["value"] for r in rows if r["encoder"] in ("student", "second")] for rows in alone]
    joined = [row["value"] for row in found if row["encoder"] == "ours" and "violations" in row["suite"]]
    assert joined == pytest.approx(np.mean(values, axis=0))
    rows = trained.json(*both[:-2], "--suite", "intphys2", "--data", films)
    assert {row["seeds"] for row in rows if row["encoder"] == "ours"} == {2}
    left = {path.name for path in (trained.root / "surprise" / films.name).iterdir()}
    assert {
        "index-seed1.html",
        "index-seed2.html",
        "HeldOut-ours-seed1.csv",
        "HeldOut-ours-seed2.csv",
    } <= left


DIES = """
import os, signal, sys
import salt_vla.evaluation.surprise_store as store
import salt_vla.jobs.violations as violations
from salt_vla.cli import main

violations.SCENES, left, write = 2, [int(sys.argv.pop(1))], store.write_text

def counted(*args):
    write(*args)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

store.write_text = counted
sys.exit(main())
"""


def test_killed_in_the_middle_it_goes_on_and_gives_the_same_to_the_last_bit(
    looked: Any, salt: Any, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("salt_vla.jobs.violations.SCENES", 2)
    shutil.copytree(looked.root / "runs", salt.root / "runs")
    command = ("eval", "student", "--suite", "intphys2", "violations", "--data", films, "--json", "--out")
    whole = looked.ok(*command, tmp_path / "whole").out

    def kept() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in salt.root.glob("surprise/films/*/*.json")}

    of_films = 4 * 12  # Models and films; then come scenes, drawn here.
    for more, there in ((6, 6), (of_films - 3, of_films + 3)):
        process = salt.start_python(DIES, more, *command, tmp_path / "killed")
        process.communicate()
        assert process.returncode == -signal.SIGKILL and len(kept()) == there
    before = kept()
    assert not (tmp_path / "killed" / "table.json").exists()
    assert salt.ok(*command, tmp_path / "resumed").out == whole
    assert {path: when for path, when in kept().items() if path in before} == before, "looked at again"
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "resumed" / file.name).read_bytes() == file.read_bytes(), file.name


def test_no_predictor_of_that_name(salt: Any) -> None:
    with salt.here(), pytest.raises(RunError, match="there is no predictor 'nothing'"):
        load_predictor("nothing")
