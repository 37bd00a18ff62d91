"""Retrieval over made-up films: planted copies are found, and what tells nothing stands at chance."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.errors import DataError
from salt_vla.evaluation.features import Pixels
from salt_vla.evaluation.results import PIXELS
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.evaluation.suites import retrieval
from salt_vla.geometry import ClipGeometry

GEOMETRY = ClipGeometry(num_frames=2, image_size=8, tubelet_size=2, patch_size=4)
MEAN = EvalSettings(poolings=("mean",))
BenchOf = Callable[..., Any]


def film(*key: object) -> np.ndarray:
    seed = [ord(letter) for letter in repr(key)]
    return np.random.default_rng(seed).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)


def own(clip: Clip) -> np.ndarray:
    return film(clip.clip_id)


def by_moment(clip: Clip) -> np.ndarray:
    """Every camera films the same."""
    return film(clip.episode, clip.first_frame)


def by_episode(clip: Clip) -> np.ndarray:
    return film(clip.episode)


def by_label(clip: Clip) -> np.ndarray:
    return (film(clip.clip_id) // 8 + (200 if clip.label == "odd" else 10)).astype(np.uint8)


class Point:
    """All clips are one point."""

    geometry, dim, fingerprint = GEOMETRY, 3, "point"

    def latents(self, frames: Tensor) -> Tensor:
        return torch.ones(len(frames), GEOMETRY.num_tokens, 3)


def score(bench: Any) -> dict[tuple[str, str, str], float]:
    return {(one.suite, one.target, one.encoder): one.sums.value for one in retrieval.score(bench)}


def test_the_other_camera_is_found_where_it_films_the_same(bench_of: BenchOf) -> None:
    encoders = {PIXELS: Pixels(GEOMETRY), "point": Point()}
    found = score(bench_of(by_moment, encoders, GEOMETRY, cameras=("x.a", "x.b"), settings=MEAN))
    for camera, other in ("ab", "ba"):
        suite = f"retrieval/{camera}/mean"
        for metric, chance in (("@1", 1 / 16), ("@5", 5 / 16)):
            assert found[suite, f"in_{other}{metric}", "pixels"] == 1
            assert found[suite, f"in_{other}{metric}", "point"] == 0, "a tie is no win"
            assert found[suite, f"in_{other}{metric}", "constant"] == pytest.approx(chance)


def test_the_next_clip_is_found_where_it_looks_the_same(bench_of: BenchOf) -> None:
    bench = bench_of(by_episode, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, settings=MEAN)
    found = score(bench)
    assert found["retrieval/a/mean", "next@1", "pixels"] == 1
    assert found["retrieval/a/mean", "next_map", "constant"] == pytest.approx(
        np.mean(1 / np.arange(1, 16))
    ), "15 others may answer"
    (one,) = [o for o in retrieval.score(bench) if (o.target, o.encoder) == ("next@1", "pixels")]
    assert one.sums.episodes.tolist() == list(range(1, 16, 2)) and set(one.sums.clips) == {1.0}
    assert (one.probe, one.sums.metric, one.alpha) == ("cosine", "recall_at_1", None)


def test_films_of_their_own_are_at_chance(bench_of: BenchOf) -> None:
    bench = bench_of(own, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, episodes=200, settings=MEAN)
    found = score(bench)
    for target in ("label@1", "label@5", "label_map"):
        values = [found["retrieval/a/mean", target, name] for name in ("pixels", "constant")]
        assert values[0] == pytest.approx(values[1], abs=0.1), target


def test_labels_are_found_among_training_clips(bench_of: BenchOf) -> None:
    found = score(bench_of(by_label, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, settings=MEAN))
    assert found["retrieval/a/mean", "label_map", "pixels"] == pytest.approx(1)
    assert found["retrieval/a/mean", "label@1", "constant"] == pytest.approx(0.5)


def test_what_all_clips_share_is_taken_away(bench_of: BenchOf) -> None:
    """A camera that adds light to every film still finds them in the other's."""

    def lit(clip: Clip) -> np.ndarray:
        return film(clip.episode, clip.first_frame) // 4 + (150 if clip.camera == "b" else 0)

    encoders = {PIXELS: Pixels(GEOMETRY)}
    found = score(bench_of(lit, encoders, GEOMETRY, cameras=("a", "b"), settings=MEAN))
    assert found["retrieval/a/mean", "in_b@1", "pixels"] == 1


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three texts: two labels and one that no clip has."""
    np.save(tmp_path / "texts.npy", np.eye(3, dtype=np.float32) + 0.1)
    (tmp_path / "texts.json").write_text(json.dumps(["even", "odd", "neither"]))
    return tmp_path / "texts.npy"


class Aligned(Point):
    """A clip's features are its text's embedding, as far as brightness tells them apart."""

    fingerprint = "aligned"

    def latents(self, frames: Tensor) -> Tensor:
        bright = (frames.double().mean((1, 2, 3, 4)) > 100).double()
        rows = torch.stack([1 - bright, bright, torch.zeros_like(bright)], -1) + 0.1
        return rows[:, None].expand(-1, GEOMETRY.num_tokens, -1)


def test_texts_find_their_clips_by_a_map_from_training_captions(bench_of: BenchOf, texts: Path) -> None:
    encoders = {PIXELS: Pixels(GEOMETRY), "aligned": Aligned()}
    bench = bench_of(by_label, encoders, GEOMETRY, settings=replace(MEAN, text=str(texts)))
    scored = [one for one in retrieval.score(bench) if "text" in one.target]
    values = {(one.target, one.encoder): one.sums.value for one in scored}
    for target in ("text@1", "clip_of_text_map"):
        assert values[target, "pixels"] == values[target, "aligned"] == pytest.approx(1)
    assert values["text@1", "constant"] == pytest.approx(1 / 3)
    assert values["clip_of_text@1", "constant"] == pytest.approx(1 / 2)
    by_target = {(one.target, one.encoder): one for one in scored}
    assert "mapped into features by ridge" in by_target["text@1", "pixels"].note
    assert by_target["text@1", "pixels"].alpha is not None
    assert by_target["clip_of_text@1", "pixels"].sums.episodes.tolist() == [0, 1], "groups are texts"


def test_texts_of_the_features_width_are_compared_as_they_are_too(bench_of: BenchOf, texts: Path) -> None:
    encoders = {PIXELS: Pixels(GEOMETRY), "aligned": Aligned(), "point": Point()}
    bench = bench_of(by_label, encoders, GEOMETRY, settings=replace(MEAN, text=str(texts)))
    direct = [one for one in retrieval.score(bench) if one.target == "text_direct@1"]
    assert {one.encoder: one.sums.value for one in direct} == {
        "aligned": 1.0,
        "point": 0.0,
        "constant": pytest.approx(1 / 3),
    }
    assert "compared as they are" in direct[0].note


def test_a_label_that_no_text_has_is_a_sentence(bench_of: BenchOf, texts: Path) -> None:
    texts.with_suffix(".json").write_text(json.dumps(["even", "shut", "neither"]))
    bench = bench_of(by_label, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, settings=replace(MEAN, text=str(texts)))
    with pytest.raises(DataError, match="none for the label 'odd'"):
        retrieval.score(bench)


def test_where_there_is_nothing_to_be_found_there_is_a_sentence(bench_of: BenchOf) -> None:
    """One clip an episode, one camera, one label."""
    bench = bench_of(own, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, episodes=2, clips=1, settings=MEAN)
    with pytest.raises(DataError, match="there is nothing to be found"):
        retrieval.score(bench)


class NearlyAPoint(Point):
    """A point but for the last bit, which is each clip's own: what rounding leaves of a collapse."""

    fingerprint = "nearly a point"

    def latents(self, frames: Tensor) -> Tensor:
        above = torch.nextafter(torch.tensor(3.3), torch.tensor(4.0))
        bits = frames.flatten(1)[:, :3] % 2 == 0
        rows = torch.where(bits, torch.tensor(3.3), above)
        return rows[:, None].expand(-1, GEOMETRY.num_tokens, -1)


