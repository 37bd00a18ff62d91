"""`field=value` on the command line: typed by the field, named when it does not fit."""

from __future__ import annotations

import dataclasses

import pytest

from salt_vla.config import TrainConfig, override, to_json
from salt_vla.errors import ConfigError
from salt_vla.recipes import all_recipes, get_recipe

CONFIG = get_recipe("demo_teacher").config


def test_nothing_to_override_is_the_same_configuration():
    assert override(CONFIG, ()) is CONFIG


@pytest.mark.parametrize("name", all_recipes())
def test_a_recipe_survives_being_overridden_with_what_it_has(name):
    config = all_recipes()[name].config
    assert override(config, (f"steps={config.steps}",)) == config


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("steps=7", "steps", 7),
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("encoder.tanh_gelu=false", "encoder.tanh_gelu", False),
        ("encoder.tanh_gelu=True", "encoder.tanh_gelu", True),
        ("optimizer.betas=0.8,0.9", "optimizer.betas", (0.8, 0.9)),
        ("optimizer.betas=[0.8, 0.9]", "optimizer.betas", (0.8, 0.9)),
        ("masks.strategy=tube", "masks.strategy", "tube"),
        ("data.table=a,b=c.parquet", "data.table", "a,b=c.parquet"),
        ("data.table=7", "data.table", "7"),
        ("data.table=", "data.table", ""),
        ("target.source=true", "target.source", "true"),
    ],
)
def test_a_value_takes_the_fields_type(assignment, path, value):
    changed = override(CONFIG, (assignment,))
    found = changed
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_only_the_named_field_changes():
    changed = override(CONFIG, ("optimizer.lr=0.5",))
    expected = dataclasses.replace(CONFIG, optimizer=dataclasses.replace(CONFIG.optimizer, lr=0.5))
    assert changed == expected
    assert to_json(CONFIG) == to_json(get_recipe("demo_teacher").config)


def test_mask_blocks_are_reached_by_their_place():
    changed = override(CONFIG, ("masks.blocks.1.num_blocks=3", "masks.blocks.0.spatial_scale=0.2"))
    assert [block.num_blocks for block in changed.masks.blocks] == [8, 3]
    assert changed.masks.blocks[0].spatial_scale == 0.2


def test_fields_that_must_fit_each_other_change_together():
    with pytest.raises(ConfigError, match="not divisible"):
        override(CONFIG, ("predictor.num_heads=7",))
    changed = override(CONFIG, ("predictor.num_heads=7", "predictor.dim=70"))
    assert (changed.predictor.dim, changed.predictor.num_heads) == (70, 7)


def test_the_last_assignment_of_a_field_counts():
    assert override(CONFIG, ("steps=7", "steps=9")).steps == 9


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps", "override 'steps' is not of the form field=value"),
        ("steps=many", "config.steps must be int, not 'many'"),
        ("steps=1e3", "config.steps must be int, not 1000.0"),
        ("steps=null", "config.steps must be int, not None"),
        ("optimizer.lr=NaN", "config.optimizer.lr must be float, not 'NaN'"),
        ("optimizer.lr=-Infinity", "config.optimizer.lr must be float, not '-Infinity'"),
        ("optimizer.betas=0.9,x", r"config.optimizer.betas\[1\] must be float, not 'x'"),
        ("optimizer.betas=0.9,0.9,0.9", "config.optimizer.betas must have 2 entries, not 3"),
        ("optimizer.betas=", r"config.optimizer.betas must have 2 entries, not 1"),
        ("encoder.positions=polar", "config.encoder.positions must be one of rope, sincos, not 'polar'"),
        ("optimizer=fast", "config.optimizer must be an object, not 'fast'"),
        ("optimiser.lr=1", "no field 'optimiser.lr' to override; did you mean optimizer"),
        ("optimizer.lr.peak=1", "no field 'optimizer.lr.peak' to override; its parent is a single value"),
        ("masks.blocks.2.num_blocks=1", "no field 'masks.blocks.2.num_blocks' .*; known here: 0, 1"),
        ("masks.blocks.-1.num_blocks=1", "no field 'masks.blocks.-1.num_blocks'"),
        ("masks.blocks.0=1", r"config.masks.blocks\[0\] must be an object, not 1"),
        (".steps=1", "no field '.steps'"),
        ("=1", "no field ''"),
        ("steps=0", "steps must be at least 1, not 0"),
    ],
)
def test_what_does_not_fit_is_named(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override(CONFIG, (assignment,))


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ("step", "steps"),
        ("masks.ration", "ratio"),
        ("objective.lose", "loss"),
        ("guards.spike_facto", "spike_factor"),
        ("encoder.geometry.num_frame", "num_frames"),
        ("data.view.frame_strid", "frame_stride"),
        ("data.photometric.brightnes", "brightness"),
        ("masks.blocks.0.num_block", "num_blocks"),
        ("data.veiw.frame_stride", "view"),
    ],
)
def test_a_typo_at_any_level_lists_near_names(field, meant):
    with pytest.raises(ConfigError, match=rf"no field '{field}' to override; did you mean .*\b{meant}\b"):
        override(CONFIG, (f"{field}=1",))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("encoder.tanh_gelu=yes", "config.encoder.tanh_gelu must be bool, not 'yes'"),
        ("encoder.tanh_gelu=1", "config.encoder.tanh_gelu must be bool, not 1"),
        ("encoder.tanh_gelu=null", "config.encoder.tanh_gelu must be bool, not None"),
        ("encoder.tanh_gelu=", "config.encoder.tanh_gelu must be bool, not ''"),
        ("steps=", "config.steps must be int, not ''"),
        ("steps=true", "config.steps must be int, not True"),
        ("optimizer.lr=", "config.optimizer.lr must be float, not ''"),
        ("optimizer.lr=[1e-4]", r"config.optimizer.lr must be float, not \[0.0001\]"),
        ("optimizer.betas=null", r"config.optimizer.betas must have 2 entries, not 1"),
        ("optimizer.betas=[]", "config.optimizer.betas must have 2 entries, not 0"),
        ('optimizer.betas=["0.9",0.9]', r"config.optimizer.betas\[0\] must be float, not '0.9'"),
        ("target.momentum=0.9,true", r"config.target.momentum\[1\] must be float, not True"),
        ("masks.blocks=[]", "masks.blocks is empty"),
        ('masks.blocks=[{"num_blocks":1}]', r"config.masks.blocks\[0\] lacks field"),
        ("masks.strategy=", "config.masks.strategy must be one of"),
        ("masks={}", "config.masks lacks field"),
        ("geometry.num_frames=8", "no field 'geometry.num_frames' to override; known here: .*encoder"),
    ],
)
def test_every_kind_of_field_says_what_it_takes(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override(CONFIG, (assignment,))


def test_an_override_never_adds_a_field():
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    changed = override(CONFIG, ("seed=5",))
    assert set(dataclasses.asdict(changed)) == fields
