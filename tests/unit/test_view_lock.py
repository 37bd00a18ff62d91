"""A view is a pure function of (clip id, view number): the same bytes in any process and order, for good."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from salt_vla.config import ViewConfig
from salt_vla.data import view_lock
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.decode import read_frames
from salt_vla.data.view_lock import View, ViewReader, cut, draw_view, view_hash
from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=16)
CONFIG = ViewConfig(frame_stride=2, num_views=4, crop_scale=(0.3, 0.9), max_shift=6)
CLIP = Clip(
    "set/000003/front/000016",
    "set",
    "lerobot",
    "a.mp4",
    116,
    3,
    100,
    60,
    "front",
    "push",
    30.0,
    False,
    "train",
)


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def reader(table: ClipTable) -> ViewReader:
    return ViewReader(table, CONFIG, GEOMETRY)


def test_cutting_is_the_arithmetic_on_record():
    """If this fails, old caches hold other pixels: give `view_lock.ALGORITHM` another name."""
    pattern = np.arange(2 * 37 * 53 * 3, dtype=np.int64)
    frames = ((pattern * pattern // 7) % 251).astype(np.uint8).reshape(2, 37, 53, 3)
    pixels = np.stack([cut(frame, (0.1, 0.05, 0.8), 16) for frame in frames])
    assert pixels.shape == (2, 16, 16, 3) and pixels.dtype == np.uint8
    assert digest(pixels) == "707cab1afb5a948d465d78bab3e59ba2fe4b6743b6e8bf5293ce32a3756d04ec"


def test_draws_are_the_ones_on_record():
    view = draw_view(CLIP, 2, CONFIG, GEOMETRY, (48, 64))
    assert view == View(
        frames=(118, 120, 122, 124, 126, 128, 130, 132),
        crop=(0.05447868842654966, 0.08131922882340055, 0.6024575286729127),
    )


def test_cutting_without_scaling_copies_the_pixels():
    frame = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    assert np.array_equal(cut(frame, (8 / 24, 0.0, 1.0), 24), frame[:, 8:32])
    assert np.array_equal(cut(frame, (12 / 24, 6 / 24, 0.5), 12), frame[6:18, 12:24])


@pytest.mark.parametrize("side", [23, 64, 97, 240, 480])
def test_resizing_is_pillows_to_one_grey_level(side):
    """An independent implementation of the same filter, whose integer weights have more bits."""
    frame = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    expected = Image.fromarray(frame).resize((96, 96), Image.Resampling.BILINEAR)
    difference = np.abs(cut(frame, (0.0, 0.0, 1.0), 96).astype(int) - np.asarray(expected))
    assert difference.max() <= 1 and difference.mean() < 0.02


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.floats(0.05, 1), st.floats(0, 1), st.floats(0, 1))
def test_crops_are_whole_pixels_within_the_picture(height, width, side, right, down):
    """What a crop shows is that stretch of the picture, at most half a pixel away from where it was drawn."""
    short = min(height, width)
    y, x = np.mgrid[:height, :width]
    picture = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    pixels = max(round(side * short), 1)
    left, top = right * (width / short - side), down * (height / short - side)
    shown = cut(picture, (left, top, side), pixels)
    assert shown[0, 0, 0] == pytest.approx(left * short, abs=1.01)
    assert shown[0, 0, 1] == pytest.approx(top * short, abs=1.01)
    assert np.array_equal(shown[..., 0] - shown[0, 0, 0], np.arange(pixels) + 0 * shown[..., 0])


def test_view_0_is_the_centred_square_of_the_clips_own_frames():
    for shape, left, top in [((48, 64), 1 / 6, 0.0), ((64, 48), 0.0, 1 / 6), ((48, 48), 0.0, 0.0)]:
        view = draw_view(CLIP, 0, CONFIG, GEOMETRY, shape)
        assert view.frames == tuple(range(116, 131, 2))
        assert view.crop == pytest.approx((left, top, 1.0), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(
    number=st.integers(0, 50),
    view=st.integers(1, 50),
    low=st.floats(0.01, 1),
    high=st.floats(0, 1),
    max_shift=st.integers(0, 100),
    start=st.integers(0, 45),
    shape=st.tuples(st.integers(16, 300), st.integers(16, 300)),
    stride=st.integers(1, 2),
)
def test_random_views_lie_within_frame_and_episode(number, view, low, high, max_shift, start, shape, stride):
    scale = (low, max(low, high))
    config = ViewConfig(frame_stride=stride, num_views=51, crop_scale=scale, max_shift=max_shift)
    clip = replace(CLIP, clip_id=f"clip{number}", first_frame=100 + start, episode_first_frame=100)
    drawn = draw_view(clip, view, config, GEOMETRY, shape)
    left, top, side = drawn.crop
    height, width = shape[0] / min(shape), shape[1] / min(shape)
    assert scale[0] - 1e-9 <= side**2 <= scale[1] + 1e-9
    assert left >= -1e-9 and left + side <= width + 1e-9
    assert top >= -1e-9 and top + side <= height + 1e-9
    assert drawn.frames[0] >= 100 and drawn.frames[-1] < 160
    assert np.all(np.diff(drawn.frames) == stride)
    assert cut(np.zeros((*shape, 3), np.uint8), drawn.crop, 8).shape == (8, 8, 3)
    latest = 60 - (7 * stride + 1)
    assert abs(drawn.frames[0] - 100 - min(start, latest)) <= max_shift + max(start - latest, 0)


def test_random_views_use_the_whole_range_they_are_given():
    views = [draw_view(CLIP, number, CONFIG, GEOMETRY, (48, 64)) for number in range(1, 500)]
    area = np.array([view.crop[2] ** 2 for view in views])
    assert 0.3 <= area.min() < 0.32 and 0.88 < area.max() <= 0.9
    assert area.mean() == pytest.approx(0.6, abs=0.03)
    shifts = {view.frames[0] - CLIP.first_frame for view in views}
    assert shifts == set(range(-6, 7))
    centre = np.array([view.crop[0] + view.crop[2] / 2 for view in views])
    assert centre.mean() == pytest.approx(64 / 48 / 2, abs=0.03)


def test_views_depend_on_clip_and_number_and_not_on_how_many_there_are():
    def drawn(clip: Clip, number: int, **changes: int) -> View:
        return draw_view(clip, number, replace(CONFIG, **changes), GEOMETRY, (48, 64))

    assert drawn(CLIP, 2) == drawn(CLIP, 2, num_views=99)
    assert drawn(CLIP, 2) != drawn(CLIP, 3) != drawn(replace(CLIP, clip_id="other"), 3)
    assert drawn(CLIP, 2) == drawn(replace(CLIP, label="pull", split="validation"), 2)


@pytest.mark.parametrize(
    ("view", "geometry"),
    [
        ({"frame_stride": 3}, {}),
        ({"crop_scale": (0.3, 0.8)}, {}),
        ({"crop_scale": (0.2, 0.9)}, {}),
        ({"max_shift": 7}, {}),
        ({}, {"num_frames": 4}),
        ({}, {"image_size": 48}),
    ],
)
def test_hash_changes_with_whatever_decides_pixels(view, geometry):
    assert view_hash(replace(CONFIG, **view), replace(GEOMETRY, **geometry)) != view_hash(CONFIG, GEOMETRY)


def test_hash_does_not_change_with_what_decides_no_pixel():
    assert view_hash(replace(CONFIG, num_views=9), GEOMETRY) == view_hash(CONFIG, GEOMETRY)
    tokens = replace(GEOMETRY, tubelet_size=4, patch_size=8)
    assert view_hash(CONFIG, tokens) == view_hash(CONFIG, GEOMETRY)


def test_fields_that_came_later_count_where_they_are_used():
    assert view_hash(replace(CONFIG, short="hold"), GEOMETRY) != view_hash(CONFIG, GEOMETRY)
    over_all = replace(CONFIG, sampling="uniform")
    assert view_hash(over_all, GEOMETRY) != view_hash(CONFIG, GEOMETRY)


def test_view_0_shows_the_tables_frames(tiny_table, read_code):
    """At the file's own size nothing is resampled, so the code in the picture can be read."""
    geometry = replace(GEOMETRY, image_size=64)
    views = ViewReader(tiny_table, CONFIG, geometry)
    for clip in tiny_table.clips():
        pixels = views.read(clip.clip_id)
        camera = int(clip.camera.endswith("side"))
        starts = range(clip.start_in_episode, clip.start_in_episode + 15, 2)
        assert [read_code(image) for image in pixels] == [(clip.episode, camera, at) for at in starts]


