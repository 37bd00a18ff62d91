"""What cannot work is said in one sentence, with exit code 2, before anything half-done is left behind."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salt_vla.cache import open_cache
from salt_vla.config import DataConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.jobs.data import open_views
from salt_vla.jobs.evaluate import evaluate, load_model
from salt_vla.jobs.teacher import data_settings

Command = Callable[..., list[object]]
LIBC = ctypes.CDLL(None, use_errno=True)
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1


def obey_permissions() -> None:
    """In a child before its program starts: permission bits hold for root too, as for anyone else."""
    if os.geteuid() == 0 and LIBC.prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot give up CAP_DAC_OVERRIDE")


def limit_files(size: int) -> Callable[[], None]:
    """In a child before its program starts: no file may grow beyond `size` bytes, as on a disk that fills."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (("frobnicate",), "there is no command 'frobnicate'; commands: demo, doctor, plan, train"),
        (("runs", "frobnicate"), "`salt-vla runs` has no verb 'frobnicate'; verbs: ls, show"),
        (("cache", "--json"), "has no verb '--json'"),
        (("train", "demo_techer"), "did you mean demo_teacher"),
        (("train", "zzz"), "there is no recipe 'zzz'; known recipes: demo_teacher"),
        (("train", "demo_teacher", "--max-steps", "0"), "--max-steps must be at least 1, not 0"),
        (("train", "demo_teacher", "--seed", "-3"), "seed must be at least 0, not -3"),
        (("train", "demo_teacher", "--name", "a/b"), "run name 'a/b' may hold only letters"),
        (("train", "demo_teacher", "--name", ""), "run name '' may hold only letters"),
        (("train", "demo_teacher", "--data", "nowhere"), "there is no clip table at "),
        (("train", "demo_teacher", "--data", "/dev/null"), "there is no clip table at /dev/null"),
        (("train", "salt_vitb", "batch_size=2", "grad_accum_steps=1", "--data", "nowhere"), "nowhere"),
        (("train", "demo_student", "--cache", "nowhere"), "no cache of training latents"),
        (("train", "demo_student", "target.source="), "needs a source: give --cache"),
        (("train", "demo_student", "target.provider=teacher", "target.source=nobody"), "'nobody'"),
        (("runs", "show", "nobody"), "there is no run or job 'nobody'"),
        (("runs", "show", "../x"), "run name '../x' may hold only letters"),
        (("cache", "show", "nowhere"), "there is no cache at nowhere"),
        (("cache", "verify", "nowhere"), "there is no cache at nowhere"),
        (("cache", "build", "--teacher", "nobody", "--out", "x"), "there is no encoder or teacher 'nobody'"),
        (("teacher", "check", "nobody"), "there is no encoder or teacher 'nobody'"),
        (("data", "index", "nowhere", "--out", "x.parquet"), "there is nothing at nowhere"),
        (("data", "index", "nowhere", "--out", "x", "--hop", "0"), "--hop must be at least 1, not 0"),
        (("data", "index", "nowhere", "--out", "x", "--source", "zip"), "'zip' is not known here"),
    ],
)
def test_a_command_that_cannot_work_is_one_sentence(
    salt: Any, command: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(salt.root)
    assert named in salt(*command).sentence
    assert salt.files() == []


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("optimizer.lr=fast", "config.optimizer.lr must be float, not 'fast'"),
        ("batch_size=3.5", "config.batch_size must be int, not 3.5"),
        ("batch_size=-1", "batch_size must be at least 1, not -1"),
        ("seed=true", "config.seed must be int, not True"),
        ("encoder.tanh_gelu=maybe", "config.encoder.tanh_gelu must be bool, not 'maybe'"),
        ("optimizer.betas=0.9", "config.optimizer.betas must have 2 entries, not 1"),
        ("masks.strategy=magic", "config.masks.strategy must be one of multiblock, random"),
        ("optimizer.rate=1", "there is no field 'optimizer.rate' to override; known here:"),
        ("nonsense=1", "there is no field 'nonsense'"),
        ("batch_size", "override 'batch_size' is not of the form field=value"),
        ("predictor.dim=97", "predictor.dim=97 is not divisible by predictor.num_heads"),
        ("encoder.geometry.patch_size=7", "geometry.image_size"),
        ("encoder.name=vit_enormous", "encoder.name 'vit_enormous' is unknown; sizes: vit_micro"),
        ("encoder.name=vit_micro_patch4_32", "says patch 4 but the geometry has"),
        ("runtime.device=abacus", "runtime.device 'abacus' cannot be used here"),
        ("masks.blocks.1.num_blocks=100", "leaves no context"),
        ("batch_size=1000000", "GB of RAM are available: lower batch_size"),
        ("data.num_workers=100000000", "GB of /dev/shm"),
    ],
)
def test_a_setting_that_cannot_work_is_named(salt: Any, pixels: Command, assignment: str, named: str) -> None:
    command = pixels("run", "--max-steps", 1)
    place = command.index("--name")
    assert named in salt(*command[:place], assignment, *command[place:]).sentence
    assert salt.files() == []


