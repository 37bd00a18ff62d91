"""A study's cell, from run to record: scored as the run itself says, kept, and refused to other settings."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from salt_vla.config import override
from salt_vla.errors import UserError
from salt_vla.recipes import get_recipe

STUDIES = Path(__file__).parents[2] / "studies"
STEPS = 8


@pytest.fixture(scope="module")
def study() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(STUDIES))
    yield {name: importlib.import_module(name) for name in ("cells", "joined", "scoring")}
    sys.path.remove(str(STUDIES))


@pytest.fixture
def cell(study: dict[str, ModuleType], salt: Any, workshop: Any) -> Any:
    """A tiny student of the workshop's teacher."""
    settings = [text for text in salt.train("demo_student", "any") if "=" in str(text)]
    recipe = override(
        get_recipe("demo_student").config, [*map(str, settings), f"data.table={workshop.table}"]
    )
    recipe = replace(recipe, target=replace(recipe.target, source=str(workshop.cache)))
    config = study["cells"].side_by_side(recipe, STEPS, seed=3)
    runtime = replace(config.runtime, log_every=1, validation_clips=6)
    return study["cells"].Cell("tiny", "plain", "good", replace(config, runtime=runtime))


def test_a_cell_is_scored_as_its_run_says_and_kept(
    study: dict[str, ModuleType], salt: Any, cell: Any
) -> None:
    cells, scoring = study["cells"], study["scoring"]
    with salt.here():
        assert cells.finished(cell) is None
        record = cells.run_cell(
            cell, lambda done: scoring.scores_of(done, {"same": done.config.masks}, [0, 1])
        )
        last = cell.run.metrics("val")[-1]
        few = scoring.errors_under(cell, cell.config.masks, clips=6)
        for baseline in scoring.BASELINES:
            assert few.r2(baseline) == pytest.approx(last[f"r2_{baseline}"], abs=1e-4)
            assert record["same"][baseline] == record["own"][baseline]
            assert record["same_own_channels"][baseline] != record["own"][baseline]
        # The run's loss is a mean over mask groups, ours one over tokens.
        assert few.mean() == pytest.approx(last["loss"], rel=0.03)
        shares = [row["changed_share"] for row in cell.run.metrics("train")]
        assert record["changed"] == pytest.approx(np.mean(shares[1:6]))
        assert record["changed_late"] == pytest.approx(shares[-1])

        again = cells.run_cells([cell], scoring.scores_of, jobs=1)  # Nothing is left to be made.
        assert again == cells.on_record([cell]) == [record]
        other = replace(cell, config=replace(cell.config, steps=STEPS + 1))
        with pytest.raises(UserError, match="of other settings"):
            cells.finished(other)

        not_yet = replace(cell, config=replace(cell.config, seed=4))
        joined = scoring.join("good", [cell, not_yet])
        assert joined.seeds == [3] and joined.mean("own", "channel_mean") == record["own"]["channel_mean"]
        (sums,) = joined.probe("student", "action_mean")
        assert np.isfinite(sums.value) and len(sums.episodes) == 2


def test_what_students_are_held_to_is_probed_on_the_same_clips(
    study: dict[str, ModuleType], salt: Any, cell: Any, workshop: Any
) -> None:
    scoring = study["scoring"]
    with salt.here():
        seed_0 = replace(cell.config, seed=0)
        scoring.keep_sums("baselines-s0", "tiny", scoring.baseline_probes(seed_0, str(workshop.teacher)))
        scoring.keep_sums("baselines-s1", "tiny", scoring.baseline_probes(cell.config, "no teacher"))
        baselines = scoring.join_baselines("tiny", 3)
        assert baselines.seeds == [0, 1]
        random = baselines.probe("random", "hand_position")
        assert random[0].same_clips(random[1]) and random[0].value != random[1].value
        assert len(baselines.probe("teacher", "hand_position")) == 1
        nothing = study["joined"].paired_probes(random, random)
        assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