def test_shifted_views_show_frames_of_their_own_episode(tiny_table, read_code):
    geometry, config = replace(GEOMETRY, image_size=64), replace(CONFIG, crop_scale=(1.0, 1.0), max_shift=40)
    views = ViewReader(tiny_table, config, geometry)
    shifts = set()
    for clip in tiny_table.clips():
        for number in (1, 2, 3):
            codes = [read_code(image) for image in views.read(clip.clip_id, number)]
            assert {code[0] for code in codes} == {clip.episode}
            first = codes[0][2]
            assert [code[2] for code in codes] == list(range(first, first + 15, 2))
            assert first + 15 <= clip.episode_frames
            shifts.add(first - clip.start_in_episode)
    assert len(shifts) > 10


def test_reading_is_cutting_the_decoded_frames(tiny_table):
    views = reader(tiny_table)
    for clip in tiny_table.clips()[::5]:
        for number in range(3):
            drawn = draw_view(clip, number, CONFIG, GEOMETRY, (64, 64))
            frames = read_frames(tiny_table.video(clip), drawn.frames, clip.fps)
            expected = [cut(frame, drawn.crop, 32) for frame in frames]
            assert np.array_equal(views.read(clip.clip_id, number), expected)


def all_keys(table: ClipTable) -> list[tuple[str, int]]:
    return [(clip_id, view) for clip_id in table.clip_ids for view in range(4)]


