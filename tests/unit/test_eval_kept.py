"""Figures that are left beside a run are held against those of other runs: only like may have like names."""

from __future__ import annotations

import pytest

from salt_vla.evaluation.results import SuiteResult
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.jobs.eval_kept import _kept_as
from salt_vla.jobs.evaluate import _with_what_stays


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


def test_a_row_over_seeds_keeps_every_seeds_note() -> None:
    same = {"encoder": "a", "suite": "s", "target": "t"}
    stays = {"clips": 8, "episodes": 4, "probe": "linear", "protocol": "held-out", "causal": True}
    rows = [same | stays | {"note": note, "seed": seed} for seed, note in enumerate(("weak", "", "strong"))]
    (row,) = _with_what_stays([same | {"seeds": 3}], rows)
    assert row == same | stays | {"seeds": 3, "note": "weak; strong"}
