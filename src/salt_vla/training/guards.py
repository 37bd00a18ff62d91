"""What is done about a step that went wrong: told apart, left out, gone back from, and when it is enough.

Pure functions of the run's state; who acts on them is the loop's and the step's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from salt_vla.config import GuardConfig, TrainConfig
from salt_vla.errors import RunError
from salt_vla.training.state import RunState

LOSSES_BEFORE_SPIKES = 20  # Before so many good steps no mean is worth comparing with.
MEMORY = 0.98  # Share of itself that the running mean of the loss keeps a step.
CURE = "lower optimizer.lr or look at the targets"


class Hopeless(RunError):
    """Too many bad steps, whatever clips were read."""


class Setback(Exception):
    """Too many bad steps in a row: the run has to go back to its last checkpoint."""


def judge(state: RunState, guards: GuardConfig, loss: float, norm: float) -> str:
    """What is wrong with a step of this loss and gradient norm ("": nothing); counts it in `state`.

    A step is bad when either is not finite, or when the loss exceeds `guards.spike_factor` times its running
    mean. Raises `RunError` for a bad step where `guards.on_bad_step` is `stop`.
    """
    reason = _reason(state, guards, loss, norm)
    if not reason:
        weight = 1 - MEMORY if state.losses_seen >= LOSSES_BEFORE_SPIKES else 1 / (state.losses_seen + 1)
        state.mean_loss += (loss - state.mean_loss) * weight
        state.losses_seen += 1
        state.bad_in_a_row = 0
        state.safe_step = max(state.safe_step, state.planned_step)
        return ""
    if guards.on_bad_step == "stop":
        raise RunError(f"{reason} at step {state.step + 1}; {CURE}")
    state.bad_steps += 1
    state.bad_in_a_row += 1
    state.missed_updates += 1
    return reason


def _reason(state: RunState, guards: GuardConfig, loss: float, norm: float) -> str:
    for name, value in (("loss", loss), ("gradient's norm", norm)):
        if not math.isfinite(value):
            return f"the {name} is {value}"
    is_known = state.losses_seen >= LOSSES_BEFORE_SPIKES and state.mean_loss > 0
    if guards.spike_factor and is_known and loss > guards.spike_factor * state.mean_loss:
        return f"the loss is {loss:.4g}, its running mean {state.mean_loss:.4g}"
    return ""


def require_progress(state: RunState, guards: GuardConfig, reason: str) -> None:
    """Raises `Setback` after `guards.rollback_after` bad steps in a row, and `Hopeless` once that has been
    tried `guards.max_rollbacks` times."""
    if state.bad_in_a_row < guards.rollback_after:
        return
    if state.rollbacks >= guards.max_rollbacks:
        returns = f", after {state.rollbacks} return(s) to a checkpoint and other clips" * (
            state.rollbacks > 0
        )
        raise Hopeless(
            f"{state.bad_in_a_row} bad steps in a row up to step {state.step}{returns}: {reason}; {CURE}"
        )
    raise Setback(f"{state.bad_in_a_row} bad steps in a row up to step {state.step}: {reason}")


def look_for_collapse(
    row: Mapping[str, Any], config: TrainConfig, say: Callable[[str], None]
) -> dict[str, Any]:
    """`{"collapse": True}` to be added to a row of scores that shows one, else nothing; `say` is told why.

    Fresh networks say the same everywhere, so nothing is looked at during the warm-up. Raises `RunError`
    where `guards.on_collapse` is `stop`.
    """
    guards = config.guards
    reason = _collapse(row, guards)
    if not reason or row["step"] <= config.optimizer.warmup_steps:
        return {}
    told = f"collapse at step {row['step']}: {reason}"
    if guards.on_collapse == "stop":
        raise RunError(f"{told}; add a variance term (objective.variance_weight), or {CURE}")
    say(told)
    return {"collapse": True}


def _collapse(row: Mapping[str, Any], guards: GuardConfig) -> str:
    if "prediction_std" in row and row["prediction_std"] < guards.collapse_std * row["target_std"]:
        return f"predictions deviate by {row['prediction_std']:.3g}, targets by {row['target_std']:.3g}"
    if "prediction_rank" in row and row["prediction_rank"] < guards.collapse_rank:
        return f"the predictions' effective rank is {row['prediction_rank']:.3g}"
    return ""
