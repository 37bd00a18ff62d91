"""The clip table: ids that never shift, a hash of what it says, and sentences for what is wrong with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_vla.data.clip_table import METADATA, SCHEMA, Clip, ClipTable
from salt_vla.errors import DataError

CLIP = Clip(
    "set/0/front/0", "set", "lerobot", "videos/a.mp4", 100, 3, 90, 60, "front", "push", 30.0, False, "train"
)
CLIPS = [
    replace(CLIP, clip_id=f"set/{number}", camera=camera, split=split, first_frame=90 + number)
    for number, (camera, split) in enumerate(
        [("front", "train"), ("side", "train"), ("front", "validation"), ("side", "validation")] * 2
    )
]

clips = st.builds(
    Clip,
    clip_id=st.uuids().map(str),
    dataset=st.just("set"),
    source=st.sampled_from(["lerobot", "ssv2"]),
    file=st.text("abc/é✓.", min_size=1, max_size=12),
    first_frame=st.integers(0, 2**40),
    episode=st.integers(0, 2**40),
    episode_first_frame=st.integers(0, 100),
    episode_frames=st.integers(1, 1000),
    camera=st.text(max_size=5),
    label=st.text(max_size=20),
    fps=st.floats(1, 240),
    variable_rate=st.booleans(),
    split=st.sampled_from(["train", "validation"]),
)


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(clips, min_size=1, max_size=6, unique_by=lambda clip: clip.clip_id))
def test_parquet_gives_back_every_column_of_every_clip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "clips.parquet"
    table = ClipTable.from_clips(rows, Path("/data/set"))
    table.write(path)
    back = ClipTable.read(path)
    assert back.clips() == rows and back.hash == table.hash and back.root == Path("/data/set")
    assert [back.clip(clip.clip_id) for clip in rows] == rows
    assert back.clip_ids == [clip.clip_id for clip in rows] and len(back) == len(rows)


def test_columns_are_the_documented_ones():
    assert SCHEMA.names == [field.name for field in fields(Clip)]
    assert CLIP.start_in_episode == 10


def test_hash_does_not_depend_on_where_the_data_set_lies(tmp_path):
    hashes = {ClipTable.from_clips(CLIPS, tmp_path / name).hash for name in ("a", "b")}
    ClipTable.from_clips(CLIPS, tmp_path / "a").write(tmp_path / "t.parquet")
    shutil.copy(tmp_path / "t.parquet", tmp_path / "u.parquet")
    assert hashes == {ClipTable.read(tmp_path / "u.parquet").hash}


def test_hash_depends_on_every_column_and_on_the_order():
    changes = {
        "clip_id": "other",
        "dataset": "set2",
        "source": "ssv2",
        "file": "b.mp4",
        "first_frame": 101,
        "episode": 4,
        "episode_first_frame": 91,
        "episode_frames": 61,
        "camera": "side",
        "label": "pull",
        "fps": 29.97,
        "variable_rate": True,
        "split": "validation",
    }
    assert set(changes) == set(SCHEMA.names)
    other = replace(CLIP, clip_id="set/other")
    tables = [[CLIP, other], [other, CLIP], [CLIP]]
    tables += [[replace(CLIP, **{name: value}), other] for name, value in changes.items()]
    assert len({ClipTable.from_clips(rows, Path("/")).hash for rows in tables}) == len(tables)


def test_hash_does_not_depend_on_how_the_rows_are_chunked():
    whole = ClipTable.from_clips(CLIPS, Path("/"))
    parts = [ClipTable.from_clips(CLIPS[i : i + 3], Path("/")).rows for i in (0, 3, 6)]
    assert ClipTable(pa.concat_tables(parts), {"set": Path("/")}).hash == whole.hash


@pytest.mark.parametrize(
    "file", ["../secret.mp4", "/etc/passwd", "videos/../../x.mp4", "a/../../set2/x.mp4", ".."]
)
def test_a_path_that_leaves_the_root_is_refused(tmp_path, file):
    table = ClipTable.from_clips([replace(CLIP, file=file)], tmp_path / "set")
    with pytest.raises(DataError, match=r"clip 'set/0/front/0': file .* leaves the data set's root"):
        table.video(table.clip(CLIP.clip_id))


def test_paths_below_the_root_are_joined_to_it(tmp_path):
    table = ClipTable.from_clips([CLIP, replace(CLIP, clip_id="b", file="x/../videos/b.mp4")], tmp_path)
    assert table.video(table.clip(CLIP.clip_id)) == tmp_path / "videos" / "a.mp4"
    assert table.video(table.clip("b")) == tmp_path / "videos" / "b.mp4"


def test_links_that_a_download_set_within_the_root_are_followed(tmp_path):
    """Hub caches keep files as links to blobs beside the data set."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "f00").write_bytes(b"film")
    (tmp_path / "set" / "videos").mkdir(parents=True)
    (tmp_path / "set" / "videos" / "a.mp4").symlink_to(tmp_path / "blobs" / "f00")
    table = ClipTable.from_clips([CLIP], tmp_path / "set")
    assert table.video(CLIP).read_bytes() == b"film"


