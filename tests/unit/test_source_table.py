"""A list of films in three formats: the same rows give the same segments; wrong ones are named."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting, Segment, SourceOptions
from salt_vla.data.sources.table import recognises, segments
from salt_vla.errors import DataError
from salt_vla.jobs.data_index import index_data

COLUMNS = ("path", "start", "end", "label", "split", "group", "id")
ROWS: list[dict[str, Any]] = [
    {"path": "a.mp4", "start": 0.5, "end": 2.25, "label": "lift", "split": "train", "group": "", "id": ""},
    {"path": "a.mp4", "start": 3, "end": None, "label": "", "split": "val", "group": "g", "id": "second"},
    {"path": "b/c.webm", "start": None, "end": None, "label": "drop", "split": "", "group": "", "id": ""},
]


def write(path: Path, rows: list[dict[str, Any]] = ROWS, columns: tuple[str, ...] = COLUMNS) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in rows))
    else:
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), path)
    return path


def listed(path: Path, **options: str) -> tuple[Segment, ...]:
    return segments(path, SourceOptions(**options)).segments


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_the_three_formats_say_the_same(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"films.{ending}")
    assert recognises(path)
    assert listed(path) == (
        Segment("films/a.mp4@0.5-2.25", "a.mp4", "films/a.mp4", "train", "lift", start=0.5, end=2.25),
        Segment("films/second", "a.mp4", "films/g", "validation", "", start=3.0),
        Segment("films/b/c.webm", "b/c.webm", "films/b/c.webm", "", "drop"),
    )


def test_the_path_alone_is_enough_and_other_columns_are_nobodys_business(tmp_path: Path) -> None:
    rows = [{"path": "x.mp4", "weather": "rain", "n": 3}]
    for ending in ("csv", "jsonl", "parquet"):
        path = write(tmp_path / f"t.{ending}", rows, ("path", "weather", "n"))
        assert listed(path) == (Segment("t/x.mp4", "x.mp4", "t/x.mp4"),)


def test_the_order_of_the_rows_moves_no_id(tmp_path: Path) -> None:
    one, other = write(tmp_path / "t.csv"), write(tmp_path / "t.jsonl", ROWS[::-1])
    assert set(listed(one)) == set(listed(other))


def test_a_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("\ufeffpath,label\r\nü.mp4,grün\r\n".encode())
    assert listed(path) == (Segment("t/ü.mp4", "ü.mp4", "t/ü.mp4", label="grün"),)


def test_paths_may_be_relative_to_another_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv")
    assert segments(path, SourceOptions()).root == tmp_path
    assert segments(path, SourceOptions(videos="/films")).root == Path("/films")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"path": ""}, "the path is empty"),
        ({"start": "soon"}, "start is 'soon', not a number of seconds"),
        ({"start": "-1"}, "start is '-1', not a number of seconds"),
        ({"end": "nan"}, "end is 'nan', not a number of seconds"),
        ({"end": "inf"}, "end is 'inf', not a number of seconds"),
        ({"start": 2, "end": 1}, "end is 1 s, not after start, 2 s"),
        ({"start": None, "end": 0}, "end is 0 s, not after start, 0 s"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_wrong_value_is_named_with_its_line(
    tmp_path: Path, ending: str, row: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / f"t.{ending}", [ROWS[0], ROWS[0] | row])
    with pytest.raises(DataError) as caught:
        listed(path)
    line = 3  # After the header, or after a blank line.
    assert f"{path}, line {line}: " in str(caught.value)
    assert said.replace("'", "") in str(caught.value).replace("'", "")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "", "lacks the column(s) path; its first line names: nothing"),
        ("t.csv", "file,label\nx,y\n", "lacks the column(s) path; its first line names: file, label"),
        ("t.csv", "path,label\nx.mp4\n", "line 2, does not have 2 values"),
        ("t.csv", "path,label\nx.mp4,a,b\n", "line 2, does not have 2 values"),
        ("t.csv", 'path,label\nx.mp4,a\n\ny.mp4,"a\n\n\n', "the row that begins in line 3 is not CSV"),
        ("t.csv", "path,label\nx.mp4,a\ny.mp4," + "b" * 140_000, "the row that begins in line 3 is not CSV"),
        ("t.csv", "path,label,path\nx,y,z\n", "has the column 'path' more than once"),
        ("t.csv", "path\n", "lists no video"),
        ("t.csv", "path,lable\nx,y\n", "has a column 'lable'; if it means 'label', call it so"),
        ("t.jsonl", '{"path": "x"}\n{', "line 2, is not valid JSON"),
        ("t.jsonl", '{"path": "x"}\n[]', "line 2, must be a JSON object"),
        ("t.jsonl", '{"path": 1.5}', "path is 1.5, not text"),
        ("t.jsonl", '{"path": "x", "start": true}', "start is True, not a number of seconds"),
        ("t.jsonl", '{"label": "x"}', "the path is empty"),
        ("t.jsonl", f'{{"path": "x", "start": {"9" * 400}}}', "line 1: start is 999"),
        ("t.parquet", "PAR1 no more", "is not a Parquet file, or a damaged one"),
        ("t.txt", "path\nx\n", "a list of videos ends in .csv, .jsonl, .parquet, not '.txt'"),
    ],
)
def test_a_list_that_is_none_is_a_sentence(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        listed(tmp_path / name)
    assert said in str(caught.value) and str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_binary_and_missing_lists_are_sentences(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(DataError, match=r"t\.csv cannot be read as text \(.*\); save it as UTF-8"):
        listed(tmp_path / "t.csv")
    with pytest.raises(DataError, match="must be a file"):
        listed(tmp_path / "u.csv")
    pq.write_table(pa.table({"film": ["x"]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="lacks the column 'path'; it has: film"):
        listed(tmp_path / "t.parquet")
    assert not recognises(tmp_path / "t.parquet") and not recognises(tmp_path / "u.csv")


def test_stretches_become_frames_of_the_file(write_video: Callable[..., Path], tmp_path: Path) -> None:
    """12 pictures a second: 0.5 s is frame 6; an end beyond the file's is its end."""
    write_video(tmp_path / "a.mp4", frames=30, fps=12)
    rows = [{"path": "a.mp4", "start": 0.5, "end": 1.5}, {"path": "a.mp4", "start": 1.5, "end": 99}]
    path = write(tmp_path / "t.csv", rows, ("path", "start", "end"))
    table, problems = index_data(path, Cutting(ViewConfig(frame_stride=1), 4, hop=4))
    places = [(c.first_frame, c.episode_first_frame, c.episode_frames) for c in table.clips()]
    assert places == [(6, 6, 12), (10, 6, 12), (14, 6, 12), (18, 18, 12), (22, 18, 12), (26, 18, 12)]
    assert len({clip.episode for clip in table.clips()}) == 1 and problems == []


