"""Windows of a film: which frames each holds, what is summed up, and what is held in memory meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.surprise import FilmSurprise, Setting, Windows, film_surprise, film_surprises
from salt_vla.geometry import ClipGeometry

GEOMETRY = ClipGeometry(num_frames=6, image_size=8, tubelet_size=2, patch_size=4)


class Witness:
    """Notes the clips it is shown, by their frames' grey, and is surprised by (context, first frame)."""

    fingerprint, target, frame_step = "witness", "what it saw", 1

    def __init__(self, geometry: ClipGeometry = GEOMETRY) -> None:
        self.geometry = geometry
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.batches: list[int] = []

    def surprise(self, clips: np.ndarray, contexts: Sequence[int], /) -> np.ndarray:
        self.batches.append(len(clips))
        frames = clips[:, :, 0, 0, 0].astype(int)
        self.seen += [(tuple(row), tuple(contexts)) for row in frames.tolist()]
        return frames[:, :1] + np.array(contexts)[None] / 100


def counted(length: int, size: int = 8) -> np.ndarray:
    """A film whose n-th picture is of grey n."""
    return np.broadcast_to(
        np.arange(length, dtype=np.uint8)[:, None, None, None], (length, size, size, 3)
    ).copy()


def look(length: int, **windows: object) -> tuple[Witness, FilmSurprise]:
    witness = Witness()
    return witness, film_surprise(witness, counted(length), Windows(**windows))  # type: ignore[arg-type]


def test_windows_begin_every_second_frame() -> None:
    witness, found = look(12, context_frames=(4,), early=False)
    assert [frames for frames, _ in witness.seen] == [
        (0, 1, 2, 3, 4, 5),
        (2, 3, 4, 5, 6, 7),
        (4, 5, 6, 7, 8, 9),
        (6, 7, 8, 9, 10, 11),
    ]
    (curve,) = found.curves
    assert curve.starts.tolist() == [0, 2, 4, 6]
    assert curve.first.tolist() == [4, 6, 8, 10]
    assert curve.values.tolist() == pytest.approx([0.04, 2.04, 4.04, 6.04])


def test_a_frame_step_spreads_a_window_and_its_stride() -> None:
    witness, found = look(20, context_frames=(2,), frame_steps=(3,), early=False)
    assert [frames for frames, _ in witness.seen] == [(0, 3, 6, 9, 12, 15)]
    witness, found = look(28, context_frames=(2,), frame_steps=(3,), early=False)
    assert [frames[0] for frames, _ in witness.seen] == [0, 6, 12]
    assert found.curves[0].first.tolist() == [6, 12, 18]


def test_stride_is_counted_in_frames_of_the_window() -> None:
    witness, _ = look(16, context_frames=(2,), stride=5, early=False)
    assert [frames[0] for frames, _ in witness.seen] == [0, 5, 10]


def test_the_beginning_is_looked_at_with_shorter_contexts_too() -> None:
    """Else whatever happens before a whole context has passed would be missed."""
    _, found = look(8, context_frames=(4,))
    assert found.curves[0].first.tolist() == [2, 4, 6]
    assert found.curves[0].values.tolist() == pytest.approx([0.02, 0.04, 2.04])


def test_each_setting_has_its_own_curve_and_none_is_chosen() -> None:
    _, found = look(16, context_frames=(4, 2), frame_steps=(1, 2), early=False)
    assert [curve.setting for curve in found.curves] == [
        Setting(2, 1),
        Setting(2, 2),
        Setting(4, 1),
        Setting(4, 2),
    ]
    means = [curve.mean for curve in found.curves]
    assert found.mean == pytest.approx(np.mean(means))
    assert found.max == pytest.approx(np.mean([curve.max for curve in found.curves]))
    assert found.curves[0].max == pytest.approx(10.02)


def test_left_open_half_a_window_is_seen_at_the_models_pace() -> None:
    witness = Witness()
    witness.frame_step = 2
    (curve,) = film_surprise(witness, counted(30)).curves
    assert curve.setting == Setting(2, 2)  # Half of 6, in whole time steps.


def test_batches_change_nothing() -> None:
    alone, found = look(40, context_frames=(2, 4), batch=1)
    many, same = look(40, context_frames=(2, 4), batch=7)
    assert max(alone.batches) == 1
    assert max(many.batches) == 7
    for a, b in zip(found.curves, same.curves, strict=True):
        assert np.array_equal(a.values, b.values)
        assert np.array_equal(a.first, b.first)


def test_a_long_film_is_never_held_whole() -> None:
    alive: set[int] = set()
    most = 0

    class Picture(np.ndarray):
        pass

    def pictures() -> Iterator[np.ndarray]:
        nonlocal most
        for number in range(300):
            picture = np.full((8, 8, 3), number % 256, np.uint8).view(Picture)
            alive.add(number)
            weakref.finalize(picture, alive.discard, number)
            most = max(most, len(alive))
            yield picture

    film_surprise(Witness(), pictures(), Windows((2,), (2,), batch=4))
    assert most <= 11 + 2  # The span of a window, and what is at hand.


def test_wide_pictures_lose_their_sides_and_are_made_small() -> None:
    film = np.zeros((6, 32, 64, 3), np.uint8)
    film[:, :, 16:48] = 200  # The square in the middle.
    witness = Witness()
    film_surprise(witness, film, Windows((2,), early=False))
    assert {grey for frames, _ in witness.seen for grey in frames} == {200}


def test_several_models_share_a_pass_over_the_film() -> None:
    passes = 0

    def pictures() -> Iterator[np.ndarray]:
        nonlocal passes
        passes += 1
        yield from counted(12)

    found = film_surprises({"a": Witness(), "b": Witness()}, pictures())
    assert passes == 1
    assert found["a"].mean == found["b"].mean


def test_a_film_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(DataError, match="falls is shorter than one window of 6 frames"):
        film_surprise(Witness(), counted(5), name="falls")
    # Long enough for one of its steps only.
    with pytest.raises(DataError, match="11 frames"):
        film_surprise(Witness(), counted(8), Windows(frame_steps=(1, 2)))
    assert len(film_surprise(Witness(), counted(6), Windows(early=False)).curves[0].values) == 1


@pytest.mark.parametrize("contexts", [(3,), (6,), (8,), (2, 5)])
def test_contexts_that_do_not_fit_the_clips_are_refused(contexts: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="choose from 2, 4"):
        film_surprise(Witness(), counted(12), Windows(contexts))


@pytest.mark.parametrize(
    "wrong", [{"stride": 0}, {"frame_steps": (0,)}, {"context_frames": (2, 2)}, {"batch": 0}]
)
def test_windows_that_mean_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="different numbers of 1 or more"):
        Windows(**wrong)


def test_clips_of_one_step_have_no_future() -> None:
    still = Witness(ClipGeometry(num_frames=2, image_size=8, tubelet_size=2, patch_size=4))
    with pytest.raises(ConfigError, match="no future"):
        film_surprise(still, counted(12))


def test_models_of_other_clips_cannot_share_a_pass() -> None:
    other = Witness(ClipGeometry(num_frames=4, image_size=8, tubelet_size=2, patch_size=4))
    with pytest.raises(ConfigError, match="'b' takes clips of"):
        film_surprises({"a": Witness(), "b": other}, counted(12))


def test_surprise_that_is_no_number_is_refused() -> None:
    class Broken(Witness):
        def surprise(self, clips: np.ndarray, contexts: Sequence[int], /) -> np.ndarray:
            return np.full((len(clips), len(contexts)), np.nan)

    with pytest.raises(DataError, match="no numbers"):
        film_surprise(Broken(), counted(12))
