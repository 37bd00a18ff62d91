"""A teacher's probe tells other numbers of the same weights; what int8 costs is measured, not hoped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from salt_vla.cache.format import PROBE
from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import CacheError, DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.cache_checks import check_probe, describe_int8, int8_cost, probe_clip, probe_of
from salt_vla.teachers import Teacher, load_teacher

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=8)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher("random:vit_micro", GEOMETRY)


@pytest.fixture
def views(tiny_table: ClipTable) -> ViewReader:
    return ViewReader(tiny_table, ViewConfig(frame_stride=2), GEOMETRY)


def test_the_probe_is_the_teachers_answer_to_one_fixed_clip(teacher: Teacher) -> None:
    clip = probe_clip(GEOMETRY)
    assert clip.shape == (1, 8, 32, 32, 3) and clip.dtype == np.uint8
    assert clip[0, 0, 0, :2].tolist() == [[95, 130, 194], [217, 207, 235]]  # For ever.
    latents = load(probe_of(teacher))["latents"]
    np.testing.assert_array_equal(latents, teacher.latents(torch.from_numpy(clip))[0].numpy())
    assert probe_of(teacher) == probe_of(load_teacher("random:vit_micro", GEOMETRY))


def with_error(probe: bytes, size: float) -> bytes:
    """The probe, moved by `size` of its length in a random direction."""
    latents = load(probe)["latents"]
    away = np.random.default_rng(0).normal(size=latents.shape)
    away *= size * np.linalg.norm(latents) / np.linalg.norm(away)
    return save({"latents": (latents + away).astype(np.float32)})


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.019])
def test_other_roundings_are_the_same_teacher(teacher: Teacher, tmp_path: Path, size: float) -> None:
    (tmp_path / PROBE).write_bytes(probe_of(teacher))
    assert check_probe(tmp_path, with_error(probe_of(teacher), size))


@pytest.mark.parametrize(("size", "said"), [(0.021, "2.1%"), (1.4, "140.0%"), (np.nan, "nan%")])
def test_other_numbers_of_the_same_weights_are_refused(
    teacher: Teacher, tmp_path: Path, size: float, said: str
) -> None:
    (tmp_path / PROBE).write_bytes(probe_of(teacher))
    with pytest.raises(CacheError, match=f"they are {said} apart .relative L2; 2% is allowed"):
        check_probe(tmp_path, with_error(probe_of(teacher), size))


def test_a_probe_of_another_shape_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / PROBE).write_bytes(save({"latents": np.zeros((3, 4), np.float32)}))
    with pytest.raises(CacheError, match="inf% apart"):
        check_probe(tmp_path, probe_of(teacher))


@pytest.mark.parametrize("content", [None, b"", b"no tensors", save({"other": np.zeros(3, np.float32)})])
def test_a_lost_probe_is_told_from_a_wrong_one(
    teacher: Teacher, tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / PROBE).write_bytes(content)
    assert not check_probe(tmp_path, probe_of(teacher))


@dataclass
class Answers:
    """A teacher whose latents are the pixels' means, plus much in every third token's first channel."""

    spike: float
    name: str = "answers"
    geometry: ClipGeometry = GEOMETRY

    def latents(self, frames: torch.Tensor) -> torch.Tensor:
        tokens = frames.float().mean(dim=2).flatten(1, 2) - 128  # (clips, 8 · 32, 3)
        tokens[:, :, 0] += self.spike * (torch.arange(256) % 3 == 0)
        return tokens


def test_int8_costs_little_where_latents_are_ordinary(
    teacher: Teacher, tiny_table: ClipTable, views: ViewReader
) -> None:
    measured = int8_cost(teacher, tiny_table, views, 4)
    assert list(measured) == ["cosine", "cosine_normalised", "worst_token_cosine", "r2_cost"]
    assert 0.999 < measured["worst_token_cosine"] <= measured["cosine_normalised"] <= 1.0
    assert 0 < measured["r2_cost"] < 1e-3
    assert all(value == round(value, 6) for value in measured.values())
    said = describe_int8(measured)
    assert f"{measured['cosine']:.6f}" in said and "R² cost" in said


def test_the_measure_is_the_definitions(teacher: Teacher, tiny_table: ClipTable, views: ViewReader) -> None:
    """Against float64 by hand, all 16 clips at once."""
    rows = np.unique(np.linspace(0, 23, 16).astype(int))
    frames = views.read_many([(tiny_table.clip_ids[row], 0) for row in rows])
    latents = teacher.latents(torch.from_numpy(frames)).numpy()
    halves = latents.astype(np.float16).astype(np.float64)
    channels = np.abs(latents).max(axis=1, keepdims=True)
    scaled = latents / channels
    scales = np.abs(scaled).max(axis=2, keepdims=True) / 127
    bytes_ = np.rint(scaled / scales) * scales * channels

    def normalise(x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)

    wanted, given = normalise(halves), normalise(bytes_)
    about = wanted - wanted.reshape(-1, wanted.shape[-1]).mean(axis=0)
    measured = int8_cost(teacher, tiny_table, views, 5)
    assert measured["cosine"] == pytest.approx(cosine(bytes_, halves).mean(), abs=2e-6)
    assert measured["cosine_normalised"] == pytest.approx(cosine(given, wanted).mean(), abs=2e-6)
    assert measured["worst_token_cosine"] == pytest.approx(cosine(given, wanted).min(), abs=2e-6)
    assert measured["r2_cost"] == pytest.approx(((given - wanted) ** 2).sum() / (about**2).sum(), abs=2e-6)


def test_int8_is_refused_with_the_figure_where_it_cannot_hold_them(
    tiny_table: ClipTable, views: ViewReader
) -> None:
    assert int8_cost(Answers(0.0), tiny_table, views, 4)["cosine"] > 0.999  # type: ignore[arg-type]
    with pytest.raises(
        CacheError, match=r"on 16 clips the mean cosine to float16 is 0\.8.*--encoding float16"
    ):
        int8_cost(Answers(60_000.0), tiny_table, views, 4)  # type: ignore[arg-type]


def test_unreadable_clips_are_left_out_of_the_measure(
    teacher: Teacher, tiny_table: ClipTable, views: ViewReader, tmp_path: Path
) -> None:
    class Some:
        def __init__(self, every: int) -> None:
            self.every = every

        def read_each(self, keys):  # type: ignore[no-untyped-def]
            for number, (key, pixels) in enumerate(views.read_each(keys)):
                yield key, DataError(f"clip {key[0]} is gone") if number % self.every == 0 else pixels

    assert int8_cost(teacher, tiny_table, Some(2), 4)["cosine"] > 0.999  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is gone"):
        int8_cost(teacher, tiny_table, Some(1), 4)  # type: ignore[arg-type]
