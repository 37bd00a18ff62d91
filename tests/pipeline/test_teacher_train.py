"""Stage 1 from its recipe to a folder of its own: trained, killed, resumed, exported, loaded, cached from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from salt_vla.config import override
from salt_vla.jobs.teacher import data_settings
from salt_vla.jobs.teacher_train import read_export
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory
from salt_vla.teachers import load_teacher

# A full-size recipe's settings at a size for two cores: the same loop, masks, schedules and accumulation.
SMALL = (
    "encoder.name=vit_micro",
    "encoder.depth=1",
    "encoder.geometry.num_frames=4",
    "encoder.geometry.image_size=32",
    "encoder.geometry.patch_size=8",
    "predictor.depth=1",
    "predictor.dim=24",
    "predictor.num_heads=3",
    "data.view.frame_stride=2",
    "data.num_workers=0",
    "optimizer.warmup_steps=2",
    "batch_size=4",
    "grad_accum_steps=2",
    "runtime.device=cpu",
    "runtime.precision=float32",
    "runtime.threads=1",
    "runtime.log_every=1",
    "runtime.checkpoint_every=1",
    "runtime.validate_every=2",
    "runtime.validation_clips=4",
)


@pytest.fixture
def command(workshop: Any) -> Callable[..., list[object]]:
    """`command(name, …)`: the command line of a small `vpixel_vitti`."""
    return lambda name, *more: [
        *("teacher", "train", "vpixel_vitti", *SMALL, "--data", workshop.table, "--name", name, *more)
    ]


@pytest.fixture(scope="module")
def trained(workshop: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A command line in whose root the run `t` has made two steps."""
    salt = type(workshop.salt)(tmp_path_factory.mktemp("trained"))
    data = ("--data", workshop.table, "--name", "t", "--max-steps", 2)
    salt.ok("teacher", "train", "vpixel_vitti", *SMALL, *data)
    return salt


def test_killed_after_a_step_it_resumes_to_the_same_bits(
    salt: Any, trained: Any, command: Any, curve: Any, weights: Any
) -> None:
    process = salt.start(*command("t"))
    run = salt.at("t")
    while not list(run.checkpoints.glob("step_*")):
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    steps = [int(path.name[5:]) for path in run.checkpoints.glob("step_*")]
    last = max(2, *steps)
    salt.ok(*command("t", "--max-steps", last))
    assert run.status().state == "finished" and run.status().step == last
    assert [row for row in curve(run) if row["step"] <= 2] == curve(trained.at("t"))
    if last == 2:
        assert weights(run) == weights(trained.at("t"))


def test_it_is_a_run_like_any_other_with_the_papers_settings(trained: Any) -> None:
    run = trained.at("t")
    config = json.loads(run.config_file.read_text())
    recipe = get_recipe("vpixel_vitti").config
    assert config["target"]["provider"] == "pixels"
    assert (config["objective"]["power"], config["objective"]["targets"]) == (1.0, "normalised")
    assert config["encoder"]["positions"] == "rope" and len(config["masks"]["blocks"]) == 2
    assert config["optimizer"]["lr"] == recipe.optimizer.lr and config["steps"] == 40_000
    assert {row["kind"] for row in run.metrics()} == {"train", "val"}
    assert trained.json("runs", "show", "t")["step"] == 2


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [("demo_student", ()), ("salt_vitb", ()), ("demo_teacher", ("target.provider=teacher",))],
)
def test_recipes_of_the_other_stage_are_refused(salt: Any, recipe: str, changes: tuple[str, ...]) -> None:
    sentence = salt("teacher", "train", recipe, *changes, "--data", "metaworld-mini").sentence
    assert f"{recipe} is no stage-1 recipe" in sentence and "`salt-vla train`" in sentence
    assert salt.files() == []


def test_the_recipes_at_their_own_size_are_whole(workshop: Any) -> None:
    """Only the size is overridden above; everything else that a recipe says is used as it stands."""
    for name in ("vpixel_vitti", "vpixel_vits", "vpixel_vitb", "vpixel_vitl"):
        changed, own = override(get_recipe(name).config, SMALL), get_recipe(name).config
        assert (changed.masks, changed.objective, changed.target) == (own.masks, own.objective, own.target)


def test_an_exported_teacher_is_the_runs_and_stands_alone(
    trained: Any, tmp_path: Path, tree: Any, tiny_dataset: Path
) -> None:
    out = tmp_path / "made" / "teacher"
    said = trained.ok("teacher", "export", "t", "--out", out).out
    assert sorted(path.name for path in out.iterdir()) == [
        "encoder.json",
        "encoder.safetensors",
        "teacher.json",
    ]
    assert sorted(out.parent.iterdir()) == [out]  # Nothing unfinished is left beside it.
    original = load_teacher(trained.root / "runs" / "t")
    copy = load_teacher(out)
    assert copy.fingerprint == original.fingerprint and copy.fingerprint in said
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(copy.latents(frames), original.latents(frames))
    facts = read_export(out)
    assert (facts.name, facts.step, facts.fingerprint) == ("t", 2, original.fingerprint)
    provenance = json.loads((trained.root / "runs/t/clip_table_provenance.json").read_text())
    assert (facts.clip_table, facts.files) == (provenance["clip_table"], provenance["files"])
    assert str(tiny_dataset) not in (out / "teacher.json").read_text()


