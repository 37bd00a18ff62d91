"""A shard file is the documented bytes, says of itself whose it is, and is found out when it is not whole."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_vla.cache import Encoding, Manifest, Record
from salt_vla.cache.format import checksum
from salt_vla.cache.shards import DamagedShard, Footer, read_footer, write_shard
from salt_vla.errors import CacheError

SHAPE = (2, 3)
ENCODING = Encoding("float16", SHAPE)
IDENTITY = Manifest("latents", "float16", SHAPE, 2, 4, {"teacher": "t"}, num_clips=9).identity
KEYS = (("a", 0), ("a", 1), ("b ü", 0), ("\U0001f980/…", 1))


def records(bad: tuple[int, ...] = ()) -> list[Record]:
    arrays = [np.full(SHAPE, slot + 1, np.float32) for slot in range(len(KEYS))]
    return [
        Record(key, None, "gone") if at in bad else Record(key, arrays[at]) for at, key in enumerate(KEYS)
    ]


def write(path: Path, bad: tuple[int, ...] = (), order: int = 1) -> Footer:
    return write_shard(path, 3, IDENTITY, KEYS, records(bad)[::order], ENCODING)


def test_a_shard_is_the_documented_bytes(tmp_path):
    write(tmp_path / "shard", bad=(1,))
    content = (tmp_path / "shard").read_bytes()
    length, check, magic = struct.unpack("<QQ8s", content[-24:])
    text = content[-24 - length : -24]
    blobs = [struct.pack("<6e", *[slot + 1] * 6) for slot in range(4)]
    assert content[: -24 - length] == blobs[0] + bytes(12) + blobs[2] + blobs[3]
    assert magic == b"SALTSHD2" and check == checksum(text)
    assert json.loads(text) == {
        "shard": 3,
        "manifest": json.loads(IDENTITY),
        "clip_ids": ["a", "a", "b ü", "\U0001f980/…"],
        "views": [0, 1, 0, 1],
        "checksums": [checksum(blobs[0]), None, checksum(blobs[2]), checksum(blobs[3])],
        "reasons": ["", "gone", "", ""],
    }
    assert text.isascii()


@pytest.mark.parametrize("bad", [(), (0,), (3,), (2, 3), (0, 1, 2, 3)])
def test_what_is_written_is_what_the_footer_says(tmp_path, bad):
    written = write(tmp_path / "shard", bad)
    for encoding in (ENCODING, None):
        assert read_footer(tmp_path / "shard", encoding) == written
    assert written.keys == KEYS and written.shard == 3 and written.identity == IDENTITY
    assert [check is None for check in written.checksums] == [slot in bad for slot in range(4)]
    assert written.reasons == tuple("gone" if slot in bad else "" for slot in range(4))


def test_the_order_in_which_records_come_does_not_matter(tmp_path):
    write(tmp_path / "one", bad=(1,))
    write(tmp_path / "other", bad=(1,), order=-1)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(), max_size=12), st.integers(0, 9), st.none() | st.text())))
def test_footers_keep_any_text_and_any_checksum(slots):
    """Lone surrogates too, as names of files may hold them, in reasons."""
    keys = tuple((clip_id, view) for clip_id, view, _ in slots)
    checksums = tuple(None if reason else 2**64 - 1 - at for at, (_, _, reason) in enumerate(slots))
    footer = Footer(7, IDENTITY, keys, checksums, tuple(reason or "" for _, _, reason in slots))
    content = footer.to_bytes()
    assert Footer.from_json(content[:-24]) == footer


def test_a_truncated_shard_is_no_shard_at_any_length(tmp_path):
    path = tmp_path / "shard"
    write(path)
    content = path.read_bytes()
    for size in range(len(content)):
        os.truncate(path, size)
        with pytest.raises(DamagedShard, match=r"shard (is no whole shard|is damaged)"):
            read_footer(path, ENCODING)
        path.write_bytes(content)
    path.write_bytes(content + b"\0")
    with pytest.raises(DamagedShard, match="ends otherwise than shards do"):
        read_footer(path, ENCODING)


def test_any_changed_byte_of_a_footer_is_noticed(tmp_path):
    path = tmp_path / "shard"
    whole = write(path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in range(len(KEYS) * ENCODING.record_bytes, len(content)):
        changed = bytearray(content)
        changed[at] ^= int(rng.integers(1, 256))
        path.write_bytes(changed)
        with pytest.raises(DamagedShard):
            read_footer(path, ENCODING)
    path.write_bytes(content)
    assert read_footer(path, ENCODING) == whole


def test_a_shard_that_lacks_bytes_before_its_footer_is_no_whole_shard(tmp_path):
    path = tmp_path / "shard"
    write(path)
    path.write_bytes(path.read_bytes()[1:])
    for encoding in (ENCODING, None):
        with pytest.raises(DamagedShard, match="its footer says otherwise"):
            read_footer(path, encoding)


def test_a_footer_that_was_never_written_is_no_footer(tmp_path):
    path = tmp_path / "shard"
    for text in (b"{}", b"[]", b"null", b"\xff", b'{"shard": 0, "manifest": {}, "clip_ids": []}'):
        path.write_bytes(text + struct.pack("<QQ8s", len(text), checksum(text), b"SALTSHD2"))
        with pytest.raises(DamagedShard, match="is no shard of this version"):
            read_footer(path)


def test_a_missing_shard_is_damage_and_one_that_may_not_be_read_is_not(tmp_path):
    """Who takes an error of the disk for a missing shard makes it again, over one that may be whole."""
    with pytest.raises(DamagedShard, match="shard is missing"):
        read_footer(tmp_path / "shard", ENCODING)
    with pytest.raises(CacheError, match="cannot be read: Is a directory") as error:
        read_footer(tmp_path, ENCODING)
    assert not isinstance(error.value, DamagedShard)


ODD = 2**63 - 1
SAID = json.loads(IDENTITY)


@pytest.mark.parametrize(
    "odd",
    [
        {"views": [float("inf"), 1, 0, 1]},
        {"views": [-1, 1, 0, 1]},
        {"clip_ids": ["a", "a", None, "b"]},
        *({"checksums": [check, None, None, None]} for check in (-1, 2**70, "x", float("nan"), True)),
        {"reasons": ["", 1, "", ""]},
        {"shard": "three"},
        {"manifest": SAID | {"complete": True}},
        *({"manifest": SAID | {"shape": shape}} for shape in ([], "ab", [0], [1.5], [ODD, ODD])),
        {"manifest": SAID | {"encoding": [1]}},
        {"manifest": SAID | {"provenance": [1]}},
        {"manifest": SAID | {"token_order": 7}},
        {"manifest": SAID | {"records_per_shard": 0}},
        {"manifest": SAID | {"records_per_shard": 2**40}},
        {"manifest": SAID | {"num_clips": 2**80}},
        {"manifest": [[]]},
    ],
    ids=str,
)
def test_odd_values_in_a_footer_whose_checksum_is_right_are_damage_and_no_crash(tmp_path, odd):
    path = tmp_path / "shard"
    sound = write(path)
    content = path.read_bytes()[: len(KEYS) * ENCODING.record_bytes]
    text = json.dumps(json.loads(sound.to_bytes()[:-24]) | odd).encode()
    path.write_bytes(content + text + struct.pack("<QQ8s", len(text), checksum(text), b"SALTSHD2"))
    for encoding in (ENCODING, None):
        with pytest.raises(DamagedShard, match="is no shard of this version"):
            read_footer(path, encoding)


def test_a_footer_nested_without_end_is_damage_and_no_crash(tmp_path):
    text = b"[" * 200_000
    (tmp_path / "shard").write_bytes(text + struct.pack("<QQ8s", len(text), checksum(text), b"SALTSHD2"))
    with pytest.raises(DamagedShard, match="is no shard of this version"):
        read_footer(tmp_path / "shard")


def test_a_pipe_in_a_shards_place_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "shard")
    with pytest.raises(CacheError, match="shard cannot be read: it is a pipe or a device"):
        read_footer(tmp_path / "shard")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[1:], "the records of shard 3 are not those of its keys"),
        (lambda r: [*r, r[0]], "comes twice"),
        (lambda r: [*r[1:], r[1]], "comes twice"),
        (lambda r: [*r[1:], Record(("c", 0), None)], "is no key of this shard"),
    ],
)
def test_records_must_be_those_of_the_shards_keys(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path / "shard", 3, IDENTITY, KEYS, change(records()), ENCODING)
    assert not list(tmp_path.iterdir())


def test_an_array_that_cannot_be_encoded_leaves_a_hole_and_its_reason(tmp_path):
    given_records = records()
    given_records[2] = Record(KEYS[2], np.full(SHAPE, np.nan))
    given_records[3] = Record(KEYS[3], np.zeros((9, 9)))
    footer = write_shard(tmp_path / "shard", 3, IDENTITY, KEYS, given_records, ENCODING)
    assert footer.checksums[2:] == (None, None)
    assert footer.reasons[2].startswith("latents hold NaN") and footer.reasons[3].startswith(
        "a record has shape"
    )
    assert (tmp_path / "shard").read_bytes()[24:48] == bytes(24)


def test_a_shard_of_which_nothing_can_be_encoded_is_refused(tmp_path):
    """One bad clip is an accident; all of them are a broken teacher, and no night shall be lost to it."""
    broken = [Record(key, np.full(SHAPE, np.inf)) for key in KEYS]
    with pytest.raises(
        CacheError, match=r"nothing of this shard can be encoded; clip 'a', view 0: latents hold"
    ):
        write_shard(tmp_path / "shard", 3, IDENTITY, KEYS, broken, ENCODING)
    assert not list(tmp_path.iterdir())
    alone = write_shard(tmp_path / "shard", 3, IDENTITY, KEYS[:1], broken[:1], ENCODING)
    assert alone.checksums == (None,)


def test_who_refuses_before_publishing_leaves_nothing(tmp_path):
    def refuse() -> None:
        (part,) = tmp_path.iterdir()
        assert part.name.startswith(".shard.") and part.read_bytes().endswith(b"SALTSHD2")
        raise RuntimeError("taken over")

    with pytest.raises(RuntimeError, match="taken over"):
        write_shard(tmp_path / "shard", 3, IDENTITY, KEYS, records(), ENCODING, refuse)
    assert not list(tmp_path.iterdir())