def test_stretches_without_frames_and_paths_that_leave_are_problems(
    write_video: Callable[..., Path], tmp_path: Path
) -> None:
    write_video(tmp_path / "data" / "a.mp4", frames=30, fps=12)
    write_video(tmp_path / "outside.mp4")
    rows = [
        {"path": "a.mp4"},
        {"path": "a.mp4", "start": 5},
        {"path": "a.mp4", "start": 1.0, "end": 1.01},
        {"path": "../outside.mp4"},
        {"path": str(tmp_path / "outside.mp4")},
        {"path": "b.mp4", "id": "twice"},
        {"path": "a.mp4", "id": "twice"},
    ]
    path = write(tmp_path / "data" / "t.csv", rows, ("path", "start", "end", "id"))
    cutting = Cutting(ViewConfig(frame_stride=1), 4)
    table, problems = index_data(path, cutting, "table", max_bad_share=1)
    assert {clip.rpartition("/")[0] for clip in table.clip_ids} == {"t/a.mp4"}
    reasons = [problem.reason for problem in problems]
    assert reasons.count("leaves the data set's folder") == 2
    assert reasons.count("repeated: 2 entries have this key, and none is taken; name each apart") == 2
    assert reasons.count("empty: of the file's 2.5 s no frame lies in this stretch") == 2


