"""A line through runs is drawn only where their figures lie on one scale."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from salt_vla.cli.runs_regress import regress
from salt_vla.config import ObjectiveConfig, TrainConfig
from salt_vla.errors import DataError, RunError
from salt_vla.jobs.loss_to_accuracy import loss_to_accuracy
from salt_vla.rundir import RunDirectory

WriteRun = Callable[..., RunDirectory]
CONFIG = TrainConfig(steps=100, batch_size=4)
LOSSES = (0.9, 0.7, 0.5, 0.3)


def evaluated(write_run: WriteRun, name: str, loss: float, value: float | None, **kinds: object) -> None:
    rows = [{"kind": "val", "step": step, "loss": loss + 1 / step} for step in (10, 1000)]
    table = kinds.pop("table", "clips")
    run = write_run(name, rows, config=replace(CONFIG, **kinds))  # type: ignore[arg-type]
    if value is not None:
        row = {"encoder": name, "suite": "front/grid", "target": "hand", "metric": "r2", "value": value}
        suites = [{"suite": "front/grid", "clip_table": table, "rows": [row]}]
        (run.path / "probes.json").write_text(json.dumps({"suites": suites}))


def four(write_run: WriteRun) -> list[str]:
    for place, loss in enumerate(LOSSES):
        evaluated(write_run, f"run_{place}", loss, 1 - loss / 2 + 0.01 * (place % 2), seed=place)
    return [f"run_{place}" for place in range(4)]


def test_last_losses_are_held_against_the_runs_own_probes(write_run: WriteRun) -> None:
    said = loss_to_accuracy(four(write_run), "val.loss", "front/grid", "hand")
    assert [point["x"] for point in said.points] == pytest.approx([loss + 0.001 for loss in LOSSES])
    assert said.found.slope == pytest.approx(-0.5, abs=0.05)
    assert said.found.r2 > 0.98
    assert (said.metric, said.notes) == ("r2", [])


def test_a_run_without_the_figure_is_left_out_and_named(write_run: WriteRun) -> None:
    names = four(write_run)
    evaluated(write_run, "bare", 0.4, None)
    said = loss_to_accuracy([*names, "bare"], "val.loss", "front/grid", "hand")
    assert said.found.runs == 4
    assert "bare is left out" in said.notes[0]
    assert "salt-vla eval bare" in said.notes[0]
    with pytest.raises(DataError, match=r"4 runs or more with both figures, not 3: bare is left out"):
        loss_to_accuracy([*names[:3], "bare"], "val.loss", "front/grid", "hand")
    with pytest.raises(
        DataError, match=r"no foot of front/grid \(`salt-vla eval run_0`; it has hand of front"
    ):
        loss_to_accuracy(names, "val.loss", "front/grid", "foot")


def test_a_run_that_has_trained_on_since_is_taken_at_the_step_that_was_evaluated(
    write_run: WriteRun,
) -> None:
    names = four(write_run)
    file = RunDirectory.named("run_3").path / "probes.json"
    said = json.loads(file.read_text())
    said["suites"][0]["step"] = 10
    file.write_text(json.dumps(said))
    found = loss_to_accuracy(names, "val.loss", "front/grid", "hand")
    assert found.points[3]["x"] == pytest.approx(LOSSES[3] + 1 / 10)
    assert found.notes == ["run_3 has trained on: its figures are those of step 10"]
    said["suites"][0]["step"] = 5
    file.write_text(json.dumps(said))
    with pytest.raises(DataError, match=r"run_3 is left out: it has no val.loss up to step 5"):
        loss_to_accuracy(names, "val.loss", "front/grid", "hand")


def test_losses_of_other_kinds_are_no_one_scale(write_run: WriteRun) -> None:
    names = four(write_run)
    evaluated(write_run, "other", 0.4, 0.8, objective=ObjectiveConfig(power=2.0))
    with pytest.raises(RunError, match="run_0 and other does not measure the same thing"):
        loss_to_accuracy([*names, "other"], "val.loss", "front/grid", "hand")


def test_probes_of_other_clips_are_refused(write_run: WriteRun) -> None:
    names = four(write_run)
    evaluated(write_run, "elsewhere", 0.4, 0.8, table="others")
    with pytest.raises(RunError, match="other clips"):
        loss_to_accuracy([*names, "elsewhere"], "val.loss", "front/grid", "hand")


def test_the_command_prints_json_and_draws_the_line(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, figure = tuple(four(write_run)), tmp_path / "line.png"
    regress(names, target="hand", figure=figure, json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["found"]["runs"] == 4
    assert figure.read_bytes().startswith(b"\x89PNG")
    regress(names, target="hand")
    assert "Pearson −" in capsys.readouterr().out.replace("-", "−")