def test_a_collapse_up_to_rounding_finds_nothing(bench_of: BenchOf) -> None:
    """Centred, rounding is all that is left of it."""
    found = score(
        bench_of(by_moment, {"nearly": NearlyAPoint()}, GEOMETRY, cameras=("a", "b"), settings=MEAN)
    )
    assert found["retrieval/a/mean", "in_b@1", "nearly"] == 0
    assert found["retrieval/a/mean", "label@1", "nearly"] == 0


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["even", "new"], r"leaves out 8 of 16 held-out clips of camera 'a': no training clip has theirs"),
        (["new", "newer"], r"leaves out 16 of 16 held-out clips"),
    ],
)
def test_labels_that_training_lacks_are_said(bench_of: BenchOf, labels: list[str], said: str) -> None:
    bench = bench_of(by_label, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, settings=MEAN)
    rows = bench.test.clips.rows
    names = pa.array([labels[label == "odd"] for label in rows["label"].to_pylist()])
    place = rows.column_names.index("label")
    renamed = ClipTable(rows.set_column(place, rows.schema.field("label"), names), bench.test.clips.roots)
    targets = {one.target for one in retrieval.score(replace(bench, test=replace(bench.test, clips=renamed)))}
    assert re.search(said, bench.notes[0])
    assert ("label@1" in targets) == ("even" in labels)


def test_one_label_is_no_question_and_that_is_said(bench_of: BenchOf) -> None:
    bench = bench_of(own, {PIXELS: Pixels(GEOMETRY)}, GEOMETRY, episodes=3, settings=MEAN)
    retrieval.score(replace(bench, train=bench.train.only(bench.train.clips.clip_ids[:2])))
    assert "`label` is not asked of camera 'a'" in bench.notes[0]