def test_repeated_ids_are_refused_by_name(tmp_path):
    with pytest.raises(DataError, match="holds clip_id 'set/1' more than once"):
        ClipTable.from_clips([*CLIPS, CLIPS[1]], tmp_path)
    table = ClipTable.from_clips(CLIPS, tmp_path)
    doubled = ClipTable(pa.concat_tables([table.rows, table.rows.slice(2, 1)]), {"set": tmp_path})
    doubled.write(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t.parquet holds clip_id 'set/2' more than once"):
        ClipTable.read(tmp_path / "t.parquet")


PLACES = json.dumps({"roots": {"set": "/data"}, "weights": {}})


def write_rows(path: Path, rows: pa.Table) -> None:
    pq.write_table(rows.replace_schema_metadata({METADATA: PLACES}), path)


@pytest.mark.parametrize("name", SCHEMA.names)
def test_a_missing_column_is_named(tmp_path, name):
    rows = ClipTable.from_clips(CLIPS, tmp_path).rows.drop_columns([name])
    write_rows(tmp_path / "t.parquet", rows)
    with pytest.raises(DataError, match=rf"t.parquet is not a clip table .* column\(s\) {name}; make"):
        ClipTable.read(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("first_frame", ["ten"] * 8, "column first_frame is not int64"),
        ("fps", [None] + [30.0] * 7, r"column fps has 1 empty value\(s\)"),
        ("episode", [[1]] * 8, "column episode is not int64"),
    ],
)
def test_a_column_of_the_wrong_kind_is_named(tmp_path, name, values, message):
    rows = ClipTable.from_clips(CLIPS, tmp_path).rows
    rows = rows.set_column(rows.column_names.index(name), name, pa.array(values))
    write_rows(tmp_path / "t.parquet", rows)
    with pytest.raises(DataError, match=message):
        ClipTable.read(tmp_path / "t.parquet")


def test_further_columns_and_narrower_types_do_no_harm(tmp_path):
    table = ClipTable.from_clips(CLIPS, tmp_path)
    at = table.rows.column_names.index("episode")
    rows = table.rows.set_column(at, "episode", table.rows["episode"].cast(pa.int32()))
    write_rows(tmp_path / "t.parquet", rows.append_column("note", pa.array(["x"] * 8)))
    assert ClipTable.read(tmp_path / "t.parquet").hash == table.hash


def test_folder_names_with_an_equals_sign_are_no_columns(tmp_path):
    path = tmp_path / "split=test" / "camera=top" / "clips.parquet"
    table = ClipTable.from_clips(CLIPS, tmp_path)
    table.write(path)
    assert ClipTable.read(path).clips() == CLIPS


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1 but short PAR1"])
def test_what_is_no_parquet_file_is_a_sentence(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"t.parquet is not a Parquet file, or a damaged one: "):
        ClipTable.read(tmp_path / "t.parquet")


