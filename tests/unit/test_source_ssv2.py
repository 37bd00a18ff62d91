"""Something-Something V2 as it lies on people's disks: old and new names, lists that lack films and films
that no list has; nothing about the data set is known beforehand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from salt_vla.data.segments import Listing, SourceOptions
from salt_vla.data.sources.ssv2 import recognises, segments
from salt_vla.errors import DataError

LIST = "something-something-v2-{}.json"
FILMS = "20bn-something-something-v2"


@pytest.fixture
def dataset(write_layout: Callable[..., Path], tmp_path: Path) -> Path:
    return write_layout("ssv2", tmp_path / "data", films=1)


def listed(root: Path) -> Listing:
    return segments(root, SourceOptions())


def rewrite(root: Path, split: str, change: Callable[[list[dict[str, object]]], object]) -> None:
    path = root / LIST.format(split)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_ids_splits_and_labels_come_from_the_lists(dataset: Path) -> None:
    found = {segment.key: segment for segment in listed(dataset).segments}
    assert set(found) == {f"ssv2/{n}" for n in range(1, 12)}
    first = found["ssv2/1"]
    assert (first.split, first.label) == ("train", "Pushing something so that it falls")
    assert (first.file, first.group) == (f"{FILMS}/1.webm", "ssv2/1")
    assert {key: s.split for key, s in found.items()} == {
        f"ssv2/{n}": "train" if n < 7 else "validation" if n < 10 else "test" for n in range(1, 12)
    }
    assert found["ssv2/10"].label == ""  # Test entries have an id only.


def test_entries_without_a_template_have_their_label_and_numbers_may_be_numbers(dataset: Path) -> None:
    rewrite(dataset, "train", lambda rows: [{"id": 3, "label": "holding a cup"}])
    found = {segment.key: segment.label for segment in listed(dataset).segments}
    assert found["ssv2/3"] == "holding a cup"


@pytest.mark.parametrize("folder", ["", "annotations", "labels"])
@pytest.mark.parametrize("prefix", ["something-something-v2-", ""])
def test_lists_may_lie_in_a_folder_and_have_the_newer_names(dataset: Path, folder: str, prefix: str) -> None:
    before = listed(dataset).segments
    (dataset / folder).mkdir(exist_ok=True)
    for name in ("train", "validation", "test", "labels"):
        (dataset / LIST.format(name)).rename(dataset / folder / f"{prefix}{name}.json")
    assert recognises(dataset)
    assert listed(dataset).segments == before


def test_films_may_lie_flat_beside_the_lists(dataset: Path) -> None:
    for film in list((dataset / FILMS).iterdir()):
        film.rename(dataset / film.name)
    (dataset / FILMS).rmdir()
    found = listed(dataset)
    assert len(found.segments) == 11 and found.segments[0].file == "1.webm" and found.problems == ()


def test_a_re_encoded_film_keeps_its_id_and_webm_comes_first(dataset: Path) -> None:
    (dataset / FILMS / "1.webm").rename(dataset / FILMS / "1.mp4")
    shutil.copy(dataset / FILMS / "2.webm", dataset / FILMS / "2.mp4")
    files = {segment.key: segment.file for segment in listed(dataset).segments}
    assert (files["ssv2/1"], files["ssv2/2"]) == (f"{FILMS}/1.mp4", f"{FILMS}/2.webm")


def test_the_order_of_a_list_moves_no_id(dataset: Path) -> None:
    before = set(listed(dataset).segments)
    rewrite(dataset, "train", lambda rows: rows[::-1])
    assert set(listed(dataset).segments) == before


def test_a_listed_film_that_is_missing_is_named(dataset: Path) -> None:
    (dataset / FILMS / "8.webm").unlink()
    (problem,) = listed(dataset).problems
    assert (problem.key, problem.file) == ("ssv2/8", f"{FILMS}/8.webm")
    assert problem.reason == f"missing: listed in {LIST.format('validation')} but not there"


def test_a_missing_list_is_reported_and_its_films_counted(dataset: Path) -> None:
    (dataset / LIST.format("test")).unlink()
    found = listed(dataset)
    assert {segment.split for segment in found.segments} == {"train", "validation"}
    (problem,) = found.problems
    assert problem.file == LIST.format("test")
    assert problem.reason == "list missing: no clips of split 'test'"
    assert found.unlisted == 2


def test_films_of_no_list_are_counted_and_left_out(dataset: Path) -> None:
    shutil.copy(dataset / FILMS / "1.webm", dataset / FILMS / "4242.webm")
    (dataset / FILMS / "readme.webm").write_bytes(b"no number")
    found = listed(dataset)
    assert found.unlisted == 1 and len(found.segments) == 11


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("[", "is not valid JSON"),
        ("{}", "must hold a JSON list"),
        ('[{"label": "x"}]', "entry 0 has no id that is a number"),
        ('[{"id": "1"}, "2"]', "entry 1 has no id that is a number"),
        ('[{"id": "../../secret"}]', "entry 0 has no id that is a number"),
        ('[{"id": true}]', "entry 0 has no id that is a number"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_list_that_is_none_is_a_sentence_with_its_name(dataset: Path, rows: str, said: str) -> None:
    (dataset / LIST.format("train")).write_text(rows)
    with pytest.raises(DataError, match=said) as caught:
        listed(dataset)
    assert LIST.format("train") in str(caught.value) and "\n" not in str(caught.value)


def test_any_projects_train_json_is_not_this_data_set(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[]")
    assert not recognises(tmp_path) and not recognises(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no list of Something-Something V2"):
        listed(tmp_path)
