"""The index finds every clip and no other, costs nothing to open, and is believed page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_vla.cache import Manifest
from salt_vla.cache import index as index_module
from salt_vla.cache.format import INDEX, INDEX_PAGES, checksum
from salt_vla.cache.index import MANIFEST_KEY, PAGE, ClipIds, Index, as_clip_ids, require_unique, write_index
from salt_vla.errors import CacheError


def columns(clips: int, views: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(clips)
    checksums = rng.integers(0, 2**64, (clips, views), dtype=np.uint64)
    return checksums, rng.integers(0, 4, (clips, views)).astype(bool).astype(np.uint8)


def write(folder: Path, clip_ids: Sequence[str] | pa.Array, views: int = 2, manifest: str = "") -> Manifest:
    """An index with drawn columns, and as much of a manifest as opening it takes."""
    folder.mkdir(exist_ok=True, parents=True)
    ids = as_clip_ids(clip_ids)
    size, pages = write_index(folder, ids, *columns(len(ids), views), manifest)
    begun = Manifest("latents", "float16", (1, 1), views, 4, num_clips=len(ids))
    return replace(begun, index_bytes=size, index_checksum=pages, complete=True)


def open_new(folder: Path, clip_ids: Sequence[str], views: int = 2) -> Index:
    return Index(folder, write(folder, clip_ids, views))


def many_ids(count: int) -> list[str]:
    """Of lengths from nothing to a few hundred bytes, in some scripts, in no order."""
    rng = np.random.default_rng(count)
    lengths = rng.integers(0, 12, count)
    return [f"{'ab/ü漢🦀'[number % 6] * int(length)}#{number:x}" for number, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """100,000 clips: over ten pages of hashes alone."""
    folder = tmp_path_factory.mktemp("large")
    ids = many_ids(100_000)
    return folder, ids, write(folder, ids)


def test_every_clip_is_found_where_a_dict_would_find_it(large):
    folder, ids, manifest = large
    index = Index(folder, manifest)
    rows = {clip_id: row for row, clip_id in enumerate(ids)}
    assert [index.find(clip_id) for clip_id in ids] == list(rows.values())
    strangers = [f"{clip_id}?" for clip_id in ids[:2000]] + ["", "\ud800", "\0"]
    assert all(index.find(clip_id) is None for clip_id in strangers)
    asked = [*strangers[:5], *ids[::-1], *strangers[5:2001], ids[7], ids[7]]
    at_once = index.rows_of(as_clip_ids(asked)).tolist()
    assert at_once == [rows.get(clip_id, -1) for clip_id in asked]


def test_what_is_read_of_a_row_is_what_was_written(large):
    folder, ids, manifest = large
    index = Index(folder, manifest)
    checksums, present = columns(len(ids), 2)
    for row in np.random.default_rng(0).integers(0, len(ids), 3000).tolist():
        assert index.clip_id(row) == ids[row]
        for view in range(2):
            wanted = int(checksums[row, view]) if present[row, view] else None
            assert index.checksum_of(row, view) == wanted
    assert np.array_equal(index.all_checksums(), checksums) and np.array_equal(index.all_present(), present)
    assert index.all_ids().to_pylist() == ids


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), unique=True), st.integers(1, 3)
)
def test_any_ids_that_differ_are_told_apart(tmp_path_factory, ids, views):
    """Empty ones, those with zeros in them, and those that look alike but are other code points."""
    folder = tmp_path_factory.mktemp("index")
    index = open_new(folder, ids, views)
    assert [index.find(clip_id) for clip_id in ids] == list(range(len(ids)))
    assert index.rows_of(as_clip_ids(["e\u0301", *ids]))[1:].tolist() == list(range(len(ids)))
    assert index.num_clips == len(ids) and index.all_present().shape == (len(ids), views)
    assert index.find("e\u0301") is None or "e\u0301" in ids


@pytest.mark.parametrize("kinds", [1, 2, 40])
@pytest.mark.parametrize("where", [0, 2**63, 2**64 - 1])
def test_ids_of_one_hash_are_told_apart(tmp_path, monkeypatch, kinds, where):
    """Hashes that are neither different nor evenly spread: the lookup then guesses wrong, and must notice."""

    def poor_hash(text: bytes) -> int:
        return (where + len(text) * 7 % kinds) % 2**64

    monkeypatch.setattr(index_module.xxhash, "xxh3_64_intdigest", poor_hash)
    ids = many_ids(400)
    folder = tmp_path / "index"
    folder.mkdir()
    size, _ = write_index(folder, as_clip_ids(ids), *columns(len(ids), 1))
    monkeypatch.undo()
    digests = b"".join(
        checksum((folder / INDEX).read_bytes()[at : at + PAGE]).to_bytes(8, "little")
        for at in range(0, size, PAGE)
    )
    (folder / INDEX_PAGES).write_bytes(digests)
    manifest = Manifest("latents", "float16", (1, 1), 1, 4, num_clips=len(ids), index_bytes=size)
    index = Index(folder, replace(manifest, index_checksum=f"{checksum(digests):016x}"))
    monkeypatch.setattr(index_module.xxhash, "xxh3_64_intdigest", poor_hash)
    assert [index.find(clip_id) for clip_id in ids] == list(range(len(ids)))
    assert index.find("stranger") is None
    at_once = index.rows_of(as_clip_ids(["stranger", *ids[::-1]]))
    assert at_once.tolist() == [-1, *range(len(ids) - 1, -1, -1)]
    require_unique(as_clip_ids(ids))
    with pytest.raises(CacheError, match="clip 'twice' comes more than once"):
        require_unique(as_clip_ids(["twice", *ids, "twice"]))


def test_the_index_is_the_documented_table(tmp_path):
    ids = ["b", "", "aü", "c"]
    manifest = write(tmp_path, ids, manifest="{}")
    content = (tmp_path / INDEX).read_bytes()
    table = pa.ipc.open_file(content).read_all()
    assert table.schema.metadata == {MANIFEST_KEY: b"{}"}
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("clip_id", "large_string"),
        ("checksums", "fixed_size_list<item: uint64>[2]"),
        ("present", "fixed_size_list<item: uint8>[2]"),
        ("id_hash", "uint64"),
        ("id_row", "uint32"),
    ]
    checksums, present = columns(4, 2)
    assert table["clip_id"].to_pylist() == ids
    assert table["checksums"].to_pylist() == checksums.tolist()
    assert table["present"].to_pylist() == present.tolist()
    hashes = [xxhash.xxh3_64_intdigest(clip_id.encode()) for clip_id in ids]
    assert table["id_hash"].to_pylist() == sorted(hashes)
    assert [hashes[row] for row in table["id_row"].to_pylist()] == sorted(hashes)
    assert (tmp_path / INDEX_PAGES).read_bytes() == checksum(content).to_bytes(8, "little")
    assert manifest.index_checksum == f"{checksum((tmp_path / INDEX_PAGES).read_bytes()):016x}"


def test_a_large_index_is_one_batch_with_a_checksum_for_each_page(large):
    folder, _, manifest = large
    content = (folder / INDEX).read_bytes()
    assert pa.ipc.open_file(content).num_record_batches == 1 and len(content) == manifest.index_bytes
    pages = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
    digests = [int.from_bytes(d, "little") for d in np.fromfile(folder / INDEX_PAGES, "V8").tolist()]
    assert digests == [checksum(page) for page in pages] and len(pages) > 40


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_bytes_do_not_depend_on_how_the_ids_were_cut(tmp_path, count):
    """A table read from Parquet comes in chunks, and a selection of it is a slice of another's buffers."""
    ids = many_ids(count)
    whole = pa.array(ids, pa.string())
    forms = [
        ids,
        tuple(ids),
        whole,
        whole.cast(pa.large_string()),
        pa.array(["before", *ids, "after"], pa.large_string())[1:-1],
        pa.array(["before", *ids, "after"], pa.string())[1:-1],
        pa.chunked_array([whole[:1], whole[1:]], pa.string()),
        pa.chunked_array([], pa.string()) if not ids else pa.chunked_array([whole]),
        whole.dictionary_encode(),
        pa.array([*ids, None], pa.large_string())[:-1],
        ClipIds(as_clip_ids(ids)),
    ]
    for number, form in enumerate(forms):
        assert as_clip_ids(form).to_pylist() == ids
        write(tmp_path / str(number), form)
    contents = {(tmp_path / str(number) / INDEX).read_bytes() for number in range(len(forms))}
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "\ud800"], "clip ids are texts, and one of these is not"),
        (["a", 3], "clip ids are texts, and one of these is not"),
        (["a", None], "1 clips have no id"),
    ],
)
def test_what_is_no_text_is_no_clip_id(ids, message):
    with pytest.raises(CacheError, match=message):
        as_clip_ids(ids)