def test_a_truncated_or_damaged_table_is_a_sentence_or_the_same_table(tmp_path):
    """Pages carry checksums; what is left unguarded in the footer decides no clip."""
    path = tmp_path / "t.parquet"
    table = ClipTable.from_clips(CLIPS, tmp_path)
    table.write(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for damage in range(300):
        content = bytearray(whole)
        if damage < 40:
            del content[int(rng.integers(len(content))) :]
        else:
            content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(content)
        try:
            assert ClipTable.read(path).hash == table.hash
        except DataError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 40


def test_no_table_and_no_root_are_sentences_with_the_cure(tmp_path):
    with pytest.raises(DataError, match=r"there is no clip table at .*; make one with `salt-vla data index`"):
        ClipTable.read(tmp_path / "t.parquet")
    pq.write_table(ClipTable.from_clips(CLIPS, tmp_path).rows, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="does not say where its videos lie; make it with `salt-vla data"):
        ClipTable.read(tmp_path / "t.parquet")


def test_table_that_cannot_be_written_leaves_the_old_one(tmp_path, tree):
    table = ClipTable.from_clips(CLIPS, tmp_path)
    table.write(tmp_path / "t.parquet")
    ClipTable.from_clips(CLIPS[:2], tmp_path).write(tmp_path / "t.parquet")
    assert len(ClipTable.read(tmp_path / "t.parquet")) == 2
    assert list(tree(tmp_path)) == ["t.parquet"]


@pytest.mark.parametrize(
    ("split", "camera", "numbers"),
    [
        (None, None, range(8)),
        ("train", None, [0, 1, 4, 5]),
        (None, "side", [1, 3, 5, 7]),
        ("validation", "front", [2, 6]),
    ],
)
def test_selection_keeps_order_and_ids(split, camera, numbers):
    chosen = ClipTable.from_clips(CLIPS, Path("/data")).select(split=split, camera=camera)
    assert chosen.clip_ids == [f"set/{number}" for number in numbers]
    assert chosen.root == Path("/data")
    assert [chosen.clip(clip_id) for clip_id in chosen.clip_ids] == [CLIPS[number] for number in numbers]
    assert chosen.hash == ClipTable.from_clips([CLIPS[number] for number in numbers], Path("/")).hash


def test_only_some_clips_keep_the_tables_order():
    table = ClipTable.from_clips(CLIPS, Path("/data"))
    chosen = table.only(["set/6", "set/1", "set/99"])
    assert chosen.clip_ids == ["set/1", "set/6"] and chosen.root == Path("/data")
    assert len(table.only([])) == 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"split": "test"}, "no clip of /data has split 'test'; there are: train, validation"),
        ({"camera": "top"}, "no clip of /data has camera 'top'; there are: front, side"),
    ],
)
def test_selecting_an_unknown_name_lists_the_known_ones(names, message):
    with pytest.raises(DataError, match=message):
        ClipTable.from_clips(CLIPS, Path("/data")).select(**names)


def test_an_unknown_clip_is_named():
    with pytest.raises(DataError, match="clip 'set/9' is not in the clip table of /data"):
        ClipTable.from_clips(CLIPS, Path("/data")).clip("set/9")


def test_table_of_a_real_data_set_survives_the_disk(tiny_table, tmp_path):
    tiny_table.write(tmp_path / "t.parquet")
    back = ClipTable.read(tmp_path / "t.parquet")
    assert back.clips() == tiny_table.clips() and back.hash == tiny_table.hash
    assert all(back.video(clip).is_file() for clip in back.clips())
    metadata = pq.read_schema(tmp_path / "t.parquet").metadata
    assert json.loads(metadata[METADATA]) == {"roots": {"tiny": str(tiny_table.root)}, "weights": {}}


