"""Configurations survive JSON unchanged, and a value that cannot work is refused by name when it is given."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from dataclasses import dataclass

import pytest

from salt_vla.config import (
    BlockSpec,
    DataConfig,
    EncoderConfig,
    MaskConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PredictorConfig,
    Recipe,
    RuntimeConfig,
    TargetConfig,
    TrainConfig,
    ViewConfig,
    from_json,
    to_json,
)
from salt_vla.errors import ConfigError, UserError
from salt_vla.recipes import all_recipes

REFUSED = [
    (BlockSpec, {"num_blocks": 0}, "masks.blocks.num_blocks must be at least 1, not 0"),
    (BlockSpec, {"spatial_scale": 0.0}, "masks.blocks.spatial_scale must lie in (0, 1], not 0.0"),
    (BlockSpec, {"spatial_scale": 1.1}, "masks.blocks.spatial_scale must lie in (0, 1], not 1.1"),
    (BlockSpec, {"temporal_scale": -1.0}, "masks.blocks.temporal_scale must lie in (0, 1], not -1.0"),
    (
        BlockSpec,
        {"aspect_ratio": (0.0, 1.0)},
        "masks.blocks.aspect_ratio must be (low, high) > 0, not (0.0, 1.0)",
    ),
    (
        BlockSpec,
        {"aspect_ratio": (2.0, 1.0)},
        "masks.blocks.aspect_ratio must be (low, high) > 0, not (2.0, 1.0)",
    ),
    (
        MaskConfig,
        {"strategy": "blocks"},
        "masks.strategy must be one of multiblock, random, tube, topup_block, not 'blocks'",
    ),
    (MaskConfig, {"truncate": "start"}, "masks.truncate must be one of end, random, pad, even, not 'start'"),
    (MaskConfig, {"ratio": 0.0}, "masks.ratio must lie in (0, 1), not 0.0"),
    (MaskConfig, {"ratio": 1.0}, "masks.ratio must lie in (0, 1), not 1.0"),
    (MaskConfig, {"ratio": float("nan")}, "masks.ratio must lie in (0, 1), not nan"),
    (MaskConfig, {"blocks": ()}, "masks.blocks is empty; give at least one block specification"),
    (MaskConfig, {"max_targets": -1}, "masks.max_targets must be 0 (all) or more, not -1"),
    (EncoderConfig, {"positions": "learned"}, "encoder.positions must be one of rope, sincos, not 'learned'"),
    (EncoderConfig, {"drop_path": 1.0}, "encoder.drop_path must lie in [0, 1), not 1.0"),
    (EncoderConfig, {"drop_path": -0.1}, "encoder.drop_path must lie in [0, 1), not -0.1"),
    (EncoderConfig, {"depth": -1}, "encoder.depth must be 0 (the name's own) or more, not -1"),
    (PredictorConfig, {"dim": 0}, "predictor.dim must be at least 1, not 0"),
    (PredictorConfig, {"depth": 0}, "predictor.depth must be at least 1, not 0"),
    (PredictorConfig, {"num_heads": 0}, "predictor.num_heads must be at least 1, not 0"),
    (PredictorConfig, {"num_mask_tokens": 0}, "predictor.num_mask_tokens must be at least 1, not 0"),
    (PredictorConfig, {"positions": ""}, "predictor.positions must be one of rope, sincos, not ''"),
    (
        PredictorConfig,
        {"dim": 96, "num_heads": 5},
        "predictor.dim=96 is not divisible by predictor.num_heads=5; "
        "head counts that divide it: 1, 2, 3, 4, 6, 8, 12",
    ),
    (PredictorConfig, {"dim": 4, "num_heads": 3}, "head counts that divide it: 1"),
    (ViewConfig, {"frame_stride": 0}, "data.view.frame_stride must be at least 1, not 0"),
    (ViewConfig, {"num_views": 0}, "data.view.num_views must be at least 1, not 0"),
    (ViewConfig, {"max_shift": -1}, "data.view.max_shift must be at least 0, not -1"),
    (ViewConfig, {"crop_scale": (0.0, 1.0)}, "data.view.crop_scale must be (low, high) within (0, 1]"),
    (ViewConfig, {"crop_scale": (0.9, 0.8)}, "data.view.crop_scale must be (low, high) within (0, 1]"),
    (ViewConfig, {"crop_scale": (0.5, 1.5)}, "data.view.crop_scale must be (low, high) within (0, 1]"),
    (DataConfig, {"num_workers": -1}, "data.num_workers must be at least 0, not -1"),
    (
        TargetConfig,
        {"provider": "tower"},
        "target.provider must be one of pixels, cache, teacher, ema, not 'tower'",
    ),
    (ObjectiveConfig, {"power": 0.0}, "objective.power must be positive, not 0.0"),
    (
        ObjectiveConfig,
        {"targets": "centered"},
        "objective.targets must be one of normalised, centred, raw, not 'centered'",
    ),
    (ObjectiveConfig, {"variance_weight": -1.0}, "objective.variance_weight must be at least 0, not -1.0"),
    (ObjectiveConfig, {"variance_target": -1.0}, "objective.variance_target must be at least 0, not -1.0"),
    (
        ObjectiveConfig,
        {"covariance_weight": -1.0},
        "objective.covariance_weight must be at least 0, not -1.0",
    ),
    (OptimizerConfig, {"lr_start": -1e-4}, "optimizer.lr_start must be at least 0, not -0.0001"),
    (OptimizerConfig, {"lr": float("nan")}, "optimizer.lr must be at least 0, not nan"),
    (OptimizerConfig, {"lr_final": -1.0}, "optimizer.lr_final must be at least 0, not -1.0"),
    (OptimizerConfig, {"weight_decay": -1.0}, "optimizer.weight_decay must be at least 0, not -1.0"),
    (
        OptimizerConfig,
        {"weight_decay_final": -1.0},
        "optimizer.weight_decay_final must be at least 0, not -1.0",
    ),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps must be at least 0, not -1"),
    (
        OptimizerConfig,
        {"cooldown_steps": 10},
        "optimizer.cooldown_steps=10 does nothing with optimizer.schedule=cosine; set the schedule",
    ),
    (
        TrainConfig,
        {"optimizer": OptimizerConfig(schedule="cooldown", warmup_steps=15, cooldown_steps=10), "steps": 24},
        "optimizer.warmup_steps=15 and optimizer.cooldown_steps=10 do not fit into steps=24; make them fewer",
    ),
    (OptimizerConfig, {"grad_clip": 0.0}, "optimizer.grad_clip must be positive, not 0.0"),
    (OptimizerConfig, {"betas": (0.9, 1.0)}, "optimizer.betas must lie in [0, 1), not (0.9, 1.0)"),
    (
        RuntimeConfig,
        {"precision": "fp16"},
        "runtime.precision must be one of auto, float32, bfloat16, not 'fp16'",
    ),
    (RuntimeConfig, {"threads": -1}, "runtime.threads must be at least 0, not -1"),
    (RuntimeConfig, {"threads": 10**6}, "runtime.threads must be at most 1024, not 1000000; 0 takes one a"),
    (RuntimeConfig, {"validation_clips": -1}, "runtime.validation_clips must be at least 0, not -1"),
    (RuntimeConfig, {"log_every": 0}, "runtime.log_every must be at least 1, not 0"),
    (RuntimeConfig, {"checkpoint_every": 0}, "runtime.checkpoint_every must be at least 1, not 0"),
    (RuntimeConfig, {"validate_every": 0}, "runtime.validate_every must be at least 1, not 0"),
    (RuntimeConfig, {"keep_checkpoints": 0}, "runtime.keep_checkpoints must be at least 1, not 0"),
    (TrainConfig, {"steps": 0}, "steps must be at least 1, not 0"),
    (TrainConfig, {"batch_size": 0}, "batch_size must be at least 1, not 0"),
    (TrainConfig, {"grad_accum_steps": 0}, "grad_accum_steps must be at least 1, not 0"),
    (TrainConfig, {"seed": -1}, "seed must be at least 0, not -1"),
    (
        TrainConfig,
        {"batch_size": 32, "grad_accum_steps": 5},
        "batch_size=32 is not a multiple of grad_accum_steps=5",
    ),
    (
        TrainConfig,
        {"predictor": PredictorConfig(num_mask_tokens=1)},
        "masks.blocks make 2 mask groups but predictor.num_mask_tokens is 1; raise the latter",
    ),
]


@pytest.mark.parametrize(("kind", "values", "sentence"), REFUSED)
def test_a_value_that_cannot_work_is_refused_by_name(kind, values, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        kind(**values)


def test_config_errors_are_the_users_to_mend():
    assert issubclass(ConfigError, UserError)


def test_one_mask_token_suffices_for_strategies_of_one_group():
    config = TrainConfig(predictor=PredictorConfig(num_mask_tokens=1), masks=MaskConfig(strategy="tube"))
    assert config.masks.num_groups == 1


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_every_recipe_survives_json_unchanged(name):
    recipe = all_recipes()[name]
    text = to_json(recipe)
    again = from_json(Recipe, text)
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert to_json(again) == text
    assert from_json(TrainConfig, to_json(recipe.config)) == recipe.config


def test_json_has_sorted_fields_and_whole_numbers_pass_for_floats():
    text = to_json(TrainConfig())
    assert list(json.loads(text)) == sorted(json.loads(text))
    optimizer = json.loads(to_json(OptimizerConfig())) | {"grad_clip": 1}
    assert from_json(OptimizerConfig, json.dumps(optimizer)).grad_clip == 1.0


def edited(path: str, value: object) -> str:
    """The default configuration as JSON with the field at `path` set, or dropped where `value` is `...`."""
    tree = json.loads(to_json(TrainConfig()))
    *parents, last = path.split(".")
    place = tree
    for name in parents:
        place = place[int(name) if name.isdigit() else name]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(tree)


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("predictor.width", 3, "c.json.predictor has unknown field(s) width; known: dim, depth, num_heads"),
        ("learning_rate", 3, "c.json has unknown field(s) learning_rate"),
        ("seed", ..., "c.json lacks field(s) seed"),
        ("masks.blocks.1.num_blocks", ..., "c.json.masks.blocks[1] lacks field(s) num_blocks"),
        ("steps", "10", "c.json.steps must be int, not '10'"),
        ("steps", 10.0, "c.json.steps must be int, not 10.0"),
        ("steps", True, "c.json.steps must be int, not True"),
        ("optimizer.lr", "1e-3", "c.json.optimizer.lr must be float, not '1e-3'"),
        ("optimizer.lr", True, "c.json.optimizer.lr must be float, not True"),
        ("data.table", None, "c.json.data.table must be str, not None"),
        ("data.store_views", 1, "c.json.data.store_views must be bool, not 1"),
        ("optimizer.betas", [0.9], "c.json.optimizer.betas must have 2 entries, not 1"),
        ("optimizer.betas", 0.9, "c.json.optimizer.betas must be a list, not 0.9"),
        ("optimizer.betas", [0.9, "x"], "c.json.optimizer.betas[1] must be float, not 'x'"),
        ("masks.blocks", [7], "c.json.masks.blocks[0] must be an object, not 7"),
        ("encoder", [], "c.json.encoder must be an object, not []"),
        ("encoder.geometry.num_frames", 15, "geometry.num_frames=15 is not a multiple of"),
        (
            "masks.strategy",
            "x",
            "c.json.masks.strategy must be one of multiblock, random, tube, topup_block, not 'x'",
        ),
        ("masks.strategy", ["x"], "c.json.masks.strategy must be one of"),
    ],
)
def test_a_field_that_is_unknown_missing_or_mistyped_is_named(path, value, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        from_json(TrainConfig, edited(path, value), where="c.json")


def test_a_file_that_is_no_json_is_named_with_the_line():
    with pytest.raises(ConfigError, match=r"runs/a/config.json is not valid JSON \(line 2\)"):
        from_json(TrainConfig, '{\n"steps": }', where="runs/a/config.json")


@dataclass(frozen=True)
class _WithOptional:
    limit: int | None = None


def test_an_optional_field_may_be_null_but_not_mistyped():
    for value in (_WithOptional(), _WithOptional(3)):
        assert from_json(_WithOptional, to_json(value)) == value
    with pytest.raises(ConfigError, match="limit must be int, not 'x'"):
        from_json(_WithOptional, '{"limit": "x"}')


def fields_below(kind: type) -> list[tuple[type, str]]:
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        found.append((kind, name))
        if dataclasses.is_dataclass(hint):
            found += fields_below(typing.cast(type, hint))
    return found


def test_every_literal_field_is_checked_on_construction():
    literals = [
        (kind, name)
        for kind, name in fields_below(TrainConfig)
        if typing.get_origin(typing.get_type_hints(kind)[name]) is typing.Literal
    ]
    assert len(literals) >= 7
    for kind, name in literals:
        with pytest.raises(ConfigError, match=f"{name} must be one of"):
            kind(**{name: "no such thing"})


def test_configurations_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3
    assert TrainConfig().geometry == TrainConfig().encoder.geometry


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'\xff\xfe{"steps": 1}', "config is not valid JSON"),
        (b"[" * 100_000, "config is not valid JSON"),
        (
            b'{"num_blocks": 1' + b"0" * 30 + b"}",
            "config.num_blocks is 10+, beyond what can be computed with",
        ),
        (b'{"spatial_scale": 1e400}', "config.spatial_scale is inf, beyond what can be computed with"),
        (b'{"spatial_scale": 1' + b"0" * 400 + b"}", "config.spatial_scale must be float, not 10+"),
    ],
)
def test_what_no_computer_can_use_is_a_sentence(text, message):
    fields = json.loads(to_json(BlockSpec()))
    if text.startswith(b"{"):
        text = json.dumps(fields | json.loads(text)).encode()
    with pytest.raises(ConfigError, match=message):
        from_json(BlockSpec, text, "config")
