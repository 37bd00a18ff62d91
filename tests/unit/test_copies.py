"""A film that was encoded anew lies on both sides of a split: it is found by its looks, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from salt_vla.data.clip_table import Clip
from salt_vla.evaluation.bench import Bench
from salt_vla.evaluation.copies import ALIKE, look_alikes, note_copies
from salt_vla.evaluation.features import Pixels, Reading
from salt_vla.geometry import ClipGeometry

GEOMETRY = ClipGeometry(num_frames=8, image_size=64, tubelet_size=2, patch_size=16)
WALL = np.kron(np.random.default_rng(0).integers(90, 150, (4, 4, 3)), np.ones((16, 16, 1)))
CODECS = {
    "libx264": (64, {"crf": "28"}),
    "mpeg4": (96, {"qmin": "8", "qmax": "8"}),
    "libvpx-vp9": (80, {"crf": "36", "b": "0", "cpu-used": "8", "deadline": "realtime"}),
}


def film(clip: Clip) -> np.ndarray:
    """A bright square that goes from left to right before the same wall, at each episode's own height; a
    clip begins where it does in its film."""
    frames = np.stack([WALL] * 8)
    random = np.random.default_rng([7, clip.episode])
    top, left = random.integers(0, 48, 2)
    for number in range(8):
        at = (left + 4 * number + clip.first_frame) % 48
        frames[number, top : top + 16, at : at + 16] = 210
    return frames.astype(np.uint8)


def encoded_anew(frames: np.ndarray, codec: str, path: Path) -> np.ndarray:
    """By another codec, smaller and of another size, and read again at the old one."""
    size, options = CODECS[codec]
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        for picture in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24").reformat(size, size)))
        out.mux(stream.encode())
    with av.open(str(path)) as again:
        side = frames.shape[1]
        pictures = [frame.reformat(side, side, "rgb24") for frame in again.decode(video=0)]
        return np.stack([picture.to_ndarray() for picture in pictures])


def looked_at(bench: Bench) -> list[str]:
    """The bench's notes once a suite has had the pixels read."""
    for side in (bench.train, bench.test):
        bench.features(side, [Reading("grid")])
    note_copies(bench)
    return bench.notes


@pytest.mark.parametrize("codec", CODECS)
def test_a_film_that_was_encoded_anew_is_found_and_both_are_named(
    codec: str, bench_of: Callable[..., Bench], tmp_path: Path
) -> None:
    def planted(clip: Clip) -> np.ndarray:
        if clip.episode != 5:  # Held out.
            return film(clip)
        anew = encoded_anew(film(replace(clip, episode=2)), codec, tmp_path / "anew.mkv")
        assert not np.array_equal(anew, film(replace(clip, episode=2)))
        return anew

    (note,) = looked_at(bench_of(planted, {"pixels": Pixels(GEOMETRY)}, GEOMETRY))
    assert note.startswith(
        "2 of 16 held-out clips of camera a look like a training clip (the first: 'd/5/a/0'"
    )
    assert "like 'd/2/a/0'" in note and "encoded anew?" in note


def test_other_films_of_one_camera_are_no_copies(bench_of: Callable[..., Bench]) -> None:
    assert looked_at(bench_of(film, {"pixels": Pixels(GEOMETRY)}, GEOMETRY)) == []


def test_nothing_is_decoded_for_it(bench_of: Callable[..., Bench]) -> None:
    """Suites of moments have other clips' pixels read."""
    bench = bench_of(film, {"pixels": Pixels(GEOMETRY)}, GEOMETRY)
    note_copies(bench)
    assert bench.notes == [] and not (bench.store.folder).exists()


def rows(*greys: float, moves: float = 100.0) -> np.ndarray:
    """Clips of two frames of one grey each, of which one place brightens."""
    clips = np.repeat(np.array(greys, np.float32)[:, None, None, None], 2, 1)
    clips = np.broadcast_to(clips, (len(greys), 2, 4, 3)).copy()
    clips[:, 1, 0] += moves
    return clips.reshape(len(greys), -1) / 255


def test_alike_is_so_everywhere_and_still_clips_are_like_any_other() -> None:
    assert look_alikes(rows(10, 40, 90), rows(41), 2) == [(0, 1)]
    assert look_alikes(rows(10, 40, 90), rows(40 + ALIKE + 1), 2) == []
    assert look_alikes(rows(40, moves=3), rows(40, moves=3), 2) == []
    one_place = rows(40)
    one_place[0, -3:] += (ALIKE + 1) / 255
    assert look_alikes(rows(40), one_place, 2) == []


def test_the_nearest_is_found_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("salt_vla.evaluation.copies.AT_ONCE", 2)
    train = rows(0, 20, 40, 60, 80)
    assert look_alikes(train, rows(81, 1, 200, 59), 2) == [(0, 4), (1, 0), (3, 3)]