def test_caches_take_their_frames_and_crops_from_an_export(
    trained: Any, workshop: Any, tmp_path: Path
) -> None:
    out = tmp_path / "teacher"
    trained.ok("teacher", "export", "t", "--out", out)
    with trained.here():
        from_run, from_export = data_settings("t"), data_settings(str(out))
        teacher = load_teacher(str(out))
    assert from_export.view == from_run.view and from_export.view.frame_stride == 2
    caches = []
    for place, cache in ((trained.root / "runs" / "t", tmp_path / "a"), (out, tmp_path / "b")):
        data = ("--data", workshop.table, "--split", "validation", "--out", cache)
        trained.ok("cache", "build", "--teacher", place, *data)
        caches.append(trained.json("cache", "show", cache)["provenance"])
    assert caches[0]["view_hash"] == caches[1]["view_hash"]
    assert caches[0]["fingerprint"] == caches[1]["fingerprint"] == teacher.fingerprint


def test_one_checkpoint_can_be_exported_and_checked(trained: Any, workshop: Any, tmp_path: Path) -> None:
    first = min((trained.root / "runs/t/checkpoints").glob("step_*"))
    trained.ok("teacher", "export", first, "--out", tmp_path / "first")
    assert read_export(tmp_path / "first").step == int(first.name[5:])
    found = trained.json("teacher", "check", tmp_path / "first", "--data", workshop.table, "--clips", 4)
    assert found["stored_name"] == "first/block1/norm"


def test_averaged_weights_can_be_exported(salt: Any, command: Any, tmp_path: Path) -> None:
    averaged = command("t", "--max-steps", 2)
    averaged.insert(3, "optimizer.average=0.9")
    salt.ok(*averaged)
    checkpoint = salt.root / "runs/t/checkpoints/best"
    said = salt.ok("teacher", "export", checkpoint / "average", "--out", tmp_path / "mean").out
    facts = read_export(tmp_path / "mean")
    assert (facts.name, facts.step, facts.averaged) == ("t", int(checkpoint.resolve().name[5:]), True)
    assert f"step {facts.step}, averaged" in said
    assert load_teacher(tmp_path / "mean").fingerprint != load_teacher(checkpoint).fingerprint
    with salt.here():
        assert data_settings(str(checkpoint / "average")).view == data_settings("t").view


def test_a_teacher_in_the_loop_is_found_below_the_root(salt: Any, workshop: Any) -> None:
    shutil.copytree(workshop.teacher, salt.root / "teachers" / "t")
    data = ("--data", workshop.table, "--max-steps", 1)
    loop = {"target__provider": "teacher", "encoder__depth": 1}
    salt.ok(*salt.train("demo_student", "s", *data, **loop, target__source="teachers/t"))
    assert (
        "there is no encoder or teacher"
        in salt(*salt.train("demo_student", "n", *data, **loop, target__source="teachers/x")).sentence
    )


def test_what_is_there_already_is_not_overwritten(trained: Any, tmp_path: Path, tree: Any) -> None:
    out = tmp_path / "teacher"
    trained.ok("teacher", "export", "t", "--out", out)
    before = tree(out)
    assert "is there already" in trained("teacher", "export", "t", "--out", out).sentence
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for taken in ("file", "link"):
        assert "is there already" in trained("teacher", "export", "t", "--out", tmp_path / taken).sentence
    assert tree(out) == before and (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "teacher"]


def test_what_cannot_be_exported_is_a_sentence_and_leaves_nothing(trained: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "there is no run 'nobody'" in trained("teacher", "export", "nobody", "--out", out).sentence
    (tmp_path / "empty").mkdir()
    assert "holds no encoder" in trained("teacher", "export", tmp_path / "empty", "--out", out).sentence
    trained.ok("teacher", "export", "t", "--out", tmp_path / "teacher")
    again = trained("teacher", "export", tmp_path / "teacher", "--out", out).sentence
    assert "neither a run nor a checkpoint of one" in again
    broken = shutil.copytree(trained.root / "runs/t", tmp_path / "broken")
    for weights in broken.rglob("encoder.safetensors"):
        weights.write_bytes(weights.read_bytes()[:100])
    assert "missing or damaged" in trained("teacher", "export", broken, "--out", out).sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "empty", "teacher"]


def test_a_copy_that_fails_midway_leaves_nothing(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("salt_vla.jobs.teacher_train.shutil.copyfile", full)
    sentence = trained("teacher", "export", "t", "--out", tmp_path / "sub" / "out").sentence
    assert "No space left" in sentence and "make space" in sentence
    assert list((tmp_path / "sub").iterdir()) == []


def test_a_damaged_teacher_json_is_a_sentence(trained: Any, tmp_path: Path, workshop: Any) -> None:
    out = tmp_path / "teacher"
    trained.ok("teacher", "export", "t", "--out", out)
    (out / "teacher.json").write_text("{}")
    answer = trained("teacher", "check", out, "--data", workshop.table)
    assert "teacher.json lacks field(s)" in answer.sentence
    assert RunDirectory(out).exists() is False
