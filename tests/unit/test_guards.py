"""A step that went wrong is told apart, left out and counted; too many turn the run back, or end it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from salt_vla.config import GuardConfig, OptimizerConfig, TrainConfig
from salt_vla.errors import RunError
from salt_vla.training.guards import (
    LOSSES_BEFORE_SPIKES,
    Setback,
    judge,
    look_for_collapse,
    require_progress,
)
from salt_vla.training.state import RunState

GUARDS = GuardConfig()


def after(losses: list[float], guards: GuardConfig = GUARDS) -> tuple[RunState, list[str]]:
    """The state after steps of these losses, and what was said of each."""
    state, said = RunState(), []
    for loss in losses:
        said.append(judge(state, guards, loss, 1.0))
        state.step += 1
    return state, said


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_bad_from_the_first_step_on(loss: float) -> None:
    state, said = after([loss])
    assert said == [f"the loss is {loss}"]
    assert (state.bad_steps, state.bad_in_a_row, state.missed_updates, state.losses_seen) == (1, 1, 1, 0)


def test_a_gradient_that_is_not_finite_is_bad_beside_a_sound_loss() -> None:
    assert judge(RunState(), GUARDS, 1.0, math.inf) == "the gradient's norm is inf"


def test_a_spike_is_bad_once_there_is_a_mean_to_compare_with() -> None:
    early, said = after([1.0] * (LOSSES_BEFORE_SPIKES - 1) + [50.0])
    assert said[-1] == "" and early.bad_steps == 0
    _, said = after([1.0] * LOSSES_BEFORE_SPIKES + [3.9])
    assert said[-1] == ""
    late, said = after([1.0] * LOSSES_BEFORE_SPIKES + [4.1])
    assert said[-1] == "the loss is 4.1, its running mean 1"
    assert late.mean_loss == pytest.approx(1.0) and late.bad_in_a_row == 1


def test_a_checkpoint_is_safe_once_a_step_from_it_was_good() -> None:
    """The update before it may have ruined the weights that it holds."""
    state = RunState(step=4, safe_step=2, planned_step=4)
    judge(state, GUARDS, math.nan, 1.0)
    assert state.safe_step == 2
    judge(state, GUARDS, 1.0, 1.0)
    assert state.safe_step == 4
    back = RunState(step=2, safe_step=0, planned_step=2).after_rollback(RunState(step=6, safe_step=2))
    assert (back.safe_step, back.planned_step, back.batches_passed) == (2, 2, 4)


def test_a_spike_factor_of_zero_looks_for_none() -> None:
    _, said = after([1.0] * LOSSES_BEFORE_SPIKES + [1e9], replace(GUARDS, spike_factor=0.0))
    assert not any(said)


def test_the_running_mean_is_the_mean_at_first_and_follows_later() -> None:
    state, _ = after([1.0, 2.0, 3.0, 4.0])
    assert state.mean_loss == pytest.approx(2.5)
    state, _ = after([1.0] * 100 + [2.0] * 200)
    assert 1.9 < state.mean_loss < 2.0


def test_a_good_step_ends_the_row_of_bad_ones() -> None:
    state, _ = after([1.0, math.nan, math.nan, 1.0, math.nan])
    assert (state.bad_steps, state.bad_in_a_row, state.missed_updates) == (3, 1, 3)


def test_stop_means_the_first_bad_step() -> None:
    state = RunState(step=7)
    with pytest.raises(RunError, match=r"the loss is nan at step 8; lower optimizer\.lr"):
        judge(state, replace(GUARDS, on_bad_step="stop"), math.nan, 1.0)
    assert state.bad_steps == 0


def test_so_many_bad_steps_in_a_row_turn_the_run_back_and_then_end_it() -> None:
    state, said = after([1.0] + [math.nan] * 4)
    require_progress(state, GUARDS, said[-1])
    state, said = after([1.0] + [math.nan] * 5)
    with pytest.raises(Setback, match="5 bad steps in a row up to step 6: the loss is nan"):
        require_progress(state, GUARDS, said[-1])
    state.rollbacks = 3
    with pytest.raises(
        RunError, match=r"to step 6, after 3 return\(s\) .*: the loss is nan; lower optimizer\.lr"
    ):
        require_progress(state, GUARDS, said[-1])


def test_after_a_rollback_other_clips_are_read_and_nothing_is_forgotten() -> None:
    checkpoint = RunState(step=40, batches_passed=7, bad_steps=1, missed_updates=1, mean_loss=0.5)
    failed = replace(checkpoint, step=52, bad_steps=6, missed_updates=6, bad_in_a_row=5, rollbacks=1)
    back = checkpoint.after_rollback(failed)
    assert (back.step, back.next_batch) == (40, failed.next_batch)
    assert (back.bad_steps, back.missed_updates, back.bad_in_a_row, back.rollbacks) == (6, 1, 0, 2)
    assert back.mean_loss == 0.5


def test_a_state_comes_back_from_json_bit_for_bit() -> None:
    state, _ = after([0.1, 0.7, math.nan, 1 / 3])
    state.best_r2, state.best_step = 0.1 + 0.2, 3
    assert RunState.from_json(json.loads(json.dumps(state.as_json())), "state.json") == state


def test_a_state_of_an_earlier_version_has_its_counts_at_their_start() -> None:
    state = RunState.from_json({"step": 9, "corrupt_records": 2}, "state.json")
    assert state == RunState(step=9, corrupt_records=2)


@pytest.mark.parametrize("stored", [{}, {"step": "9"}, {"step": 9, "bad_steps": [1]}])
def test_a_damaged_state_is_a_sentence(stored: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"state\.json is damaged"):
        RunState.from_json(stored, "state.json")


def test_a_line_says_what_was_clipped_since_the_last_and_begins_anew() -> None:
    state = RunState(steps_since_line=4, clipped_since_line=1)
    assert state.as_line() == {"clipped_share": 0.25}
    state.begin_line()
    assert (state.steps_since_line, state.clipped_since_line) == (0, 0)
    state = RunState(steps_since_line=1, bad_steps=2, rollbacks=1)
    assert state.as_line() == {"clipped_share": 0.0, "bad_steps": 2, "rollbacks": 1}


CONFIG = TrainConfig(optimizer=OptimizerConfig(warmup_steps=10))
SOUND = {"step": 11, "prediction_std": 0.5, "target_std": 1.0, "prediction_rank": 20.0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prediction_std": 0.019}, "predictions deviate by 0.019, targets by 1"),
        ({"prediction_rank": 1.04}, "the predictions' effective rank is 1.04"),
    ],
)
def test_predictions_that_say_the_same_everywhere_raise_the_alarm(
    change: dict[str, float], reason: str
) -> None:
    said: list[str] = []
    assert look_for_collapse(SOUND, CONFIG, said.append) == {} and not said
    assert look_for_collapse(SOUND | change, CONFIG, said.append) == {"collapse": True}
    assert said == [f"collapse at step 11: {reason}"]
    stopping = replace(CONFIG, guards=replace(GUARDS, on_collapse="stop"))
    with pytest.raises(RunError, match=reason):
        look_for_collapse(SOUND | change, stopping, said.append)
    during_warm_up = SOUND | change | {"step": 10}
    assert look_for_collapse(during_warm_up, stopping, said.append) == {}
    off = replace(CONFIG, guards=replace(GUARDS, collapse_std=0.0, collapse_rank=0.0))
    assert look_for_collapse(SOUND | change, off, said.append) == {}