@contextmanager
def flipped(path: Path, at: int) -> Iterator[None]:
    def flip() -> None:
        with path.open("r+b") as file:
            file.seek(at)
            old = file.read(1)[0]
            file.seek(at)
            file.write(bytes([old ^ 16]))

    flip()
    try:
        yield
    finally:
        flip()


def answers(index: Index, ids: list[str]) -> list[object]:
    found = [index.find(clip_id) for clip_id in ids]
    rows = [row for row in found if row is not None]
    return [found, [index.checksum_of(row, 1) for row in rows], [index.clip_id(row) for row in rows]]


def test_a_flipped_byte_is_an_error_or_changes_nothing_wherever_it_is(tmp_path):
    ids = many_ids(20)
    manifest = write(tmp_path, ids)
    right = answers(Index(tmp_path, manifest), ids)
    damaged = r"index.arrow is damaged between bytes 0 and \d+: .*cache repair"
    for at in range(manifest.index_bytes):
        with flipped(tmp_path / INDEX, at), pytest.raises(CacheError, match=damaged):
            answers(Index(tmp_path, manifest), ids)
    assert answers(Index(tmp_path, manifest), ids) == right


def test_a_flipped_byte_of_a_large_index_never_gives_a_wrong_answer(large):
    """Most of its pages are not looked at on opening: whoever needs one finds the damage then."""
    folder, ids, manifest = large
    rng = np.random.default_rng(1)
    some = [ids[row] for row in rng.integers(0, len(ids), 400).tolist()]
    right = answers(Index(folder, manifest), some)
    num_noticed = num_opened = 0
    for at in rng.integers(0, manifest.index_bytes, 60).tolist():
        with flipped(folder / INDEX, at):
            try:
                index = Index(folder, manifest)
                num_opened += 1
                assert sum(bad is not None for bad in index.check_all()) == 1
                assert answers(Index(folder, manifest), some) == right
            except CacheError as error:
                num_noticed += 1
                assert f"is damaged between bytes {at // PAGE * PAGE} and" in str(error)
    assert num_noticed > 40 and num_opened > 40
    assert not any(Index(folder, manifest).check_all())