def test_data_sets_with_equal_rows_and_other_films_are_told_apart(
    tiny_table: ClipTable, tmp_path: Path
) -> None:
    copy = tmp_path / tiny_table.root.name
    shutil.copytree(tiny_table.root, copy)
    same = ClipTable(tiny_table.rows, {"tiny": copy})
    assert (same.hash, same.files_hash) == (tiny_table.hash, tiny_table.files_hash)
    film = copy / tiny_table.clips()[0].file
    film.write_bytes(film.read_bytes()[:-1] + b"x")
    changed = ClipTable(tiny_table.rows, {"tiny": copy})
    assert changed.hash == tiny_table.hash
    assert changed.files_hash != tiny_table.files_hash


def mixture() -> ClipTable:
    others = [replace(clip, clip_id=f"b/{n}", dataset="b", source="ssv2") for n, clip in enumerate(CLIPS[:4])]
    parts = [ClipTable.from_clips(CLIPS, Path("/data")), ClipTable.from_clips(others, Path("/elsewhere"))]
    return ClipTable.mix([(parts[0], 3), (parts[1], 1)])


def test_a_mixture_keeps_every_clips_source_root_and_weight(tmp_path):
    table = mixture()
    table.write(tmp_path / "mix.parquet")
    for mixed in (table, ClipTable.read(tmp_path / "mix.parquet")):
        assert mixed.weights == {"set": 3.0, "b": 1.0} and len(mixed) == 12
        assert mixed.video(mixed.clip("b/2")) == Path("/elsewhere/videos/a.mp4")
        assert mixed.video(mixed.clip("set/2")) == Path("/data/videos/a.mp4")
        assert [clip.source for clip in mixed.clips()] == ["lerobot"] * 8 + ["ssv2"] * 4
        assert mixed.name == "/data + /elsewhere"
        with pytest.raises(DataError, match="/data \\+ /elsewhere is a mixture; give a clip table of one"):
            _ = mixed.root


def test_a_selection_of_a_mixture_keeps_the_data_sets_that_are_left():
    assert mixture().select(split="train").weights == {"set": 3.0, "b": 1.0}
    alone = mixture().only(["b/0", "b/3"])
    assert alone.weights == {"b": 1.0} and alone.root == Path("/elsewhere")


def test_what_cannot_be_mixed_is_a_sentence():
    table = ClipTable.from_clips(CLIPS, Path("/data"))
    renamed = ClipTable.from_clips([replace(clip, dataset="b") for clip in CLIPS], Path("/data"))
    for parts, message in [
        (
            [(table, 1), (table, 1)],
            "two tables of the mixture hold the data set 'set'; index one under",
        ),
        ([(table, 1), (renamed, 1)], "the mixture holds clip_id 'set/0' more than once"),
        ([(table, 0)], "a mixture's weight must be a positive number, not 0"),
        ([(table, float("inf"))], "a mixture's weight must be a positive number, not inf"),
        ([(table, float("nan"))], "a mixture's weight must be a positive number, not nan"),
        ([(table, 1e308)], "a mixture's weight must be a positive number, not 1e.308"),
        ([(table, 1e-320)], "a mixture's weight must be a positive number, not 1e-320"),
        ([(mixture(), 1)], "is a mixture already; mix the tables it was made of"),
    ]:
        with pytest.raises(DataError, match=message):
            ClipTable.mix(parts)


@pytest.mark.parametrize(
    "said",
    [
        "",
        "[]",
        "{",
        '{"roots": {}}',
        '{"roots": {"set": 3}, "weights": {}}',
        '{"roots": {"set": "/data"}, "weights": {"set": NaN}}',
        '{"roots": {"set": "/data"}, "weights": {"set": 0}}',
    ],
)
def test_damaged_places_are_a_sentence(tmp_path, said):
    rows = ClipTable.from_clips(CLIPS, tmp_path).rows.replace_schema_metadata({METADATA: said})
    pq.write_table(rows, tmp_path / "t.parquet")
    with pytest.raises(DataError, match="does not say where its videos lie; make it with"):
        ClipTable.read(tmp_path / "t.parquet")
