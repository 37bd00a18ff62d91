"""Figures that are left beside a run are held against those of other runs: only like may have like names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from salt_vla.errors import RunError
from salt_vla.evaluation.results import SuiteResult
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.jobs.eval_encoders import training_cost
from salt_vla.jobs.eval_kept import _kept, _kept_as
from salt_vla.jobs.evaluate import _with_what_stays
from salt_vla.rundir import RunDirectory


@pytest.mark.parametrize(
    ("suite", "settings", "frame_stride", "name"),
    [
        ("state/front", EvalSettings(seed=3, device="cpu"), None, "state/front"),
        ("state/front", EvalSettings(horizon=2), None, "state/front (horizon 2)"),
        ("state/front", EvalSettings(moment_stride=4), 3, "state/front (moment stride 4, frame stride 3)"),
        (
            "time-arrow/front/grid",
            EvalSettings(min_motion=1.5),
            None,
            "time-arrow/front/grid (min motion 1.5)",
        ),
        ("state/front", EvalSettings(poolings=("mean", "grid")), None, "state/front (mean)"),
        ("front/mean", EvalSettings(poolings=("mean",)), None, "front/mean"),
    ],
)
def test_settings_that_decide_a_figure_are_in_its_name(
    suite: str, settings: EvalSettings, frame_stride: int | None, name: str
) -> None:
    assert _kept_as(SuiteResult(suite, 0, [], []), settings, frame_stride) == name


@pytest.mark.parametrize("text", ['{"suites": 5}', '{"suites": [{}]}', "[]", ""])
def test_a_damaged_file_beside_a_run_is_a_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "probes.json"
    file.write_text(text)
    with pytest.raises(RunError, match=r"probes\.json is damaged .*remove it"):
        _kept(file)
    assert _kept(tmp_path / "none.json") == []


@pytest.mark.parametrize("text", ['{"flops_a_step": null}', '{"flops_a_step": "x"}', "{}", None])
def test_a_cost_that_is_none_is_left_out(write_run: Callable[..., RunDirectory], text: str | None) -> None:
    run = write_run("run", [])
    checkpoint = run.path / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    for name in ("encoder.json", "encoder.safetensors"):
        (checkpoint / name).write_text("{}")
    if text is not None:
        (run.path / "cost.json").write_text(text)
    assert training_cost(str(run.path)) == {"training_steps": 4}
    (run.path / "cost.json").write_text("")
    with pytest.raises(RunError, match=r"cost\.json is damaged .*remove it"):
        training_cost(str(run.path))


def test_a_row_over_seeds_keeps_every_seeds_note() -> None:
    same = {"encoder": "a", "suite": "s", "target": "t"}
    stays = {"clips": 8, "episodes": 4, "probe": "linear", "protocol": "held-out", "causal": True}
    rows = [same | stays | {"note": note, "seed": seed} for seed, note in enumerate(("weak", "", "strong"))]
    (row,) = _with_what_stays([same | {"seeds": 3}], rows)
    assert row == same | stays | {"seeds": 3, "note": "weak; strong"}
