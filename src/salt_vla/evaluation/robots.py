"""What robot suites share: causal windows with what was recorded around their moments, and probes scored on
held-out episodes, and again on tasks they never saw.

Knows features as arrays by encoder; neither what a suite asks nor how films are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.data.signals import Recordings
from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.bench import Bench, Side
from salt_vla.evaluation.causal import Moments, Windows, every, open_windows
from salt_vla.evaluation.features import Reading
from salt_vla.evaluation.probes import ProbeFit, Problem, check_split, deviation_floor
from salt_vla.evaluation.probing import ProbeSet, common_targets, load_probe
from salt_vla.evaluation.results import CONSTANT, Scored
from salt_vla.evaluation.statistics import EpisodeSums, auroc_sums, r2_sums
from salt_vla.evaluation.targets import END_STEPS, STATE, TASK

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64

    Features = Mapping[str, Float[np.ndarray, " examples *dims"]]
    Targets = Mapping[str, Float[np.ndarray, "examples dims"]]

RCOND = 1e-3  # Singular values below this share of the largest count as none.
UNSEEN = "unseen-tasks"
TASK_FOLDS = 3
Score = Callable[
    ["Float[np.ndarray, 'clips dims']", "Float[np.ndarray, 'clips dims']", "Int64[np.ndarray, ' clips']"],
    EpisodeSums,
]
Predictions = dict[tuple[str, str], ProbeFit]  # (encoder, target) → what it says of the held-out examples


@dataclass(frozen=True)
class Recorded:
    """One side of the split as one camera filmed it: windows, and what was recorded in their episodes.

    `asked`: the windows that suites ask about; the others are there to be what follows one of them.
    """

    windows: Windows
    recordings: Recordings
    asked: Bool[np.ndarray, " windows"]

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

    def of_other_tasks(self) -> Examples:
        """To learn what holds for another task: penalties are chosen by folds over tasks (over episodes where
        there is one task)."""
        names, codes = np.unique(self.tasks, return_inverse=True)
        return replace(self, folds=codes if len(names) > 1 else None)


def recorded_sides(
    bench: Bench, suite: str, camera: str, signals: Sequence[str], moments: Moments | None = None
) -> list[Recorded]:
    """Training and held-out side; by default with a window every `moment_stride` frames and another `horizon`
    frames after each, the same for all suites, so that their features are extracted once.

    Raises `DataError` where a side has no window, or the data set not one of these signals.
    """
    settings = bench.settings
    asked = every(settings.moment_stride)
    sides = []
    for side in (bench.train, bench.test):
        mine = side.of_camera(camera)
        recordings = bench.recordings(mine)
        if missing := [name for name in signals if name not in recordings.signals]:
            raise DataError(
                f"suite {suite!r} needs the feature {missing[0]!r}, which {mine.clips.name} lacks; it has: "
                f"{', '.join(recordings.signals) or 'none'}"
            )
        chosen = moments or every(settings.moment_stride, settings.horizon)
        windows = open_windows(mine, bench.data.view, bench.geometry, chosen)
        if windows is None:
            raise DataError(f"suite {suite!r}: no episode of {mine.clips.name} is long enough to be asked")
        pairs = zip(windows.moments.tolist(), windows.lengths.tolist(), strict=True)
        mask = [moments is not None or moment in asked(length) for moment, length in pairs]
        sides.append(Recorded(windows, recordings, np.array(mask)))
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
    bench: Bench,
    suite: str,
    sides: Sequence[Recorded],
    keep: Sequence[Bool[np.ndarray, " windows"]],
    why: str,
) -> list[Int64[np.ndarray, " kept"]]:
    """The rows to keep of those that are asked about, of each side; those left out are counted in a note.
    Raises `DataError` where a side is left with none."""
    kept = [np.flatnonzero(side.asked & each) for side, each in zip(sides, keep, strict=True)]
    if not all(map(len, kept)):
        raise DataError(
            f"suite {suite!r}: every window is left out: {why}; a smaller --moment-stride or --horizon asks "
            "about more of them"
        )
    asked = sum(int(side.asked.sum()) for side in sides)
    if left := asked - sum(map(len, kept)):
        bench.notes.append(f"{suite}: {left} of {asked} windows are left out: {why}")
    return kept


def examples(
    bench: Bench,
    side: Recorded,
    rows: Int64[np.ndarray, " kept"],
    targets: Targets,
    known: Float[np.ndarray, "windows dims"] | None = None,
) -> Examples:
    """These windows' features with what was recorded at them (targets and known numbers of all windows)."""
    features = window_features(bench, side.windows.side)
    whole = Examples(features, targets, side.windows.episodes, np.array(side.windows.tasks), known)
    return whole.rows(rows)


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
    train, test = with_common_targets(bench, suite, train, test)
    settings = bench.settings

    def scored(where: str, found: Predictions) -> list[Scored]:
        sums = {key: score(test.targets[key[1]], fit.predicted, test.episodes) for key, fit in found.items()}
        how = settings.probe, settings.protocol, causal
        return [
            Scored(encoder, where, target, sums[encoder, target], fit.alpha, fit.note, *how)
            for (encoder, target), fit in found.items()
        ]

    where = on_both_splits(
        bench, suite, train, test, partial(predictions, bench, known=known), score is auroc_sums
    )
    return [one for name, found in where.items() for one in scored(name, found)]


