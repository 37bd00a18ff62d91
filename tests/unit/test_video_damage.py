"""A film that lost packets or pictures is not taken for a healthy one; films of any lawful times are."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import av.logging
import numpy as np
import pytest

from salt_vla.data.decode import probe, read_frames, stream_frames
from salt_vla.errors import DataError

FRAMES = 90
GROUP = 15  # pictures from one key frame to the next
CODECS = {
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "av1": ("libsvtav1", {"preset": "12"}),
    "h264": ("libx264", {"bf": "2"}),
    "mpeg4": ("mpeg4", {"b": "900000"}),
    "flv1": ("flv", {"b": "900000"}),
}


def write(
    path: Path, codec: str, times: list[int] | None = None, sound: float = 0.0, **container_options: str
) -> Path:
    """Noise that moves: packets of some hundred bytes. `times` in milliseconds, else 25 a second."""
    encoder, options = CODECS[codec]
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(20, 230, (24, 64)), np.ones((4, 4))).astype(np.uint8)
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(encoder, rate=25, options={"g": str(GROUP), **options})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.thread_count = 1
        voice = container.add_stream("aac", rate=16000) if sound else None
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(len(times or range(FRAMES))):
            view = np.ascontiguousarray(texture[number // 4 : number // 4 + 48, number : number + 64])
            frame = av.VideoFrame.from_ndarray(np.repeat(view[..., None], 3, axis=2), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        for number in range(round(sound * 16000 / 1024)):
            assert voice is not None
            tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            tone.sample_rate, tone.pts = 16000, 1024 * number
            container.mux(voice.encode(tone))
        if voice is not None:
            container.mux(voice.encode(None))
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Callable[..., Path]:
    """`film("vp9.mkv")`: written once."""
    folder, made = tmp_path_factory.mktemp("films"), {}

    def get(name: str, codec: str, **options: str) -> Path:
        if name not in made:
            made[name] = write(folder / name, codec, **options)
        return made[name]

    return get


def packets(path: Path) -> list[tuple[int, bytes]]:
    """(offset in the file, bytes) of each picture's packet."""
    content = path.read_bytes()
    with av.open(str(path)) as container:
        found = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    return [(content.index(packet), packet) for packet in found]


CUT = {
    "vp9.webm": ("vp9", {}, "ends after .* s though its header says 3.60 s: it is truncated or damaged"),
    "h264.mkv": ("h264", {}, "ends after .* s though its header says 3.60 s: it is truncated or damaged"),
    "flv1.flv": ("flv1", {}, "ends after .* s though its header says 3.60 s: it is truncated or damaged"),
    "h264.mp4": ("h264", {"movflags": "faststart"}, "is truncated or damaged: FFmpeg says .*partial file"),
}


@pytest.mark.parametrize("name", CUT)
def test_a_film_whose_end_is_missing_is_no_shorter_film(film, name, tmp_path):
    codec, options, message = CUT[name]
    content = film(name, codec, **options).read_bytes()
    path = tmp_path / name
    path.write_bytes(content)
    assert probe(path).frames == FRAMES
    for share in (0.4, 0.6, 0.9):
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(DataError, match=message) as error:
            probe(path)
        assert str(error.value).startswith(f"video {path} ") and "restore the file" in str(error.value)


@pytest.mark.parametrize("name", ["vp9.webm", "av1.mkv", "h264.mkv"])
def test_packets_that_get_lost_are_noticed(film, name, tmp_path):
    """A block of another track is skipped, and all that is left is a hole as dropped frames leave it."""
    source = film(name, name.partition(".")[0])
    path, content = tmp_path / name, bytearray(source.read_bytes())
    at, _ = packets(source)[40]
    assert content[at - 4] == 0x81  # the block's track number; RFC 9559, 10.1
    content[at - 4] = 0x91
    path.write_bytes(content)
    with pytest.raises(DataError, match="is truncated or damaged: FFmpeg says 'Invalid track number 17'"):
        probe(path)


def with_time(source: Path, path: Path, number: int, by: int) -> Path:
    """A Matroska film whose block `number` claims a time `by` milliseconds later."""
    content = bytearray(source.read_bytes())
    at, _ = packets(source)[number]
    time = int.from_bytes(content[at - 3 : at - 1], "big", signed=True) + by
    content[at - 3 : at - 1] = time.to_bytes(2, "big", signed=True)
    path.write_bytes(content)
    return path


def test_one_time_that_lies_far_out_does_not_set_the_rate_of_the_film(film, tmp_path):
    for name in ("vp9.webm", "h264.mkv"):
        path = with_time(film(name, name.partition(".")[0]), tmp_path / name, 50, 16384)
        with pytest.raises(DataError, match=r"ends after .* s though its header says 3.60 s"):
            probe(path)


@pytest.mark.parametrize(("name", "by"), [("vp9.webm", 512), ("av1.mkv", -256), ("h264.mkv", 1024)])
def test_times_that_no_encoder_gives_are_noticed(film, name, by, tmp_path):
    path = with_time(film(name, name.partition(".")[0]), tmp_path / name, 50, by)
    with pytest.raises(DataError, match=r"has times in disorder at \d\.\d\d s: it is damaged"):
        probe(path)


