"""The suites `inverse-dynamics` (two moments → the actions between) and `forward-dynamics` (a moment and the
actions after it → what the encoder will see).

Knows latents as arrays; a dynamics model is a ridge on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.evaluation.bench import Bench, short_name
from salt_vla.evaluation.linear import LinearProbe
from salt_vla.evaluation.probes import ProbeFit, Problem, fit_basis
from salt_vla.evaluation.results import CONSTANT, Scored
from salt_vla.evaluation.robots import (
    Examples,
    Predictions,
    Recorded,
    leave_out,
    on_both_splits,
    own_state,
    recorded_sides,
    score_examples,
    window_features,
    with_common_targets,
)
from salt_vla.evaluation.statistics import copy_sums, r2_sums
from salt_vla.evaluation.suites.actions import action_targets
from salt_vla.evaluation.targets import ACTION, STATE, WORLD

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

INVERSE, FORWARD = "inverse-dynamics", "forward-dynamics"
READS = ("horizon", "moment_stride")
LATENT_DIMS = 128
LATENT, COPIED, SEEN = "latent", "_if_copied", "_if_seen"
OWN_SPACE = "in the encoder's own latents, against copying them: not to be compared between encoders"


def inverse(bench: Bench) -> list[Scored]:
    """R² of the actions from a moment to `horizon` frames later, from features at both. Not causal: the
    second window has seen what the actions did. The robot's states at both moments are a baseline."""
    scored, horizon = [], bench.settings.horizon
    for camera in bench.cameras:
        suite = f"{INVERSE}/{short_name(camera)}"
        sides = recorded_sides(bench, INVERSE, camera, [ACTION])
        pairs = _pairs(bench, suite, sides)
        train, test = (
            _between(bench, side, now, later, horizon)
            for side, (now, later) in zip(sides, pairs, strict=True)
        )
        scored += score_examples(bench, suite, train, test, causal=False)
    return scored


def _between(
    bench: Bench, side: Recorded, now: Int64[np.ndarray, " pairs"], later: Int64[np.ndarray, " pairs"], k: int
) -> Examples:
    features = window_features(bench, side.windows.side)
    states = own_state(side, (0, k))
    return Examples(
        {name: _side_by_side(each[now], each[later]) for name, each in features.items()},
        {name: values[now] for name, values in action_targets(side, k).items()},
        side.windows.episodes[now],
        np.array(side.windows.tasks)[now],
        None if states is None else states[now],
    )


def _side_by_side(
    now: Float[np.ndarray, " pairs *dims"], later: Float[np.ndarray, " pairs *dims"]
) -> Float[np.ndarray, " pairs *both"]:
    """Vectors as one; tokens with a number beside each that says of which moment it is: attention has no
    order, and the places that tokens know are the same at both."""
    if now.ndim > 2:
        now, later = (
            np.concatenate((tokens, np.full((*tokens.shape[:2], 1), mark, tokens.dtype)), axis=2)
            for mark, tokens in enumerate((now, later))
        )
    return np.concatenate((now, later), axis=1)


def _pairs(
    bench: Bench, suite: str, sides: list[Recorded]
) -> list[tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]]:
    """Rows of the windows that are asked about, and of those that end `horizon` frames later."""
    horizon = bench.settings.horizon
    why = f"the episode ends within {horizon} frames (the horizon)"
    kept = leave_out(bench, suite, sides, [side.has(0, horizon) for side in sides], why)
    pairs = []
    for side, now in zip(sides, kept, strict=True):
        windows = side.windows
        keys = zip(windows.episodes.tolist(), windows.moments.tolist(), strict=True)
        row_of = {key: row for row, key in enumerate(keys)}
        later = [row_of[int(windows.episodes[row]), int(windows.moments[row]) + horizon] for row in now]
        pairs.append((now, np.array(later, np.int64)))
    return pairs


def forward(bench: Bench) -> list[Scored]:
    """Two things of each encoder. `latent`: how much better than a copy of the present latent a ridge on it
    and the actions foresees the one `horizon` frames later. `state` and `world`: R² of what a linear reader,
    learned from true latents, reads from the foreseen one; beside it from the copied and from the true one.

    Latents are the first 128 principal components of training windows, of all tasks: what an unseen one looks
    like is no secret, what is done in it is. Causal: no frame after the present
    is seen but in the rows `…_if_seen`, which say what the reader is worth. Baseline `state`: the robot's own
    state and the actions, no frame at all.
    """
    scored: list[Scored] = []
    for camera in bench.cameras:
        suite = f"{FORWARD}/{short_name(camera)}"
        sides = recorded_sides(bench, FORWARD, camera, [ACTION])
        train, test = _steps(bench, sides, _pairs(bench, suite, sides))
        width = bench.settings.horizon * sides[0].at(ACTION, [0]).shape[2]
        train, test = with_common_targets(bench, suite, train, test)
        predict = partial(_foresee, width=width, seed=bench.settings.seed)
        for where, found in on_both_splits(bench, suite, train, test, predict).items():
            scored += [_scored(bench, where, test, key, fit) for key, fit in found.items()]
    return scored


