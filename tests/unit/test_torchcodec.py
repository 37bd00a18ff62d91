"""torchcodec gives PyAV's frames bit by bit, or the file goes through PyAV; damage is told by both alike."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from salt_vla.data import torchcodec_decode
from salt_vla.data.decode import read_frames, read_through_pyav
from salt_vla.data.golden import GOLDEN_CLIPS, golden_path
from salt_vla.errors import ConfigError, DataError

TRUSTED, REASON = torchcodec_decode.examine(read_through_pyav)
needs_torchcodec = pytest.mark.skipif(bool(REASON), reason=f"torchcodec cannot be used here: {REASON}")


def test_an_unknown_decoder_is_a_sentence(monkeypatch):
    monkeypatch.setenv("SALT_VLA_DECODER", "opencv")
    with pytest.raises(
        ConfigError, match="SALT_VLA_DECODER is 'opencv'; choose one of auto, pyav, torchcodec"
    ):
        read_frames(golden_path("h264.mp4"), [0], 30)


def test_choosing_it_where_it_does_not_work_is_a_sentence(monkeypatch):
    monkeypatch.setenv("SALT_VLA_DECODER", "torchcodec")
    refusal = (frozenset(), "it is not installed (pip install x)")
    monkeypatch.setattr(torchcodec_decode, "examine", lambda read: refusal)
    with pytest.raises(
        ConfigError, match=r"is torchcodec, but it is not installed \(pip install x\); unset it"
    ):
        read_frames(golden_path("h264.mp4"), [0], 30)
    monkeypatch.setenv("SALT_VLA_DECODER", "auto")
    assert read_frames(golden_path("h264.mp4"), [0], 30).shape == (1, 54, 96, 3)


def test_other_frames_on_the_golden_clips_rule_it_out():
    torchcodec_decode.examine.cache_clear()
    try:
        codecs, reason = torchcodec_decode.examine(lambda path, indices, fps: np.zeros((24, 54, 96, 3), "u1"))
    finally:
        torchcodec_decode.examine.cache_clear()
    assert not codecs and reason == (REASON or "its frames of the golden clips are not PyAV's")


def test_pyav_alone_imports_no_torchcodec():
    code = """
import sys
from salt_vla.data.decode import read_frames
from salt_vla.data.golden import golden_path
read_frames(golden_path("vp9.webm"), [3], 12.0)
assert "torchcodec" not in sys.modules and "torch" not in sys.modules
"""
    environment = os.environ | {"SALT_VLA_DECODER": "pyav"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def outcome(path: Path, fps: float, decoder: str, monkeypatch: pytest.MonkeyPatch) -> np.ndarray | str:
    monkeypatch.setenv("SALT_VLA_DECODER", decoder)
    try:
        return read_frames(path, range(24), fps)
    except DataError as error:
        return str(error)


def is_same(one: np.ndarray | str, other: np.ndarray | str) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str) and one == other
    return np.array_equal(one, other)


@needs_torchcodec
@pytest.mark.parametrize("name", GOLDEN_CLIPS)
def test_both_decoders_give_the_same_frames(name, monkeypatch):
    path, fps = golden_path(name), GOLDEN_CLIPS[name]
    frames = outcome(path, fps, "torchcodec", monkeypatch)
    assert isinstance(frames, np.ndarray)
    assert is_same(frames, outcome(path, fps, "pyav", monkeypatch))


@needs_torchcodec
@pytest.mark.parametrize("codec", torchcodec_decode.EXAMINED)
def test_frames_are_torchcodecs_own_and_equal(codec):
    """Asked past the choice of decoder; AV1 too, which some versions of its library are not trusted with."""
    name, _ = torchcodec_decode.EXAMINED[codec]
    path, fps = golden_path(name), GOLDEN_CLIPS[name]
    pictures = dict(torchcodec_decode.stream(path, range(24), fps, frozenset([codec])))
    assert np.array_equal(np.stack([pictures[n] for n in range(24)]), read_through_pyav(path, range(24), fps))


@needs_torchcodec
def test_what_torchcodec_shows_otherwise_is_left_to_pyav(tmp_path):
    every = frozenset(torchcodec_decode.EXAMINED)
    with pytest.raises(torchcodec_decode.NotForTorchcodec, match="of a kind that PyAV reads"):
        list(torchcodec_decode.stream(golden_path("h264_10bit.mp4"), [0], 30.0, every))
    with pytest.raises(torchcodec_decode.NotForTorchcodec, match="at frame 11 the picture of"):
        list(torchcodec_decode.stream(golden_path("h264.mp4"), [11], 60.0, every))
    with pytest.raises(torchcodec_decode.NotForTorchcodec):
        list(torchcodec_decode.stream(golden_path("h264.mp4"), [24], 30.0, every))


@needs_torchcodec
@pytest.mark.parametrize("name", ["vp9.webm", "h264.mp4", "av1.mp4"])
def test_damage_is_told_by_both_alike(name, tmp_path, monkeypatch):
    """Flipped bits: both refuse, or both give the same pictures. FFmpeg 5.1 says nothing of one H.264 picture
    in sixty that FFmpeg 8.1 marks as damaged."""
    content, fps = golden_path(name).read_bytes(), GOLDEN_CLIPS[name]
    rng = np.random.default_rng(0)
    refused, different = 0, []
    for number in range(60):
        damaged = bytearray(content)
        damaged[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"{number}-{name}"
        path.write_bytes(damaged)
        ours = outcome(path, fps, "pyav", monkeypatch)
        refused += isinstance(ours, str)
        if not is_same(ours, outcome(path, fps, "torchcodec", monkeypatch)):
            different.append(number)
    assert (refused > 0) == (name != "vp9.webm")  # whose decoder notices next to nothing
    assert len(different) <= 1, different
