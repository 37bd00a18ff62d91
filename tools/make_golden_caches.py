"""Writes the golden caches (tests/golden/cache_v2): small whole caches of every kind, and what is in them.

Later versions must read them and get the same numbers, so they are written once for a version of the format
and committed; a new version gets a folder of its own beside them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from salt_vla.cache import CacheWriter, Encoding, Key, Manifest, Record, open_cache

CLIPS = ("set/000000/front/000000", "set/000000/front/000016", "vidéo 漢字/🦀.webm", "", "Z")
LATENTS = {
    "teacher": "golden",
    "fingerprint": "0123456789abcdef",
    "layer": 12,
    "dtype": "float32",
    "split": "train",
    "clip_table": "00112233445566778899aabbccddeeff",
    "files": "ffeeddccbbaa99887766554433221100",
    "view_hash": "0f1e2d3c4b5a69788796a5b4c3d2e1f0",
    "view": {"sampling": "stride", "frame_stride": 4, "crop_scale": [0.3, 1.0]},
    "geometry": {"num_frames": 4, "image_size": 32, "tubelet_size": 2, "patch_size": 16},
    "batch_size": 2,
}
VIEWS = {name: LATENTS[name] for name in ("clip_table", "files", "view_hash")}
MANIFESTS = {
    "float16": Manifest("latents", "float16", (8, 6), 2, 3, LATENTS),
    "int8": Manifest("latents", "int8", (8, 6), 1, 64, LATENTS | {"split": "validation"}),
    "views": Manifest("views", "uint8", (2, 4, 4, 3), 3, 4, VIEWS, token_order=""),
}
# By cache: the keys that have no record, and why.
BAD = {
    "float16": {(CLIPS[1], 1): "clip 'é' cannot be read: moov atom not found"},
    "int8": {},
    "views": {(CLIPS[4], view): "the file is missing" for view in range(3)},
}
MEASURED = {"int8": {"cosine": 0.999987, "r2_cost": 0.000026}}


def array_of(manifest: Manifest, number: int) -> np.ndarray:
    """Values that every encoding holds well; one channel is a hundred times the others, as teachers have."""
    values = (np.arange(np.prod(manifest.shape)).reshape(manifest.shape) * 37 + number * 11) % 251
    if manifest.kind == "views":
        return values.astype(np.uint8)
    latents = (values.astype(np.float32) - 125) / 64
    latents[..., 2] *= 100
    return latents.astype(np.float16).astype(np.float32)


def keys_of(manifest: Manifest) -> list[Key]:
    return [(clip_id, view) for clip_id in CLIPS for view in range(manifest.num_views)]


def build(name: str, folder: Path) -> None:
    manifest = MANIFESTS[name]
    numbers = {key: number for number, key in enumerate(keys_of(manifest))}
    with CacheWriter(folder, manifest, CLIPS) as writer:
        if manifest.kind == "latents":
            writer.write_probe(save({"latents": array_of(manifest, 1000)}))
        if name in MEASURED:
            writer.note(MEASURED[name])
        for shard in writer.pending():
            writer.write_shard(
                shard,
                [
                    Record(key, None, BAD[name][key])
                    if key in BAD[name]
                    else Record(key, array_of(manifest, numbers[key]))
                    for key in shard.keys
                ],
            )
        writer.finish()


def contents(folder: Path) -> dict[str, object]:
    """What a reader of today finds in a cache: its manifest, its records' values, and what it lacks."""
    cache = open_cache(folder)
    return {
        "manifest": json.loads((folder / "manifest.json").read_text()),
        "clip_ids": list(cache.clip_ids),
        "records": [
            {"clip_id": clip_id, "view": view, "values": cache.read(clip_id, view=view).ravel().tolist()}
            for clip_id, view in cache.keys()  # noqa: SIM118
        ],
        "quarantine": json.loads((folder / "quarantine.json").read_text()),
    }


def check_values(name: str, folder: Path) -> None:
    """The values on record must be the ones that went in, as near as the encoding comes."""
    manifest, cache = MANIFESTS[name], open_cache(folder)
    for number, key in enumerate(keys_of(manifest)):
        if key not in BAD[name]:
            wanted, got = array_of(manifest, number), cache.read(key[0], view=key[1])
            step = 1 / 127 if manifest.encoding == "int8" else 0.0
            assert np.all(np.abs(got - wanted) <= step * np.abs(wanted).max(axis=0)), key
            assert (
                len(Encoding(manifest.encoding, manifest.shape).encode(wanted)) == cache.encoding.record_bytes
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("tests/golden/cache_v2"))
    folder: Path = parser.parse_args().folder
    if folder.exists():
        raise SystemExit(f"{folder} exists; golden caches are never written again")
    for name in MANIFESTS:
        build(name, folder / name)
        check_values(name, folder / name)
        text = json.dumps(contents(folder / name), ensure_ascii=False, sort_keys=True)
        (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
