"""Looking after caches: `cache show`, `cache diff`, `cache ls` and `cache prune`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from salt_vla.cache import Manifest, open_cache
from salt_vla.cache.format import LEASES, MANIFEST, shard_name
from salt_vla.cache.leases import Leases
from salt_vla.objectives import normalise


def test_the_manifest_alone_is_what_json_prints(workshop: Any, salt: Any) -> None:
    shown = salt.json("cache", "show", workshop.cache)
    on_disk = json.loads((workshop.cache / MANIFEST).read_text())
    assert shown == on_disk
    people = salt.ok("cache", "show", workshop.cache).out
    assert "provenance.view.frame_stride" in people and "provenance.geometry.num_frames" in people


def test_statistics_are_those_of_the_records(workshop: Any, salt: Any) -> None:
    cache = open_cache(workshop.cache)
    stats = salt.json("cache", "show", workshop.cache, "--statistics", "--sample", 1000)["statistics"]
    assert stats["records"] == len(cache.clip_ids) == 18 and stats["damaged"] == 0
    keys = [(clip_id, place % 2) for place, clip_id in enumerate(cache.clip_ids)]
    latents = torch.from_numpy(np.stack([cache.read(clip, view=view) for clip, view in keys]))
    assert stats["mean_square"] == pytest.approx(float(latents.square().mean()), rel=1e-5)
    assert stats["top_channels"] == latents.flatten(0, 1).double().var(0).topk(8).indices.tolist()
    scored = normalise(latents).flatten(0, 1)
    assert stats["mean_mse_normalised"] == pytest.approx(float(scored.var(0, correction=0).mean()), rel=1e-4)
    assert stats.keys() >= {
        "token_std",
        "top_share",
        "effective_rank",
        "mean_l1_normalised",
        "position_share",
    }
    assert "statistics.effective_rank" in salt.ok("cache", "show", workshop.cache, "--statistics").out


def test_damaged_records_are_counted_and_left_out(workshop: Any, salt: Any, tmp_path: Path) -> None:
    damaged = shutil.copytree(workshop.cache, tmp_path / "damaged")
    with (damaged / shard_name(0)).open("r+b") as shard:
        shard.write(b"\xff\xff")
    stats = salt.json("cache", "show", damaged, "--statistics", "--sample", 18)["statistics"]
    assert (stats["records"], stats["damaged"]) == (17, 1) and np.isfinite(stats["mean_square"])


def test_a_picture_shows_films_beside_tokens(workshop: Any, salt: Any, tmp_path: Path) -> None:
    bare, beside = tmp_path / "bare.png", tmp_path / "beside.png"
    salt.ok("cache", "show", workshop.cache, "--picture", bare)
    salt.ok("cache", "show", workshop.cache, "--picture", beside, "--data", workshop.table)
    sizes = [Image.open(path).size for path in (bare, beside)]
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > 1.8 * sizes[0][1]
    assert len(Image.open(bare).convert("RGB").getcolors(1 << 24)) > 30  # Not one grey.
    stores = list((workshop.salt.root / "caches").glob("views-*"))
    assert stores
    salt.ok("cache", "show", stores[0], "--picture", tmp_path / "views.png")
    assert "holds pixels, not latents" in salt("cache", "show", stores[0], "--statistics").sentence


def test_a_picture_of_other_clips_or_over_another_file_is_refused(
    workshop: Any, salt: Any, tmp_path: Path
) -> None:
    other = tmp_path / "other.parquet"
    index = ("data", "index", workshop.dataset, "--num-frames", 4, "--frame-stride", 2, "--hop", 9)
    salt.ok(*index, "--out", other)
    picture = ("cache", "show", workshop.cache, "--picture")
    assert "are not in" in salt(*picture, tmp_path / "p.png", "--data", other).sentence
    assert "is not a PNG picture" in salt(*picture, other).sentence
    assert "--picture FILE.png too" in salt("cache", "show", workshop.cache, "--data", other).sentence
    assert "named otherwise; end it in .png" in salt(*picture, tmp_path / "p.jpg").sentence
    assert "--sample must be" in salt(*picture, tmp_path / "p.png", "--sample", 0).sentence
    assert not (tmp_path / "p.png").exists() and not (tmp_path / "p.jpg").exists()


def asked(workshop: Any) -> list[str]:
    """What the workshop's teacher was asked for, as changes to a recipe."""
    provenance = Manifest.read(workshop.cache).provenance
    view = {name: json.dumps(value) for name, value in provenance["view"].items()}
    geometry = [f"encoder.geometry.{name}={value}" for name, value in provenance["geometry"].items()]
    return [
        *(f"data.view.{name}={value}" for name, value in view.items()),
        "data.view.num_views=2",
        *geometry,
    ]


