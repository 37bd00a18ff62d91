"""Pairs of films from the layouts that they come in, and what is said of lists that are not whole."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from salt_vla.data.film_pairs import Film, FilmSet, read_film_sets
from salt_vla.errors import DataError

Squares = Callable[..., Path]


@pytest.fixture(scope="module")
def published(squares: Squares) -> Path:
    return squares({"Debug": 3, "Main": 4, "HeldOut": 2}, frames=6, size=16)


def copy_of(folder: Path, place: Path, split: str = "Main") -> Path:
    """One split's folder, to be damaged: its list is a copy, its films are links."""
    (place / split / "Videos").mkdir(parents=True)
    for film in (folder / split / "Videos").iterdir():
        (place / split / "Videos" / film.name).symlink_to(film)
    (place / split / "metadata.csv").write_text((folder / split / "metadata.csv").read_text())
    return place / split


def edit(folder: Path, change: Callable[[list[list[str]]], list[list[str]]]) -> None:
    with (folder / "metadata.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(change(rows))


def by_name(sets: list[FilmSet]) -> dict[str, FilmSet]:
    return {each.name: each for each in sets}


def test_intphys2_pairs_are_scene_and_run(published: Path) -> None:
    found = by_name(read_film_sets(published))
    assert {name: (len(s.films), len(s.pairs)) for name, s in found.items()} == {
        "Debug": (12, 6),
        "Main": (16, 8),
        "HeldOut": (8, 0),
    }
    main = found["Main"]
    assert Counter(pair.scene for pair in main.pairs) == {f"Main/{n}": 2 for n in range(4)}
    for pair in main.pairs:
        assert pair.possible.name.replace("Possible", "Impossible") == pair.impossible.name
        assert pair.possible.run == pair.impossible.run
        assert set(pair.parts) == {"condition", "difficulty", "camera"}
    assert not found["HeldOut"].has_labels


def test_one_split_may_be_given_alone(published: Path) -> None:
    (alone,) = read_film_sets(published / "Debug")
    assert (alone.name, len(alone.pairs)) == ("Debug", 6)


def test_pictures_come_in_order_and_whole(published: Path) -> None:
    (debug, *_) = read_film_sets(published)
    pictures = list(debug.films[0].pictures())
    assert len(pictures) == 6
    assert {picture.shape for picture in pictures} == {(16, 16, 3)}
    bright = [np.flatnonzero(p.max((0, 2)) > 120) for p in pictures]
    assert len({tuple(columns) for columns in bright}) == 6  # The square moves at each of them.
    assert np.array_equal(pictures[0], next(iter(debug.films[0].pictures())))


def test_missing_films_are_counted_and_named(published: Path, tmp_path: Path) -> None:
    split = copy_of(published, tmp_path)
    gone = sorted((split / "Videos").iterdir())[:5]
    for film in gone:
        film.unlink()
    with pytest.raises(DataError, match="5 of 16 films") as error:
        read_film_sets(split)
    assert gone[0].name in str(error.value)
    assert "and 2 more" in str(error.value)


def test_a_film_that_stands_alone_is_refused(published: Path, tmp_path: Path) -> None:
    split = copy_of(published, tmp_path)
    edit(split, lambda rows: rows[:-1])
    with pytest.raises(DataError, match=r"scene Main/3, run 2, has 1 possible film"):
        read_film_sets(split)


def test_three_films_of_a_run_are_refused(published: Path, tmp_path: Path) -> None:
    split = copy_of(published, tmp_path)
    edit(split, lambda rows: [*rows, rows[1]])
    with pytest.raises(DataError, match=r"1 impossible, 2 possible"):
        read_film_sets(split)


def test_labels_that_are_missing_in_part_are_refused(published: Path, tmp_path: Path) -> None:
    split = copy_of(published, tmp_path)
    edit(split, lambda rows: [rows[0], [*rows[1][:6], "", *rows[1][7:]], *rows[2:]])
    with pytest.raises(DataError, match="unlabelled"):
        read_film_sets(split)


def test_an_unknown_type_is_refused(published: Path, tmp_path: Path) -> None:
    split = copy_of(published, tmp_path)
    edit(split, lambda rows: [rows[0], [*rows[1][:6], "1_Maybe", *rows[1][7:]], *rows[2:]])
    with pytest.raises(DataError, match="1_Maybe"):
        read_film_sets(split)


def test_a_list_without_films_is_refused(published: Path, tmp_path: Path) -> None:
    split = copy_of(published, tmp_path)
    edit(split, lambda rows: rows[:1])
    with pytest.raises(DataError, match="lists no film"):
        read_film_sets(split)


def write_intphys1(folder: Path, scenes: int = 2, flat: bool = False) -> Path:
    """IntPhys 1's dev set: block/scene/movie, each with a folder of pictures and a status."""
    for scene in range(1, scenes + 1):
        for movie, possible in enumerate((True, False, False, True), start=1):
            place = folder / "O1" / f"{scene:02d}" / str(movie)
            (place / "scene").mkdir(parents=True)
            for frame in range(1, 4):
                write_png(place / "scene" / f"scene_{frame:03d}.png", 40 * frame)
            said = {"is_possible": possible}
            (place / "status.json").write_text(json.dumps(said if flat else {"header": said}))
    return folder


def write_png(path: Path, grey: int) -> None:
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as file:
        stream = file.add_stream("png", rate=1)
        stream.width = stream.height = 16
        stream.pix_fmt = "rgb24"
        frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), grey, np.uint8), format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            file.mux(packet)


