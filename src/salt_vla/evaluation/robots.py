"""What robot suites share: causal windows with what was recorded around their moments, and probes scored on
held-out episodes, and again on tasks they never saw.

Knows features as arrays by encoder; neither what a suite asks nor how films are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.data.signals import Recordings
from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.bench import Bench, Side
from salt_vla.evaluation.causal import Moments, Windows, open_windows
from salt_vla.evaluation.features import Reading
from salt_vla.evaluation.probes import ProbeFit, Problem, check_split
from salt_vla.evaluation.probing import ProbeSet, common_targets, load_probe
from salt_vla.evaluation.results import CONSTANT, Scored
from salt_vla.evaluation.statistics import EpisodeSums, r2_sums
from salt_vla.evaluation.targets import END_STEPS, STATE

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

    Features = Mapping[str, Float[np.ndarray, " examples *dims"]]
    Targets = Mapping[str, Float[np.ndarray, "examples dims"]]

UNSEEN = "unseen-tasks"
TASK_FOLDS = 3
Score = Callable[
    ["Float[np.ndarray, 'clips dims']", "Float[np.ndarray, 'clips dims']", "Int64[np.ndarray, ' clips']"],
    EpisodeSums,
]
Predictions = dict[tuple[str, str], ProbeFit]  # (encoder, target) → what it says of the held-out examples


@dataclass(frozen=True)
class Recorded:
    """One side of the split as one camera filmed it: windows, and what was recorded in their episodes."""

    windows: Windows
    recordings: Recordings

    def has(self, first: int, last: int) -> Bool[np.ndarray, " windows"]:
        """Whether the episode reaches from `first` to `last` frames after the window's last."""
        moments = self.windows.moments
        return (moments + first >= 0) & (moments + last < self.windows.lengths)

    def at(self, signal: str, steps: Sequence[int]) -> Float[np.ndarray, "windows steps dims"]:
        """A signal so many frames after each window's last one; beyond the episode's ends those frames are
        held (`has` tells). Raises `DataError` for a value that is not a number."""
        frames = self.windows.moments[:, None] + np.asarray(steps)
        frames = np.clip(frames, 0, self.windows.lengths[:, None] - 1)
        by_episode = self.recordings.signals[signal]
        values = np.stack(
            [by_episode[e][f] for e, f in zip(self.windows.episodes.tolist(), frames, strict=True)]
        ).astype(np.float64)
        bad = np.argwhere(~np.isfinite(values).all(2))
        if len(bad):
            row, step = bad[0]
            raise DataError(
                f"feature {signal!r} is not a number at frame {frames[row, step]} of episode "
                f"{self.windows.episodes[row]}"
            )
        return values

    def require(self, signal: str, suite: str) -> None:
        """Raise `DataError` where the data set has no such signal."""
        if signal not in self.recordings.signals:
            raise DataError(
                f"suite {suite!r} needs the feature {signal!r}, which the data set lacks; it has: "
                f"{', '.join(self.recordings.signals) or 'none'}"
            )


@dataclass(frozen=True)
class Examples:
    """One side of a probe: what each encoder gives it, what it is to say, whose episode and task that is.

    `known`: numbers that are at hand without any encoder, to be beaten. `folds`: what a penalty must do
    without when it is tried on it; by default episodes.
    """

    features: Features
    targets: Targets
    episodes: Int64[np.ndarray, " examples"]
    tasks: np.ndarray
    known: Float[np.ndarray, "examples dims"] | None = None
    folds: Int64[np.ndarray, " examples"] | None = None

    def rows(self, chosen: np.ndarray) -> Examples:
        return Examples(
            {name: values[chosen] for name, values in self.features.items()},
            {name: values[chosen] for name, values in self.targets.items()},
            self.episodes[chosen],
            self.tasks[chosen],
            None if self.known is None else self.known[chosen],
            None if self.folds is None else self.folds[chosen],
        )

    def by_task(self) -> Examples:
        """To be folded over tasks, so that what is chosen is what tasks have in common; over episodes where
        there is one task."""
        names, codes = np.unique(self.tasks, return_inverse=True)
        return replace(self, folds=codes if len(names) > 1 else None)


