"""What is asked about a moment is told from frames up to it: no setting lets a later one in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from salt_vla.config import EncoderConfig, ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.lerobot_writer import DatasetLayout, Episode, Feature, writing_dataset
from salt_vla.data.segments import Cutting
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Side
from salt_vla.evaluation.causal import CausalReader, Windows, every, frames_back, open_windows
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore
from salt_vla.evaluation.features import Reading
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data_index import index_data
from salt_vla.models import build_encoder
from salt_vla.teachers.pixel import EncoderTeacher

GEOMETRY = ClipGeometry(num_frames=8, image_size=64, tubelet_size=2, patch_size=16)
VIEW = ViewConfig(frame_stride=2)
SPAN = 15  # file frames of a clip
CAMERA = "observation.images.front"


def side(table: ClipTable) -> Side:
    table = table.select(camera=CAMERA)
    return Side(table, ClipViews(table.clip_ids, ViewReader(table, VIEW, GEOMETRY), "p"))


def windows(table: ClipTable, stride: int = 10, ahead: int = 0, view: ViewConfig = VIEW) -> Windows:
    found = open_windows(side(table), view, GEOMETRY, every(stride, ahead))
    assert found is not None
    return found


def test_moments_are_the_last_frames_of_even_stretches() -> None:
    assert list(every(10)(34)) == [9, 19, 29]
    assert list(every(10)(30)) == [9, 19, 29]
    assert list(every(10)(7)) == [6]
    assert list(every(1)(3)) == [0, 1, 2]


def test_what_follows_a_moment_is_a_moment_too_where_the_episode_has_it() -> None:
    assert list(every(10, 8)(34)) == [9, 17, 19, 27, 29]
    assert list(every(10, 10)(34)) == [9, 19, 29]
    assert list(every(10, 40)(34)) == [9, 19, 29]


@pytest.mark.parametrize(
    "view", [VIEW, ViewConfig(frame_stride=1), ViewConfig(sampling="fps", target_fps=7.0)]
)
def test_no_frame_of_a_clip_lies_after_its_last(view: ViewConfig) -> None:
    back = frames_back(view, 8, 30.0)
    assert len(back) == 8 and back[-1] == 0
    assert list(back) == sorted(back, reverse=True)


def test_a_clip_spread_over_the_whole_video_has_no_moment() -> None:
    with pytest.raises(DataError, match="'uniform' spreads a clip over the whole video"):
        frames_back(ViewConfig(sampling="uniform"), 8, 30.0)


def test_a_window_shows_the_frames_up_to_its_moment_and_no_other(
    tiny_table: ClipTable, read_code: Callable[[np.ndarray], tuple[int, int, int]]
) -> None:
    """From real films, whose frames say what they are; episodes share files."""
    found = windows(tiny_table)
    shown = found.side.views.views.read_many([(clip, 0) for clip in found.side.clips.clip_ids])
    for film, episode, moment in zip(shown, found.episodes, found.moments, strict=True):
        frames = [max(int(moment) - back, 0) for back in range(SPAN - 1, -1, -2)]
        assert [read_code(image) for image in film] == [(episode, 0, frame) for frame in frames]


def test_windows_know_their_episode_task_and_length(tiny_table: ClipTable) -> None:
    found = windows(tiny_table)
    assert len(found) == len(set(found.side.clips.clip_ids))
    clips = tiny_table.clips()
    for episode in sorted({clip.episode for clip in clips}):
        mine = found.episodes == episode
        (length,) = {clip.episode_frames for clip in clips if clip.episode == episode}
        assert found.moments[mine].tolist() == list(every(10)(length))
        assert set(found.lengths[mine].tolist()) == {length}
        tasks = {task for task, is_mine in zip(found.tasks, mine, strict=True) if is_mine}
        assert tasks == {clip.label for clip in clips if clip.episode == episode}


def test_a_robot_that_has_just_begun_sees_its_first_frame_held(
    tiny_table: ClipTable, read_code: Callable[[np.ndarray], tuple[int, int, int]]
) -> None:
    found = windows(tiny_table, stride=1)
    first = found.side.clips.clip_ids[1]
    (film,) = found.side.views.views.read_many([(first, 0)])
    assert first.endswith("until-000001")
    assert [read_code(image)[2] for image in film] == [0, 0, 0, 0, 0, 0, 0, 1]


def test_a_view_shifted_in_time_is_refused(tiny_table: ClipTable) -> None:
    found = windows(tiny_table)
    with pytest.raises(DataError, match="have one view, 0"):
        found.side.views.views.read_many([(found.side.clips.clip_ids[0], 1)])


def test_no_moment_is_no_window(tiny_table: ClipTable) -> None:
    assert open_windows(side(tiny_table), VIEW, GEOMETRY, lambda frames: []) is None


def test_other_frames_are_other_features(tiny_table: ClipTable) -> None:
    """Stores are found by the hash of what decides pixels, which windows at other moments change."""
    hashes = {windows(tiny_table, stride).side.views.pixels_hash for stride in (5, 10)}
    hashes |= {windows(tiny_table, 10, view=ViewConfig(frame_stride=1)).side.views.pixels_hash}
    assert len(hashes) == 3


# The proof: films that differ after a moment alone give the same features up to it, bit for bit.

CHANGED_EPISODE, MOMENT, LENGTH = 1, 19, 40


def write_films(folder: Path, future: int) -> ClipTable:
    """Two episodes in one lossless film; those of the second differ after frame 19 by `future`."""
    layout = DatasetLayout(30, {"action": Feature("float32", (2,))}, (CAMERA,), (64, 64), "toy", video_crf=0)
    rng = np.random.default_rng(0)
    with writing_dataset(folder, layout) as writer:
        writer.start_split("train")
        for episode in range(2):
            film = rng.integers(0, 200, (LENGTH, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
            if episode == CHANGED_EPISODE:
                film[MOMENT + 1 :] += np.uint8(future)
            writer.add_episode(Episode("t", {"action": np.zeros((LENGTH, 2), np.float32)}, {CAMERA: film}))
    return index_data(folder, Cutting(VIEW, GEOMETRY.num_frames))[0]


Reader = Callable[[Windows], ViewReader]


def features(table: ClipTable, folder: Path, reader: Reader | None = None) -> tuple[Windows, np.ndarray]:
    found = windows(table, stride=5)
    views = found.side.views
    if reader is not None:
        views = ClipViews(views.clip_ids, reader(found), "leaking")
    torch.manual_seed(0)
    config = EncoderConfig(name="vit_micro", depth=1, geometry=GEOMETRY)
    model = EncoderTeacher(build_encoder(config), "random")
    reading = Reading("grid")
    return found, FeatureStore(folder).features({"e": model}, views, [reading])[reading]["e"]


@pytest.fixture(scope="module")
def two_futures(tmp_path_factory: pytest.TempPathFactory) -> list[ClipTable]:
    folder = tmp_path_factory.mktemp("futures")
    return [write_films(folder / f"films-{future}", future) for future in (0, 50)]


def seen_differently(
    tables: list[ClipTable], tmp_path: Path, reader: Reader | None = None
) -> list[tuple[int, int]]:
    """(episode, moment) of the windows whose features are not bitwise the same for another future."""
    (found, before), (_, after) = (
        features(table, tmp_path / f"features-{number}", reader) for number, table in enumerate(tables)
    )
    changed = (before != after).any(1)
    return list(zip(found.episodes[changed].tolist(), found.moments[changed].tolist(), strict=True))


AFTER = [(CHANGED_EPISODE, moment) for moment in (24, 29, 34, 39)]


def test_another_future_leaves_every_earlier_feature_bitwise_as_it_was(
    two_futures: list[ClipTable], tmp_path: Path
) -> None:
    assert seen_differently(two_futures, tmp_path) == AFTER


class Peeking(CausalReader):
    """Looks one frame ahead."""

    def frames_of(self, clip: Clip, view: int) -> tuple[int, ...]:
        last = clip.episode_first_frame + clip.episode_frames - 1
        return tuple(min(frame + 1, last) for frame in super().frames_of(clip, view))


class Following(CausalReader):
    """Takes the frames that begin at the moment, as who cuts clips by their first frame."""

    def frames_of(self, clip: Clip, view: int) -> tuple[int, ...]:
        last = clip.episode_first_frame + clip.episode_frames - 1
        begin = self.last[clip.clip_id]
        return tuple(min(begin + 2 * step, last) for step in range(GEOMETRY.num_frames))


@pytest.mark.parametrize(("kind", "sees"), [(Peeking, 1), (Following, SPAN - 1)])
def test_a_reader_that_looks_ahead_is_caught_by_the_same_proof(
    two_futures: list[ClipTable], tmp_path: Path, kind: type[CausalReader], sees: int
) -> None:
    def leaking(found: Windows) -> ViewReader:
        reader = found.side.views.views
        assert isinstance(reader, CausalReader)
        return kind(reader.table, VIEW, GEOMETRY, reader.last)

    expected = [
        (CHANGED_EPISODE, moment) for moment in every(5)(LENGTH) if min(moment + sees, LENGTH - 1) > MOMENT
    ]
    assert seen_differently(two_futures, tmp_path, leaking) == expected
    assert expected[0] == (CHANGED_EPISODE, MOMENT if sees == 1 else 9)
