"""The recipes are the experiments on record: every figure of the tables is repeated here by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from salt_vla.config import VJEPA_BLOCKS, MaskConfig, differing_fields, parse_criterion
from salt_vla.errors import UserError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.teacher_train import require_stage_one
from salt_vla.models.encoder import SIZES
from salt_vla.recipes import all_recipes, demo, get_recipe, paper, seed
from salt_vla.verdicts import TASK

# name: encoder, epochs, steps, batch, lr, lr_final, warm-up, masks, ratio; one row of the table each.
SEED_TABLE = {
    "baseline_tiny": ("tiny", 10, 105_560, 16, 1e-4, 0.0, 100, "random", 0.75),
    "tiny_lr_fix": ("tiny", 3, 15_834, 32, 3e-4, 3e-5, 500, "random", 0.75),
    "vitb_5epoch": ("base", 5, 26_390, 32, 1.5e-4, 1e-5, 1000, "topup_block", 0.75),
    "fast_throughput": ("base", 5, 26_390, 32, 1.5e-4, 1e-5, 1000, "topup_block", 0.75),
    "vitb_10epoch": ("base", 10, 52_780, 32, 1.5e-4, 1e-5, 1000, "topup_block", 0.75),
    "exp1_higher_lr": ("base", 3, 15_834, 32, 3e-4, 3e-5, 500, "topup_block", 0.75),
    "exp2_high_mask": ("base", 3, 15_834, 32, 1.5e-4, 1e-5, 500, "topup_block", 0.9),
    "exp3_combined": ("base", 3, 15_834, 32, 3e-4, 3e-5, 500, "topup_block", 0.9),
    "exp1_vicreg10": ("base", 10, 52_780, 32, 3e-4, 3e-5, 500, "topup_block", 0.75),
    "vitl_extreme": ("large", 5, 35_185, 24, 1e-4, 1e-5, 1500, "topup_block", 0.75),
}


def test_the_names_are_the_ones_on_record():
    assert list(all_recipes()) == [
        "demo_teacher",
        "demo_student",
        "demo_jepa",
        *SEED_TABLE,
        "vpixel_vitti",
        "vpixel_vits",
        "vpixel_vitb",
        "vpixel_vitl",
        "salt_vitb",
        "salt_vitl",
        "vjepa_vitb",
        "vjepa2_vitl",
    ]
    assert len(all_recipes()) == len(demo.RECIPES + seed.RECIPES + paper.RECIPES), "two recipes share a name"
    assert all(name == recipe.name for name, recipe in all_recipes().items())


@pytest.mark.parametrize("name", SEED_TABLE)
def test_the_earlier_attempts_table_is_met_row_by_row(name):
    recipe = get_recipe(name)
    config = recipe.config
    assert SEED_TABLE[name] == (
        config.encoder.name.removeprefix("vit_").removesuffix("_patch16_224"),
        recipe.epochs,
        config.steps,
        config.batch_size,
        config.optimizer.lr,
        config.optimizer.lr_final,
        config.optimizer.warmup_steps,
        config.masks.strategy,
        config.masks.ratio,
    )


@pytest.mark.parametrize("name", SEED_TABLE)
def test_what_the_earlier_experiments_have_in_common(name):
    config = get_recipe(name).config
    assert config.geometry == ClipGeometry(num_frames=16, image_size=224, tubelet_size=2, patch_size=16)
    assert config.target.provider == "cache"
    assert (config.objective.power, config.objective.targets) == (2.0, "raw")
    assert config.masks.max_targets == 0
    assert config.grad_accum_steps == 1
    assert config.data.num_workers == 8
    assert config.runtime.log_every == 20
    assert config.runtime.cudnn_benchmark is True


@pytest.mark.parametrize("name", SEED_TABLE)
def test_what_single_experiments_did_differently(name):
    config = get_recipe(name).config
    optimizer, predictor, objective = config.optimizer, config.predictor, config.objective
    tiny = name in ("baseline_tiny", "tiny_lr_fix")
    assert (optimizer.weight_decay, optimizer.weight_decay_final) == ((0.05, 0.05) if tiny else (0.04, 0.4))
    assert optimizer.grad_clip == (1.0 if tiny else 0.02)
    assert optimizer.betas == ((0.9, 0.999) if tiny else (0.9, 0.95))

    large = name == "vitl_extreme"
    widths = (512, 12, 8) if large else (384, 6 if tiny else 12, 6)
    assert (predictor.dim, predictor.depth, predictor.num_heads) == widths
    assert config.encoder.grad_checkpointing == predictor.grad_checkpointing == large

    vicreg = name == "exp1_vicreg10"
    weights = (objective.variance_weight, objective.variance_target, objective.covariance_weight)
    assert weights == ((1.0, 1.0, 0.1) if vicreg else (0.0, 1.0, 0.0))


def test_an_epoch_drops_the_last_partial_batch():
    assert seed.steps_for(1, 32) == 5278
    assert seed.steps_for(1, 16) == 10_556
    assert seed.steps_for(1, 24) == 7037


def test_fast_throughput_is_vitb_5epoch():
    first, second = get_recipe("vitb_5epoch"), get_recipe("fast_throughput")
    assert replace(first, name="", summary="") == replace(second, name="", summary="")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("baseline_tiny", "plateau of 12.5"),
        ("tiny_lr_fix", "10.73"),
        ("vitb_5epoch", "15.76 to 11.5, 10.86 at the least, at 185 clips/s"),
        ("vitb_10epoch", "10.76"),
        ("exp1_higher_lr", "10.40; with the second teacher 10.50, epoch means 12.03, 11.69, 11.58"),
        ("exp2_high_mask", "Not run"),
        ("exp3_combined", "Not run"),
        ("exp1_vicreg10", "Started"),
        ("vitl_extreme", "Cancelled"),
    ],
)
def test_what_the_logs_reported_is_kept(name, words):
    assert words in get_recipe(name).notes


@pytest.mark.parametrize(("size", "encoder"), [("vitb", "vit_base"), ("vitl", "vit_large")])
def test_salts_published_values(size, encoder):
    teacher, student = get_recipe(f"vpixel_{size}"), get_recipe(f"salt_{size}")
    for recipe in (teacher, student):
        config, optimizer = recipe.config, recipe.config.optimizer
        assert config.encoder.name == f"{encoder}_patch16_224"
        assert config.encoder.positions == config.predictor.positions == "rope"
        assert (config.predictor.dim, config.predictor.depth) == (384, 12)
        assert config.geometry == ClipGeometry() and config.data.view.frame_stride == 4
        assert config.masks == MaskConfig(strategy="multiblock", blocks=VJEPA_BLOCKS)
        assert (optimizer.lr_start, optimizer.lr, optimizer.lr_final) == (2e-4, 6.25e-4, 1e-6)
        assert (optimizer.weight_decay, optimizer.weight_decay_final) == (0.04, 0.4)
        assert (optimizer.grad_clip, optimizer.warmup_steps) == (0.02, 10_000)
        assert (config.objective.power, config.objective.targets) == (1.0, "normalised")
        assert config.batch_size == 3072
    assert (teacher.config.target.provider, teacher.config.steps) == ("pixels", 40_000)
    assert (student.config.target.provider, student.config.steps) == ("cache", 200_000)


def test_vjepa_2s_published_values():
    config = get_recipe("vjepa2_vitl").config
    optimizer = config.optimizer
    assert config.geometry == ClipGeometry(num_frames=16, image_size=256, tubelet_size=2, patch_size=16)
    assert (config.target.provider, config.target.momentum) == ("ema", (0.99925, 0.99925))
    assert (optimizer.lr_start, optimizer.lr, optimizer.lr_final) == (1e-4, 5.25e-4, 1e-6)
    assert (optimizer.schedule, optimizer.warmup_steps, optimizer.cooldown_steps) == (
        "cooldown",
        12_000,
        12_000,
    )
    assert config.steps - optimizer.warmup_steps - optimizer.cooldown_steps == 228_000
    assert (optimizer.weight_decay, optimizer.weight_decay_final) == (0.04, 0.04)
    assert (config.predictor.dim, config.predictor.depth, config.predictor.num_heads) == (384, 12, 12)
    assert config.masks.blocks == VJEPA_BLOCKS and config.batch_size == 3072
    assert (config.data.view.sampling, config.data.view.target_fps) == ("fps", 4.0)
    assert config.data.view.crop_scale == (0.3, 1.0)
    assert config.encoder.grad_checkpointing and config.predictor.grad_checkpointing


@pytest.mark.parametrize(("name", "other"), [("vjepa_vitb", "salt_vitb"), ("demo_jepa", "demo_student")])
def test_salt_and_jepa_are_compared_at_equal_clips_and_steps(name, other):
    jepa, salt = get_recipe(name), get_recipe(other)
    assert jepa.parent == other
    fields = {each.field for each in differing_fields(salt.config, jepa.config)}
    assert {"target.provider", "target.momentum"} <= fields
    assert fields <= {"target.provider", "target.momentum", "target.source", "objective.targets"}


@pytest.mark.parametrize(
    ("size", "encoder", "dim"),
    [("vitti", "tiny", 192), ("vits", "small", 384), ("vitb", "base", 768), ("vitl", "large", 1024)],
)
def test_stage_one_has_a_recipe_for_every_size_and_they_differ_in_nothing_else(size, encoder, dim):
    config, base = get_recipe(f"vpixel_{size}").config, get_recipe("vpixel_vitb").config
    assert config.encoder.name == f"vit_{encoder}_patch16_224" and SIZES[encoder].dim == dim
    assert replace(config, encoder=replace(config.encoder, name=base.encoder.name)) == base
    assert (config.batch_size, config.grad_accum_steps, config.steps) == (3072, 96, 40_000)
    require_stage_one(config, f"vpixel_{size}")


def test_the_block_sizes_are_the_published_ones():
    short, long = VJEPA_BLOCKS
    assert (short.num_blocks, short.spatial_scale) == (8, 0.15)
    assert (long.num_blocks, long.spatial_scale) == (2, 0.7)
    for spec in VJEPA_BLOCKS:
        assert (spec.temporal_scale, spec.aspect_ratio) == (1.0, (0.75, 1.5))


def test_the_demos_student_can_learn_from_its_teacher():
    teacher, student = get_recipe("demo_teacher").config, get_recipe("demo_student").config
    assert teacher.geometry == student.geometry
    assert teacher.geometry.num_tokens == 144
    assert teacher.data.view == student.data.view
    assert (teacher.target.provider, student.target.provider) == ("pixels", "cache")


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_every_recipe_says_what_it_is_and_what_it_follows(name):
    recipe = get_recipe(name)
    assert recipe.summary and not recipe.summary.endswith(".")
    assert recipe.parent in ("", *all_recipes())
    assert recipe.parent != name
    assert bool(recipe.hypothesis) == bool(recipe.target), (
        "a hypothesis needs a target, and a target a hypothesis"
    )
    assert not recipe.parent or recipe.hypothesis
    assert not recipe.criterion or recipe.target, "a condition says in figures what the target says in words"


@pytest.mark.parametrize("name", SEED_TABLE)
def test_the_earlier_experiments_are_judged_by_r2_and_not_by_their_loss(name):
    recipe = get_recipe(name)
    masks = get_recipe(recipe.parent).config.masks if recipe.parent else None
    assert recipe.criterion == ("val.r2_position_mean > parent" if recipe.config.masks == masks else "")


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_no_recipe_promises_a_comparison_that_is_never_made(name):
    recipe = get_recipe(name)
    if not recipe.criterion or not parse_criterion(recipe.criterion).of_parent:
        return
    fields = [each.field for each in differing_fields(get_recipe(recipe.parent).config, recipe.config)]
    task = tuple(f"{field}." for field in TASK)
    assert not [field for field in fields if f"{field}.".startswith(task)]


def test_a_mistyped_name_is_answered_with_close_ones():
    with pytest.raises(UserError, match=r"no recipe 'demo_studnt'; did you mean demo_student or"):
        get_recipe("demo_studnt")
    with pytest.raises(UserError, match=r"no recipe '8'; known recipes: demo_teacher, demo_student, "):
        get_recipe("8")


def test_recipes_are_read_without_torch_or_masks():
    code = (
        "import sys, salt_vla.recipes as recipes\n"
        "recipes.all_recipes()\n"
        "print({'torch', 'salt_vla.masks'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
