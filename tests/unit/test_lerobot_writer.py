"""The data set writer keeps its promises: the layout, the right frame at the right time, all or nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salt_vla.data.lerobot_writer import DatasetLayout, Episode, Feature, writing_dataset
from salt_vla.errors import ConfigError, DataError, ResourceError

FPS = 10
SIDE = 32
CAMERAS = ("observation.images.front", "observation.images.side")
LENGTHS = (20, 7, 33, 12)
TASKS = ("Open the drawer.", "Close the drawer.", "Open the drawer.", "Wave.")


def layout(**changes: Any) -> DatasetLayout:
    settings: dict[str, Any] = {
        "fps": FPS,
        "features": {
            "observation.state": Feature("float32", (3,), ("x", "y", "z")),
            "action": Feature("float32", (2,)),
            "next.success": Feature("bool"),
        },
        "cameras": CAMERAS,
        "image_shape": (SIDE, SIDE),
        "robot_type": "sawyer",
    }
    return DatasetLayout(**(settings | changes))


def coded_film(episode: int, camera: int, length: int) -> np.ndarray:
    """Each frame shows its camera, episode and frame number as bright and dark blocks of 8×8 pixels."""
    film = np.zeros((length, SIDE, SIDE, 3), np.uint8)
    for frame in range(length):
        code = frame + 64 * episode + 1024 * camera
        bits = np.array([(code >> bit) & 1 for bit in range(16)], np.uint8).reshape(4, 4)
        film[frame] = (40 + 170 * np.kron(bits, np.ones((8, 8), np.uint8)))[..., None]
    return film


def read_code(image: np.ndarray) -> tuple[int, int, int]:
    """(camera, episode, frame) shown by a decoded frame."""
    blocks = image.astype(np.float64).mean(axis=2).reshape(4, 8, 4, 8).mean(axis=(1, 3)).ravel()
    code = sum(1 << bit for bit in range(16) if blocks[bit] > 125)
    return code // 1024, code % 1024 // 64, code % 64


def episode(number: int) -> Episode:
    rng = np.random.default_rng(number)
    length = LENGTHS[number]
    columns = {
        "observation.state": rng.normal(size=(length, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
        "next.success": np.arange(length) > length - 3,
    }
    films = {key: coded_film(number, camera, length) for camera, key in enumerate(CAMERAS)}
    metadata = {"simulation/seed": 100 + number, "simulation/camera/position": [0.5, float(number), 1.0]}
    return Episode(TASKS[number], columns, films, metadata)


def write(target: Path, **changes: Any) -> Path:
    with writing_dataset(target, layout(**changes)) as writer:
        writer.start_split("train")
        for number in range(3):
            writer.add_episode(episode(number))
        writer.start_split("validation")
        writer.add_episode(episode(3))
    return target


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("written") / "dataset")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_episodes(dataset: Path) -> list[dict[str, Any]]:
    return pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").to_pylist()


def video_path(dataset: Path, row: dict[str, Any], key: str) -> Path:
    place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
    return dataset / read_json(dataset / "meta/info.json")["video_path"].format(video_key=key, **place)


def decode(path: Path) -> list[tuple[float, bool, np.ndarray]]:
    """Time in seconds, whether it is a key frame, and the picture, of every frame."""
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        return [(float(f.time), f.key_frame, f.to_ndarray(format="rgb24")) for f in frames]


def tree_digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_info_describes_the_whole(dataset: Path) -> None:
    info = read_json(dataset / "meta/info.json")
    assert info["codebase_version"] == "v3.0"
    assert info["fps"] == FPS
    assert info["total_episodes"] == 4
    assert info["total_frames"] == sum(LENGTHS)
    assert info["total_tasks"] == 3
    assert info["robot_type"] == "sawyer"
    assert info["splits"] == {"train": "0:3", "validation": "3:4"}
    assert info["features"]["observation.state"] == {
        "dtype": "float32",
        "shape": [3],
        "names": ["x", "y", "z"],
    }
    for key in CAMERAS:
        assert info["features"][key]["dtype"] == "video"
        assert info["features"][key]["shape"] == [SIDE, SIDE, 3]
    for key in ("timestamp", "frame_index", "episode_index", "index", "task_index"):
        assert info["features"][key]["shape"] == [1]


def test_templates_of_info_lead_to_the_files(dataset: Path) -> None:
    info = read_json(dataset / "meta/info.json")
    for row in read_episodes(dataset):
        place = {name: row[f"data/{name}"] for name in ("chunk_index", "file_index")}
        assert (dataset / info["data_path"].format(**place)).is_file()
        for key in CAMERAS:
            assert video_path(dataset, row, key).is_file()


def test_data_table_has_every_column_in_order(dataset: Path) -> None:
    table = pq.read_table(dataset / "data/chunk-000/file-000.parquet")
    assert table.schema.field("observation.state").type == pa.list_(pa.float32(), 3)
    assert table.schema.field("next.success").type == pa.bool_()
    rows = table.to_pydict()
    assert rows["index"] == list(range(sum(LENGTHS)))
    assert rows["episode_index"] == [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    assert rows["frame_index"] == [frame for length in LENGTHS for frame in range(length)]
    np.testing.assert_allclose(rows["timestamp"], np.array(rows["frame_index"]) / FPS, rtol=1e-6)
    expected = np.concatenate([episode(number).columns["action"] for number in range(4)])
    np.testing.assert_array_equal(np.array(rows["action"], np.float32), expected)


def test_tasks_table_is_indexed_by_the_sentence(dataset: Path) -> None:
    table = pq.read_table(dataset / "meta/tasks.parquet")
    assert table.schema.pandas_metadata["index_columns"] == ["task"]
    index_of = dict(zip(table["task"].to_pylist(), table["task_index"].to_pylist(), strict=True))
    assert index_of == {"Open the drawer.": 0, "Close the drawer.": 1, "Wave.": 2}
    rows = pq.read_table(dataset / "data/chunk-000/file-000.parquet").to_pydict()
    for number, task in enumerate(TASKS):
        row = rows["episode_index"].index(number)
        assert rows["task_index"][row] == index_of[task]


def test_episodes_table_has_the_columns_of_the_format(dataset: Path) -> None:
    rows = read_episodes(dataset)
    assert [row["episode_index"] for row in rows] == [0, 1, 2, 3]
    assert [row["length"] for row in rows] == list(LENGTHS)
    assert [row["tasks"] for row in rows] == [[task] for task in TASKS]
    assert [row["dataset_from_index"] for row in rows] == [0, 20, 27, 60]
    assert [row["dataset_to_index"] for row in rows] == [20, 27, 60, 72]
    for name in ("min", "max", "mean", "std", "count"):
        assert f"stats/action/{name}" in rows[0]
        assert f"stats/{CAMERAS[0]}/{name}" in rows[0]


def test_metadata_of_an_episode_become_columns(dataset: Path) -> None:
    rows = read_episodes(dataset)
    assert [row["simulation/seed"] for row in rows] == [100, 101, 102, 103]
    assert rows[2]["simulation/camera/position"] == [0.5, 2.0, 1.0]


def test_every_frame_lies_at_from_timestamp_plus_its_time(dataset: Path) -> None:
    for row in read_episodes(dataset):
        for camera, key in enumerate(CAMERAS):
            frames = {
                round(time * FPS): (time, image) for time, _, image in decode(video_path(dataset, row, key))
            }
            start = row[f"videos/{key}/from_timestamp"]
            for frame in range(row["length"]):
                time, image = frames[round((start + frame / FPS) * FPS)]
                assert time == pytest.approx(start + frame / FPS, abs=1e-9)
                assert read_code(image) == (camera, row["episode_index"], frame)
            assert row[f"videos/{key}/to_timestamp"] == pytest.approx(start + row["length"] / FPS)


def test_seeking_to_an_episode_finds_its_first_frame(dataset: Path) -> None:
    for row in read_episodes(dataset):
        key = CAMERAS[1]
        start = row[f"videos/{key}/from_timestamp"]
        with av.open(str(video_path(dataset, row, key))) as container:
            stream = container.streams.video[0]
            assert stream.time_base is not None
            container.seek(round(start / stream.time_base), stream=stream)
            frame = next(container.decode(stream))
        assert read_code(frame.to_ndarray(format="rgb24")) == (1, row["episode_index"], 0)


def test_episodes_share_a_file_and_begin_with_key_frames(dataset: Path) -> None:
    rows = read_episodes(dataset)
    assert {row[f"videos/{CAMERAS[0]}/file_index"] for row in rows} == {0}
    frames = decode(video_path(dataset, rows[0], CAMERAS[0]))
    keys = [number for number, (_, is_key, _) in enumerate(frames) if is_key]
    assert {0, 20, 27, 60} <= set(keys)
    assert max(np.diff([*keys, len(frames)])) <= 16


def test_video_files_roll_over_at_their_size(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    target = tmp_path / "dataset"
    quality = layout(image_shape=(64, 64), video_files_size_in_mb=1, video_crf=4, cameras=CAMERAS[:1])
    with writing_dataset(target, quality) as writer:
        for _ in range(16):
            base = episode(0)
            film = noise.integers(0, 256, (LENGTHS[0], 64, 64, 3), dtype=np.uint8)
            writer.add_episode(Episode(base.task, base.columns, {CAMERAS[0]: film}))
    rows = read_episodes(target)
    files = [row[f"videos/{CAMERAS[0]}/file_index"] for row in rows]
    assert files == sorted(files)
    assert len(set(files)) > 1
    for row in rows:
        path = video_path(target, row, CAMERAS[0])
        assert path.stat().st_size <= 1.1 * 1024 * 1024
        first_of_file = files.index(row[f"videos/{CAMERAS[0]}/file_index"]) == row["episode_index"]
        assert (row[f"videos/{CAMERAS[0]}/from_timestamp"] == 0) == first_of_file


def test_statistics_are_those_of_all_frames(dataset: Path) -> None:
    statistics = read_json(dataset / "meta/stats.json")
    states = np.concatenate([episode(number).columns["observation.state"] for number in range(4)])
    written = statistics["observation.state"]
    np.testing.assert_allclose(written["mean"], states.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(written["std"], states.std(axis=0), rtol=1e-5)
    np.testing.assert_allclose(written["min"], states.min(axis=0))
    np.testing.assert_allclose(written["max"], states.max(axis=0))
    assert written["count"] == [sum(LENGTHS)]


def test_statistics_of_a_camera_are_per_channel_in_zero_to_one(dataset: Path) -> None:
    written = read_json(dataset / "meta/stats.json")[CAMERAS[0]]
    pixels = np.concatenate([episode(number).films[CAMERAS[0]] for number in range(4)]) / 255
    for name, expected in (
        ("min", pixels.min(axis=(0, 1, 2))),
        ("max", pixels.max(axis=(0, 1, 2))),
        ("mean", pixels.mean(axis=(0, 1, 2))),
        ("std", pixels.std(axis=(0, 1, 2))),
    ):
        assert np.shape(written[name]) == (3, 1, 1)
        np.testing.assert_allclose(np.ravel(written[name]), expected, rtol=1e-6)


def test_same_episodes_give_the_same_bytes(dataset: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again")
    assert tree_digest(again) == tree_digest(dataset)
    assert len(tree_digest(again)) == 7


def test_without_splits_all_is_train(tmp_path: Path) -> None:
    with writing_dataset(tmp_path / "dataset", layout()) as writer:
        writer.add_episode(episode(0))
    assert read_json(tmp_path / "dataset/meta/info.json")["splits"] == {"train": "0:1"}


def test_extra_info_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "dataset", extra_info={"simulation": {"field_of_view_degrees": 32.0}})
    info = read_json(tmp_path / "dataset/meta/info.json")
    assert info["simulation"] == {"field_of_view_degrees": 32.0}


def test_nothing_is_at_the_target_before_the_end_or_after_a_failure(tmp_path: Path) -> None:
    target = tmp_path / "dataset"
    with pytest.raises(KeyError, match="on purpose"), writing_dataset(target, layout()) as writer:
        writer.add_episode(episode(0))
        assert not target.exists()
        raise KeyError("on purpose")
    assert list(tmp_path.iterdir()) == []


def test_leftover_of_a_killed_run_is_replaced(tmp_path: Path, dataset: Path) -> None:
    leftover = tmp_path / ".dataset.partial" / "data"
    leftover.mkdir(parents=True)
    (leftover / "half-written.parquet").write_bytes(b"PAR1")
    write(tmp_path / "dataset")
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]
    assert tree_digest(tmp_path / "dataset") == tree_digest(dataset)


def test_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    write(tmp_path / "dataset")
    assert (tmp_path / "dataset/meta/info.json").is_file()


def test_existing_target_is_refused_and_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "dataset"
    target.mkdir()
    (target / "precious.txt").write_text("mine")
    with pytest.raises(DataError, match=r"dataset exists and is not empty; choose another folder"):
        write(target)
    assert (target / "precious.txt").read_text() == "mine"
    with pytest.raises(DataError, match="exists and is not empty"):
        write(target / "precious.txt")


def test_place_that_cannot_hold_a_folder_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ResourceError, match="Cannot write the data set") as caught:
        write(tmp_path / "file" / "dataset")
    assert "\n" not in str(caught.value)


def test_data_set_without_episodes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without episodes"), writing_dataset(tmp_path / "d", layout()):
        pass
    assert list(tmp_path.iterdir()) == []


def changed(**replacements: Any) -> Episode:
    base = episode(1)
    columns = {**base.columns, **replacements.get("columns", {})}
    films = {**base.films, **replacements.get("films", {})}
    return Episode(base.task, columns, films, replacements.get("metadata", base.metadata))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Episode("Wave.", {}, episode(1).films), r"do not both have the metadata"),
        (Episode("Wave.", {}, episode(1).films, episode(1).metadata), "lacks the column observation.state"),
        (
            Episode("Wave.", episode(1).columns, {}, episode(1).metadata),
            "lacks the film of observation.images",
        ),
        (changed(metadata={**episode(1).metadata, "new": 1}), r"do not both have the metadata \['new'\]"),
        (
            changed(columns={"action": np.zeros((7, 3), np.float32)}),
            r"action of episode 1 has shape \(7, 3\)",
        ),
        (
            changed(columns={"action": np.full((7, 2), np.nan)}),
            "action of episode 1 holds values that are not",
        ),
        (changed(columns={"action": np.zeros((6, 2), np.float32)}), "of different or no length"),
        (changed(films={CAMERAS[0]: np.zeros((7, SIDE, SIDE, 3))}), "front of episode 1 is float64"),
        (changed(films={CAMERAS[0]: np.zeros((7, 8, SIDE, 3), np.uint8)}), r"of shape \(7, 8, 32, 3\)"),
        (changed(films={CAMERAS[1]: np.zeros((9, SIDE, SIDE, 3), np.uint8)}), "of different or no length"),
    ],
)
def test_episode_that_does_not_fit_is_named(tmp_path: Path, bad: Episode, message: str) -> None:
    with pytest.raises(DataError, match=message), writing_dataset(tmp_path / "dataset", layout()) as writer:
        writer.add_episode(episode(0))
        writer.add_episode(bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps is 0"),
        ({"video_files_size_in_mb": 0}, "video_files_size_in_mb is 0"),
        ({"image_shape": (33, 32)}, "even sides"),
        ({"features": {"timestamp": Feature("float32")}}, r"\['timestamp'\]"),
        ({"features": {CAMERAS[0]: Feature("float32")}}, "observation.images.front"),
    ],
)
def test_layout_that_cannot_be_written_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout(**changes)


@pytest.mark.parametrize(("dtype", "shape"), [("float64", (1,)), ("string", (1,)), ("float32", (2, 2))])
def test_feature_of_unknown_kind_is_refused(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="A feature is a vector of float32, int64, bool"):
        Feature(dtype, shape)