def test_a_flipped_byte_of_the_pages_checksums_is_found_at_opening(large):
    folder, _, manifest = large
    for at in (0, 7, (folder / INDEX_PAGES).stat().st_size - 1):
        damaged = r"index.pages is damaged: .*`salt-vla cache repair`"
        with flipped(folder / INDEX_PAGES, at), pytest.raises(CacheError, match=damaged):
            Index(folder, manifest)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_index_is_a_sentence_and_no_sigbus(tmp_path, keep):
    manifest = write(tmp_path, many_ids(9))
    content = (tmp_path / INDEX).read_bytes()
    (tmp_path / INDEX).write_bytes(content[:keep])
    with pytest.raises(
        CacheError, match=rf"has {len(content[:keep])} bytes, not the manifest's {len(content)}"
    ):
        Index(tmp_path, manifest)
    (tmp_path / INDEX).write_bytes(content)
    (tmp_path / INDEX_PAGES).write_bytes((tmp_path / INDEX_PAGES).read_bytes()[: min(keep, 7)])
    with pytest.raises(CacheError, match=r"index.pages is damaged"):
        Index(tmp_path, manifest)


def test_a_manifest_longer_than_a_page_is_checked_too(tmp_path):
    """It lies before the columns' layout, and once more at the file's end."""
    text = "x" * (2 * PAGE)
    manifest = write(tmp_path, many_ids(9), manifest=text)
    assert Index(tmp_path, manifest).find("stranger") is None
    for at in range(0, manifest.index_bytes, 997):
        damaged = r"index.arrow is damaged between"
        with flipped(tmp_path / INDEX, at), pytest.raises(CacheError, match=damaged):
            answers(Index(tmp_path, manifest), many_ids(9))


def test_opening_looks_at_the_ends_of_the_file_and_a_lookup_at_a_few_pages(large):
    folder, ids, manifest = large
    index = Index(folder, manifest)
    assert sum(index._is_sound) <= 3
    row = 70_000 + int(columns(len(ids), 2)[1][70_000:, 0].argmax())
    assert index.find(ids[row]) == row and index.checksum_of(row, 0) is not None
    assert sum(index._is_sound) <= 3 + 7