def _steps(
    bench: Bench,
    sides: Sequence[Recorded],
    pairs: Sequence[tuple[Int64[np.ndarray, " pairs"], Int64[np.ndarray, " pairs"]]],
) -> list[Examples]:
    """Of both sides: features (pairs, 2, dims) are latents at both moments; known are the actions between,
    then the robot's own state before them; targets are what was recorded at the second moment."""
    horizon = bench.settings.horizon
    features = [window_features(bench, side.windows.side, bench.settings.poolings[0]) for side in sides]
    latents: list[dict[str, np.ndarray]] = [{}, {}]
    for name in features[0]:
        both = leading_components(name, features[0][name], features[1][name])
        for found, values, (now, later) in zip(latents, both, pairs, strict=True):
            found[name] = np.stack((values[now], values[later]), axis=1)
    steps = []
    for side, found, (now, _) in zip(sides, latents, pairs, strict=True):
        actions, own = side.at(ACTION, range(horizon)), own_state(side)
        known = [actions.reshape(len(actions), -1)] + ([] if own is None else [own])
        targets = {
            name: side.at(signal, [horizon])[now, 0]
            for name, signal in (("state", STATE), ("world", WORLD))
            if signal in side.recordings.signals
        }
        tasks = np.array(side.windows.tasks)[now]
        steps.append(
            Examples(found, targets, side.windows.episodes[now], tasks, np.concatenate(known, axis=1)[now])
        )
    return steps


def leading_components(
    name: str, train: Float[np.ndarray, "train dims"], test: Float[np.ndarray, "test dims"]
) -> tuple[Float[np.ndarray, "train components"], Float[np.ndarray, "test components"]]:
    """The first 128 principal components of training windows, as axes turned at random: distances are what
    they were, and probes that bring every axis to one size do not blow small components up."""
    basis = fit_basis(name, train, test)
    inside = (basis.train * np.sqrt(basis.power))[:, :LATENT_DIMS]
    dims = inside.shape[1]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(dims, dims)))[0]
    return inside @ turn, basis.test[:, :LATENT_DIMS] @ turn


def _foresee(train: Examples, test: Examples, width: int, seed: int) -> Predictions:
    """The first `width` of the known numbers are the actions."""
    assert train.known is not None and test.known is not None
    folds = train.episodes if train.folds is None else train.folds

    def fit(
        encoder: str, inside: np.ndarray, outside: np.ndarray, said: Mapping[str, np.ndarray]
    ) -> dict[str, ProbeFit]:
        return LinearProbe().fit(Problem(encoder, inside, outside, said, folds, seed))

    found: Predictions = {}
    for encoder, inside in train.features.items():
        outside = test.features[encoder]
        change = fit(
            encoder,
            np.concatenate((inside[:, 0], train.known[:, :width]), axis=1),
            np.concatenate((outside[:, 0], test.known[:, :width]), axis=1),
            {LATENT: inside[:, 1] - inside[:, 0]},
        )[LATENT]
        foreseen = replace(change, predicted=outside[:, 0] + change.predicted)
        found[encoder, LATENT] = foreseen
        asked = np.concatenate((foreseen.predicted, outside[:, 0], outside[:, 1]))
        for name, read in fit(encoder, inside[:, 1], asked, train.targets).items():
            for kind, values in zip(("", COPIED, SEEN), np.split(read.predicted, 3), strict=True):
                found[encoder, name + kind] = replace(read, predicted=values)
    for name, constant in fit(CONSTANT, train.known[:, :0], test.known[:, :0], train.targets).items():
        found[CONSTANT, name] = constant
    if "state" in train.targets:
        for name, read in fit("state", train.known, test.known, train.targets).items():
            found["state", name] = read
    return found


def _scored(bench: Bench, suite: str, test: Examples, key: tuple[str, str], fit: ProbeFit) -> Scored:
    encoder, target = key
    if target == LATENT:
        now, later = test.features[encoder][:, 0], test.features[encoder][:, 1]
        sums = copy_sums(later, fit.predicted, now, test.episodes)
        note = "; ".join(filter(None, [fit.note, OWN_SPACE]))
    else:
        truth = test.targets[target.removesuffix(COPIED).removesuffix(SEEN)]
        sums, note = r2_sums(truth, fit.predicted, test.episodes), fit.note
    causal = not target.endswith(SEEN)
    return Scored(encoder, suite, target, sums, fit.alpha, note, causal=causal)