def test_order_of_reading_does_not_matter(tiny_table):
    keys = all_keys(tiny_table)
    in_order = reader(tiny_table).read_many(keys)
    assert in_order.shape == (96, 8, 32, 32, 3)
    order = np.random.default_rng(0).permutation(len(keys))
    shuffled = reader(tiny_table).read_many([keys[at] for at in order])
    assert np.array_equal(shuffled, in_order[order])
    alone = [reader(tiny_table).read(*key) for key in keys[::13]]
    assert np.array_equal(alone, in_order[::13])


def test_a_shared_pass_gives_the_bytes_of_reading_alone(tiny_table, monkeypatch):
    keys = all_keys(tiny_table)
    alone = {key: reader(tiny_table).read(*key) for key in keys}
    for pass_bytes in (0, 100_000, view_lock.PASS_BYTES):
        monkeypatch.setattr(view_lock, "PASS_BYTES", pass_bytes)
        order = np.random.default_rng(pass_bytes).permutation(len(keys)) if pass_bytes else range(len(keys))
        read = list(reader(tiny_table).read_each([keys[at] for at in order]))
        assert [key for key, _ in read] == [keys[at] for at in order]
        assert all(np.array_equal(pixels, alone[key]) for key, pixels in read)


def test_squares_that_wait_for_each_other_give_the_bytes_of_one_by_one(tiny_table, monkeypatch):
    keys = all_keys(tiny_table)
    monkeypatch.setattr(view_lock, "WAITING_BYTES", 0)
    one_by_one = reader(tiny_table).read_many(keys)
    at_once: list[int] = []
    resized = view_lock.resized
    monkeypatch.setattr(
        view_lock, "resized", lambda squares, size: at_once.append(squares.nbytes) or resized(squares, size)
    )
    for waiting in (200_000, 4 * 2**20):
        monkeypatch.setattr(view_lock, "WAITING_BYTES", waiting)
        assert np.array_equal(reader(tiny_table).read_many(keys), one_by_one)
        reader(tiny_table).read(*keys[0])
        assert 64 * 64 * 3 < max(at_once) <= waiting