def test_more_weights_than_memory_are_refused_before_they_are_made(salt: Any, pixels: Command) -> None:
    said = salt(*pixels("run", encoder__name="vit_gigantic", encoder__depth=100_000)).sentence
    assert "+ weights " in said and "choose a smaller encoder" in said


@pytest.mark.parametrize(
    "command",
    [
        ("train",),
        ("train", "demo_teacher", "--frobnicate"),
        ("train", "demo_teacher", "--max-steps", "many"),
        ("train", "demo_teacher", "--seed", "1.5"),
        ("demo", "--seed", "x"),
        ("demo", "surplus"),
        ("eval", "x", "--seed", "x"),
        ("cache", "build", "--out", "x"),
        ("cache", "build", "--teacher", "t", "--out", "x", "--encoding", "zip"),
        ("cache", "show"),
        ("runs", "show"),
        ("data", "index", "x"),
    ],
    ids=" ".join,
)
def test_arguments_that_cannot_be_read_end_with_2(salt: Any, command: tuple[str, ...]) -> None:
    answer = salt(*command)
    assert answer.code == 2
    assert answer.err and "Traceback" not in answer.err and not answer.out
    assert salt.files() == []


def test_a_root_that_is_a_file_is_a_sentence(salt: Any, pixels: Command, tmp_path: Path) -> None:
    salt.root = tmp_path / "file"
    salt.root.write_text("precious")
    assert f"cannot write {salt.root}" in salt(*pixels("run")).sentence
    assert "there is no run" in salt("runs", "show", "run").sentence
    assert salt.json("runs", "ls") == []
    assert salt.root.read_text() == "precious"


@pytest.fixture
def broken_copy(workshop: Any, tmp_path: Path) -> Path:
    """A copy of the data set that a test may break."""
    copy = tmp_path / "data" / "tiny"
    shutil.copytree(workshop.dataset, copy)
    return copy


def indexed(salt: Any, dataset: Path) -> Path:
    """The clip table of a data set that breaks afterwards."""
    table = dataset.parent / "clips.parquet"
    salt.ok("data", "index", dataset, "--out", table, "--num-frames", 4, "--frame-stride", 2)
    return table


def videos(dataset: Path) -> list[Path]:
    return sorted(dataset.rglob("*.mp4"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "text"])
