"""Data sets that are not on this disk yet: from a hub's cache without a network, and from the simulator."""

from __future__ import annotations

import importlib.util
import shutil
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.data.sources.lerobot_signals import read_signals
from salt_vla.errors import ResourceError
from salt_vla.jobs.data_index import index_data

HAS_SIMULATOR = all(importlib.util.find_spec(name) for name in ("mujoco", "metaworld"))
CAN_RENDER = HAS_SIMULATOR and bool(find_library("OSMesa") or find_library("EGL"))
COMMIT = "b" * 40
SHORT = ("--num-frames", 4, "--frame-stride", 2)


@pytest.fixture
def offline(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network for the processes to come; their hub client has `org/robots` in its cache."""
    repository = tmp_path / "hub" / "hub" / "datasets--org--robots"
    shutil.copytree(tiny_dataset, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("offline")
def test_a_hub_id_is_read_from_what_was_downloaded_before(
    salt: Any, tmp_path: Path, tiny_dataset: Path
) -> None:
    index = ("data", "index", "org/robots", "--source", "lerobot", *SHORT, "--workers", 1)
    answer = salt.run(*index, "--out", tmp_path / "clips.parquet", cwd=tmp_path)
    assert answer.code == 0, answer.err
    table = ClipTable.read(tmp_path / "clips.parquet")
    here = index_data(tiny_dataset, Cutting(ViewConfig(frame_stride=2), 4))[0]
    assert [clip.replace("robots/", "tiny/") for clip in table.clip_ids] == here.clip_ids
    assert table.root.name == COMMIT and salt("data", "check", tmp_path / "clips.parquet").code == 0
    said = salt.run(*index[:2], "org/elsewhere", *index[3:], "--out", "x", cwd=tmp_path).sentence
    assert "dataset org/elsewhere is not on this machine" in said and "HF_HUB_OFFLINE" in said


@pytest.mark.usefixtures("offline")
def test_a_folder_of_that_name_comes_before_the_hub(salt: Any, tmp_path: Path, tiny_dataset: Path) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "org" / "robots")
    index = ("data", "index", "org/robots", *SHORT, "--out", "clips.parquet")
    answer = salt.run(*index, cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert ClipTable.read(tmp_path / "clips.parquet").root == tmp_path / "org" / "robots"


def test_an_empty_place_is_filled_by_the_simulator_and_then_read(tmp_path: Path) -> None:
    """Or the sentence says what to install, and nothing is left there."""
    place = tmp_path / "robots"
    view = ViewConfig(frame_stride=2)
    if not CAN_RENDER:
        with pytest.raises(ResourceError, match=r"pip install 'salt-vla\[sim\]'|apt-get install libosmesa6"):
            index_data(place, Cutting(view, 8), "sim")
        assert not place.exists()
        return
    table, problems = index_data(place, Cutting(view, 8), "sim")
    assert problems == [] and set(table.rows["source"].to_pylist()) == {"sim"}
    assert set(table.rows["split"].to_pylist()) == {"train", "validation"}
    assert len(set(table.rows["label"].to_pylist())) == 2
    signals = read_signals(table, 8, view)
    assert signals.signals["action"].shape == (len(table), 15, 4)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert index_data(place, Cutting(view, 8), "sim")[0].hash == table.hash
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before