def test_a_size_that_changes_at_a_views_last_frame_is_a_sentence(tmp_path):
    """Nothing of the view is given, though all its other pictures came."""
    films = []
    for name, side in (("one.h264", 64), ("two.h264", 32)):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
            for number in range(7):
                image = np.full((side, side, 3), 20 * number, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        films.append((tmp_path / name).read_bytes())
    (tmp_path / "v.h264").write_bytes(b"".join(films))
    clip = Clip("c", "d", "folder", "v.h264", 0, 0, 0, 8, "", "", 25.0, False, "train")
    table = ClipTable.from_clips([clip], tmp_path)
    whole = ViewReader(table, ViewConfig(frame_stride=1), ClipGeometry(8, 32, tubelet_size=2, patch_size=16))
    with pytest.raises(DataError, match=r"v\.h264 changes the size of its pictures at frame 7"):
        whole.read("c")


def test_clips_of_one_file_share_one_pass(tiny_table, monkeypatch):
    """Every clip and view of a camera's films from one way through the file."""
    passes = []
    stream = view_lock.stream_frames
    monkeypatch.setattr(view_lock, "stream_frames", lambda *args: passes.append(args) or stream(*args))
    front = tiny_table.select(camera="observation.images.front", split="train")
    reader(front).read_many(all_keys(front))
    assert len(passes) == len(set(front.rows["file"].to_pylist())) == 1


def test_one_bad_clip_harms_no_other_of_its_pass(tiny_table):
    clips = tiny_table.clips()[:4]
    clips[1] = replace(clips[1], episode_frames=4000, first_frame=3900)
    clips[3] = replace(clips[3], file="videos/nowhere.mp4")
    table = ClipTable.from_clips(clips, tiny_table.root)
    read = dict(reader(table).read_each([(clip.clip_id, 0) for clip in clips] + [("nobody", 0)]))
    whole = reader(tiny_table)
    for clip in (clips[0], clips[2]):
        assert np.array_equal(read[clip.clip_id, 0], whole.read(clip.clip_id))
    messages = [str(pixels) for pixels in read.values() if isinstance(pixels, DataError)]
    assert len(messages) == 3
    for message, part in zip(
        messages, ("ends before frame 3900", "is missing", "not in the clip"), strict=True
    ):
        assert part in message
    with pytest.raises(DataError, match="ends before frame 3900"):
        reader(table).read_many([(clip.clip_id, 0) for clip in reversed(clips[:3])])


def test_another_process_reads_the_same_bytes(tiny_dataset, tiny_table):
    code = f"""
import hashlib
from pathlib import Path
from salt_vla.config import ViewConfig
from salt_vla.data.segments import Cutting
from salt_vla.jobs.data_index import index_data
from salt_vla.data.view_lock import ViewReader
from salt_vla.geometry import ClipGeometry
table = index_data(Path({str(tiny_dataset)!r}), Cutting(ViewConfig(frame_stride=2), 8))[0]
views = ViewReader(table, {CONFIG!r}, {GEOMETRY!r})
keys = [(clip_id, view) for clip_id in table.clip_ids for view in range(4)]
print({{key: hashlib.sha256(views.read(*key).tobytes()).hexdigest() for key in reversed(keys)}})
"""
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    views = reader(tiny_table)
    ours = {key: digest(views.read(*key)) for key in all_keys(tiny_table)}
    assert done.stdout.strip() == repr(dict(reversed(ours.items())))


def one_clip(table: ClipTable, **changes: object) -> ViewReader:
    return reader(ClipTable.from_clips([replace(table.clips()[0], **changes)], table.root))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episode_frames": 14}, "its episode has 14 frames, too few for 8 frames at stride 2"),
        (
            {"first_frame": 25},
            "8 frames at stride 2 from frame 25 of its episode reach beyond the episode's 34",
        ),
        ({"episode_first_frame": 3}, "8 frames at stride 2 from frame -3 of its episode reach beyond"),
        ({"file": "videos/nowhere.mp4"}, "video .*nowhere.mp4 is missing"),
        ({"file": "../x.mp4"}, "leaves the data set's root"),
        ({"episode_frames": 500, "first_frame": 240}, "ends before frame 2"),
    ],
)
def test_what_cannot_be_read_is_a_sentence_that_begins_with_the_clip(tiny_table, changes, message):
    views = one_clip(tiny_table, **changes)
    (clip_id,) = views.table.clip_ids
    for view in (0, 1):
        with pytest.raises(DataError, match=f"^clip '{clip_id}', view {view}: .*{message}"):
            views.read(clip_id, view)


def test_an_unknown_clip_is_a_sentence(tiny_table):
    with pytest.raises(DataError, match="clip 'nobody' is not in the clip table"):
        reader(tiny_table).read("nobody")


def test_reader_says_the_hash_of_its_views(tiny_table):
    assert reader(tiny_table).hash == view_hash(CONFIG, GEOMETRY)