def test_a_group_in_two_splits_is_refused(write_video: Callable[..., Path], tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    rows = [{"path": "a.mp4", "end": 1, "split": "train"}, {"path": "a.mp4", "start": 1, "split": "val"}]
    path = write(tmp_path / "t.csv", rows, ("path", "start", "end", "split"))
    with pytest.raises(DataError, match=r"'t/a\.mp4' is in the splits train and validation"):
        index_data(path, Cutting(ViewConfig(frame_stride=1), 4))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_only_line_ends_end_lines(tmp_path: Path, ending: str) -> None:
    """JSON and CSV may hold what Unicode calls a line separator inside a value."""
    labels = ["a\u2028b", "a\x85b", "a\x0cb", "a\x1cb"]
    rows = [{"path": f"{number}.mp4", "label": label} for number, label in enumerate(labels)]
    path = tmp_path / f"t.{ending}"
    if ending == "jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    else:
        write(path, rows, ("path", "label"))
    assert [segment.label for segment in listed(path)] == labels


def test_one_film_has_one_name(tmp_path: Path) -> None:
    """However its place is written: it may not be in two splits by another spelling."""
    rows = [{"path": said} for said in ("a.mp4", "./a.mp4", "x/../a.mp4", "x//b.mp4", ".//x/./b.mp4")]
    found = listed(write(tmp_path / "t.csv", rows, ("path",)))
    assert [segment.file for segment in found] == ["a.mp4"] * 3 + ["x/b.mp4"] * 2
    assert {segment.group for segment in found} == {"t/a.mp4", "t/x/b.mp4"}
    assert {segment.key for segment in found} == {"t/a.mp4", "t/x/b.mp4"}


def test_a_film_in_two_splits_by_two_spellings_is_refused(
    write_video: Callable[..., Path], tmp_path: Path
) -> None:
    write_video(tmp_path / "a.mp4")
    rows = [
        {"path": "a.mp4", "split": "train", "id": "one"},
        {"path": "./a.mp4", "split": "val", "id": "two"},
    ]
    path = write(tmp_path / "t.csv", rows, ("path", "split", "id"))
    with pytest.raises(DataError, match=r"'t/a\.mp4' is in the splits train and validation"):
        index_data(path, Cutting(ViewConfig(frame_stride=1), 4))


@pytest.mark.parametrize(
    ("start", "end", "key"),
    [
        (1000.001, 1001.001, "@1000.001-1001.001"),
        (1000.002, 1001.002, "@1000.002-1001.002"),
        (0.5, None, "@0.5-"),
        (None, 3, "@0-3"),
        (1e-5, 123456.0, "@1e-05-123456"),
        (0, 1234567.5, "@0-1234567.5"),
    ],
)
def test_stretches_are_told_apart_by_every_digit(
    tmp_path: Path, start: float | None, end: float | None, key: str
) -> None:
    path = write(tmp_path / "t.jsonl", [{"path": "a.mp4", "start": start, "end": end}])
    assert [segment.key for segment in listed(path)] == [f"t/a.mp4{key}"]


def test_single_precision_names_stretches_as_double_does(tmp_path: Path) -> None:
    columns = {"path": ["a.mp4"] * 2, "start": [0.1, None], "end": [2.7, 1000.5]}
    keys = []
    for kind in (pa.float32(), pa.float64()):
        table = pa.table({n: pa.array(v, pa.string() if n == "path" else kind) for n, v in columns.items()})
        pq.write_table(table, tmp_path / "t.parquet")
        keys.append([segment.key for segment in listed(tmp_path / "t.parquet")])
    assert keys[0] == keys[1] == ["t/a.mp4@0.1-2.7", "t/a.mp4@0-1000.5"]


def test_a_list_whose_own_name_is_no_text_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "\udcff.parquet"
    (tmp_path / "t.parquet").write_bytes(write(tmp_path / "u.parquet").read_bytes())
    (tmp_path / "t.parquet").rename(path)
    assert not recognises(path)
    for read in (listed, ClipTable.read):
        with pytest.raises(DataError, match="is not a Parquet file, or a damaged one"):
            read(path)


@pytest.mark.parametrize("field", ["id", "path", "label", "split", "group"])
def test_halves_of_characters_cost_their_row_alone(
    write_video: Callable[..., Path], tmp_path: Path, field: str
) -> None:
    write_video(tmp_path / "a.mp4")
    rows = [{"path": "a.mp4"}, {"path": "a.mp4", "id": "other", field: "x\ud800"}]
    table, problems = index_data(
        write(tmp_path / "t.jsonl", rows), Cutting(ViewConfig(frame_stride=1), 4), max_bad_share=0.5
    )
    said = field if field in ("label", "split", "group") else "name"
    assert [problem.reason.partition(";")[0] for problem in problems] == [f"its {said} is not text in UTF-8"]
    assert set(table.rows["file"].to_pylist()) == {"a.mp4"}


@pytest.mark.parametrize("name", ["x" * 300 + ".mp4", "y/" * 3000 + "z.mp4", "loop.mp4", "a\0b.mp4"])
def test_names_that_no_system_holds_cost_their_row_alone(
    write_video: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    write_video(tmp_path / "a.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    path = write(tmp_path / "t.jsonl", [{"path": "a.mp4"}, {"path": name}])
    table, problems = index_data(path, Cutting(ViewConfig(frame_stride=1), 4), max_bad_share=0.5)
    assert set(table.rows["file"].to_pylist()) == {"a.mp4"} and len(problems) == 1
