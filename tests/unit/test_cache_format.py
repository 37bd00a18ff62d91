"""Records are the documented bytes, lose no more than promised, and never hold what is not a number."""

from __future__ import annotations

import copy
import json
import re
import struct
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from salt_vla.cache import Encoding, Manifest
from salt_vla.cache.format import (
    MANIFEST,
    SCHEMA_VERSION,
    CorruptRecord,
    DamagedManifest,
    NoManifest,
    checksum,
    describe_differences,
    shard_name,
)
from salt_vla.cache.shards import Footer
from salt_vla.errors import CacheError

SHAPE = (6, 48)
MANIFEST_OF_LATENTS = Manifest(
    kind="latents",
    encoding="float16",
    shape=SHAPE,
    num_views=2,
    records_per_shard=4,
    provenance={"teacher": "t", "fingerprint": "f00", "geometry": {"num_frames": 8}, "layer": None},
)


def gaussian_latents(seed: int, rows: int = 64, dim: int = 768) -> np.ndarray:
    """Like a teacher's residual stream: unit noise, and a few channels a hundred times as large."""
    rng = np.random.default_rng(seed)
    latents = rng.normal(size=(rows, dim)).astype(np.float32)
    latents[:, rng.choice(dim, 3, replace=False)] *= rng.uniform(20, 100, 3).astype(np.float32)
    return latents


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float16, SHAPE, elements=st.floats(-65504, 65504, width=16)))
def test_float16_gives_halves_back_exactly(halves):
    encoding = Encoding("float16", SHAPE)
    record = encoding.encode(halves.astype(np.float32))
    decoded = encoding.decode(record)
    assert decoded.dtype == np.float32 and decoded.shape == SHAPE
    assert decoded.tobytes() == halves.astype(np.float32).tobytes()
    assert encoding.encode(decoded) == record


def test_float16_rounds_others_to_the_nearest_half():
    latents = gaussian_latents(0)
    decoded = Encoding("float16", latents.shape).decode(Encoding("float16", latents.shape).encode(latents))
    assert np.abs(decoded - latents).max() <= np.abs(latents).max() * 2.0**-11


@pytest.mark.parametrize("seed", range(5))
def test_int8_keeps_the_direction_of_every_token_despite_outlier_channels(seed):
    latents = gaussian_latents(seed)
    encoding = Encoding("int8", latents.shape)
    assert cosine(encoding.decode(encoding.encode(latents)), latents).min() >= 0.999


@pytest.mark.parametrize("seed", range(5))
def test_int8_keeps_ordinary_channels_beside_channels_of_huge_variance(seed):
    """A scale a token alone would leave them no levels: their cosine was 0.88 to 0.96 here."""
    latents = gaussian_latents(seed)
    encoding = Encoding("int8", latents.shape)
    ordinary = np.abs(latents).max(axis=0) < 10
    decoded = encoding.decode(encoding.encode(latents))
    assert cosine(decoded[:, ordinary], latents[:, ordinary]).min() >= 0.999


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, SHAPE, elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_int8_is_off_by_half_a_step_of_its_row_and_channel_at_most(latents):
    encoding = Encoding("int8", SHAPE)
    record = encoding.encode(latents)
    decoded = encoding.decode(record)
    scales = np.frombuffer(record, "<f4", count=sum(SHAPE))
    step = scales[: SHAPE[0], None] * scales[SHAPE[0] :]
    assert (np.abs(decoded - latents) <= step * 0.5001).all()
    assert (scales[SHAPE[0] :] == np.maximum(np.abs(latents).max(axis=0), np.float32(1e-12))).all()
    assert not decoded[~latents.any(axis=1)].any()


def test_pixels_come_back_as_they_are_and_only_pixels_are_taken():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    encoding = Encoding("uint8", pixels.shape)
    assert encoding.encode(pixels) == pixels.tobytes()
    assert encoding.encode(np.asfortranarray(pixels)) == pixels.tobytes()
    assert np.array_equal(encoding.decode(pixels.tobytes()), pixels)
    with pytest.raises(CacheError, match="pixels are uint8, not float32"):
        encoding.encode(pixels.astype(np.float32))


def test_float16_record_is_the_documented_bytes():
    latents = np.array([[1.0, -2.0], [0.5, 65504.0]], dtype=np.float32)
    assert Encoding("float16", (2, 2)).encode(latents) == struct.pack("<4e", 1.0, -2.0, 0.5, 65504.0)


def test_int8_record_is_the_documented_bytes():
    latents = np.array([[127.0, -8.0, 0.0], [-63.5, 2.0, 0.5]], dtype=np.float32)
    rows = struct.pack("<2f", 1 / 127, 1 / 127)
    channels = struct.pack("<3f", 127.0, 8.0, 0.5)
    values = struct.pack("6b", 127, -127, 0, -64, 32, 127)
    assert Encoding("int8", (2, 3)).encode(latents) == rows + channels + values


