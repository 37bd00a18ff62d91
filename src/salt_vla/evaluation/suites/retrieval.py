"""The suite `retrieval`: does a clip find its next, its other camera, its task and its text, by cosine alone?

Nothing is fitted but the training clips' mean (and a map from texts, where it is said). Knows which clips
belong together; not how answers are ranked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Bench, Side, short_name
from salt_vla.evaluation.features import Reading
from salt_vla.evaluation.ranking import SMALLEST_SHARE, Lookup, by_chance, ranked
from salt_vla.evaluation.results import CONSTANT, Scored
from salt_vla.evaluation.statistics import share_sums
from salt_vla.evaluation.texts import Texts, mapped, read_texts

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    Features = Mapping[str, Float[np.ndarray, "clips dims"]]

READS = ("text",)
VERSION = 2
SHORT = {"recall_at_1": "@1", "recall_at_5": "@5", "mean_average_precision": "_map"}
CHANCE = "expected of answers in random order"
MAPPED = "texts mapped into features by ridge regression on training clips"
DIRECT = "texts compared as they are: features have their width"


@dataclass(frozen=True)
class Look:
    """One question asked of all encoders: rows of queries and gallery by encoder, who is right, and the group
    (episode) that a query counts for. `alphas`: the penalty of what was fitted."""

    target: str
    queries: Features
    gallery: Features
    lookup: Lookup
    groups: Int64[np.ndarray, " queries"]
    note: str = ""
    alphas: Mapping[str, float | None] = field(default_factory=dict)


def score(bench: Bench) -> list[Scored]:
    """Held-out clips ask; a suite `retrieval/<camera>/<pooling>` each. `next`: the clip that follows in the
    episode, among all other held-out clips of the camera. `in_<camera>`: the same moment, among the clips of
    that other camera. `label`: a training clip of the same label. With `settings.text` also `text`: the
    clip's own label among all texts, and `clip_of_text`: a text's clips among the held-out ones.
    """
    texts = read_texts(Path(bench.settings.text)) if bench.settings.text else None
    readings = [Reading(pooling) for pooling in bench.settings.poolings]
    sides = {c: (bench.train.of_camera(c), bench.test.of_camera(c)) for c in bench.cameras}
    found = {c: [bench.features(side, readings) for side in pair] for c, pair in sides.items()}
    scored: list[Scored] = []
    for reading in readings:
        features = {
            camera: Camera(
                camera, *sides[camera], *({n: each[reading][n] for n in bench.encoders} for each in both)
            )
            for camera, both in found.items()
        }
        for camera, mine in features.items():
            looks = [*_next_clips(mine), *_same_label(mine)]
            bench.notes.extend(_unasked(mine))
            for name, other in features.items():
                looks += _other_camera(mine, other) if name != camera else []
            looks += _by_text(mine, texts) if texts is not None else []
            suite = f"retrieval/{short_name(camera)}/{reading.pooling}"
            scored += [one for look in looks for one in _scored(suite, look)]
    if not scored:
        raise DataError(
            "retrieval: there is nothing to be found: no held-out clip has a next one, another camera or one "
            "of several labels"
        )
    return scored


class Camera:
    """One camera's clips on both sides, and their features. Those compared are centred by its training clips:
    what all clips of a camera share tells none from another."""

    def __init__(
        self, name: str, train: Side, test: Side, train_features: Features, test_features: Features
    ) -> None:
        self.name, self.train, self.test = name, train, test
        self.as_read = (train_features, test_features)
        self.means = {encoder: _mean(rows) for encoder, rows in train_features.items()}
        self.trained, self.held_out = (
            {encoder: _centred(rows, self.means[encoder]) for encoder, rows in side.items()}
            for side in self.as_read
        )

    @property
    def moments(self) -> list[tuple[str, int, int]]:
        """(data set, episode, frame of the episode) of every held-out clip: the same for all cameras."""
        return [(clip.dataset, clip.episode, clip.start_in_episode) for clip in self.test.clips.clips()]


def _mean(rows: Float[np.ndarray, "clips dims"]) -> Float[np.ndarray, " dims"]:
    return np.asarray(rows).mean(0, dtype=np.float64).astype(np.float32)


def _centred(
    rows: Float[np.ndarray, "clips dims"], mean: Float[np.ndarray, " dims"]
) -> Float[np.ndarray, "clips dims"]:
    """Less the mean; what rounding leaves of rows that are the mean is 0, and points nowhere."""
    found = np.asarray(rows - mean)
    found[np.linalg.norm(found, axis=1) <= SMALLEST_SHARE * np.linalg.norm(mean)] = 0
    return found


def _rows(features: Features, rows: Int64[np.ndarray, " rows"]) -> Features:
    return {encoder: values[rows] for encoder, values in features.items()}


def _next_clips(mine: Camera) -> Iterator[Look]:
    moments = mine.moments
    order = sorted(range(len(moments)), key=lambda row: moments[row])
    after = np.full(len(moments), -1)
    for here, there in itertools.pairwise(order):
        if moments[here][:2] == moments[there][:2]:
            after[here] = there
    asking = np.flatnonzero(after >= 0)
    if len(asking):
        lookup = Lookup(after[asking], np.arange(len(moments)), asking)
        queries = _rows(mine.held_out, asking)
        yield Look("next", queries, mine.held_out, lookup, mine.test.episodes[asking])


def _other_camera(mine: Camera, other: Camera) -> Iterator[Look]:
    place = {moment: row for row, moment in enumerate(other.moments)}
    wanted = np.array([place.get(moment, -1) for moment in mine.moments])
    asking = np.flatnonzero(wanted >= 0)
    if len(asking):
        lookup = Lookup(wanted[asking], np.arange(len(place)), np.full(len(asking), -1))
        queries = _rows(mine.held_out, asking)
        target = f"in_{short_name(other.name)}"
        yield Look(target, queries, other.held_out, lookup, mine.test.episodes[asking])


def _same_label(mine: Camera) -> Iterator[Look]:
    known = mine.train.clips.rows["label"].to_pylist()
    asked = mine.test.clips.rows["label"].to_pylist()
    number = {label: code for code, label in enumerate(sorted(set(known)))}
    wanted = np.array([number.get(label, -1) for label in asked])
    asking = np.flatnonzero(wanted >= 0)
    if len(number) > 1 and len(asking):
        codes = np.array([number[label] for label in known])
        lookup = Lookup(wanted[asking], codes, np.full(len(asking), -1))
        yield Look("label", _rows(mine.held_out, asking), mine.trained, lookup, mine.test.episodes[asking])


def _unasked(mine: Camera) -> Iterator[str]:
    """What must be said of held-out clips that `label` does not ask about."""
    known, asked = (side.clips.rows["label"].to_pylist() for side in (mine.train, mine.test))
    labels = set(known)
    left = [label for label in asked if label not in labels]
    where = f" of camera {short_name(mine.name)!r}" if mine.name else ""
    if len(labels) < 2:
        yield f"retrieval: `label` is not asked{where}: all training clips have the same label, or none"
    elif left:
        yield (
            f"retrieval: `label` leaves out {len(left)} of {len(asked)} held-out clips{where}: no training "
            f"clip has theirs, such as {left[0]!r}"
        )


def _by_text(mine: Camera, texts: Texts) -> Iterator[Look]:
    of_train, of_test = (
        texts.numbers(side.clips.rows["label"].to_pylist()) for side in (mine.train, mine.test)
    )
    fits = {
        encoder: mapped(encoder, texts, rows, of_train, mine.train.episodes)
        for encoder, rows in mine.trained.items()
    }
    placed = {encoder: fit for encoder, (fit, _) in fits.items()}
    alphas = {encoder: alpha for encoder, (_, alpha) in fits.items()}
    width = texts.embeddings.shape[1]
    plain = {encoder: rows for encoder, rows in mine.as_read[1].items() if rows.shape[1] == width}
    asking = np.unique(of_test)
    of_clips = Lookup(of_test, np.arange(len(texts.names)), np.full(len(of_test), -1))
    of_texts = Lookup(asking, of_test, np.full(len(asking), -1))
    episodes = mine.test.episodes
    yield Look("text", mine.held_out, placed, of_clips, episodes, MAPPED, alphas)
    if plain:
        same = dict.fromkeys(plain, texts.embeddings)
        yield Look("text_direct", plain, same, of_clips, episodes, DIRECT)
    if len(asking) > 1:
        by_label = f"{MAPPED}; resampled are texts"
        yield Look("clip_of_text", _rows(placed, asking), mine.held_out, of_texts, asking, by_label, alphas)


def _scored(suite: str, look: Look) -> Iterator[Scored]:
    answers = {
        encoder: ranked(rows, look.gallery[encoder], look.lookup) for encoder, rows in look.queries.items()
    }
    answers[CONSTANT] = by_chance(look.lookup)
    for encoder, found in answers.items():
        for metric, values in found.items():
            yield Scored(
                encoder,
                suite,
                look.target + SHORT[metric],
                share_sums(metric, values, look.groups),
                None if encoder == CONSTANT else look.alphas.get(encoder),
                CHANCE if encoder == CONSTANT else look.note,
                probe="cosine",
            )