@pytest.mark.parametrize("flat", [False, True])
def test_intphys1_pairs_movies_of_a_scene(flat: bool, tmp_path: Path) -> None:
    (dev,) = read_film_sets(write_intphys1(tmp_path / "dev", flat=flat))
    assert (dev.name, len(dev.films), len(dev.pairs)) == ("dev", 8, 4)
    names = [(pair.possible.name, pair.impossible.name) for pair in dev.pairs[:2]]
    assert names == [("O1/01/1", "O1/01/2"), ("O1/01/4", "O1/01/3")]
    assert {pair.scene for pair in dev.pairs} == {"O1/01", "O1/02"}
    assert dev.pairs[0].parts == {"condition": "O1"}
    pictures = list(dev.films[0].pictures())
    assert [int(picture.mean()) for picture in pictures] == [40, 80, 120]


def test_intphys1_without_labels_or_pictures_is_refused(tmp_path: Path) -> None:
    folder = write_intphys1(tmp_path / "test")
    status = folder / "O1" / "01" / "1" / "status.json"
    status.write_text("{}")
    with pytest.raises(DataError, match="does not say is_possible"):
        read_film_sets(folder)
    status.write_text('{"header": {"is_possible": true}}')
    (status.parent / "scene").rename(status.parent / "frames")
    with pytest.raises(DataError, match="no folder scene"):
        read_film_sets(folder)


def write_pairs(folder: Path, published: Path, lines: list[str]) -> Path:
    folder.mkdir()
    for film in (published / "Main" / "Videos").iterdir():
        (folder / film.name).symlink_to(film)
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_list_of_pairs_covers_any_other_layout(published: Path, tmp_path: Path) -> None:
    lines = [
        "possible,impossible,group,condition,room",
        "main-000-1_Possible.mp4,main-000-1_Impossible.mp4,ball,gravity,kitchen",
        "main-000-2_Possible.mp4,main-000-2_Impossible.mp4,ball,gravity,",
        "main-001-1_Possible.mp4,main-001-1_Impossible.mp4,,,hall",
    ]
    (own,) = read_film_sets(write_pairs(tmp_path / "own", published, lines))
    assert (own.name, len(own.films), len(own.pairs)) == ("own", 6, 3)
    assert [pair.scene for pair in own.pairs] == ["ball", "ball", "line 4"]
    assert [pair.parts for pair in own.pairs] == [
        {"condition": "gravity", "room": "kitchen"},
        {"condition": "gravity"},
        {"room": "hall"},
    ]


def test_one_possible_film_may_have_several_impossible_twins(published: Path, tmp_path: Path) -> None:
    lines = [
        "possible,impossible",
        "main-000-1_Possible.mp4,main-000-1_Impossible.mp4",
        "main-000-1_Possible.mp4,main-000-2_Impossible.mp4",
    ]
    (own,) = read_film_sets(write_pairs(tmp_path / "own", published, lines))
    assert (len(own.films), len(own.pairs)) == (3, 2)
    assert {pair.scene for pair in own.pairs} == {"line 2"}, "what one film surprises shows in both"


def test_rows_that_share_films_through_others_are_one_scene(published: Path, tmp_path: Path) -> None:
    first, second, third = "main-000-1", "main-000-2", "main-001-1"
    lines = [
        "possible,impossible",
        f"{first}_Possible.mp4,{first}_Impossible.mp4",
        f"{third}_Possible.mp4,{third}_Impossible.mp4",
        f"{second}_Possible.mp4,{second}_Impossible.mp4",
        f"{second}_Possible.mp4,{first}_Impossible.mp4",
    ]
    (own,) = read_film_sets(write_pairs(tmp_path / "own", published, lines))
    assert [pair.scene for pair in own.pairs] == ["line 2", "line 3", "line 2", "line 2"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("main-000-1_Possible.mp4,gone.mp4", "1 of 2 films"),
        ("main-000-1_Possible.mp4,", "line 2, names no impossible film"),
        ("main-000-1_Possible.mp4,main-000-1_Possible.mp4", "possible and impossible"),
    ],
)
def test_wrong_pairs_are_named(line: str, said: str, published: Path, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "own", published, ["possible,impossible", line])
    with pytest.raises(DataError, match=said):
        read_film_sets(folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no film pairs: neither pairs\.csv"):
        read_film_sets(tmp_path)
    with pytest.raises(DataError, match="there is no folder"):
        read_film_sets(tmp_path / "nowhere")


def test_a_film_that_changes_is_another_film(published: Path, tmp_path: Path) -> None:
    first, second = sorted((published / "Main" / "Videos").iterdir())[:2]
    place = tmp_path / "film.mp4"
    place.write_bytes(first.read_bytes())
    film = Film("film", place, "scene", "1")
    before = film.identity()
    assert film.identity() == before
    place.write_bytes(second.read_bytes() + b" ")
    assert film.identity() != before
