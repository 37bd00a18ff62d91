"""The simulator writes a data set that plays back what it rendered, twice the same; or says what it lacks."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from salt_vla.data.simulation import (
    FRONT_KEY,
    MOVING_KEY,
    TASKS,
    EpisodePlan,
    SimulationConfig,
    film_episode,
    simulate,
)
from salt_vla.data.simulation_scene import Scene
from salt_vla.errors import DataError, ResourceError

CONFIG = SimulationConfig(
    tasks=("drawer-open", "reach"),
    train_episodes=1,
    validation_episodes=1,
    image_size=64,
    min_steps=12,
    max_steps=20,
    video_crf=18,
)
HAS_SIMULATOR = all(importlib.util.find_spec(name) for name in ("mujoco", "metaworld"))
CAN_RENDER = HAS_SIMULATOR and bool(find_library("OSMesa") or find_library("EGL"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """The data set, or None where this machine has no simulator or nothing to draw with."""
    out = tmp_path_factory.mktemp("simulated") / "dataset"
    if CAN_RENDER:
        return simulate(CONFIG, out)
    with pytest.raises(
        ResourceError, match=r"pip install 'salt-vla\[sim\]'|apt-get install libosmesa6"
    ) as caught:
        simulate(CONFIG, out)
    assert "\n" not in str(caught.value)
    assert list(out.parent.iterdir()) == []
    return None


def tree_digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def read_info(dataset: Path) -> dict[str, Any]:
    return json.loads((dataset / "meta/info.json").read_text(encoding="utf-8"))


def read_episodes(dataset: Path) -> list[dict[str, Any]]:
    return pq.read_table(dataset / "meta/episodes").to_pylist()


def decode_at(dataset: Path, row: dict[str, Any], key: str, seconds: float) -> np.ndarray:
    """The picture that lies at this time of the episode, found by seeking."""
    place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
    path = dataset / read_info(dataset)["video_path"].format(video_key=key, **place)
    wanted = row[f"videos/{key}/from_timestamp"] + seconds
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.time_base is not None
        container.seek(round(wanted / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time is not None and abs(frame.time - wanted) < 1e-6:
                return frame.to_ndarray(format="rgb24")
    raise AssertionError(f"no frame at {wanted} s of {path}")


def test_same_config_gives_the_same_bytes(dataset: Path | None, tmp_path: Path) -> None:
    if dataset is None:
        return
    assert tree_digest(simulate(CONFIG, tmp_path / "again")) == tree_digest(dataset)


def test_decoded_frames_are_the_rendered_ones(dataset: Path | None) -> None:
    if dataset is None:
        return
    for row in read_episodes(dataset):
        scene = Scene(row["simulation/task"], CONFIG.image_size)
        plan = EpisodePlan(row["simulation/task"], "any", row["simulation/seed"])
        episode = film_episode(scene, plan, CONFIG)
        scene.close()
        assert row["length"] == len(episode.columns["action"])
        for key in (FRONT_KEY, MOVING_KEY):
            for step in (0, 7, row["length"] - 1):
                picture = decode_at(dataset, row, key, step / 80).astype(np.float64)
                errors = ((episode.films[key].astype(np.float64) - picture) ** 2).mean(axis=(1, 2, 3))
                assert errors.argmin() == step
                assert 10 * np.log10(255**2 / errors[step]) > 28


def test_table_holds_what_the_robot_did(dataset: Path | None) -> None:
    if dataset is None:
        return
    info = read_info(dataset)
    assert info["fps"] == 80
    assert info["splits"] == {"train": "0:2", "validation": "2:4"}
    table = pq.read_table(dataset / "data").to_pydict()
    states = np.array(table["observation.state"])
    actions = np.array(table["action"])
    things = np.array(table["observation.environment_state"])
    assert np.isfinite(states).all() and np.isfinite(things).all()
    assert np.abs(actions).max() <= 1
    episodes = np.array(table["episode_index"])
    for row in read_episodes(dataset):
        inside = episodes == row["episode_index"]
        assert CONFIG.min_steps <= row["length"] == inside.sum() <= CONFIG.max_steps
        moved = np.diff(states[inside, :3], axis=0)
        # The action of a frame moves the hand after that frame, a few steps behind: the arm is soft.
        along = np.sum(moved[2:] * actions[inside, :3][1:-2], axis=1)
        assert along.mean() > 0
        assert np.ptp(things[inside, 6:], axis=0).max() < 1e-6


def test_episodes_say_how_they_were_made(dataset: Path | None) -> None:
    if dataset is None:
        return
    rows = read_episodes(dataset)
    assert [row["simulation/task"] for row in rows] == ["drawer-open", "reach"] * 2
    assert [row["tasks"] for row in rows] == [[TASKS[row["simulation/task"]]] for row in rows]
    assert len({row["simulation/seed"] for row in rows}) == 4
    for row in rows:
        assert row["simulation/noise"] in (0.0, 0.1, 0.3)
        assert 0.6 <= row["simulation/speed"] <= 1.0
        moving = np.array(row["simulation/camera/moving/position"])
        front = np.array(row["simulation/camera/front/position"])
        assert 0 < np.abs(moving - front).max() <= 0.1
    assert len({tuple(row["simulation/camera/moving/look_at"]) for row in rows}) == 4
    assert len({tuple(row["simulation/camera/front/look_at"]) for row in rows}) == 1


def test_goals_differ_between_episodes_of_a_task(dataset: Path | None) -> None:
    if dataset is None:
        return
    table = pq.read_table(dataset / "data").to_pydict()
    for task in CONFIG.tasks:
        rows = [row for row in read_episodes(dataset) if row["simulation/task"] == task]
        goals = {tuple(table["observation.environment_state"][row["dataset_from_index"]][6:]) for row in rows}
        assert len(goals) == len(rows) == 2


def test_robot_fills_a_visible_part_of_the_picture(dataset: Path | None) -> None:
    if dataset is None:
        return
    for row in read_episodes(dataset):
        for key in (FRONT_KEY, MOVING_KEY):
            picture = decode_at(dataset, row, key, 0.1).astype(int)
            red = (picture[..., 0] > 60) & (picture[..., 0] > 2 * picture[..., 1])
            assert 0.01 < red.mean() < 0.6


def test_finished_data_set_is_not_overwritten(dataset: Path | None) -> None:
    if dataset is None:
        return
    before = tree_digest(dataset)
    with pytest.raises(DataError, match="exists and is not empty"):
        simulate(CONFIG, dataset)
    assert tree_digest(dataset) == before


def simulate_elsewhere(out: Path, preparation: str, **environment: str) -> str:
    """The last line of a process's complaint: an import that fails once stays failed in a process."""
    script = (
        f"import sys; {preparation}\n"
        "from pathlib import Path\n"
        "from salt_vla.data.simulation import SimulationConfig, simulate\n"
        "simulate(SimulationConfig(tasks=('reach',), train_episodes=1, image_size=16), Path(sys.argv[1]))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(out)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert not out.exists()
    assert list(out.parent.iterdir()) == []
    return run.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("missing", ["metaworld", "mujoco"])
def test_missing_simulator_is_named_with_its_cure(tmp_path: Path, missing: str) -> None:
    complaint = simulate_elsewhere(tmp_path / "dataset", f"sys.modules[{missing!r}] = None")
    assert complaint == (
        "salt_vla.errors.ResourceError: The simulator is not installed; "
        "install the extra: pip install 'salt-vla[sim]'."
    )


def test_missing_opengl_is_named_with_its_cure(tmp_path: Path) -> None:
    complaint = simulate_elsewhere(tmp_path / "dataset", "pass", MUJOCO_GL="crayons")
    if HAS_SIMULATOR:
        assert complaint == (
            "salt_vla.errors.ResourceError: MuJoCo found no OpenGL to draw with (MUJOCO_GL is crayons); "
            "apt-get install libosmesa6, or set MUJOCO_GL=egl."
        )
    else:
        assert "salt-vla[sim]" in complaint
