"""Features are extracted once, in the clips' order, and gone on with where an extraction was cut off."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from salt_vla.config import EncoderConfig
from salt_vla.errors import CacheError, DataError, ResourceError
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore
from salt_vla.evaluation.features import CONSTANT, Pixels, Reading, features_of
from salt_vla.geometry import ClipGeometry
from salt_vla.models import build_encoder
from salt_vla.teachers.pixel import EncoderTeacher

GEOMETRY = ClipGeometry(num_frames=4, image_size=16, tubelet_size=2, patch_size=8)
READINGS = [Reading("mean"), Reading("grid"), Reading("tokens")]
CLIPS = 11


class Films:
    """Random pixels that tell their clip; how often each was asked for is counted."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def read_many(self, keys: Sequence[tuple[str, int]], out: np.ndarray | None = None) -> np.ndarray:
        self.asked += [clip for clip, _ in keys]
        return np.stack([self.film(clip) for clip, _ in keys])

    def film(self, clip: str) -> np.ndarray:
        seed = int(clip.removeprefix("clip"))
        return np.random.default_rng(seed).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)

    def read_each(self, keys: Iterable[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
        return ((key, self.read_many([key])[0]) for key in keys)


class Failing(Pixels):
    """Fails at its `at`-th batch."""

    def __init__(self, at: int) -> None:
        super().__init__(GEOMETRY)
        self.left = at

    def latents(self, frames: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().latents(frames)


class NotFinite(Pixels):
    def latents(self, frames: Tensor) -> Tensor:
        tokens = super().latents(frames)
        tokens[-1, 3] = torch.nan
        return tokens


def views(films: Films | None = None, pixels: str = "p", clips: int = CLIPS) -> ClipViews:
    return ClipViews([f"clip{number}" for number in range(clips)], films or Films(), pixels)


def test_rows_follow_the_clips_and_are_what_one_batch_gives(tmp_path: Path) -> None:
    films = Films()
    found = FeatureStore(tmp_path, batch_size=4).features({"m": Pixels(GEOMETRY)}, views(films), READINGS)
    whole = torch.from_numpy(np.stack([films.film(f"clip{number}") for number in range(CLIPS)]))
    expected = features_of("m", Pixels(GEOMETRY), whole, READINGS)
    for reading in READINGS:
        kind = np.float16 if reading.pooling == "tokens" else np.float32
        assert found[reading]["m"].dtype == kind
        assert np.array_equal(found[reading]["m"], expected[reading].astype(kind))
        assert found[reading][CONSTANT].shape == (CLIPS, 0)


def test_one_pass_serves_all_and_the_second_call_reads_no_film(tmp_path: Path) -> None:
    films = Films()
    encoders = {"a": Pixels(GEOMETRY), "b": NotFingerprinted()}
    store = FeatureStore(tmp_path, batch_size=4)
    first = store.features(encoders, views(films), READINGS)
    assert films.asked == [f"clip{number}" for number in range(CLIPS)]
    again = FeatureStore(tmp_path).features(encoders, views(films), READINGS)
    assert len(films.asked) == CLIPS
    assert np.array_equal(first[READINGS[1]]["b"], again[READINGS[1]]["b"])


class NotFingerprinted(Pixels):
    def __init__(self) -> None:
        super().__init__(GEOMETRY)
        self.fingerprint = "another"

    def latents(self, frames: Tensor) -> Tensor:
        return 1 - super().latents(frames)


def test_two_names_of_the_same_weights_share_a_file(tmp_path: Path) -> None:
    found = FeatureStore(tmp_path).features(
        {"a": Pixels(GEOMETRY), "b": Pixels(GEOMETRY)}, views(), READINGS[:1]
    )
    assert len(list(tmp_path.glob("*.rows"))) == 1
    assert np.array_equal(found[READINGS[0]]["a"], found[READINGS[0]]["b"])


def test_other_pixels_clips_or_weights_are_other_features(tmp_path: Path) -> None:
    store, films = FeatureStore(tmp_path), Films()
    for asked, (pixels, clips) in enumerate([("p", 5), ("q", 5), ("p", 4)], 1):
        store.features({"m": Pixels(GEOMETRY)}, views(films, pixels, clips), READINGS[:1])
        assert len(list(tmp_path.glob("*.rows"))) == asked
    one = store.features({"m": Pixels(GEOMETRY)}, views(films), READINGS[2:])[READINGS[2]]["m"]
    other = store.features({"m": NotFingerprinted()}, views(films), READINGS[2:])[READINGS[2]]["m"]
    assert not np.array_equal(one, other)


def test_an_interrupted_extraction_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    films = Films()
    whole = FeatureStore(tmp_path / "whole", batch_size=2)
    expected = whole.features({"m": Pixels(GEOMETRY)}, views(), READINGS)
    store = FeatureStore(tmp_path / "cut", batch_size=2)
    with pytest.raises(KeyboardInterrupt):
        store.features({"m": Failing(3)}, views(films), READINGS)
    assert not list((tmp_path / "cut").glob("*.rows"))
    for partial in (tmp_path / "cut").glob("*.partial"):
        with partial.open("ab") as file:
            file.write(b"half a row")
    films.asked.clear()
    found = store.features({"m": Pixels(GEOMETRY)}, views(films), READINGS)
    assert films.asked == [f"clip{number}" for number in range(6, CLIPS)]
    for reading in READINGS:
        assert np.array_equal(found[reading]["m"], expected[reading]["m"])


def test_features_that_are_no_numbers_name_encoder_and_clip(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="encoder 'm' hold NaN or infinite values at clip 'clip3'"):
        FeatureStore(tmp_path, batch_size=4).features({"m": NotFinite(GEOMETRY)}, views(), READINGS)


def test_a_file_cut_short_is_a_sentence(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path)
    store.features({"m": Pixels(GEOMETRY)}, views(), READINGS[:1])
    (file,) = tmp_path.glob("*.rows")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CacheError, match="are damaged"):
        store.features({"m": Pixels(GEOMETRY)}, views(), READINGS[:1])


def test_a_file_says_what_it_holds(tmp_path: Path) -> None:
    FeatureStore(tmp_path).features({"m": Pixels(GEOMETRY)}, views(), READINGS[:1])
    (note,) = tmp_path.glob("*.json")
    said = json.loads(note.read_text())
    assert said["clips"] == CLIPS and said["encoder"] == Pixels(GEOMETRY).fingerprint


def test_no_clips_are_no_features(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no clip"):
        FeatureStore(tmp_path).features({"m": Pixels(GEOMETRY)}, views(clips=0), READINGS)


class Hungry(EncoderTeacher):
    """Takes 40 MB a clip while it works; notes its batches."""

    def encode(self, pixels: Tensor) -> Tensor:
        self.seen.append(len(pixels))
        meal = torch.ones(len(pixels) * 40_000_000, dtype=torch.uint8)
        return super().encode(pixels) + 0 * meal[:1]


def test_a_limit_of_memory_bounds_how_many_clips_pass_at_once_and_changes_no_figure(tmp_path: Path) -> None:
    hungry = Hungry(build_encoder(EncoderConfig(name="vit_micro", geometry=GEOMETRY, depth=1)), "hungry")
    hungry.seen = []
    models = {"hungry": hungry, "pixels": Pixels(GEOMETRY)}
    limited = FeatureStore(tmp_path / "limited", memory_limit=110_000_000)
    found = limited.features(models, views(), READINGS[:1])[READINGS[0]]
    assert hungry.seen[-6:] == [2, 2, 2, 2, 2, 1]
    free = FeatureStore(tmp_path / "free").features(models, views(), READINGS[:1])[READINGS[0]]
    assert hungry.seen[-1] == CLIPS
    for name in models:
        np.testing.assert_allclose(found[name], free[name], atol=1e-5)
    with pytest.raises(
        ResourceError, match=r"one clip of .* needs more than 8 MB .*of --memory-limit 80% are"
    ):
        FeatureStore(tmp_path / "none", memory_limit=10_000_000).features(models, views(), READINGS[:1])


def test_memory_that_runs_out_is_a_sentence_that_names_the_encoder_and_the_cure(tmp_path: Path) -> None:
    class Full(Pixels):
        def latents(self, frames: Tensor) -> Tensor:
            return torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(ResourceError, match=r"11 clips passed encoder 'full'.*--memory-limit") as raised:
        FeatureStore(tmp_path).features({"full": Full(GEOMETRY)}, views(), READINGS[2:])
    assert "memory ran out" in str(raised.value)


BOUNDED = """
import sys, tempfile
from pathlib import Path
import numpy as np, psutil
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore, _batch_size
from salt_vla.evaluation.features import Reading
from salt_vla.geometry import ClipGeometry
from salt_vla.teachers import load_teacher

class Films:
    def read_each(self, keys):
        return ((key, np.full((8, 224, 224, 3), 7, np.uint8)) for key in keys)

model, limit = load_teacher("random:vit_tiny_patch16_224", ClipGeometry(num_frames=8)), int(sys.argv[1])
before = psutil.Process().memory_info().rss
batch = _batch_size([model], limit)
Path("/proc/self/clear_refs").write_text("5")
clips = ClipViews([str(number) for number in range(3 * batch)], Films(), "p")
with tempfile.TemporaryDirectory() as folder:
    store = FeatureStore(Path(folder), batch_size=batch, memory_limit=limit)
    store.features({"m": model}, clips, [Reading("mean")])
marks = Path("/proc/self/status").read_text().splitlines()
peak = 1024 * int(next(line for line in marks if line.startswith("VmHWM")).split()[1])
print(batch, peak - before)
"""


def test_batches_below_a_limit_of_memory_stay_below_it() -> None:
    limit = 250_000_000
    command = [sys.executable, "-c", BOUNDED, str(limit)]
    batch, peak = map(int, subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split())
    assert 1 < batch < 20 and limit / 4 < peak <= limit


@pytest.mark.parametrize("limit", [0, 10**9])
def test_freed_memory_is_kept_where_no_limit_is_to_be(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("salt_vla.evaluation.feature_store.keep_freed_memory", lambda: kept.append(True))
    store = FeatureStore(tmp_path, memory_limit=limit)
    store.features({"pixels": Pixels(GEOMETRY)}, ClipViews(["clip1"], Films(), "p"), READINGS[:1])
    assert kept == [True] * (not limit)