@pytest.mark.parametrize(
    ("name", "size"),
    [("float16", 2 * 6 * 48), ("int8", 4 * (6 + 48) + 6 * 48), ("uint8", 6 * 48)],
)
def test_record_sizes_are_fixed_by_name_and_shape(name, size):
    encoding = Encoding(name, SHAPE)
    array = np.ones(SHAPE, np.uint8) if name == "uint8" else np.ones(SHAPE, np.float32)
    assert encoding.record_bytes == size == len(encoding.encode(array))


@pytest.mark.parametrize("name", ["float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_what_is_not_a_number_is_refused(name, value):
    latents = np.zeros(SHAPE)
    latents[3, 5] = value
    with pytest.raises(CacheError, match="latents hold NaN, infinity or values beyond float"):
        Encoding(name, SHAPE).encode(latents)


def test_float16_overflow_is_refused_where_int8_holds_it():
    latents = np.full(SHAPE, 70_000, np.float32)
    with pytest.raises(CacheError, match=r"beyond float16 \(65,504\)"):
        Encoding("float16", SHAPE).encode(latents)
    decoded = Encoding("int8", SHAPE).decode(Encoding("int8", SHAPE).encode(latents))
    assert np.allclose(decoded, latents)


@pytest.mark.parametrize("name", ["float16", "int8", "uint8"])
def test_another_shape_is_refused(name):
    with pytest.raises(CacheError, match=r"a record has shape \(6, 48\), not \(48, 6\)"):
        Encoding(name, SHAPE).encode(np.zeros(SHAPE[::-1], np.uint8))


def test_checksums_and_shard_names_are_the_documented_ones():
    assert checksum(b"salt") == xxhash.xxh3_64(b"salt").intdigest() == 0x9BD63BCD2B4C3683
    assert shard_name(7) == "shards/000007.bin"
    assert shard_name(12_345_678) == "shards/12345678.bin"


def test_manifest_comes_back_as_it_was_written(tmp_path):
    MANIFEST_OF_LATENTS.write(tmp_path)
    assert Manifest.read(tmp_path) == MANIFEST_OF_LATENTS
    text = (tmp_path / MANIFEST).read_text()
    said = json.loads(text)
    assert list(said) == sorted([*asdict(MANIFEST_OF_LATENTS), "checksum"])
    MANIFEST_OF_LATENTS.write(tmp_path)
    assert (tmp_path / MANIFEST).read_text() == text
    rest = {name: value for name, value in said.items() if name != "checksum"}
    assert said["checksum"] == f"{checksum(json.dumps(rest, sort_keys=True).encode()):016x}"


def test_every_field_of_manifest_and_footer_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    cells = re.findall(
        r"^\| (`[^|]+`) \|", page[page.index("## Cache") : page.index("## Run directory")], re.M
    )
    documented = set(re.findall(r"`(\w+)`", " ".join(cells)))
    text = Footer(0, MANIFEST_OF_LATENTS.identity, (), (), ()).to_bytes()[:-24]
    assert {*asdict(MANIFEST_OF_LATENTS), "checksum", *json.loads(text)} <= documented
    assert f"| `schema_version` | {SCHEMA_VERSION}. " in page


def test_counts_follow_from_what_was_asked_for():
    asked = replace(MANIFEST_OF_LATENTS, num_clips=7)
    assert (asked.num_keys, asked.num_shards) == (14, 4)
    assert replace(asked, num_clips=0).num_shards == 0
    assert replace(asked, num_clips=8).num_shards == 4


def test_identity_is_what_was_asked_for_and_gives_it_back():
    done = replace(
        MANIFEST_OF_LATENTS,
        provenance=MANIFEST_OF_LATENTS.provenance | {"share": 0.1, "grid": [4, 6]},
        num_records=5,
        measured={"cosine": 0.9999},
        probe_checksum="ab",
        complete=True,
    )
    begun = done.without_results()
    assert begun.identity == done.identity and not begun.complete and begun.measured == {}
    assert Manifest.from_identity(done.identity) == begun
    for other in (replace(done, num_clips=3), replace(done, provenance={}), replace(done, encoding="int8")):
        assert other.identity != done.identity


def test_differences_name_fields_and_ignore_what_came_of_the_build():
    done = replace(MANIFEST_OF_LATENTS, num_records=5, num_quarantined=1, index_checksum="aa", complete=True)
    assert done.differences(MANIFEST_OF_LATENTS) == {}
    provenance = MANIFEST_OF_LATENTS.provenance | {"fingerprint": "f01", "split": "train"}
    other = replace(MANIFEST_OF_LATENTS, encoding="int8", provenance=provenance)
    differences = done.differences(other)
    assert differences == {
        "encoding": ("float16", "int8"),
        "provenance.fingerprint": ("f00", "f01"),
        "provenance.split": (None, "train"),
    }
    assert describe_differences(differences).startswith("encoding: 'float16' here, 'int8' wanted; ")


def test_tuples_in_provenance_equal_the_lists_json_makes_of_them(tmp_path):
    manifest = replace(MANIFEST_OF_LATENTS, provenance={"grid": (4, 6, 6)})
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path).differences(manifest) == {}
    assert Manifest.read(tmp_path).identity == manifest.identity


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": "one"}, "schema_version cannot be right"),
        ({"kind": "latent"}, "kind cannot be right"),
        ({"encoding": "float8"}, "encoding cannot be right"),
        ({"shape": ()}, "shape cannot be right"),
        ({"shape": (6, -48)}, "shape cannot be right"),
        ({"shape": "6x48", "num_views": 0}, "shape, num_views cannot be right"),
        ({"num_records": None}, "num_records cannot be right"),
        ({"num_clips": -1}, "num_records cannot be right"),
        ({"index_bytes": 1.5}, "index_bytes cannot be right"),
        ({"provenance": []}, "provenance cannot be right"),
        ({"measured": None}, "measured cannot be right"),
        ({"complete": "yes"}, "complete cannot be right"),
    ],
)
def test_a_manifest_that_cannot_be_is_one_sentence(tmp_path, changes, message):
    """Though its checksum is right: somebody has computed that too."""
    replace(MANIFEST_OF_LATENTS, **changes).write(tmp_path)
    with pytest.raises(DamagedManifest, match=message) as error:
        Manifest.read(tmp_path)
    assert str(tmp_path / MANIFEST) in str(error.value) and "`salt-vla cache repair`" in str(error.value)


