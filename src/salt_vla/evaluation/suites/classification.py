"""The suite `classification`: what a film is called, top-1 and top-5, a film's clips averaged.

Reads the labels of the clip table, whatever source wrote them; knows no data set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Bench, Side, short_name
from salt_vla.evaluation.features import Reading
from salt_vla.evaluation.probing import ProbeSet, fit_probes
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.statistics import Metric, share_sums
from salt_vla.registry import SIGNALS

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, Shaped

    from salt_vla.evaluation.probes import ProbeFit

VERSION = 3
READS: tuple[str, ...] = ()
TARGET = "label"
TOPS: dict[int, tuple[str, Metric]] = {1: (TARGET, "accuracy"), 5: (f"{TARGET}_top5", "accuracy_at_5")}


def score(bench: Bench) -> list[Scored]:
    """Top-1 and, of more than five classes, top-5 of held-out films, resampled by what may not be divided
    between splits. A clip is seen whole: not causal. Raises `DataError` for clips without a label, a class
    that only held-out clips have, and a film that is on both sides."""
    settings = bench.settings
    readings = [Reading(pooling) for pooling in bench.poolings]
    scored: list[Scored] = []
    for camera in bench.cameras:
        train, test = (side.of_camera(camera) for side in (bench.train, bench.test))
        labels = _labels(train, "training"), _labels(test, "held-out")
        _refuse_shared_films(train, test)
        features = [bench.features(side, readings) for side in (train, test)]
        films = np.unique(_films(test), return_inverse=True)[1]
        for reading in readings:
            sides = [
                ProbeSet(features[i][reading], {TARGET: labels[i]}, side.episodes)
                for i, side in enumerate((train, test))
            ]
            fits = fit_probes(
                sides[0], sides[1], settings.seed, settings.probe, settings.protocol, settings.device
            )
            suite = "/".join(filter(None, ["classification", short_name(camera), reading.pooling]))
            for encoder, by_target in fits.items():
                fit = by_target[TARGET]
                for top, right in _right(fit, labels[1], films).items():
                    target, metric = TOPS[top]
                    sums = share_sums(metric, right, sides[1].episodes[_first(films)])
                    about = (fit.alpha, fit.note, settings.probe, settings.protocol)
                    scored.append(Scored(encoder, suite, target, sums, *about))
    return scored


def _labels(side: Side, what: str) -> Shaped[np.ndarray, " clips"]:
    """Every clip's label. Raises `DataError` naming a clip that has none."""
    labels = np.array(side.clips.rows["label"].to_pylist(), dtype=np.str_)
    missing = np.flatnonzero(labels == "")
    if len(missing) == len(labels):
        raise DataError(
            f"no {what} clip of {side.clips.name} has a label; index it from a source that gives labels "
            "(docs/sources.md)"
        )
    if len(missing):
        raise DataError(
            f"{len(missing)} {what} clip(s) of {side.clips.name} have no label, such as "
            f"{side.clips.clip_ids[missing[0]]!r}; label them or leave them out"
        )
    return labels


def _refuse_shared_films(train: Side, test: Side) -> None:
    """Where a film is a file. In robots' data sets a file holds many episodes, and those are compared by
    their numbers."""
    files = [
        {
            (dataset, file)
            for dataset, file, source in zip(
                *(side.clips.rows[name].to_pylist() for name in ("dataset", "file", "source")), strict=True
            )
            if source not in SIGNALS
        }
        for side in (train, test)
    ]
    if shared := files[0] & files[1]:
        dataset, file = min(shared)
        raise DataError(
            f"film {file} of {dataset} has clips in both training and held-out data ({len(shared)} such "
            "film(s)); give all clips of a film one split"
        )


def _films(side: Side) -> Shaped[np.ndarray, " clips"]:
    """Which film, or stretch of one, each clip was cut from."""
    names = ("dataset", "file", "camera", "episode_first_frame")
    rows = zip(*(side.clips.rows[name].to_pylist() for name in names), strict=True)
    return np.array(["\0".join(map(str, row)) for row in rows])


def _first(films: Int64[np.ndarray, " clips"]) -> Int64[np.ndarray, " films"]:
    """A clip of each film."""
    return np.unique(films, return_index=True)[1]


def _right(
    fit: ProbeFit, labels: Shaped[np.ndarray, " clips"], films: Int64[np.ndarray, " clips"]
) -> dict[int, Float[np.ndarray, " films"]]:
    """For each k how right every film's k most likely classes are, shares of its clips averaged (as
    facebookresearch/vjepa2 averages softmax outputs, evals/video_classification_frozen/eval.py).

    Where the true class ties with others for fewer places than they are, its credit is its part of them.
    """
    assert fit.classes is not None and fit.shares is not None
    shares = np.zeros((films.max() + 1, len(fit.classes)))
    np.add.at(shares, films, fit.shares)
    # The shares of one film's clips are summed in one order: equal ones are equal to the last bit.
    truth = np.searchsorted(fit.classes, labels[_first(films)])
    mine = shares[np.arange(len(shares)), truth][:, None]
    above, tied = (shares > mine).sum(1), (shares == mine).sum(1)
    return {top: np.clip((top - above) / tied, 0, 1) for top in TOPS if top == 1 or len(fit.classes) > top}