def test_a_cache_is_held_against_a_recipe(workshop: Any, salt: Any) -> None:
    diff = ("cache", "diff", workshop.cache, *asked(workshop))
    recipe = ("--recipe", "demo_student", "--data", workshop.table)
    assert "the same" in salt.ok(*diff, *recipe).out
    answer = salt(*diff, "data.view.frame_stride=3", "data.view.num_views=4", *recipe, "--json")
    found = json.loads(answer.out)
    rows = {row["field"]: (row["a"], row["b"]) for row in found["fields"]}
    assert answer.code == 1 and found["records"] is None and found["same"] is False
    assert rows.pop("view_hash")[0] == Manifest.read(workshop.cache).provenance["view_hash"]
    assert rows == {"view.frame_stride": (2, 3), "num_views": (2, 4)}
    bigger = salt(*diff, "encoder.geometry.image_size=64", *recipe)
    assert bigger.code == 1 and "geometry.image_size" in bigger.out and "tokens" in bigger.out


def test_two_caches_are_compared(workshop: Any, salt: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(workshop.cache, tmp_path / "copy")
    assert "36 equal, 0 different" in salt.ok("cache", "diff", workshop.cache, copy).out
    build = ("cache", "build", "--teacher", workshop.teacher, "--data", workshop.table, "--num-views", 1)
    salt.ok(*build, "--out", tmp_path / "one")
    answer = salt("cache", "diff", workshop.cache, tmp_path / "one")
    assert answer.code == 1 and "num_views" in answer.out
    assert "18 equal, 0 different, 18 only in" in answer.out.replace("\n", " ")
    assert "give a second cache, or --recipe" in salt("cache", "diff", workshop.cache).sentence
    assert "no cache at" in salt("cache", "diff", workshop.cache, tmp_path / "none").sentence


@pytest.fixture
def home(workshop: Any, salt: Any, student: Callable[..., list[object]]) -> Path:
    """A root with a cache of two splits that a run uses, a copy that none uses, and two folders of others."""
    caches = salt.root / "caches"
    shutil.copytree(workshop.cache, caches / "used")
    shutil.copytree(workshop.cache, caches / "spare", ignore=shutil.ignore_patterns("validation"))
    other = Manifest.read(caches / "spare")
    other.provenance["fingerprint"] = "of another"
    other.write(caches / "spare")
    (caches / "notes").mkdir()
    (caches / "notes" / "manifest.txt").write_text("mine")
    salt.ok(*student("run", "--cache", caches / "used", "--max-steps", 1))
    return caches


def names(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {Path(row["path"]).name: row for row in rows if "views-" not in row["path"]}


def test_caches_are_listed_with_their_runs(home: Path, salt: Any) -> None:
    found = salt.json("cache", "ls")
    listed = names(found)
    assert set(listed) == {"used", "validation", "spare"}
    assert listed["used"]["used_by"] == listed["validation"]["used_by"] == ["run"]
    assert listed["spare"]["unused"] and not listed["used"]["unused"]
    assert listed["used"]["records"] == 36 and listed["used"]["complete"]
    stores = [row for row in found if "views-" in row["path"]]
    assert stores and all(row["used_by"] == ["run"] and row["kind"] == "views" for row in stores)
    shard = home / "used" / shard_name(0)
    assert listed["used"]["bytes"] >= shard.stat().st_blocks * 512 > 0
    lines = salt.ok("cache", "ls").out.splitlines()
    spare = lines[lines.index("caches/spare") + 1]
    assert (
        spare.startswith("  latents of ")
        and ", train: 36 records, 0.00 GB, complete; used by no run" in spare
    )


def test_a_moved_cache_is_known_by_what_the_run_wrote_down(home: Path, salt: Any) -> None:
    (home / "used").rename(home / "moved")
    listed = names(salt.json("cache", "ls"))
    assert listed["moved"]["used_by"] == listed["validation"]["used_by"] == ["run"]
    assert listed["spare"]["unused"]


def test_pruning_says_what_would_go_and_then_removes_that_alone(home: Path, salt: Any) -> None:
    part = home / "used" / "shards" / ".000000.bin.abc.part"
    part.write_bytes(b"half")
    before = salt.files()
    told = salt.ok("cache", "prune", "--unused").out
    assert f"would remove {home / 'spare'}" in told and f"would remove {part}" in told
    assert "nothing is removed without --yes" in told and salt.files() == before
    done = salt.json("cache", "prune", "--unused", "--yes")
    assert [Path(row["path"]).name for row in done["caches"]] == ["spare"]
    assert done["leftovers"] == [str(part)] and done["bytes"] > 4
    assert not (home / "spare").exists() and not part.exists()
    gone = {path for path in before if "caches/spare" in path or path.endswith(".part")}
    assert set(before) - set(salt.files()) == gone
    assert "36 records" in salt.ok("cache", "verify", home / "used").out
    assert "would remove 0.00 GB\n" in salt.ok("cache", "prune").out


def test_splits_that_are_both_unused_leave_no_folder(home: Path, salt: Any) -> None:
    shutil.copytree(home / "spare", home / "spare" / "further")
    salt.ok("cache", "prune", "--unused", "--yes")
    assert not (home / "spare").exists()


def test_a_cache_that_is_named_goes_with_nothing_else_in_its_folder(home: Path, salt: Any) -> None:
    (home / "used" / "notes.txt").write_text("mine")
    told = salt.ok("cache", "prune", home / "used").out
    assert "(used by run)" in told and (home / "used" / MANIFEST).exists()
    salt.ok("cache", "prune", home / "used", "--yes")
    left = sorted(path.name for path in (home / "used").iterdir())
    assert left == ["notes.txt", "validation"]
    assert salt.json("cache", "show", home / "used" / "validation")["complete"]


def test_what_is_no_cache_is_never_touched(home: Path, salt: Any, tmp_path: Path) -> None:
    outside = shutil.copytree(home / "spare", tmp_path.parent / f"{tmp_path.name}-outside")
    (home / "linked").symlink_to(outside)
    for path in (home / "notes", home, tmp_path):
        assert "is no cache" in salt("cache", "prune", path, "--yes").sentence
    salt.ok("cache", "prune", "--unused", "--yes")
    assert (home / "notes" / "manifest.txt").read_text() == "mine"
    assert (outside / MANIFEST).exists()
    salt.ok("cache", "prune", outside, "--yes")
    assert not outside.exists()


def test_a_cache_that_is_being_built_is_left_alone(home: Path, salt: Any) -> None:
    part = home / "spare" / "shards" / ".000001.bin.abc.part"
    with Leases(home / "spare" / LEASES) as leases:
        assert leases.take("000001") is not None
        part.write_bytes(b"half")
        salt.ok("cache", "prune", "--unused", "--yes")
        assert part.exists() and (home / "spare" / MANIFEST).exists()
        assert "being built by" in salt.ok("cache", "ls").out
        assert "is being built by" in salt("cache", "prune", home / "spare", "--yes").sentence
    assert str(part) in salt.json("cache", "prune")["leftovers"]


HOLD = """
import sys, time
from pathlib import Path
from salt_vla.cache.leases import Leases
Leases(Path(sys.argv[1])).take("000001")
print("held", flush=True)
time.sleep(60)
"""


def test_what_a_killed_builder_left_is_cleared_up(home: Path, salt: Any) -> None:
    leases = home / "used" / LEASES
    holder = salt.start_python(HOLD, leases)
    assert holder.stdout.readline() == "held\n"
    assert salt.json("cache", "prune")["leftovers"] == []
    holder.kill()
    holder.wait()
    assert salt.json("cache", "prune", "--yes")["leftovers"] == [str(leases)]
    assert not leases.exists() and (home / "used" / MANIFEST).exists()


def test_a_damaged_manifest_or_run_keeps_everything(home: Path, salt: Any) -> None:
    (home / "spare" / MANIFEST).write_text("{")
    row = names(salt.json("cache", "ls"))["spare"]
    assert "is damaged" in row["problem"] and not row["unused"]
    salt.ok("cache", "prune", "--unused", "--yes")
    assert (home / "spare" / shard_name(0)).exists()
    salt.at("run").config_file.write_text("{")
    assert "nobody knows which caches the run needs" in salt("cache", "prune", "--unused", "--yes").sentence


def test_an_empty_root_has_no_caches(salt: Any) -> None:
    assert salt.json("cache", "ls") == []
    assert salt.json("cache", "prune", "--unused", "--yes")["caches"] == []
    assert "there are no caches" in salt.ok("cache", "ls").out
    assert salt.files() == []


def lay_others_folder(folder: Path) -> list[Path]:
    """What another tool might keep: a manifest.json of its own, and files that are called like ours."""
    (folder / "shards").mkdir(parents=True)
    (folder / MANIFEST).write_text(json.dumps({"name": "my web app", "schema_version": 1, "icons": []}))
    for name in (
        "index.arrow",
        "probe.safetensors",
        "shards/weights.bin",
        ".download.part",
        "shards/000000.bin",
    ):
        (folder / name).write_text("precious")
    return sorted(folder.rglob("*"))


def test_another_tools_folder_is_not_ours_whatever_its_files_are_called(
    home: Path, salt: Any, tmp_path: Path
) -> None:
    for folder in (home / "other", tmp_path / "other"):
        before = lay_others_folder(folder)
        assert "is no cache" in salt("cache", "prune", folder, "--yes").sentence
        for content in (b"{", b"[" * 100_000):  # In pieces, too, unless a shard is ours.
            (folder / MANIFEST).write_bytes(content)
            assert "is no cache" in salt("cache", "prune", folder, "--yes").sentence
        assert salt.json("cache", "prune", "--yes")["leftovers"] == []
        assert "other" not in names(salt.json("cache", "ls"))
        assert sorted(folder.rglob("*")) == before


def test_of_a_cache_only_what_is_the_caches_goes(home: Path, salt: Any) -> None:
    spare = home / "spare"
    mine = [spare / name for name in (".download.part", "shards/weights.bin", "shards/.x.part", "notes")]
    for path in mine:
        path.write_text("mine")
    (spare / shard_name(0)).rename(spare / "shards" / "set aside.bin")
    salt.ok("cache", "prune", spare, "--yes")
    assert sorted(path for path in spare.rglob("*") if path.is_file()) == sorted(mine)


def test_a_cache_whose_manifest_is_in_pieces_can_still_be_removed(home: Path, salt: Any) -> None:
    (home / "spare" / MANIFEST).write_text('{"kind": "lat')
    salt.ok("cache", "prune", home / "spare", "--yes")
    assert not (home / "spare").exists()


def test_nothing_is_unused_while_runs_are_out_of_sight(home: Path, salt: Any) -> None:
    runs, prune = salt.root / "runs", ("cache", "prune", "--unused", "--yes")
    away = runs.rename(salt.root / "away")
    before = salt.files()
    assert "there is no run in" in salt(*prune).sentence
    runs.symlink_to(salt.root / "unmounted")
    assert "there is no run in" in salt(*prune).sentence
    runs.unlink()
    away.rename(runs)
    (runs / "old").symlink_to(salt.root / "unmounted")
    assert f"{runs / 'old'} is a run without a config.json" in salt(*prune).sentence
    (runs / "old").unlink()
    config = salt.at("run").config_file
    config.rename(config.with_suffix(".bak"))
    shutil.copytree(runs / "run", runs / "second")
    config.with_suffix(".bak").rename(config)
    assert f"{runs / 'second'} is a run without a config.json" in salt(*prune).sentence
    shutil.rmtree(runs / "second")
    assert salt.files() == sorted(path.replace("away", "runs", 1) for path in before)
    salt.ok("cache", "ls")
    salt.ok(*prune)
    assert not (home / "spare").exists()


def test_a_cache_that_says_little_of_itself_is_listed(salt: Any, build_cache: Any) -> None:
    build_cache(salt.root / "caches" / "bare")
    assert names(salt.json("cache", "ls"))["bare"]["complete"]


def test_a_store_of_views_is_not_held_against_a_recipe(workshop: Any, salt: Any) -> None:
    store = next((workshop.salt.root / "caches").glob("views-*"))
    for given in ((), ("--data", workshop.table)):
        refused = salt("cache", "diff", store, "--recipe", "demo_student", *given).sentence
        assert "holds pixels, and a recipe asks for latents" in refused
