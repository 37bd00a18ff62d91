"""A film of several episodes plays back the frames that went in, at their times, from the same bytes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from salt_vla.data.video_writer import FRAMES_BETWEEN_KEY_FRAMES, EpisodeVideoFile

FPS = 80


def moving_ball(length: int, seed: int, side: int = 64) -> np.ndarray:
    """A red ball that wanders over a textured grey floor."""
    rng = np.random.default_rng(seed)
    floor = np.repeat(np.repeat(rng.integers(90, 140, (side // 4, side // 4, 1)), 4, 0), 4, 1)
    rows, columns = np.mgrid[0:side, 0:side]
    film = np.empty((length, side, side, 3), np.uint8)
    for frame, (row, column) in enumerate(side / 2 + np.cumsum(rng.normal(0, 2, (length, 2)), axis=0)):
        ball = ((rows - row) ** 2 + (columns - column) ** 2 < 36)[..., None]
        film[frame] = np.where(ball, [180, 30, 30], floor)
    return film


def written(path: Path, films: list[np.ndarray], crf: int = 20) -> list[tuple[float, float]]:
    file = EpisodeVideoFile(path, FPS, films[0].shape[1:3], crf)
    spans = [file.append(film) for film in films]
    file.close()
    return spans


def decoded(path: Path) -> tuple[list[float], list[bool], np.ndarray]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    images = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    return [float(frame.time) for frame in frames], [frame.key_frame for frame in frames], images


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    error = np.mean((first.astype(np.float64) - second) ** 2)
    return float(10 * np.log10(255**2 / error))


def test_times_are_exact_multiples_of_the_frame_time(tmp_path: Path) -> None:
    spans = written(tmp_path / "film.mp4", [moving_ball(25, 0), moving_ball(40, 1)])
    times, _, _ = decoded(tmp_path / "film.mp4")
    assert spans == [(0.0, 25 / FPS), (25 / FPS, 65 / FPS)]
    np.testing.assert_allclose(times, np.arange(65) / FPS, rtol=0, atol=1e-12)


def test_pictures_survive(tmp_path: Path) -> None:
    films = [moving_ball(25, 0), moving_ball(40, 1)]
    written(tmp_path / "film.mp4", films)
    _, _, images = decoded(tmp_path / "film.mp4")
    for image, original in zip(images, np.concatenate(films), strict=True):
        assert psnr(image, original) > 30


def test_lower_crf_is_closer_to_the_original_and_larger(tmp_path: Path) -> None:
    film = moving_ball(30, 2)
    quality = {}
    for crf in (16, 36):
        written(tmp_path / f"{crf}.mp4", [film], crf)
        quality[crf] = psnr(decoded(tmp_path / f"{crf}.mp4")[2], film)
    assert quality[16] > quality[36] + 2
    assert (tmp_path / "16.mp4").stat().st_size > 2 * (tmp_path / "36.mp4").stat().st_size


@pytest.mark.parametrize("lengths", [(1,), (16, 16), (17, 1, 40), (3, 3, 3, 3)])
def test_each_episode_begins_with_a_key_frame(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    written(tmp_path / "film.mp4", [moving_ball(length, seed) for seed, length in enumerate(lengths)])
    _, is_key, _ = decoded(tmp_path / "film.mp4")
    starts = np.cumsum([0, *lengths])
    assert len(is_key) == starts[-1]
    assert all(is_key[start] for start in starts[:-1])
    keys = np.flatnonzero(is_key)
    assert max(np.diff([*keys, len(is_key)])) <= FRAMES_BETWEEN_KEY_FRAMES


def test_decoding_from_an_episode_needs_nothing_before_it(tmp_path: Path) -> None:
    """A key frame that later frames look behind would give other pictures after a seek."""
    films = [moving_ball(30, 3), moving_ball(30, 4)]
    spans = written(tmp_path / "film.mp4", films)
    _, _, played = decoded(tmp_path / "film.mp4")
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        container.seek(round(spans[1][0] / stream.time_base), stream=stream)
        sought = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    np.testing.assert_array_equal(sought, played[30:])


def test_bytes_do_not_depend_on_what_memory_held_before(tmp_path: Path) -> None:
    """With x264's macroblock tree about one file in a hundred differed, in key frames of small films."""
    rng = np.random.default_rng(0)
    film = moving_ball(40, 5, side=32)
    contents = set()
    for _ in range(40):
        rubbish = [
            np.frombuffer(rng.bytes(int(size)), np.uint8).copy() for size in rng.integers(1, 50_000, 30)
        ]
        del rubbish[::2]
        written(tmp_path / "film.mp4", [film[:20], film[20:27], film[27:]])
        contents.add((tmp_path / "film.mp4").read_bytes())
    assert len(contents) == 1


def test_bytes_are_counted(tmp_path: Path) -> None:
    file = EpisodeVideoFile(tmp_path / "film.mp4", FPS, (64, 64), 20)
    file.append(moving_ball(60, 6))
    file.close()
    assert 0 < file.encoded_bytes <= (tmp_path / "film.mp4").stat().st_size
