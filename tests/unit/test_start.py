"""What a run's masks are like and what its steps cost is counted at its first start, once, and can be read
where the run is shown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from salt_vla.cli import main
from salt_vla.config import EncoderConfig, MaskConfig, TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.start import note_cost, note_masks, noted_masks
from salt_vla.masks import build_masks, mask_statistics
from salt_vla.rundir import RunDirectory, Status
from salt_vla.training.flops import mean_step_flops
from salt_vla.training.learner import build_learner

GRID = ClipGeometry(num_frames=4, image_size=48, tubelet_size=2, patch_size=8)
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=1),
    masks=MaskConfig(truncate="pad"),
    batch_size=8,
    seed=5,
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    run = RunDirectory.named("some")
    run.path.mkdir(parents=True)
    return run


def test_the_first_start_writes_what_the_runs_own_batches_are_masked_like(run: RunDirectory) -> None:
    assert noted_masks(run) == {}
    note_masks(run, CONFIG)
    noted = noted_masks(run)
    assert (noted["batch_size"], noted["batches"]) == (8, 64)
    counted = mask_statistics(build_masks(CONFIG.masks, GRID), 8, 64, seed=5)
    assert [group["context"] for group in noted["groups"]] == [row.context for row in counted]
    assert noted["summary"] == [f"masks over 64 batches of 8 clips, {row}" for row in counted]
    assert run.log_file.read_text().splitlines() == noted["summary"]


def test_a_later_start_says_nothing_again(run: RunDirectory) -> None:
    note_masks(run, CONFIG)
    before = (run.path / "masks.json").read_bytes(), run.log_file.read_bytes()
    note_masks(run, replace(CONFIG, masks=MaskConfig()))
    assert ((run.path / "masks.json").read_bytes(), run.log_file.read_bytes()) == before


@pytest.mark.parametrize(("batch_size", "batches"), [(1, 64), (24, 64), (256, 8), (5000, 1)])
def test_large_batches_are_counted_less_often(run: RunDirectory, batch_size: int, batches: int) -> None:
    note_masks(run, replace(CONFIG, batch_size=batch_size))
    assert noted_masks(run)["batches"] == batches


def test_runs_show_says_it(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    run.config_file.write_text("{}")
    run.set_status(Status("stopped"))
    assert main(["runs", "show", "some", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["masks"] == {}
    note_masks(run, CONFIG)
    assert main(["runs", "show", "some", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["masks"] == noted_masks(run)
    assert main(["runs", "show", "some"]) == 0
    said = capsys.readouterr().out
    assert "masked; context" in said and "padding" in said


def test_the_first_start_writes_what_a_step_costs(run: RunDirectory) -> None:
    note_cost(run, CONFIG, 24, clips=100)
    cost = json.loads((run.path / "cost.json").read_text())
    learner = build_learner(CONFIG, 24, "cpu")
    for part in ("encoder", "predictor"):
        there = sum(each.numel() for each in getattr(learner.networks, part).parameters())
        assert cost["parameters"][part] == there
    counted = mean_step_flops(CONFIG, 24, build_masks(CONFIG.masks, GRID)).total
    assert cost["flops_a_step"] == counted * 8 == cost["flops_a_clip"]["total"] * 8 > 0
    assert (cost["clips_a_step"], cost["clips_an_epoch"], cost["tokens_a_clip"]) == (8, 100, 72)


def test_what_a_step_cost_at_the_first_start_stays_on_record(run: RunDirectory) -> None:
    note_cost(run, CONFIG, 24, clips=100)
    before = (run.path / "cost.json").read_bytes()
    note_cost(run, replace(CONFIG, batch_size=16), 24, clips=50)
    assert (run.path / "cost.json").read_bytes() == before
