"""Kinetics by its annotation lists: what is listed, what has gone, and what is written wrongly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from salt_vla.data.segments import SourceOptions
from salt_vla.data.sources.kinetics import recognises, segments
from salt_vla.errors import DataError

WriteLayout = Callable[..., Path]
DEFAULT = SourceOptions()


@pytest.fixture
def folder(write_layout: WriteLayout, tmp_path: Path) -> Path:
    return write_layout("kinetics", tmp_path / "data")


def test_films_are_found_by_their_id_and_seconds(folder: Path) -> None:
    listing = segments(folder, DEFAULT)
    said = {one.key: (one.file, one.label, one.split, one.group) for one in listing.segments}
    assert len(said) == 6 and not listing.problems and not listing.unlisted
    assert said["kinetics/train-1_1_000007_000017"] == (
        *("train/train-1_1_000007_000017.mp4", "class 1", "train", "kinetics/train-1_1"),
    )
    assert said["kinetics/val-0_0_000000_000010"][2] == "validation"


def test_films_may_lie_in_class_folders_and_lists_beside_them(folder: Path) -> None:
    before = segments(folder, DEFAULT)
    (folder / "annotations" / "val.csv").rename(folder / "val.csv")
    (folder / "train" / "class 1").mkdir()
    for film in folder.glob("train/train-1*"):
        film.rename(folder / "train" / "class 1" / film.name)
    after = segments(folder, DEFAULT)
    assert {one.key for one in after.segments} == {one.key for one in before.segments}
    assert any(one.file.startswith("train/class 1/") for one in after.segments)


def test_a_list_without_labels_gives_none_and_validate_is_validation(folder: Path) -> None:
    (folder / "annotations" / "val.csv").write_text(
        "youtube_id,time_start,time_end,split\nval-0_0,0.0,10.0,validate\nval-1_0,0,10,test\n"
    )
    said = {one.key: (one.split, one.label) for one in segments(folder, DEFAULT).segments}
    assert said["kinetics/val-0_0_000000_000010"] == ("validation", "")
    assert said["kinetics/val-1_0_000000_000010"] == ("test", "")


def test_what_has_gone_is_named_and_what_no_list_names_is_counted(folder: Path) -> None:
    (folder / "train" / "train-0_0_000000_000010.mp4").rename(folder / "train" / "another.mp4")
    listing = segments(folder, DEFAULT)
    (problem,) = listing.problems
    assert problem.key == "kinetics/train-0_0_000000_000010" and listing.unlisted == 1
    assert problem.file == "train/train-0_0_000000_000010.mp4" and "listed in train.csv" in problem.reason


@pytest.mark.parametrize("start", ["soon", "-1", "nan", "1e9"])
def test_a_wrong_time_is_named_with_its_line(folder: Path, start: str) -> None:
    (folder / "annotations" / "val.csv").write_text(
        f"label,youtube_id,time_start,time_end,split\na,val-0_0,{start},10,val\n"
    )
    with pytest.raises(DataError, match=r"val\.csv, line 2: time_start is '.*', not a number of seconds"):
        segments(folder, DEFAULT)


def test_other_folders_are_not_kinetics(folder: Path, tmp_path: Path) -> None:
    assert recognises(folder) and not recognises(tmp_path) and not recognises(folder / "annotations.csv")
    with pytest.raises(DataError, match="holds no list of Kinetics"):
        segments(tmp_path, DEFAULT)
    for film in [*folder.glob("*/*.mp4")]:
        film.unlink()
    with pytest.raises(DataError, match=r"holds none of the films that its lists name, .*_000010\.mp4 for"):
        segments(folder, DEFAULT)