@pytest.mark.parametrize("version", [1, SCHEMA_VERSION + 1, 99])
def test_a_manifest_of_another_version_is_refused_with_both_versions(tmp_path, version):
    """Not as damage: those who repair damage would write this version's over it."""
    replace(MANIFEST_OF_LATENTS, schema_version=version).write(tmp_path)
    said = json.loads((tmp_path / MANIFEST).read_text())
    age = "older" if version < SCHEMA_VERSION else "newer"
    for fields in (said, {"schema_version": version, "colour": "green"}):
        (tmp_path / MANIFEST).write_text(json.dumps(fields))
        with pytest.raises(
            CacheError, match=f"schema version {version}, {age} than this program's 2"
        ) as error:
            Manifest.read(tmp_path)
        assert not isinstance(error.value, DamagedManifest | NoManifest)
        assert ("update salt-vla" in str(error.value)) == (age == "newer")


def test_a_changed_version_number_is_damage_and_no_other_version(tmp_path):
    MANIFEST_OF_LATENTS.write(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    for version in (0, 1, 3, 6):
        (tmp_path / MANIFEST).write_text(text.replace('"schema_version": 2', f'"schema_version": {version}'))
        with pytest.raises(DamagedManifest):
            Manifest.read(tmp_path)


def test_any_other_byte_of_a_manifest_is_noticed(tmp_path):
    MANIFEST_OF_LATENTS.write(tmp_path)
    content = (tmp_path / MANIFEST).read_bytes()
    rng = np.random.default_rng(0)
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= int(rng.integers(1, 256))
        (tmp_path / MANIFEST).write_bytes(changed)
        with pytest.raises(DamagedManifest, match=r"manifest.json is damaged"):
            Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b'"no"', b"\xff\xfe{}", b"{}", b"[" * 100_000]
)
def test_a_manifest_that_is_no_object_is_one_sentence(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(DamagedManifest, match=r"manifest.json is damaged .*; `salt-vla cache repair` or"):
        Manifest.read(tmp_path)


def test_no_manifest_is_one_sentence_with_the_cure(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for folder in (tmp_path, tmp_path / "nowhere", file):
        with pytest.raises(NoManifest, match=r"there is no cache at .*; make it with `salt-vla cache build`"):
            Manifest.read(folder)


def test_corrupt_records_say_the_same_in_another_process():
    """Which makes them anew from what `__reduce__` gives, as a copy is made."""
    error = CorruptRecord(Path("/caches/a"), "clip/1", 3, shard_name(2), 4096, "truncated")
    again = copy.copy(error)
    assert (again.clip_id, again.view, again.file, again.offset) == ("clip/1", 3, "shards/000002.bin", 4096)
    place = "cache /caches/a, shards/000002.bin, offset 4096 (clip 'clip/1', view 3): truncated; "
    assert str(again) == str(error) and str(error).startswith(place)