def test_clip_ids_read_like_a_list():
    ids = ["a", "b", "ü", ""]
    clips = ClipIds(as_clip_ids(ids))
    assert clips == ids and clips == ClipIds(as_clip_ids(ids)) and list(clips) == ids and len(clips) == 4
    assert clips[1:] == ids[1:] and clips[::-2] == ids[::-2] and clips[-1] == "" and clips[np.int64(2)] == "ü"
    assert "ü" in clips and "x" not in clips and clips.index("b") == 1
    assert clips != ids[:-1] and clips != [*ids[:-1], "x"] and clips != "abü" and clips != 3
    assert repr(clips) == "ClipIds(['a', 'b', 'ü', …], 4 in all)"
    for beyond in (4, -5):
        with pytest.raises(IndexError):
            clips[beyond]


def crafted(folder: Path, content: bytes, **manifest: int) -> Index:
    """An index of any content whose checksums are right."""
    pages = b"".join(
        checksum(content[at : at + PAGE]).to_bytes(8, "little") for at in range(0, len(content), PAGE)
    )
    (folder / INDEX).write_bytes(content)
    (folder / INDEX_PAGES).write_bytes(pages)
    begun = Manifest("latents", "float16", (1, 1), 2, 4, num_clips=300)
    sizes = {"index_bytes": len(content), "index_checksum": f"{checksum(pages):016x}"}
    return Index(folder, replace(begun, **sizes, **manifest))


def as_file(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


@pytest.fixture
def batch(tmp_path) -> pa.RecordBatch:
    write(tmp_path, many_ids(300))
    return pa.ipc.open_file((tmp_path / INDEX).read_bytes()).get_batch(0)


def test_an_index_of_other_columns_or_clips_is_a_sentence_though_its_checksums_are_right(tmp_path, batch):
    other_type = batch.set_column(4, "id_row", batch["id_row"].cast(pa.uint64()))
    with_nulls = batch.set_column(4, "id_row", pa.array([None] * 300, pa.uint32()))
    cases = {
        "its columns differ": [batch.drop_columns(["id_row"]), other_type, with_nulls],
        "has 100 clips, and the manifest 300": [batch.slice(0, 100)],
    }
    assert crafted(tmp_path, as_file(batch)).find(batch["clip_id"][7].as_py()) == 7
    for message, batches in cases.items():
        for wrong in batches:
            with pytest.raises(CacheError, match=f"{message}; `salt-vla cache repair`"):
                crafted(tmp_path, as_file(wrong))
    with pytest.raises(CacheError, match="has 300 clips, and the manifest 600"):
        crafted(tmp_path, as_file(batch), num_clips=600)
    with pytest.raises(CacheError, match="its columns differ"):
        crafted(tmp_path, as_file(batch), num_views=3)


@pytest.mark.parametrize("size", [1, 9, 100, 5000])
def test_an_index_that_is_no_arrow_file_is_a_sentence_though_its_checksums_are_right(tmp_path, batch, size):
    for content in (b"x" * size, b"\0" * size, as_file(batch)[:size], as_file(batch)[-size:]):
        with pytest.raises(CacheError, match="is no index"):
            crafted(tmp_path, content)


def test_rows_beyond_an_indexs_end_are_a_sentence(tmp_path, batch):
    beyond = batch.set_column(4, "id_row", pa.array([4_000_000_000] * 300, pa.uint32()))
    index = crafted(tmp_path, as_file(beyond))
    with pytest.raises(CacheError, match="is no index: it has no clip 4000000000"):
        index.find(batch["clip_id"][7].as_py())
    with pytest.raises(CacheError, match="is no index: it has no clip 4000000000"):
        index.rows_of(batch["clip_id"])


def test_ids_that_point_beyond_an_indexs_end_are_a_sentence(tmp_path, batch):
    content = bytearray((tmp_path / INDEX).read_bytes())
    offsets = np.frombuffer(batch["clip_id"].buffers()[1], np.int64)[:301].tobytes()
    for row in (1, 300):
        at = content.index(offsets) + 8 * row
        beyond = content[:at] + (1 << 40).to_bytes(8, "little") + content[at + 8 :]
        with pytest.raises(CacheError, match="is no index"):
            crafted(tmp_path, bytes(beyond)).all_ids()
