"""What a suite does not read decides no cell of it, and is refused where nobody reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from salt_vla.data.clip_table import Clip
from salt_vla.errors import UserError
from salt_vla.evaluation.bench import Bench
from salt_vla.evaluation.features import Pixels
from salt_vla.evaluation.settings import OF_SUITES, EvalSettings
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.eval_score import _keys, _read_by, require_read
from salt_vla.registry import SUITES, SURPRISE

GEOMETRY = ClipGeometry(num_frames=4, image_size=16, tubelet_size=2, patch_size=8)
SURPRISED = EvalSettings(context_frames=(2,))


def grey(clip: Clip) -> np.ndarray:
    return np.zeros((4, 16, 16, 3), np.uint8)


def test_only_what_a_suite_reads_makes_another_cell(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(grey, {"pixels": Pixels(GEOMETRY)}, GEOMETRY)
    for suite, is_another in (("dense", False), ("time-arrow", True)):
        other = replace(bench, settings=replace(bench.settings, min_motion=3.0))
        assert (_keys(suite, bench)("f") != _keys(suite, other)("f")) == is_another, suite
        told = replace(bench, settings=replace(bench.settings, text="no-such-file.npy"))
        assert _keys(suite, bench)("f") == _keys(suite, told)("f")
        seeded = replace(bench, settings=replace(bench.settings, seed=3, device="cpu"))
        assert _keys(suite, bench)("f") != _keys(suite, seeded)("f")


@pytest.mark.parametrize("suite", [*SUITES, *SURPRISE])
def test_every_suite_says_what_it_reads(suite: str) -> None:
    assert set(_read_by(suite)) < set(OF_SUITES)


def test_a_setting_that_nobody_reads_is_refused_by_its_options_name() -> None:
    require_read(["probes", "events"], EvalSettings(horizon=3))
    require_read(["probes", "violations"], SURPRISED)
    with pytest.raises(UserError, match=r"--context-frames: no suite of this call \(probes, events\)"):
        require_read(["probes", "events"], SURPRISED)
    with pytest.raises(UserError, match="--moment-stride and --text: "):
        require_read(["dense"], EvalSettings(moment_stride=2, text="t.npy", fraction=0.5))