def test_videos_that_cannot_be_read_are_refused_with_their_reasons(
    salt: Any, broken_copy: Path, damage: str
) -> None:
    table = indexed(salt, broken_copy)
    for file in videos(broken_copy)[:1]:
        content = file.read_bytes()
        file.unlink()
        if damage != "missing":
            cut = {"truncated": content[: len(content) // 2], "empty": b"", "text": b"no video"}
            file.write_bytes(cut[damage])
    said = salt(*salt.train("demo_teacher", "run", "--data", table, data__store_views="true")).sentence
    assert "clip views could not be read so far, more than 5%; the last is clip '" in said
    assert f"video {file} " in said and "`salt-vla data check` names each" in said
    assert not salt.at("run").path.exists() and not list(salt.root.rglob("*.bin"))


def test_a_missing_video_met_in_training_is_a_sentence(salt: Any, broken_copy: Path) -> None:
    table = indexed(salt, broken_copy)
    for file in videos(broken_copy):
        file.unlink()
    said = salt(*salt.train("demo_teacher", "run", "--data", broken_copy, data__store_views="false")).sentence
    assert "missing: the data set's tables name it, but it is not there" in said
    assert not salt.at("run").path.exists()
    said = salt(*salt.train("demo_teacher", "run", "--data", table, data__store_views="false")).sentence
    assert ".mp4 is missing; restore it or index the data set again" in said
    status = salt.at("run").status()
    assert (status.state, status.step) == ("failed", 0) and "is missing" in status.exit_reason


@pytest.fixture
def one_bad_clip(workshop: Any, salt: Any, tmp_path: Path) -> tuple[Path, str]:
    """A table of which one training clip in sixty points to a video that is not there."""
    table = tmp_path / "clips.parquet"
    index = ("data", "index", workshop.dataset, "--num-frames", 4, "--frame-stride", 2, "--hop", 4)
    salt.ok(*index, "--out", table)
    rows = pq.read_table(table)
    files = rows["file"].to_pylist()
    files[7] = "videos/lost.mp4"
    at = rows.column_names.index("file")
    pq.write_table(rows.set_column(at, "file", pa.array(files)), table)
    return table, rows["clip_id"][7].as_py()


def test_one_bad_clip_is_set_aside_all_the_way(
    salt: Any, one_bad_clip: tuple[Path, str], tmp_path: Path
) -> None:
    """Teacher, cache, student and evaluation go on without it, and say which and why."""
    table, bad = one_bad_clip
    salt.ok(*salt.train("demo_teacher", "t", "--data", table, "--max-steps", 2, data__store_views="true"))
    for split in ("train", "validation"):
        build = ("cache", "build", "--teacher", "t", "--split", split, "--data", table)
        salt.ok(*build, "--out", tmp_path / "latents")
    listed = json.loads((tmp_path / "latents" / "quarantine.json").read_text())
    assert [(entry["clip_id"], entry["view"]) for entry in listed] == [(bad, 0), (bad, 1)]
    cache = open_cache(tmp_path / "latents")
    assert bad not in cache.clip_ids and cache.manifest.num_quarantined == 2
    arguments = ("--data", table, "--cache", tmp_path / "latents", "--max-steps", 2)
    salt.ok(*salt.train("demo_student", "s", *arguments, data__store_views="true"))
    with salt.here():
        data = data_settings("t")
        model = load_model("t", "t")
        results = evaluate({"t": model}, ClipTable.read(table), data, model.geometry)
    assert len(results) == 6


def test_one_bad_clip_is_set_aside_without_a_view_store(
    salt: Any, one_bad_clip: tuple[Path, str], tmp_path: Path
) -> None:
    table, bad = one_bad_clip
    healthy = salt.train("demo_teacher", "t", "--data", table, "--max-steps", 1, data__store_views="true")
    salt.ok(*healthy)
    config = salt.at("t").config_file
    config.write_text(config.read_text().replace('"store_views": true', '"store_views": false'))
    salt.ok("cache", "build", "--teacher", "t", "--data", table, "--out", tmp_path / "latents")
    listed = json.loads((tmp_path / "latents" / "quarantine.json").read_text())
    assert [(entry["clip_id"], entry["view"]) for entry in listed] == [(bad, 0), (bad, 1)]
    assert all("lost.mp4 is missing" in entry["reason"] for entry in listed)


def test_folders_that_may_not_be_written_are_a_sentence(
    salt: Any, workshop: Any, pixels: Command, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    index = ("data", "index", workshop.dataset, "--out", closed / "x.parquet", "--num-frames", 4)
    build = ("cache", "build", "--teacher", workshop.teacher, "--data", workshop.table, "--out", closed / "x")
    salt.root = closed
    for command in (index, build, pixels("run")):
        said = salt.run(*command, preexec_fn=obey_permissions).sentence
        assert said.startswith(f"cannot write {closed}") and "choose another folder" in said
    assert list(closed.iterdir()) == []


def test_a_disk_that_fills_while_views_are_stored_leaves_nothing_half(salt: Any, pixels: Command) -> None:
    command = pixels("run", data__store_views="true")
    said = salt.run(*command, preexec_fn=limit_files(100_000)).sentence
    assert said.startswith(f"cannot write {salt.root}/caches") and "make space" in said
    assert not salt.at("run").path.exists()
    assert not list(salt.root.rglob("*.part")) and not list(salt.root.rglob("*.bin"))


def test_a_disk_that_fills_at_a_checkpoint_keeps_the_one_before(
    salt: Any, pixels: Command, weights: Any
) -> None:
    settings = {"data__store_views": "false", "runtime__checkpoint_every": 2}
    salt.ok(*pixels("run", "--max-steps", 2, **settings))
    run = salt.at("run")
    before = weights(run)
    command = pixels("run", "--max-steps", 8, **settings)
    said = salt.run(*command, preexec_fn=limit_files(100_000)).sentence
    assert said.startswith(f"cannot write {run.checkpoints}") and "make space" in said
    assert weights(run) == before
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000002"]
    assert (run.status().state, run.status().step) != ("running", 8)
    salt.ok(*command)
    assert (run.status().state, run.status().step) == ("finished", 8)


def test_a_run_is_not_asked_for_fewer_steps_than_it_has_done(
    salt: Any, pixels: Command, weights: Any
) -> None:
    salt.ok(*pixels("run", "--max-steps", 4))
    run = salt.at("run")
    before = weights(run), run.config_file.read_text(), run.status()
    said = salt(*pixels("run", "--allow-change", "steps", steps=3)).sentence
    assert said.startswith("run 'run' has done 4 steps already, more than steps=3; ask for more, or begin")
    assert (weights(run), run.config_file.read_text(), run.status()) == before
    salt.ok(*pixels("run", "--max-steps", 3))
    assert (run.status().step, run.status().total_steps) == (4, 4)


def test_a_table_that_is_no_clip_table_is_a_sentence(salt: Any, tmp_path: Path) -> None:
    table = tmp_path / "other.parquet"
    pq.write_table(pa.table({"x": [1]}), table)
    assert (
        "is not a clip table of this version"
        in salt(*salt.train("demo_teacher", "r", "--data", table)).sentence
    )
    table.write_text("text")
    assert "not a Parquet file" in salt(*salt.train("demo_teacher", "r", "--data", table)).sentence
    assert not salt.at("r").path.exists()


def test_clips_of_other_lengths_than_the_recipes_are_a_sentence(salt: Any, workshop: Any) -> None:
    """The table was made for clips of 4 frames; 16 do not fit its episodes."""
    settings = {"encoder__geometry__num_frames": 16, "data__view__frame_stride": 4}
    command = salt.train(
        "demo_teacher", "run", "--data", workshop.table, data__store_views="true", **settings
    )
    assert "could not be read" in salt(*command).sentence
    assert not salt.at("run").path.exists()


def test_views_that_are_refused_can_be_mended(salt: Any, broken_copy: Path) -> None:
    """The sentence's cure works: mend the files, remove the folder it names, run again."""
    table = indexed(salt, broken_copy)
    file = videos(broken_copy)[0]
    hidden = file.rename(file.with_suffix(".away"))
    command = salt.train("demo_teacher", "run", "--data", table, "--max-steps", 1)
    place = salt(*command).sentence.partition(" remove ")[2].removesuffix(" and run again")
    hidden.rename(file)
    shutil.rmtree(place)
    salt.ok(*command)
    with salt.here():
        _, readable = open_views(ClipTable.read(table), DataConfig(), load_model("run", "run").geometry)
    assert len(readable) == 26