def with_common_targets(
    bench: Bench, suite: str, train: Examples, test: Examples
) -> tuple[Examples, Examples]:
    """Both sides with the targets that can be scored, and a note on each other. Raises `DataError` where
    targets were given and none can."""
    if not train.targets:
        return train, test
    names, notes = common_targets(
        *(ProbeSet(each.features, each.targets, each.episodes) for each in (train, test))
    )
    bench.notes.extend(f"{suite}: {note}" for note in notes)
    of = [replace(side, targets={name: side.targets[name] for name in names}) for side in (train, test)]
    return of[0], of[1]


def on_both_splits(
    bench: Bench,
    suite: str,
    train: Examples,
    test: Examples,
    predict: Callable[[Examples, Examples], Predictions],
    relative: bool = False,
) -> dict[str, Predictions]:
    """By suite: what is said of held-out episodes, and of tasks that were not learned from (`relative`: see
    `joined`); a note where there are no such tasks."""
    found = {suite: predict(train, test)}
    folds = task_folds(train, test)
    if isinstance(folds, str):
        bench.notes.append(f"{suite}/{UNSEEN} is left out: {folds}")
        return found
    parts = [(rows, predict(train.rows(others).of_other_tasks(), test.rows(rows))) for others, rows in folds]
    return found | {f"{suite}/{UNSEEN}": joined(parts, len(test.episodes), relative)}


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
    """What every encoder's probe says of the held-out examples, learned from all training ones. A known task
    says nothing of another one, and is no baseline there."""
    found: Predictions = {}
    for encoder, values in train.features.items():
        found |= _fit(bench, encoder, (values, test.features[encoder]), train, test)
    empty = np.zeros((len(train.episodes), 0)), np.zeros((len(test.episodes), 0))
    found |= _fit(bench, CONSTANT, empty, train, test)
    is_of_others = not set(test.tasks.tolist()) <= set(train.tasks.tolist())
    if train.known is None or test.known is None or (known == TASK and is_of_others):
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
    chosen = load_probe(settings.probe, settings.protocol)
    probe = load_probe("linear") if encoder == CONSTANT else chosen
    folds = train.episodes if train.folds is None else train.folds
    problem = Problem(encoder, *features, train.targets, folds, settings.seed, held_out, settings.device)
    return {(encoder, name): fit for name, fit in probe.fit(problem).items()}


def _explained(known: np.ndarray, known_test: np.ndarray, targets: Targets) -> tuple[Targets, Targets]:
    """What least squares (with an intercept) says of the targets from the known numbers, on both sides."""
    inside, outside = _design(known, known), _design(known, known_test)
    weights = {name: np.linalg.lstsq(inside, y, RCOND)[0] for name, y in targets.items()}
    return {n: inside @ w for n, w in weights.items()}, {n: outside @ w for n, w in weights.items()}


def _without(
    known: np.ndarray, known_test: np.ndarray, train: np.ndarray, test: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Features less what the known numbers say of them (Frisch and Waugh 1933): a ridge on these, with the
    targets' residuals, is the ridge on both in which the known numbers go unpenalised. Tokens are left."""
    if train.ndim != 2:
        return train, test
    inside, outside = _design(known, known), _design(known, known_test)
    weights = np.linalg.lstsq(inside, train.astype(np.float64), RCOND)[0]
    return train - inside @ weights, test - outside @ weights


def _design(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Standardised by the training side, an intercept beside them. What varies there by less than a number's
    rounding, such as a gripper that is never closed, stays as small as it is and falls below `RCOND`: it
    would get any weight, and on the other side it may move."""
    mean, deviation = known.mean(0), known.std(0)
    scale = np.maximum(deviation, deviation_floor(deviation) or 1)
    return np.column_stack([np.ones(len(values)), (values - mean) / scale])


def joined(
    parts: Sequence[tuple[np.ndarray, Predictions]], examples: int, relative: bool = False
) -> Predictions:
    """The parts' predictions as one, each at its own rows; `relative`: to what `constant` says there, where
    only their order counts and the parts' means would decide it."""
    whole = {}
    for key, first in parts[0][1].items():
        values = np.empty((examples, *first.predicted.shape[1:]))
        for rows, found in parts:
            values[rows] = found[key].predicted - (found[CONSTANT, key[1]].predicted if relative else 0)
        notes = dict.fromkeys(found[key].note for _, found in parts if found[key].note)
        whole[key] = ProbeFit(values, None, "; ".join(notes))
    return whole
