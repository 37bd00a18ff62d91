"""The commands on the page make exactly the settings that a run had."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from salt_vla.config import BlockSpec, TrainConfig, override
from salt_vla.operations.handoff.commands import make_again, nearest_recipe, of_recipe, overrides, with_seed
from salt_vla.recipes import all_recipes, get_recipe
from salt_vla.rundir import RunDirectory, write_text

ODD = (
    BlockSpec(num_blocks=3, spatial_scale=0.2, aspect_ratio=(0.5, 2.0)),
    BlockSpec(num_blocks=1, spatial_scale=0.9),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    return RunDirectory(tmp_path / "runs" / "first")


def changed(config: TrainConfig) -> TrainConfig:
    """Other values of every kind: numbers, words, lists, objects, truth."""
    return replace(
        config,
        masks=replace(config.masks, strategy="multiblock", blocks=ODD),
        optimizer=replace(config.optimizer, lr=1.25e-7, betas=(0.5, 0.75)),
        runtime=replace(config.runtime, memory_limit="3 GB", cudnn_benchmark=True, threads=2),
        data=replace(config.data, view=replace(config.data.view, crop_scale=(0.5, 0.75))),
        start_from="weights of mine/a 'b'.safetensors",
        steps=config.steps + 20,
    )


def parsed(command: str) -> tuple[TrainConfig, dict[str, str]]:
    """The settings that the command asks for, as `salt-vla train` reads it, and its options."""
    words = shlex.split(command)
    assert words[:2] == ["salt-vla", "train"]
    first = next(place for place, word in enumerate(words) if word.startswith("--"))
    options = dict(zip(words[first::2], words[first + 1 :: 2], strict=True))
    return override(get_recipe(words[2]).config, words[3:first]), options


@pytest.mark.parametrize("name", all_recipes())
def test_every_setting_of_a_run_is_in_its_command(name: str, run: RunDirectory) -> None:
    for config in (get_recipe(name).config, changed(get_recipe(name).config)):
        table, cache = str(run.path.parents[1] / "clips of mine.parquet"), "caches/a b"
        config = replace(
            config,
            seed=7,
            data=replace(config.data, table=table),
            target=replace(config.target, source=cache),
        )
        made, options = parsed(make_again(run, config, name))
        assert options == {
            "--name": "first",
            "--seed": "7",
            "--data": "clips of mine.parquet",
            "--cache": cache,
        }
        back = replace(
            made,
            seed=7,
            data=replace(made.data, table=table),
            target=replace(made.target, source=cache),
        )
        assert back == config


def test_a_run_without_a_recipe_on_record_is_told_by_the_nearest(run: RunDirectory) -> None:
    config = replace(get_recipe("exp2_high_mask").config, batch_size=16)
    for noted in ("", "a_recipe_that_was_removed"):
        assert nearest_recipe(config, noted).name == "exp2_high_mask"
        assert parsed(make_again(run, config, noted))[0] == config


def test_nothing_is_said_twice_that_the_recipe_says(run: RunDirectory) -> None:
    recipe = get_recipe("demo_student")
    assert overrides(recipe.config, recipe.config) == []
    assert make_again(run, recipe.config, recipe.name) == (
        "salt-vla train demo_student --name first --seed 0"
    )


def test_a_run_that_was_cut_short_is_made_as_short_again(run: RunDirectory) -> None:
    config = get_recipe("demo_student").config
    assert parsed(make_again(run, config, "demo_student", 30))[1]["--max-steps"] == "30"
    assert "--max-steps" not in make_again(run, config, "demo_student", config.steps)


def test_a_branch_is_made_again_as_a_branch_and_resumed_without(run: RunDirectory) -> None:
    config = get_recipe("demo_student").config
    run.path.mkdir(parents=True)
    write_text(run.path / "branch.json", '{"run": "long", "step": 40}')
    assert parsed(make_again(run, config, "demo_student", name="anew"))[1]["--branch"] == "long@40"
    assert "--branch" not in make_again(run, config, "demo_student")


def test_another_seed_is_a_run_of_its_own(run: RunDirectory) -> None:
    command = make_again(run, get_recipe("demo_student").config, "demo_student")
    settings, options = parsed(with_seed(command, "first", 3))
    assert settings == get_recipe("demo_student").config
    assert (options["--seed"], options["--name"]) == ("3", "first-seed3")


def test_a_recipe_is_run_on_the_data_and_cache_in_use(run: RunDirectory) -> None:
    recipe = get_recipe("demo_student")
    at_root = str(run.path.parents[1] / "clips.parquet")
    assert of_recipe(recipe, at_root, "caches/mine") == (
        "salt-vla train demo_student --name demo_student --data clips.parquet --cache caches/mine"
    )
    teacher = get_recipe("demo_teacher")
    assert of_recipe(teacher, teacher.config.data.table, "caches/mine") == (
        "salt-vla train demo_teacher --name demo_teacher"
    )


def test_no_field_of_the_settings_is_forgotten() -> None:
    """Options stand for three fields; every other one is written as field=value when it differs."""
    recipe = TrainConfig()
    for field in dataclasses.fields(recipe.optimizer):
        value = getattr(recipe.optimizer, field.name)
        if isinstance(value, float):
            other = replace(recipe, optimizer=replace(recipe.optimizer, **{field.name: value / 2 + 1e-3}))
            assert [word.partition("=")[0] for word in overrides(recipe, other)] == [
                f"optimizer.{field.name}"
            ]
