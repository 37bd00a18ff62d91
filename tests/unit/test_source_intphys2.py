"""IntPhys 2: 253 scenes of four films, never divided; a film or a partner that lacks is named."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from salt_vla.data.segments import Listing, SourceOptions
from salt_vla.data.sources.intphys2 import recognises, segments
from salt_vla.errors import DataError

Change = Callable[[dict[str, str]], dict[str, str] | None]


@pytest.fixture
def dataset(write_layout: Callable[..., Path], tmp_path: Path) -> Path:
    return write_layout("intphys2", tmp_path / "data", films=1)


def listed(root: Path) -> Listing:
    return segments(root, SourceOptions())


def rewrite(root: Path, change: Change, split: str = "Main") -> None:
    """Every row of a metadata.csv through `change`; None drops it."""
    path = root / split / "metadata.csv"
    with path.open(newline="") as file:
        rows = [new for row in csv.DictReader(file) if (new := change(row)) is not None]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_films_are_named_after_their_split_and_name_and_grouped_by_scene(dataset: Path) -> None:
    listing = listed(dataset)
    found = {segment.key: segment for segment in listing.segments}
    assert Counter(segment.split for segment in found.values()) == {"Main": 12, "HeldOut": 2}
    film = found["intphys2/Main/main-1-2"]
    assert (film.file, film.label) == ("Main/Videos/main-1-2.mp4", "2_Possible")
    assert film.group == "intphys2/Main/scene-1"
    assert Counter(s.group for s in found.values() if s.split == "Main") == {
        f"intphys2/Main/scene-{n}": 4 for n in range(3)
    }
    assert found["intphys2/HeldOut/heldout-0-0"].label == "" and listing.problems == ()


def test_the_published_size_gives_506_pairs(write_layout: Callable[..., Path], tmp_path: Path) -> None:
    listing = listed(write_layout("intphys2", tmp_path / "data", scenes=253, films=1))
    main = [segment for segment in listing.segments if segment.split == "Main"]
    pairs = Counter((segment.group, segment.label.partition("_")[0]) for segment in main)
    assert (len(main), len(pairs), set(pairs.values())) == (1012, 506, {2})


@pytest.mark.parametrize("said", ["Main/Videos/{}", "Videos/{}", "{}", "Main/{}"])
def test_file_names_are_joined_with_the_folder_whichever_way_they_are_meant(dataset: Path, said: str) -> None:
    before = listed(dataset).segments
    rewrite(dataset, lambda row: row | {"file_name": said.format(Path(row["file_name"]).name)})
    after = listed(dataset)
    if said == "Main/{}":  # Neither there nor in Videos of that folder's folder; but the name is.
        assert {s.file for s in after.segments} == {s.file for s in before}
    assert after.segments == before and after.problems == ()


def test_a_splits_own_folder_gives_the_same_ids(dataset: Path) -> None:
    keys = {segment.key for segment in listed(dataset).segments if segment.split == "Main"}
    one = listed(dataset / "Main")
    assert {segment.key for segment in one.segments} == keys
    assert one.segments[0].file.startswith("Videos/")


def test_scenes_with_odd_names_are_scenes(dataset: Path) -> None:
    rewrite(dataset, lambda row: row | {"SceneIndex": "124_" + row["SceneIndex"]})
    assert {s.group for s in listed(dataset).segments if s.split == "Main"} == {
        f"intphys2/Main/scene-124_{n}" for n in range(3)
    }


def test_a_missing_film_is_named_with_the_pair_it_breaks(dataset: Path) -> None:
    (dataset / "Main" / "Videos" / "main-1-2.mp4").unlink()
    (problem,) = listed(dataset).problems
    assert (problem.key, problem.file) == ("intphys2/Main/main-1-2", "Main/Videos/main-1-2.mp4")
    assert "missing" in problem.reason and "its pair in scene 1 is broken" in problem.reason


def test_a_scene_without_a_partner_is_named(dataset: Path) -> None:
    rewrite(dataset, lambda row: None if row["name"] == "main-2-3" else row)
    listing = listed(dataset)
    (problem,) = listing.problems
    assert (problem.key, problem.file) == ("intphys2/Main/scene-2", "Main/metadata.csv")
    assert problem.reason == "unpaired: run 2 lists 1 Possible"
    assert len(listing.segments) == 13


def test_two_possible_films_are_no_pair(dataset: Path) -> None:
    rewrite(dataset, lambda row: row | {"type": row["type"].replace("Impossible", "Possible")})
    reasons = {problem.reason for problem in listed(dataset).problems}
    assert reasons == {"unpaired: run 1 lists 2 Possible", "unpaired: run 2 lists 2 Possible"}


def test_the_held_out_split_may_lack_the_column(dataset: Path) -> None:
    rewrite(dataset, lambda row: {k: v for k, v in row.items() if k != "type"}, "HeldOut")
    assert {s.label for s in listed(dataset).segments if s.split == "HeldOut"} == {""}
    assert listed(dataset).problems == ()


@pytest.mark.parametrize("said", ["../../etc/passwd", "/etc/passwd"])
def test_a_film_outside_of_the_folder_is_refused(dataset: Path, said: str) -> None:
    rewrite(dataset, lambda row: row | {"file_name": said} if row["name"] == "main-0-0" else row)
    (problem,) = listed(dataset).problems
    assert problem.key == "intphys2/Main/main-0-0" and problem.reason == "leaves the data set's folder"


def test_what_is_not_this_data_set_is_a_sentence(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.csv").write_text("file_name,text\nx.png,y\n")
    assert not recognises(tmp_path / "other") and recognises(dataset) and recognises(dataset / "Main")
    with pytest.raises(DataError, match=r"metadata\.csv lacks the column\(s\) SceneIndex, name"):
        listed(tmp_path / "other")
    with pytest.raises(DataError, match=r"is not IntPhys 2: no metadata\.csv there, nor in Debug, Main"):
        listed(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfeS\0c\0", b"path,label\nx,caf\xe9\n", b""])
def test_another_metadata_list_makes_no_intphys2(tmp_path: Path, content: bytes) -> None:
    """A folder of films with a list of its own, in any encoding, is a folder of films."""
    (tmp_path / "metadata.csv").write_bytes(content)
    assert not recognises(tmp_path)
    (tmp_path / "metadata.csv").write_bytes(b"\xef\xbb\xbfSceneIndex,name,file_name\n" + content)
    assert recognises(tmp_path)