LAWFUL = {
    "telephone": [n * 100 // 3 + (n * 7) % 5 for n in range(60) if n not in (20, 41)],
    "screen": [n * 100 // 6 for n in range(400) if n < 20 or n % 37 == 0 or 250 < n < 270],
    "slide show": [0, 40, 5000, 11_000, 11_040, 30_000],
    "speeding up": [round(8000 * (1 - 0.95**n)) for n in range(60)],
}


@pytest.mark.parametrize("ending", ["mkv", "mp4", "webm"])
@pytest.mark.parametrize("kind", LAWFUL)
def test_films_of_lawful_times_are_measured_and_read(kind, ending, tmp_path):
    times = sorted(set(LAWFUL[kind]))
    path = write(tmp_path / f"v.{ending}", "vp9" if ending == "webm" else "h264", times)
    facts = probe(path)
    assert facts.variable_rate and facts.frames / facts.fps >= 0.99 * times[-1] / 1000
    assert len(read_frames(path, range(facts.frames), facts.fps, True)) == facts.frames


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_a_sound_track_may_be_longer_or_shorter(ending, tmp_path):
    for seconds in (1.0, 12.0):
        path = write(tmp_path / f"v.{ending}", "h264", sound=seconds)
        assert probe(path).frames == FRAMES and not probe(path).variable_rate
        assert len(read_frames(path, [0, 50, FRAMES - 1], 25.0)) == 3


def test_a_truncated_film_with_sound_is_noticed(tmp_path):
    path = write(tmp_path / "v.mkv", "h264", sound=2.0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="truncated or damaged"):
        probe(path)


def damaged_in_the_third_group(film: Callable[..., Path], tmp_path: Path) -> tuple[Path, np.ndarray]:
    """An MPEG-4 film with noise in picture 35, which its decoder patches up from picture 34; the pictures."""
    source = film("mpeg4.mkv", "mpeg4")
    whole = read_frames(source, range(FRAMES), 25.0)
    at, packet = packets(source)[35]
    content = bytearray(source.read_bytes())
    content[at + 30 : at + len(packet) - 4] = np.random.default_rng(3).bytes(len(packet) - 34)
    path = tmp_path / "v.mkv"
    path.write_bytes(content)
    return path, whole


def test_pictures_that_were_patched_up_are_refused_until_the_next_key_frame(film, tmp_path):
    path, whole = damaged_in_the_third_group(film, tmp_path)
    for number in (0, 29, 34, 45, 60, 89):
        assert np.array_equal(read_frames(path, [number], 25.0)[0], whole[number]), number
    for number in (35, 36, 44):
        with pytest.raises(DataError, match=rf"v\.mkv is damaged at frame {number} \(FFmpeg: .+\); restore"):
            read_frames(path, [number], 25.0)
    given = {}
    with pytest.raises(DataError, match="is damaged at frame 40"):
        given |= stream_frames(path, [3, 40, 70], 25.0)
    pictures = stream_frames(path, [3, 40, 70], 25.0)
    assert next(pictures)[0] == 3 and next(pictures)[0] == 70  # what can be given is, before the sentence


def test_the_same_damage_is_heard_in_the_next_file_too(film, tmp_path):
    """PyAV leaves out a message that is the same as the last."""
    path, _ = damaged_in_the_third_group(film, tmp_path)
    twin = tmp_path / "twin.mkv"
    twin.write_bytes(path.read_bytes())
    for damaged in (path, twin, path):
        with pytest.raises(DataError, match="is damaged at frame 35"):
            read_frames(damaged, [35], 25.0)


def test_a_file_is_not_blamed_for_what_another_causes_meanwhile(film, tmp_path):
    path, whole = damaged_in_the_third_group(film, tmp_path)
    pictures = stream_frames(film("mpeg4.mkv", "mpeg4"), range(FRAMES), 25.0)
    for number, picture in pictures:
        assert np.array_equal(picture, whole[number])
        if number in (5, 50):
            with pytest.raises(DataError):
                read_frames(path, [36], 25.0)


def test_ffmpegs_complaints_are_not_printed_and_a_chosen_level_is_kept(film, tmp_path, capfd, caplog):
    path, _ = damaged_in_the_third_group(film, tmp_path)
    with pytest.raises(DataError):
        read_frames(path, [36], 25.0)
    said = capfd.readouterr()
    assert not said.err and not said.out and not caplog.records
    before = av.logging.get_level()
    av.logging.set_level(av.logging.WARNING)
    try:
        with pytest.raises(DataError, match="is damaged at frame 36"):
            read_frames(path, [36], 25.0)
        assert av.logging.get_level() == av.logging.WARNING
    finally:
        av.logging.set_level(before)
    handlers = logging.getLogger("libav").handlers
    assert sum(isinstance(handler, logging.NullHandler) for handler in handlers) == 1


def test_fewer_flipped_films_pass_with_other_pictures_than_are_noticed(film, tmp_path):
    """Of each kind some flips leave a valid stream; VP9 and H.264 have no checksums."""
    wrong = noticed = 0
    for name in ("h264.mkv", "mpeg4.mkv", "av1.mkv"):
        source = film(name, name.partition(".")[0])
        content, whole = source.read_bytes(), read_frames(source, range(FRAMES), 25.0)
        rng = np.random.default_rng(1)
        for _ in range(12):
            damaged = bytearray(content)
            for at in rng.integers(600, len(content), 8):
                damaged[at] ^= 1 << int(rng.integers(8))
            (tmp_path / name).write_bytes(damaged)
            try:
                facts = probe(tmp_path / name)
                frames = read_frames(tmp_path / name, range(FRAMES), facts.fps, facts.variable_rate)
                wrong += np.abs(frames.astype(int) - whole).max() > 24
            except DataError as error:
                assert re.match(rf"video {re.escape(str(tmp_path / name))} ", str(error))
                noticed += 1
    assert noticed > 10 * wrong
