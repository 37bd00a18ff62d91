"""The pixels on record: of every codec, view and way of sampling, made by an earlier version of the code.

`python tests/unit/test_golden.py` prints the record. A difference means that old caches hold other pixels:
then `view_lock.ALGORITHM` must be raised, and the reason told in the change log.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.golden import GOLDEN_CLIPS, golden_path
from salt_vla.data.view_lock import ViewReader, golden_pixels, view_hash
from salt_vla.geometry import ClipGeometry

RECORD = Path(__file__).parents[1] / "golden" / "view_lock.json"
GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=16)
CROPS = {"crop_scale": (0.3, 0.9), "num_views": 3}
SAMPLINGS = {
    "stride": ViewConfig(frame_stride=2, max_shift=4, **CROPS),
    "fps": ViewConfig(sampling="fps", target_fps=12.0, max_shift=2, **CROPS),
    "uniform": ViewConfig(sampling="uniform", **CROPS),
    "hold": ViewConfig(frame_stride=4, short="hold", **CROPS),
}


def golden_table() -> ClipTable:
    clips = [
        Clip(name, "golden", "folder", name, 0, number, 0, 24, "", "", fps, False, "train")
        for number, (name, fps) in enumerate(GOLDEN_CLIPS.items())
    ]
    return ClipTable.from_clips(clips, golden_path(""))


def pixels_now(sampling: str) -> dict[str, str]:
    reader = ViewReader(golden_table(), SAMPLINGS[sampling], GEOMETRY)
    return {
        f"{name} {sampling} {view}": hashlib.sha256(reader.read(name, view).tobytes()).hexdigest()
        for name in GOLDEN_CLIPS
        for view in range(3)
    }


def record() -> dict[str, object]:
    return {
        "golden": golden_pixels(),
        "hashes": {name: view_hash(view, GEOMETRY) for name, view in SAMPLINGS.items()},
        "pixels": {key: value for name in SAMPLINGS for key, value in pixels_now(name).items()},
    }


@pytest.fixture(scope="module")
def on_record() -> dict[str, dict[str, str]]:
    return json.loads(RECORD.read_text())


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_pixels_are_the_ones_on_record(sampling, on_record):
    now = pixels_now(sampling)
    assert len(now) == 3 * len(GOLDEN_CLIPS) == len(set(now.values()))
    assert now == {key: on_record["pixels"][key] for key in now}


def test_nothing_on_record_is_left_unread(on_record):
    assert set(on_record["pixels"]) == {
        f"{name} {sampling} {view}" for name in GOLDEN_CLIPS for sampling in SAMPLINGS for view in range(3)
    }


def test_hashes_are_the_ones_on_record(on_record):
    """They stand in every cache: if they change for unchanged settings, all caches are refused."""
    assert golden_pixels() == on_record["golden"]
    assert {name: view_hash(view, GEOMETRY) for name, view in SAMPLINGS.items()} == on_record["hashes"]


def test_another_process_on_a_plainer_processor_gives_what_is_on_record():
    """Without vector instructions torch resizes with other code; its bytes must be the same."""
    done = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == json.loads(RECORD.read_text())


def test_other_pixels_are_another_hash(monkeypatch):
    """A library whose pixels differ is told by the golden clips, whatever its version says."""
    before = view_hash(SAMPLINGS["stride"], GEOMETRY)
    monkeypatch.setattr("salt_vla.data.view_lock.GOLDEN_CLIPS", {"h264.mp4": 30.0})
    golden_pixels.cache_clear()
    try:
        assert view_hash(SAMPLINGS["stride"], GEOMETRY) != before
    finally:
        golden_pixels.cache_clear()


if __name__ == "__main__":
    print(json.dumps(record(), indent=1, sort_keys=True))