def recorded_sides(bench: Bench, suite: str, camera: str, moments: Moments) -> list[Recorded]:
    """Training and held-out side. Raises `DataError` where one has no window."""
    sides = []
    for side in (bench.train, bench.test):
        mine = side.of_camera(camera)
        windows = open_windows(mine, bench.data.view, bench.geometry, moments)
        if windows is None:
            raise DataError(f"suite {suite!r}: no episode of {mine.clips.name} is long enough to be asked")
        sides.append(Recorded(windows, bench.recordings(mine)))
    return sides


def own_state(side: Recorded, steps: Sequence[int] = (0,)) -> Float[np.ndarray, "windows dims"] | None:
    """What the robot knows of itself so many frames after each window's last: its state, and the change of it
    over the `END_STEPS` frames before. None where no state was recorded."""
    if STATE not in side.recordings.signals:
        return None
    parts = []
    for step in steps:
        now, before = side.at(STATE, [step, step - END_STEPS]).transpose(1, 0, 2)
        parts += [now, now - before]
    return np.concatenate(parts, axis=1)


def window_features(bench: Bench, side: Side, pooling: str = "") -> Features:
    """Of every encoder, under the first of the poolings that were asked for."""
    reading = Reading(pooling or bench.poolings[0])
    features = bench.features(side, [reading])[reading]
    return {name: values for name, values in features.items() if name != CONSTANT}


def leave_out(
    bench: Bench, suite: str, keep: Sequence[Bool[np.ndarray, " windows"]], why: str
) -> list[Int64[np.ndarray, " kept"]]:
    """The rows to keep of each side; those left out are counted in a note. Raises `DataError` where a side
    is left with none."""
    if not all(each.any() for each in keep):
        raise DataError(f"suite {suite!r}: every window is left out: {why}")
    left = sum(int((~each).sum()) for each in keep)
    if left:
        bench.notes.append(f"{suite}: {left} of {sum(map(len, keep))} windows are left out: {why}")
    return [np.flatnonzero(each) for each in keep]


def score_examples(
    bench: Bench,
    suite: str,
    train: Examples,
    test: Examples,
    causal: bool,
    known: str = "state",
    score: Score = r2_sums,
) -> list[Scored]:
    """Every encoder on every target of held-out episodes, then (as `<suite>/unseen-tasks`) by probes that
    learned from other tasks only: tasks are dealt into three parts, each said by a probe of the others, whose
    penalty is chosen by folds over tasks.

    Beside encoders stand `constant` and, where something is known without them, that alone (`state`) and with
    each of them (`state+encoder`).
    """
    check_split(train.episodes, test.episodes)
    sets = [ProbeSet(side.features, side.targets, side.episodes) for side in (train, test)]
    names, notes = common_targets(*sets)
    bench.notes.extend(f"{suite}: {note}" for note in notes)
    train, test = (
        replace(side, targets={name: side.targets[name] for name in names}) for side in (train, test)
    )
    settings = bench.settings

    def scored(where: str, found: Predictions) -> list[Scored]:
        sums = {key: score(test.targets[key[1]], fit.predicted, test.episodes) for key, fit in found.items()}
        how = settings.probe, settings.protocol, causal
        return [
            Scored(encoder, where, target, sums[encoder, target], fit.alpha, fit.note, *how)
            for (encoder, target), fit in found.items()
        ]

    result = scored(suite, predictions(bench, train, test, known))
    folds = task_folds(train, test)
    if isinstance(folds, str):
        bench.notes.append(f"{suite}/{UNSEEN} is left out: {folds}")
        return result
    parts = [(rows, predictions(bench, train.rows(others), test.rows(rows), known)) for others, rows in folds]
    return result + scored(f"{suite}/{UNSEEN}", _joined(parts, len(test.episodes)))


