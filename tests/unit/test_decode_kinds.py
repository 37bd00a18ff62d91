"""Files as cameras, editors and encoders leave them: every picture at its time, upright, in RGB."""

from __future__ import annotations

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from salt_vla.data import decode, video_file
from salt_vla.data.decode import VideoFacts, probe, read_frames, stream_frames
from salt_vla.data.video_file import Deadline, TooSlow
from salt_vla.errors import DataError

HEIGHT, WIDTH = 48, 64
# Milliseconds: three pictures a tenth apart, a gap, two close ones, a long hold, and a steady end.
TIMES = [0, 100, 200, 700, 710, 1500, *range(1600, 2600, 100)]


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Its number as 8 vertical stripes, black or white, over the whole height."""
    stripe = np.array([number >> bit & 1 for bit in range(8)]).repeat(-(-width // 8))[:width]
    return np.broadcast_to((stripe * 219 + 16)[None, :, None], (height, width, 3)).astype(np.uint8)


def number_of(image: np.ndarray) -> int:
    width = image.shape[1]
    edges = [(2 * bit + 1) * -(-width // 8) // 2 for bit in range(8)]
    return sum(int(image[:, min(at, width - 1)].mean() > 128) << bit for bit, at in enumerate(edges))


def write(
    path: Path,
    codec: str = "libx264",
    times: list[int] | None = None,
    frames: int = 20,
    pixels: str = "yuv420p",
    shape: tuple[int, int] = (HEIGHT, WIDTH),
    rate: int = 10,
    source: str = "rgb24",
    **options: str,
) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *shape, pixels
        stream.codec_context.thread_count = 1
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(len(times) if times else frames):
            image = picture(number, *shape)
            if source == "rgba":
                image = np.dstack([image, np.full(shape, 40 * (number % 7), np.uint8)])
            frame = av.VideoFrame.from_ndarray(image, format=source)
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shown(path: Path, fps: float, variable: bool, frames: int) -> list[int]:
    return [number_of(image) for image in read_frames(path, range(frames), fps, variable)]


def expected(times: list[int], fps: float, frames: int) -> list[int]:
    """From the definition: the last picture that began before the middle of the slot."""
    middles = [(slot + 0.5) / fps for slot in range(frames)]
    return [max(n for n, time in enumerate(times) if n == 0 or time / 1000 < middle) for middle in middles]


KEPT = {
    "mp4": ("libx264", {"g": "6", "bf": "2"}),
    "webm": ("libvpx-vp9", {"g": "6", "deadline": "realtime", "cpu-used": "8"}),
    "mkv": ("libx264", {"g": "4", "bf": "0"}),
}


@pytest.fixture(scope="module", params=KEPT)
def variable(request, tmp_path_factory) -> Path:
    codec, options = KEPT[request.param]
    return write(tmp_path_factory.mktemp("variable") / f"v.{request.param}", codec, TIMES, **options)


@pytest.mark.parametrize("fps", [10.0, 24.0, 4.0])
def test_a_picture_of_a_variable_rate_is_held_until_the_next(variable, fps):
    frames = round(2.6 * fps) - 1
    assert shown(variable, fps, True, frames) == expected(TIMES, fps, frames)
    for number in range(0, frames, 3):
        (image,) = read_frames(variable, [number], fps, True)
        assert number_of(image) == expected(TIMES, fps, frames)[number]


def test_nothing_is_held_beyond_the_last_pictures_own_time(variable):
    with pytest.raises(DataError, match="ends before frame 40"):
        read_frames(variable, [40], 10.0, True)


def test_a_constant_rate_file_must_have_every_frame(variable):
    with pytest.raises(DataError, match=r"lacks frame 3 though it has later ones: .* rate than 10 a second"):
        read_frames(variable, [3], 10.0)


def test_facts_of_a_variable_rate_say_so_and_every_frame_can_be_read(variable):
    facts = probe(variable)
    assert facts.variable_rate and (facts.height, facts.width) == (HEIGHT, WIDTH)
    assert 3 < facts.fps < 12
    assert len(read_frames(variable, range(facts.frames), facts.fps, True)) == facts.frames


def test_a_lost_picture_is_no_reason_to_hold_the_one_before(tmp_path):
    """The packet is there, its picture is not: what came before may be held until then and no longer."""
    path = write(tmp_path / "v.mkv", "libsvtav1", TIMES, g="1", preset="12")
    with av.open(str(path)) as container:
        packet = bytes(next(packet for packet in container.demux(video=0) if packet.pts == 1500))
    size = len(packet) - 3
    padding = bytes([0x7A, size & 127 | 128, size >> 7]) + bytes(size - 1) + b"\x80"  # AV1 specification, 5.9
    content = path.read_bytes()
    assert content.count(packet) == 1 and len(padding) == len(packet)
    path.write_bytes(content.replace(packet, padding))
    assert [number_of(image) for image in read_frames(path, [12, 14, 16], 10.0, True)] == [4, 4, 6]
    with pytest.raises(DataError, match="lacks frame 15 though it has later ones"):
        read_frames(path, [15], 10.0, True)


def test_what_cannot_be_decoded_ends_a_hold(tmp_path):
    path = write(tmp_path / "v.mkv", "mjpeg", TIMES, pixels="yuvj420p")
    content = path.read_bytes()
    starts = [at for at in range(len(content) - 3) if content[at : at + 3] == b"\xff\xd8\xff"]
    lost, after = starts[5], starts[6] - 16  # picture 5, at 1.5 s
    path.write_bytes(content[:lost] + bytes(after - lost) + content[after:])
    assert number_of(read_frames(path, [6], 10.0, True)[0]) == 2
    with pytest.raises(DataError, match=r"v\.mkv cannot be decoded: Invalid data"):
        read_frames(path, [15], 10.0, True)


CONSTANT = {
    "plain.mp4": ("libx264", {}, VideoFacts(20, 10.0, HEIGHT, WIDTH, False, "h264")),
    "av1.mp4": ("libsvtav1", {"preset": "12"}, VideoFacts(20, 10.0, HEIGHT, WIDTH, False, "av1")),
    "vp9.webm": ("libvpx-vp9", {"cpu-used": "8"}, VideoFacts(20, 10.0, HEIGHT, WIDTH, False, "vp9")),
    "hidden_frames.webm": (
        "libvpx",
        {"auto-alt-ref": "1", "lag-in-frames": "12"},
        VideoFacts(20, 10.0, HEIGHT, WIDTH, False, "vp8"),
    ),
    "transport.ts": ("libx264", {"bf": "2"}, VideoFacts(20, 10.0, HEIGHT, WIDTH, False, "h264")),
    "raw.h264": ("libx264", {"bf": "3"}, VideoFacts(20, 25.0, HEIGHT, WIDTH, False, "h264")),
    "raw.mjpeg": ("mjpeg", {}, VideoFacts(20, 25.0, HEIGHT, WIDTH, False, "mjpeg")),
    "b_frames.avi": ("libx264", {"bf": "3"}, VideoFacts(20, 10.0, HEIGHT, WIDTH, False, "h264")),
    "b_frames_mpeg4.avi": ("mpeg4", {"bf": "2"}, VideoFacts(20, 10.0, HEIGHT, WIDTH, False, "mpeg4")),
    "program_stream.mpg": (
        "mpeg2video",
        {"bf": "2"},
        VideoFacts(20, 25.0, HEIGHT, WIDTH, False, "mpeg2video"),
    ),
    "picture.gif": ("gif", {}, VideoFacts(20, 10.0, HEIGHT, WIDTH, False, "gif")),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_frames_and_facts_of_every_container(name, tmp_path):
    """Raw streams and AVI have no display times: their pictures are numbered in their order."""
    codec, options, facts = CONSTANT[name]
    pixels = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
    path = write(tmp_path / name, codec, pixels=pixels, rate=25 if codec == "mpeg2video" else 10, **options)
    assert probe(path) == facts
    assert shown(path, facts.fps, False, 20) == list(range(20))
    assert number_of(read_frames(path, [13], facts.fps)[0]) == 13


def test_one_frame_is_a_film_of_one_frame(tmp_path):
    facts = probe(write(tmp_path / "v.mp4", frames=1))
    assert facts.frames == 1 and not facts.variable_rate and 0 < facts.fps < 1000


def test_a_film_that_lost_a_few_frames_keeps_its_rate(tmp_path):
    """33 ms is no multiple of anything: the clock of a telephone, and two pictures it dropped."""
    times = [n * 100 // 3 for n in range(60) if n not in (20, 41)]
    facts = probe(write(tmp_path / "v.webm", "libvpx-vp9", times, rate=30, **{"cpu-used": "8"}))
    assert facts.variable_rate and facts.fps == pytest.approx(30, rel=0.05) and facts.frames in (58, 59, 60)


PIXELS = {
    "grey.mp4": ("libx264", "gray", "rgb24"),
    "ten_bits.mp4": ("libx264", "yuv420p10le", "rgb24"),
    "full_chroma.mp4": ("libx264", "yuv444p", "rgb24"),
    "full_range.mp4": ("libx264", "yuvj420p", "rgb24"),
    "alpha.mov": ("png", "rgba", "rgba"),
    "alpha_planar.mkv": ("ffv1", "yuva420p", "rgba"),
    "palette.gif": ("gif", "rgb8", "rgb24"),
    "sixteen_bits.mkv": ("ffv1", "rgb48le", "rgb24"),
}


@pytest.mark.parametrize("name", PIXELS)
def test_every_pixel_format_becomes_rgb_bytes(name, tmp_path):
    """Black stays black and white white; alpha is dropped, and with it neither darkens the colours."""
    codec, pixels, source = PIXELS[name]
    try:
        path = write(tmp_path / name, codec, frames=8, pixels=pixels, source=source)
    except (av.FFmpegError, ValueError) as error:
        pytest.skip(f"this FFmpeg writes no {pixels} with {codec}: {error}")
    frames = read_frames(path, range(8), 10.0)
    assert frames.dtype == np.uint8 and frames.shape == (8, HEIGHT, WIDTH, 3)
    assert [number_of(frame) for frame in frames] == list(range(8))
    assert frames[5][:, 4].mean() > 215 and frames[5][:, 12].mean() < 40
    if codec != "gif":  # whose encoder dithers
        assert np.ptp(frames[5][:, 4].astype(int)) < 12


@pytest.mark.parametrize("shape", [(47, 63), (1, 1), (2, 130), (33, 64)])
def test_odd_sizes_keep_their_size(shape, tmp_path):
    path = write(tmp_path / "v.webm", "libvpx-vp9", frames=3, shape=shape, **{"cpu-used": "8"})
    assert read_frames(path, [0, 2], 10.0).shape == (2, *shape, 3)
    assert (probe(path).height, probe(path).width) == shape


ONE = 0x10000
# Matrix (a, b, c, d) → how the quarters red, green / blue, white come to stand.
TURNS = {
    (1, 0, 0, 1): "RGBW",
    (0, 1, -1, 0): "BRWG",
    (-1, 0, 0, -1): "WBGR",
    (0, -1, 1, 0): "GWRB",
    (-1, 0, 0, 1): "GRWB",
    (1, 0, 0, -1): "BWRG",
    (0, 1, 1, 0): "RBGW",
    (0, -1, -1, 0): "WGBR",
}


@pytest.fixture(scope="module")
def quarters(tmp_path_factory) -> Path:
    """Stored: red, green above blue, white."""
    path = tmp_path_factory.mktemp("turned") / "v.mp4"
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[:24, :32], image[:24, 32:], image[24:, :32], image[24:, 32:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        255,
    )
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def with_matrix(path: Path, target: Path, a: float, b: float, c: float, d: float) -> Path:
    def entries(a: float, b: float, c: float, d: float) -> bytes:
        return struct.pack(
            ">9i", round(a * ONE), round(b * ONE), 0, round(c * ONE), round(d * ONE), 0, 0, 0, 1 << 30
        )

    content = path.read_bytes()
    at = content.index(entries(1, 0, 0, 1), content.index(b"tkhd"))
    target.write_bytes(content[:at] + entries(a, b, c, d) + content[at + 36 :])
    return target


@pytest.mark.parametrize(("matrix", "standing"), TURNS.items())
def test_turned_and_mirrored_films_are_shown_upright(quarters, matrix, standing, tmp_path):
    path = with_matrix(quarters, tmp_path / "v.mp4", *matrix)
    (image,) = read_frames(path, [1], 10.0)
    height, width = (WIDTH, HEIGHT) if matrix[0] == 0 else (HEIGHT, WIDTH)
    assert image.shape == (height, width, 3) and (probe(path).height, probe(path).width) == (height, width)
    names = {(255, 0, 0): "R", (0, 255, 0): "G", (0, 0, 255): "B", (255, 255, 255): "W"}
    corners = [image[8, 8], image[8, -8], image[-8, 8], image[-8, -8]]
    assert "".join(names[tuple(int(v > 128) * 255 for v in corner)] for corner in corners) == standing


@pytest.mark.parametrize("matrix", [(0.8, 0.6, -0.6, 0.8), (1, 1, 0, 1), (0, 0, 0, 0)])
def test_a_film_turned_by_no_quarter_is_refused(quarters, matrix, tmp_path):
    path = with_matrix(quarters, tmp_path / "v.mp4", *matrix)
    for read in (lambda path: read_frames(path, [0], 10.0), probe):
        with pytest.raises(DataError, match="turned by no multiple of 90°; write it anew"):
            read(path)


def test_stretches_nobody_wants_are_not_decoded(tmp_path, monkeypatch):
    """One pass for clips far apart leaves out what lies between, where the index names a key frame."""
    path = write(tmp_path / "v.mp4", frames=250, g="10", bf="2")
    monkeypatch.setenv("SALT_VLA_DECODER", "pyav")
    decoded: list[int] = []
    frames_of = decode._Pass._frames
    monkeypatch.setattr(
        decode._Pass, "_frames", lambda self: (decoded.append(1) or f for f in frames_of(self))
    )
    wanted = [3, 4, 5, 120, 121, 240]
    assert {n: number_of(image) for n, image in stream_frames(path, wanted, 10.0)} == {n: n for n in wanted}
    assert len(decoded) < 60


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "v.mp4")
    for read in (lambda path: read_frames(path, [0], 10.0), probe):
        with pytest.raises(DataError, match="is no regular file"):
            read(tmp_path / "v.mp4")


def test_decoding_is_given_up_when_it_takes_too_long(tmp_path, monkeypatch):
    monkeypatch.setenv("SALT_VLA_DECODER", "pyav")
    path = write(tmp_path / "v.mp4", frames=30)
    with pytest.raises(TooSlow, match=r"v\.mp4 took longer than 0 s to decode one clip"):
        list(stream_frames(path, [25], 10.0, deadline=Deadline(0.0)))


def test_a_header_that_claims_too_much_is_refused_before_there_is_room_for_it(tmp_path, monkeypatch):
    path = write(tmp_path / "v.mp4", frames=3)
    monkeypatch.setenv("SALT_VLA_DECODER", "pyav")
    monkeypatch.setattr(video_file, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    for read in (lambda path: read_frames(path, [0], 10.0), probe):
        with pytest.raises(DataError, match="says that its pictures are 64 × 48, more than 3071 pixels"):
            read(path)


def test_pictures_that_change_their_size_are_not_stacked(tmp_path):
    path = write(tmp_path / "one.h264", frames=4)
    other = write(tmp_path / "two.h264", frames=4, shape=(32, 32))
    path.write_bytes(path.read_bytes() + other.read_bytes())
    assert read_frames(path, [0, 3], 25.0).shape == (2, HEIGHT, WIDTH, 3)
    with pytest.raises(DataError, match="changes the size of its pictures"):
        read_frames(path, [3, 4], 25.0)
