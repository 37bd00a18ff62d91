"""`cache import`: others' latents become a cache that trains like one of ours, or says why it may not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from salt_vla.cache import Manifest, open_cache
from salt_vla.cache.format import MANIFEST
from salt_vla.data.clip_table import ClipTable

UNKNOWN = ["batch_size", "dtype", "fingerprint", "layer"]


@dataclass(frozen=True)
class Old:
    """Caches of one view for both splits, and their latents as the earlier attempt kept them: a folder a
    split, a bfloat16-free file a clip, and metadata.json with the clips in order."""

    cache: Path
    folder: Path


def name_of(clip_id: str) -> str:
    return clip_id.replace("/", "_")


def write_old(folder: Path, latents: dict[str, np.ndarray], listed: Sequence[str], **said: object) -> Path:
    folder.mkdir(parents=True)
    for clip_id, array in latents.items():
        name = name_of(clip_id)
        torch.save({"latents": torch.from_numpy(array), "video_id": name}, folder / f"{name}.pt")
    ids = [name_of(clip_id) for clip_id in listed]
    metadata = {"model": "some/teacher", "num_samples": len(latents), "video_ids": ids, **said}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    return folder


@pytest.fixture(scope="session")
def old(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Old:
    """Shared, so nobody may write into it."""
    root = tmp_path_factory.mktemp("old")
    source = ("--teacher", "teacher", "--data", workshop.table, "--num-views", 1)
    for split in ("train", "validation"):
        workshop.salt.ok("cache", "build", *source, "--split", split, "--out", root / "cache")
        folder = root / "cache" / ("validation" if split == "validation" else "")
        cache = open_cache(folder)
        latents = {clip_id: cache.read(clip_id).astype(np.float16) for clip_id in cache.clip_ids}
        write_old(root / "latents" / split, latents, cache.clip_ids, split=split)
    return Old(root / "cache", root / "latents")


@pytest.fixture
def state(workshop: Any) -> Callable[..., list[object]]:
    """`state(folder, out, …)`: an import that states the workshop's clips and how its teacher saw them."""
    scale = ",".join(map(str, Manifest.read(workshop.cache).provenance["view"]["crop_scale"]))
    view = (f"data.view.crop_scale=[{scale}]", "data.view.frame_stride=2", "data.view.max_shift=2")
    sizes = {"num_frames": 4, "image_size": 32, "tubelet_size": 2, "patch_size": 8}
    geometry = [f"encoder.geometry.{name}={value}" for name, value in sizes.items()]

    def command(folder: Path, out: Path, *more: object) -> list[object]:
        stated = ("--data", workshop.table, "--recipe", "demo_student")
        changed = [part for part in more if "=" in str(part)]
        more = tuple(part for part in more if part not in changed)
        return ["cache", "import", folder, *view, *geometry, *changed, "--out", out, *stated, *more]

    return command