def task_folds(train: Examples, test: Examples) -> list[tuple[np.ndarray, np.ndarray]] | str:
    """(training rows of other tasks, held-out rows of these) for each part of the tasks, which are dealt in
    the order of their names; or why there are none. Tasks of the held-out episodes decide the parts."""
    names = sorted(set(test.tasks.tolist()))
    if len(set(train.tasks.tolist()) | set(names)) < 2:
        return "all episodes have the same task"
    folds = []
    for part in range(min(TASK_FOLDS, len(names))):
        held = names[part::TASK_FOLDS]
        others = np.flatnonzero(~np.isin(train.tasks, held))
        if len(set(train.episodes[others].tolist())) < 2:
            return f"without the task(s) {', '.join(map(repr, held))} fewer than 2 training episodes are left"
        folds.append((others, np.flatnonzero(np.isin(test.tasks, held))))
    return folds


def predictions(bench: Bench, train: Examples, test: Examples, known: str) -> Predictions:
    """What every encoder's probe says of the held-out examples, learned from all training ones."""
    found: Predictions = {}
    for encoder, values in train.features.items():
        found |= _fit(bench, encoder, (values, test.features[encoder]), train, test)
    empty = np.zeros((len(train.episodes), 0)), np.zeros((len(test.episodes), 0))
    found |= _fit(bench, CONSTANT, empty, train, test)
    if train.known is None or test.known is None:
        return found
    if known in train.features:
        raise ConfigError(f"{known!r} is the name of a baseline; give the encoder another name")
    said, truth = ({name: y.astype(np.float64) for name, y in side.targets.items()} for side in (train, test))
    on_train, on_test = _explained(train.known, test.known, said)
    left, held = (
        replace(side, targets={name: whole[name] - explained[name] for name in whole})
        for side, whole, explained in ((train, said, on_train), (test, truth, on_test))
    )
    for name, values in on_test.items():
        found[known, name] = ProbeFit(values, None)
    for encoder, values in train.features.items():
        both = _without(train.known, test.known, values, test.features[encoder])
        for (_, name), fit in _fit(bench, encoder, both, left, held).items():
            found[f"{known}+{encoder}", name] = replace(fit, predicted=fit.predicted + on_test[name])
    return found


def _fit(
    bench: Bench,
    encoder: str,
    features: tuple[np.ndarray, np.ndarray],
    train: Examples,
    test: Examples,
) -> Predictions:
    settings = bench.settings
    held_out = test.targets if settings.protocol != "held-out" else None
    probe = load_probe("linear" if encoder == CONSTANT else settings.probe)
    folds = train.episodes if train.folds is None else train.folds
    problem = Problem(encoder, *features, train.targets, folds, settings.seed, held_out)
    return {(encoder, name): fit for name, fit in probe.fit(problem).items()}


def _explained(known: np.ndarray, known_test: np.ndarray, targets: Targets) -> tuple[Targets, Targets]:
    """What least squares (with an intercept) says of the targets from the known numbers, on both sides."""
    inside, outside = _design(known, known), _design(known, known_test)
    weights = {name: np.linalg.lstsq(inside, y, rcond=None)[0] for name, y in targets.items()}
    return {n: inside @ w for n, w in weights.items()}, {n: outside @ w for n, w in weights.items()}


def _without(
    known: np.ndarray, known_test: np.ndarray, train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Features less what the known numbers say of them (Frisch and Waugh 1933): a ridge on these, with the
    targets' residuals, is the ridge on both in which the known numbers go unpenalised. Tokens are left."""
    if train.ndim != 2:
        return train, test
    inside, outside = _design(known, known), _design(known, known_test)
    weights = np.linalg.lstsq(inside, train.astype(np.float64), rcond=None)[0]
    return train - inside @ weights, test - outside @ weights


def _design(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Standardised by the training side, an intercept beside them."""
    mean, deviation = known.mean(0), known.std(0)
    scale = np.where(deviation > 0, deviation, 1)
    return np.column_stack([np.ones(len(values)), (values - mean) / scale])


def _joined(parts: Sequence[tuple[np.ndarray, Predictions]], examples: int) -> Predictions:
    """The parts' predictions as one, each at its own rows."""
    joined = {}
    for key, first in parts[0][1].items():
        whole = np.empty((examples, *first.predicted.shape[1:]))
        for rows, found in parts:
            whole[rows] = found[key].predicted
        notes = dict.fromkeys(found[key].note for _, found in parts if found[key].note)
        joined[key] = ProbeFit(whole, None, "; ".join(notes))
    return joined
