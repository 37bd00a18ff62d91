"""Frame n is frame n, however it is reached; what cannot be read is a sentence that names the file."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from salt_vla.data.decode import probe, read_frames
from salt_vla.errors import DataError

LENGTHS = (34, 40, 32, 37, 33, 36)
TOTAL = sum(LENGTHS)
NUMBERED = 70


def numbered(number: int) -> np.ndarray:
    """48 × 64 × 3: the number as 8 blocks of 8 × 8, black or white, above a moving shade."""
    image = np.full((48, 64, 3), 60 + 2 * (number % 50), np.uint8)
    image[:16] = np.kron([number >> bit & 1 for bit in range(8)], np.ones((16, 8)))[..., None] * 219 + 16
    return image


def number_of(image: np.ndarray) -> int:
    blocks = image[:16].mean(axis=(0, 2)).reshape(8, 8).mean(axis=1)
    return sum(int(bright) << bit for bit, bright in enumerate(blocks > 128))


def write_video(path: Path, codec: str, rate: Fraction, frames: int = NUMBERED, **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode(None))
    return path


KINDS = {
    "plain.mp4": ("libx264", Fraction(30), {"g": "12", "bf": "0"}),
    "b_frames_open_gop.mp4": ("libx264", Fraction(30), {"g": "12", "bf": "3", "x264-params": "open-gop=1"}),
    "one_key_frame.mp4": ("libx264", Fraction(25), {"g": "500", "bf": "2"}),
    "intra_refresh.mp4": ("libx264", Fraction(25), {"g": "20", "x264-params": "intra-refresh=1"}),
    "ntsc.mp4": ("libx264", Fraction(30000, 1001), {"g": "10"}),
    "b_frames.mkv": ("libx264", Fraction(30), {"g": "15", "bf": "3"}),
    "transport.ts": ("libx264", Fraction(25), {"g": "15", "bf": "2"}),
    "milliseconds.webm": ("libvpx-vp9", Fraction(12), {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
    "old.avi": ("mpeg4", Fraction(24), {"g": "12", "qscale": "2", "b": "2000000"}),
    "program_stream.mpg": ("mpeg2video", Fraction(30), {"g": "15", "bf": "2", "b": "900000"}),
    "program_stream_1.mpg": ("mpeg1video", Fraction(25), {"g": "12", "b": "900000"}),
    "mpeg2.ts": ("mpeg2video", Fraction(25), {"g": "12", "bf": "2", "b": "900000"}),
    "flash.flv": ("flv", Fraction(25), {"g": "12", "b": "900000"}),
    "windows.wmv": ("wmv2", Fraction(25), {"g": "12", "b": "900000"}),
    "hidden_frames.mkv": ("libvpx", Fraction(25), {"g": "20", "auto-alt-ref": "1", "lag-in-frames": "12"}),
    "hevc.mp4": ("libx265", Fraction(25), {"preset": "ultrafast", "x265-params": "keyint=15:log-level=none"}),
    "av1.mkv": ("libsvtav1", Fraction(25), {"g": "15", "preset": "12"}),
    "mpeg4.mov": ("mpeg4", Fraction(25), {"g": "12", "bf": "2", "b": "900000"}),
}


@pytest.fixture(scope="module", params=KINDS)
def video(request, tmp_path_factory) -> tuple[Path, float]:
    codec, rate, options = KINDS[request.param]
    return write_video(tmp_path_factory.mktemp("video") / request.param, codec, rate, **options), float(rate)


def test_every_frame_is_itself_in_every_kind_of_file(video):
    path, fps = video
    frames = read_frames(path, range(NUMBERED), fps)
    assert frames.shape == (NUMBERED, 48, 64, 3) and frames.dtype == np.uint8
    assert [number_of(frame) for frame in frames] == list(range(NUMBERED))


def test_seeking_to_any_frame_gives_the_pixels_of_reading_all(video):
    path, fps = video
    whole = read_frames(path, range(NUMBERED), fps)
    for number in range(NUMBERED):
        alone = read_frames(path, [number], fps)
        assert np.array_equal(alone[0], whole[number]), number


def test_frames_come_in_the_order_asked_for_and_may_repeat(video):
    path, fps = video
    numbers = [40, 3, 40, 69, 0, 3, 41]
    frames = read_frames(path, numbers, fps)
    assert [number_of(frame) for frame in frames] == numbers


@pytest.mark.parametrize("camera", [0, 1])
def test_a_file_of_several_episodes_is_counted_through(tiny_dataset, read_code, camera):
    key = ("observation.images.front", "observation.images.side")[camera]
    path = tiny_dataset / "videos" / key / "chunk-000" / "file-000.mp4"
    expected = [(episode, camera, frame) for episode, length in enumerate(LENGTHS) for frame in range(length)]
    whole = read_frames(path, range(TOTAL), 30)
    assert [read_code(image) for image in whole] == expected
    starts = list(itertools.accumulate(LENGTHS, initial=0))[:-1]
    for number in [*starts, *(start - 1 for start in starts[1:]), *range(0, TOTAL, 7), TOTAL - 1]:
        (image,) = read_frames(path, [number], 30)
        assert read_code(image) == expected[number]
        assert np.array_equal(image, whole[number])


@pytest.mark.parametrize("indices", [[TOTAL], [0, TOTAL + 5], [10_000_000], range(TOTAL - 2, TOTAL + 2)])
def test_a_frame_beyond_the_end_is_named(tiny_dataset, indices):
    path = tiny_dataset / "videos/observation.images.front/chunk-000/file-000.mp4"
    beyond = min(index for index in indices if index >= TOTAL)
    with pytest.raises(DataError, match=rf"video {path} ends before frame {beyond}: it is truncated"):
        read_frames(path, list(indices), 30)


def test_frames_below_zero_and_no_frames_are_sentences(tiny_dataset):
    path = tiny_dataset / "videos/observation.images.front/chunk-000/file-000.mp4"
    with pytest.raises(DataError, match="has no frame -1"):
        read_frames(path, [3, -1], 30)
    with pytest.raises(DataError, match="no frames were asked for"):
        read_frames(path, [], 30)


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, 1024 * number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_what_is_no_video_is_a_sentence_that_names_the_file(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("a film about a text\n" * 100)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(20_000))
    (tmp_path / "folder.mp4").mkdir()
    write_audio(tmp_path / "sound.mp4")
    for name, message in {
        "empty.mp4": r"is empty \(0 bytes\); restore it",
        "text.mp4": "cannot be decoded",
        "noise.mp4": "cannot be decoded",
        "folder.mp4": "is a folder, not a file; index the data set again",
        "nowhere.mp4": "is missing; restore it or index the data set again",
        "sound.mp4": "holds no video stream",
    }.items():
        for read in (lambda path: read_frames(path, [0], 30), probe):
            with pytest.raises(DataError, match=message) as error:
                read(tmp_path / name)
            assert str(tmp_path / name) in str(error.value)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["index_last", "index_first"])
def test_truncated_anywhere_a_file_gives_right_frames_or_a_sentence(tmp_path, layout):
    """With its index at the front a cut file still opens, and gives the frames that it still holds."""
    path = write_video(tmp_path / "v.mp4", "libx264", Fraction(30), g="12")
    if layout == "index_first":
        path = move_index_to_the_front(path)
    content = path.read_bytes()
    whole = read_frames(path, range(NUMBERED), 30)
    given = 0
    for size in range(0, len(content), len(content) // 60):
        path.write_bytes(content[:size])
        for number in (0, 30, NUMBERED - 1):
            try:
                (image,) = read_frames(path, [number], 30)
            except DataError as error:
                assert str(path) in str(error)
            else:
                assert np.array_equal(image, whole[number])
                given += 1
    assert (given > 10) == (layout == "index_first")


def move_index_to_the_front(path: Path) -> Path:
    target = path.with_name("front.mp4")
    with av.open(str(path)) as source, av.open(str(target), "w", options={"movflags": "faststart"}) as sink:
        stream = sink.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                sink.mux(packet)
    return target


def test_damage_that_the_decoder_notices_is_a_sentence(tiny_dataset, tmp_path):
    """It would rather fill a damaged picture in from an older one. Flips that leave a valid stream pass."""
    source = tiny_dataset / "videos/observation.images.front/chunk-000/file-000.mp4"
    path, content = tmp_path / "v.mp4", source.read_bytes()
    whole = read_frames(source, range(40), 30)
    begin = content.index(b"mdat") + 4
    rng = np.random.default_rng(0)
    refused = passed_wrong = 0
    for _ in range(40):
        damaged = bytearray(content)
        damaged[int(rng.integers(begin, begin + 3000))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            passed_wrong += not np.array_equal(read_frames(path, range(40), 30), whole)
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > passed_wrong


def test_metadata_in_another_encoding_does_no_harm(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "cafe-title"
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(5), format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"cafe-title", b"caf\xe9-title"))
    assert number_of(read_frames(path, [0], 30)[0]) == 5
