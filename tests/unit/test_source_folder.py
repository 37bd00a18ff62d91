"""Any folder of films: splits and classes are folders, ids are paths, and what cannot be listed is said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from salt_vla.data.segments import SourceOptions
from salt_vla.data.sources.files import is_inside, video_files
from salt_vla.data.sources.folder import recognises, segments
from salt_vla.errors import DataError


@pytest.fixture
def dataset(write_layout: Callable[..., Path], tmp_path: Path) -> Path:
    return write_layout("folder", tmp_path / "data")


def test_top_folders_are_splits_and_the_next_ones_classes(dataset: Path) -> None:
    found = {s.key: (s.split, s.label) for s in segments(dataset, SourceOptions()).segments}
    assert found == {
        "data/train/c.avi": ("train", ""),
        "data/train/pull/b.mkv": ("train", "pull"),
        "data/train/push/a.mp4": ("train", "push"),
        "data/train/push/a.webm": ("train", "push"),
        "data/val/push/d.mp4": ("validation", "push"),
    }


@pytest.mark.parametrize(
    ("name", "split"), [("Train", "train"), ("valid", "validation"), ("TEST", "test"), ("other", "")]
)
def test_splits_have_several_names(tmp_path: Path, name: str, split: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "x.MP4").touch()
    (segment,) = segments(tmp_path, SourceOptions()).segments
    assert (segment.split, segment.label) == (split, "" if split else "other")


def test_without_split_folders_none_is_said_and_classes_are_the_top_ones(dataset: Path) -> None:
    found = segments(dataset / "train", SourceOptions(dataset="mine")).segments
    assert {(s.key, s.split, s.label) for s in found} >= {
        ("mine/push/a.mp4", "", "push"),
        ("mine/c.avi", "", ""),
    }


def test_films_of_one_name_in_two_containers_are_two_and_neither_takes_the_others_id(dataset: Path) -> None:
    keys = {segment.key for segment in segments(dataset, SourceOptions()).segments}
    (dataset / "train" / "push" / "a.mp4").unlink()
    left = {segment.key for segment in segments(dataset, SourceOptions()).segments}
    assert keys - left == {"data/train/push/a.mp4"}


def test_hidden_files_and_folders_and_other_endings_are_passed_over(dataset: Path) -> None:
    before = segments(dataset, SourceOptions())
    for name in (".hidden.mp4", ".cache/x.mp4", "push/._a.mp4", "notes.md", "no_ending"):
        path = dataset / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert segments(dataset, SourceOptions()) == before


def test_a_linked_folder_cannot_send_the_search_round_in_circles(dataset: Path) -> None:
    before = segments(dataset, SourceOptions()).segments
    (dataset / "train" / "again").symlink_to(dataset)
    assert segments(dataset, SourceOptions()).segments == before


def test_a_folder_that_cannot_be_listed_is_a_problem(dataset: Path) -> None:
    """Root may list anything: the listing is asked of a folder that is gone by then."""
    said: list[OSError] = []
    walk = video_files(dataset, said.append)
    assert next(walk).name == "c.avi"
    shutil.rmtree(dataset / "train" / "pull")
    assert [path.name for path in walk] == ["a.mp4", "a.webm", "d.mp4"]
    assert [Path(error.filename).name for error in said] == ["pull"]


def test_an_empty_or_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    assert not recognises(tmp_path)
    with pytest.raises(DataError, match="holds no video file"):
        segments(tmp_path, SourceOptions())
    with pytest.raises(DataError, match="is not a folder of videos"):
        segments(tmp_path / "nowhere", SourceOptions())


@pytest.mark.parametrize("file", ["../x.mp4", "a/../../x", "/etc/passwd", "", ".", "a/..", "..", "x\0.mp4"])
def test_paths_that_leave_the_folder_are_told(file: str) -> None:
    assert not is_inside(file)


@pytest.mark.parametrize("file", ["x.mp4", "a/b/../x.mp4", "..a/x.mp4", "a b/ü.mp4"])
def test_paths_that_stay_are_told_too(file: str) -> None:
    assert is_inside(file)