def test_a_run_on_imported_latents_computes_what_the_built_cache_gives(
    salt: Any, old: Old, workshop: Any, state: Any, curve: Any, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        salt.ok(*state(old.folder, tmp_path / "imported", "--split", split))
    diff = salt("cache", "diff", tmp_path / "imported", old.cache, "--json")
    found = json.loads(diff.out)
    assert diff.code == 1 and found["records"]["different"] == 0 and found["records"]["equal"] > 0
    assert not {"provenance.clip_table", "provenance.view_hash"} & {row["field"] for row in found["fields"]}
    for name, cache in (("built", old.cache), ("imported", tmp_path / "imported")):
        given = ("--data", workshop.table, "--cache", cache, "--seed", 1, "--max-steps", 4)
        salt.ok(*salt.train("demo_student", name, *given, data__view__num_views=1))
    assert len(curve(salt.at("built"))) > 4
    assert curve(salt.at("built")) == curve(salt.at("imported"))


def test_what_was_stated_and_what_nobody_knows_is_said(
    salt: Any, old: Old, state: Any, tmp_path: Path
) -> None:
    said = salt.ok(*state(old.folder / "train", tmp_path / "c", "--teacher-name", "my/teacher")).out
    assert "18 records, 0 quarantined" in said
    assert "stated at the import: clip_table, files, geometry, teacher, view, view_hash\n" in said
    assert "claimed by its metadata.json: split\n" in said
    assert f"known to nobody: {', '.join(UNKNOWN)}\n" in said
    shown = salt.ok("cache", "show", tmp_path / "c").out
    assert "known to nobody: batch_size, dtype" in shown and "my/teacher" in shown
    provenance = salt.json("cache", "show", tmp_path / "c")["provenance"]
    assert provenance["unknown"] == UNKNOWN and provenance["fingerprint"] is None
    assert provenance["imported"]["metadata"]["model"] == "some/teacher"


def test_training_needs_to_be_told_of_which_clips_the_latents_are(
    salt: Any, old: Old, workshop: Any, tmp_path: Path
) -> None:
    said = salt.ok("cache", "import", old.folder / "train", "--out", tmp_path / "c").out
    assert "import it again into another folder with --data and --recipe" in said
    command = salt.train("demo_student", "run", "--data", workshop.table, "--cache", tmp_path / "c")
    assert salt.json("cache", "show", tmp_path / "c")["token_order"] == ""
    refused = salt(*command).sentence
    compared = salt("cache", "diff", tmp_path / "c", "--recipe", "demo_student")
    assert compared.code == 1 and "unknown" in compared.out
    assert "nobody has stated its clip_table, files, view_hash, geometry" in refused
    assert "--data TABLE and --recipe NAME" in refused and not salt.at("run").path.exists()


def test_an_import_goes_on_and_is_then_as_it_would_have_been(
    salt: Any, old: Old, state: Any, tmp_path: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    salt.ok(*state(old.folder / "train", tmp_path / "whole"))
    salt.ok(*state(old.folder / "train", tmp_path / "again"))
    (tmp_path / "again" / MANIFEST).unlink()
    salt.ok(*state(old.folder / "train", tmp_path / "again"))
    assert tree(tmp_path / "whole") == tree(tmp_path / "again")
    (tmp_path / "again" / "shards" / "000000.bin").unlink()  # As of a damaged shard: how it is mended.
    salt.ok(*state(old.folder / "train", tmp_path / "again"))
    assert tree(tmp_path / "whole") == tree(tmp_path / "again")
    other = shutil.copytree(old.folder / "train", tmp_path / "other")
    torch.save(torch.zeros(9), next(other.glob("*.pt")))
    assert "made from something else" in salt(*state(other, tmp_path / "again")).sentence


def test_bad_files_are_quarantined_and_the_others_keep_their_clips(
    salt: Any, old: Old, state: Any, workshop: Any, tmp_path: Path
) -> None:
    clip_ids = ClipTable.read(workshop.table).select(split="train").clip_ids
    folder = shutil.copytree(old.folder / "train", tmp_path / "latents")
    (folder / f"{name_of(clip_ids[4])}.pt").write_bytes(b"nothing")
    out = tmp_path / "c"
    assert "more than 5%" in salt(*state(folder, out)).sentence
    assert not Manifest.read(out).complete  # So that nobody trains from it.
    reason = json.loads((out / "quarantine.json").read_text())
    assert [row["clip_id"] for row in reason] == [clip_ids[4]] and "is damaged" in reason[0]["reason"]
    assert f"mend them, remove {out} and import again" in salt(*state(folder, out)).sentence
    assert "is unfinished" in salt("cache", "show", out, "--statistics").sentence


def test_clips_without_a_file_and_files_without_a_clip_are_counted(
    salt: Any, old: Old, state: Any, workshop: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(old.folder / "train", tmp_path / "latents")
    torch.save(torch.zeros(32, 64), folder / "stranger.pt")
    said = salt.ok(*state(folder, tmp_path / "c")).out
    assert "1 files are of none of its clips" in said
    assert "warning: metadata.json counts 18 files, and there are 19" in said
    for path in sorted(folder.glob("*.pt"))[5:8]:
        path.unlink()
    assert "3 of 18 clips have no file" in salt(*state(folder, tmp_path / "d")).sentence
    assert not (tmp_path / "d").exists()


def test_names_that_shifted_are_moved_back(
    salt: Any, old: Old, state: Any, workshop: Any, tmp_path: Path
) -> None:
    """The earlier attempt's files: from the first unreadable clip on each holds its successor's latents."""
    right = open_cache(old.cache)
    clip_ids = list(right.clip_ids)
    readable = [clip_id for clip_id in clip_ids if clip_id != clip_ids[7]]
    wrong = {
        name: right.read(clip).astype(np.float16) for name, clip in zip(clip_ids, readable, strict=False)
    }
    folder = write_old(tmp_path / "latents", wrong, clip_ids, split="train")
    assert "1 have no file, 1 of them at the end" in salt(*state(folder, tmp_path / "c")).sentence
    (tmp_path / "unreadable.txt").write_text(name_of(clip_ids[7]) + "\n")
    salt.ok(*state(folder, tmp_path / "c", "--unreadable", tmp_path / "unreadable.txt"))
    cache = open_cache(tmp_path / "c")
    assert list(cache.clip_ids) == readable
    assert all(np.array_equal(cache.read(clip), right.read(clip)) for clip in readable)
    (bad,) = json.loads((tmp_path / "c" / "quarantine.json").read_text())
    assert bad["clip_id"] == clip_ids[7] and "as was stated" in bad["reason"]


def test_rows_follow_the_tables_order_when_that_is_stated(
    salt: Any, old: Old, state: Any, tmp_path: Path
) -> None:
    right = open_cache(old.cache)
    folder = tmp_path / "rows"
    folder.mkdir()
    for row, clip_id in enumerate(right.clip_ids):
        np.save(folder / f"{row:06d}.npy", right.read(clip_id)[None])
    train = ("--split", "train")
    assert "are numbered" in salt(*state(folder, tmp_path / "c", *train)).sentence
    salt.ok(*state(folder, tmp_path / "c", *train, "--names", "rows"))
    cache = open_cache(tmp_path / "c")
    assert all(np.array_equal(cache.read(clip), right.read(clip)) for clip in right.clip_ids)
    (folder / "000017.npy").unlink()
    few = salt(*state(folder, tmp_path / "d", *train, "--names", "rows")).sentence
    assert "17 files for 18 readable clips" in few and "shift by one" in few


def test_statements_that_cannot_be_true_are_refused(
    salt: Any, old: Old, state: Any, workshop: Any, tmp_path: Path
) -> None:
    train, out = old.folder / "train", tmp_path / "c"
    tokens = salt(*state(train, out, "encoder.geometry.patch_size=16")).sentence
    assert "holds 32 tokens a clip" in tokens and "has 8" in tokens
    assert (
        "latents of split 'train', not 'validation'"
        in salt(*state(train, out, "--split", "validation")).sentence
    )
    strange = write_old(tmp_path / "x", {"unheard": np.zeros((32, 4), np.float32)}, [], split="train")
    assert "no file of" in salt(*state(strange, out)).sentence
    assert "give --recipe, too" in salt("cache", "import", train, "steps=3", "--out", out).sentence
    nothing = tmp_path / "bare"
    nothing.mkdir()
    torch.save(torch.zeros(4, 4), nothing / "a.pt")
    assert "give --split" in salt("cache", "import", nothing, "--out", out).sentence
    assert not out.exists()


def test_a_name_of_another_width_is_pointed_out(salt: Any, tmp_path: Path) -> None:
    latents = {clip: np.ones((4, 768), np.float16) for clip in ("a", "b")}
    folder = write_old(tmp_path / "latents", latents, ["a", "b"], split="train", model="x/videomae-huge")
    said = salt.ok("cache", "import", folder, "--out", tmp_path / "c").out
    assert "videomae-huge is 1280 wide, these latents 768" in said


def test_nan_and_what_float16_cannot_hold_are_quarantined(salt: Any, tmp_path: Path) -> None:
    latents = {f"clip{number}": np.ones((4, 8), np.float32) for number in range(60)}
    latents["clip7"][1, 1] = np.nan
    latents["clip9"][0, 0] = 1e6
    folder = write_old(tmp_path / "latents", latents, list(latents), split="train")
    salt.ok("cache", "import", folder, "--out", tmp_path / "c")
    rows = json.loads((tmp_path / "c" / "quarantine.json").read_text())
    assert [row["clip_id"] for row in rows] == ["clip7", "clip9"]
    assert all("NaN, infinity or values beyond float16" in row["reason"] for row in rows)


def test_int8_is_measured_on_the_files_or_refused(salt: Any, old: Old, tmp_path: Path) -> None:
    said = salt.ok("cache", "import", old.folder / "train", "--out", tmp_path / "c", "--encoding", "int8").out
    assert "int8 against float16: mean token cosine 0.999" in said
    assert salt.json("cache", "show", tmp_path / "c")["measured"]["cosine"] > 0.999
    rng = np.random.default_rng(0)
    uneven = rng.normal(size=(32, 64)).astype(np.float32)
    uneven[0, :-1] = (
        1e4  # One token takes the scale of all channels but the last, which sets the others' own.
    )
    folder = write_old(tmp_path / "latents", {"a": uneven}, ["a"], split="train")
    answer = salt("cache", "import", folder, "--out", tmp_path / "d", "--encoding", "int8")
    assert "int8 cannot hold the latents of" in answer.sentence and not (tmp_path / "d").exists()


def test_the_teacher_itself_tells_whether_the_latents_are_its_own(
    salt: Any, old: Old, state: Any, workshop: Any, pixels: Any, tmp_path: Path
) -> None:
    folder, out = old.folder / "train", tmp_path / "c"
    said = salt.ok(*state(folder, out, "--compare", workshop.teacher)).out
    assert "R² of the teacher's latents on some of the clips: 1.0000" in said
    assert salt.json("cache", "show", out)["measured"]["teacher_r2"] > 0.999
    salt.ok(*pixels("other", "--seed", 5, "--max-steps", 1))
    other = salt(*state(folder, tmp_path / "d", "--compare", salt.at("other").path)).sentence
    assert "where 1 is the same; names, frames, crops, layer or teacher are others" in other
    stride = salt(
        *state(folder, tmp_path / "d", "data.view.frame_stride=9", "--compare", workshop.teacher)
    ).sentence
    assert "fewer than two clips" in stride or "are not teacher" in stride
    bare = salt("cache", "import", folder, "--out", tmp_path / "d", "--compare", workshop.teacher).sentence
    assert "state them with --data and --recipe" in bare
    assert not (tmp_path / "d").exists()


def test_the_teacher_tells_that_names_have_shifted(
    salt: Any, old: Old, state: Any, workshop: Any, tmp_path: Path
) -> None:
    right = open_cache(old.cache)
    clip_ids = list(right.clip_ids)
    moved = {
        clip: right.read(after) for clip, after in zip(clip_ids, clip_ids[1:] + clip_ids[:1], strict=True)
    }
    folder = write_old(tmp_path / "latents", moved, clip_ids, split="train")
    said = salt(*state(folder, tmp_path / "c", "--compare", workshop.teacher)).sentence
    assert "with clips 1 further on: the names have shifted, see --unreadable" in said


def test_an_import_that_is_killed_is_gone_on_with(
    salt: Any, tmp_path: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    folder = tmp_path / "latents"
    folder.mkdir()
    for number in range(500):
        np.save(folder / f"clip{5 * number}.npy", np.full((4, 8), number, np.float32))
    command = ("cache", "import", folder, "--split", "train", "--out")
    salt.ok(*command, tmp_path / "whole")
    process = salt.start(*command, tmp_path / "killed")
    first = tmp_path / "killed" / "shards" / "000000.bin"
    while not first.exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not Manifest.read(tmp_path / "killed").complete
    written = first.stat().st_ino
    salt.ok(*command, tmp_path / "killed")
    assert first.stat().st_ino == written
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


def write_numbers(folder: Path, names: Sequence[str], listed: Sequence[str] = (), **said: object) -> Path:
    """A plain array for each name; a listed clip's holds its place in the list, others hold −1."""
    folder.mkdir(parents=True)
    for name in names:
        number = listed.index(name) if name in listed else -1
        np.save(folder / f"{name}.npy", np.full((2, 4), number, np.float32))
    (folder / "metadata.json").write_text(json.dumps({"split": "train", "ids": list(listed), **said}))
    return folder


def test_the_list_in_the_metadata_says_which_clips_there_are(salt: Any, tmp_path: Path) -> None:
    """Clips without a file, or with one that leads nowhere, are quarantined; further files are left out."""
    listed = [f"clip{number}k" for number in range(60)]
    folder = write_numbers(tmp_path / "latents", [*listed[:9], *listed[10:], "mean"], listed)
    (folder / "clip30k.npy").unlink()
    (folder / "clip30k.npy").symlink_to(tmp_path / "gone")
    said = salt.ok("cache", "import", folder, "--out", tmp_path / "c").out
    assert "58 records, 2 quarantined" in said and "1 files are of none of its clips" in said
    bad = {row["clip_id"]: row["reason"] for row in json.loads((tmp_path / "c/quarantine.json").read_text())}
    assert bad.keys() == {"clip9k", "clip30k"}
    assert "no file of it" in bad["clip9k"] and "cannot be read" in bad["clip30k"]
    cache = open_cache(tmp_path / "c")
    assert "mean" not in list(cache.clip_ids)
    assert all(cache.read(clip)[0, 0] == listed.index(clip) for clip in cache.clip_ids)


def test_a_pipe_in_the_folder_is_quarantined_and_not_waited_for(salt: Any, tmp_path: Path) -> None:
    folder = write_numbers(tmp_path / "latents", [f"clip{number}k" for number in range(40)])
    os.mkfifo(folder / "clip40k.pt")
    assert "40 records, 1 quarantined" in salt.ok("cache", "import", folder, "--out", tmp_path / "c").out


def test_names_that_cannot_be_printed_get_into_no_manifest(salt: Any, tmp_path: Path) -> None:
    folder = write_numbers(tmp_path / "latents", ["a", "b"], model="\ud800x\x1b[31m[/red]")
    out = salt.root / "caches" / "c"
    refused = salt("cache", "import", folder, "--out", out, "--teacher-name", "my\udcffteacher")
    assert "--teacher-name 'my\\udcffteacher' cannot be printed" in refused.sentence and not out.exists()
    salt.ok("cache", "import", folder, "--out", out)
    assert "latents of �x�[31m[/red], train" in salt.ok("cache", "ls").out
    assert "�x�[31m[/red]" in salt.ok("cache", "show", out).out


def test_a_list_of_unreadable_clips_that_is_no_list_is_refused(salt: Any, tmp_path: Path) -> None:
    folder = write_numbers(tmp_path / "latents", ["a", "b"])
    (tmp_path / "list").write_text("[" * 100_000)
    given = ("--out", tmp_path / "c", "--unreadable", tmp_path / "list")
    assert "names no clips" in salt("cache", "import", folder, *given).sentence


@pytest.mark.parametrize("split", ["../../elsewhere", "/elsewhere", "", "shards"])
def test_a_splits_name_leads_nowhere_else(salt: Any, tmp_path: Path, split: str) -> None:
    salt.ok("cache", "import", write_numbers(tmp_path / "a", ["a", "b"]), "--out", tmp_path / "o" / "c")
    folder = write_numbers(tmp_path / "b", ["a", "b"], split=split)
    before = sorted(tmp_path.rglob("*"))
    refused = salt("cache", "import", folder, "--out", tmp_path / "o" / "c").sentence
    assert f"which {split!r} cannot be" in refused
    assert sorted(tmp_path.rglob("*")) == before
