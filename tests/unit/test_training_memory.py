"""A step's memory by arithmetic: exact where it can be, near real steps, and said when it runs out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from salt_vla.config import EncoderConfig, PredictorConfig, TargetConfig, TrainConfig
from salt_vla.errors import ResourceError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.resources import find_batch, memory_of, target_size
from salt_vla.jobs.train_trial import confirmed, peak_of_step
from salt_vla.masks import build_masks
from salt_vla.models import build_encoder, build_predictor
from salt_vla.training.memory import (
    activations,
    checkpoint_bytes,
    host_memory,
    largest_sizes,
    parameters,
    shared_memory,
    step_memory,
)
from salt_vla.training.out_of_memory import explain_out_of_memory, is_out_of_memory, memory_explained

GRID = ClipGeometry(num_frames=8, image_size=112, tubelet_size=2, patch_size=16)
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_tiny", geometry=GRID),
    predictor=PredictorConfig(dim=96, depth=4, num_heads=4),
    target=TargetConfig("pixels"),
    batch_size=8,
)
CONFIG = replace(CONFIG, runtime=replace(CONFIG.runtime, device="cpu", precision="float32", threads=1))
SIZES = [(64, 84), (28, 140)]


@pytest.mark.parametrize("name", ["vit_micro", "vit_tiny", "vit_base", "vit_giant"])
@pytest.mark.parametrize("target_dim", [24, 768])
def test_parameters_are_counted_exactly(name: str, target_dim: int) -> None:
    config = replace(CONFIG, encoder=replace(CONFIG.encoder, name=name, positions="sincos"))
    with torch.device("meta"):
        encoder = build_encoder(config.encoder)
        predictor = build_predictor(config.predictor, encoder.dim, target_dim, GRID)
    counted = parameters(config, target_dim)
    assert counted.encoder == sum(p.numel() for p in encoder.parameters())
    assert counted.predictor == sum(p.numel() for p in predictor.parameters())
    assert counted.largest_block >= sum(p.numel() for p in encoder.blocks[0].parameters())


@pytest.mark.parametrize(
    ("name", "batch", "parts", "checkpointing"),
    [("vit_tiny", 16, 2, False), ("vit_small", 8, 1, True)],
)
def test_the_arithmetic_is_near_what_a_real_step_takes(
    name: str, batch: int, parts: int, checkpointing: bool
) -> None:
    """The whole process' peak, which no step before it has warmed."""
    encoder = replace(CONFIG.encoder, name=name, grad_checkpointing=checkpointing)
    predictor = replace(CONFIG.predictor, grad_checkpointing=checkpointing)
    config = replace(CONFIG, encoder=encoder, predictor=predictor, batch_size=batch, grad_accum_steps=parts)
    ratio = memory_of(config).total / peak_of_step(config)
    assert 0.75 < ratio < 1.35, ratio


def test_the_largest_batch_is_confirmed_by_a_real_step_or_made_smaller() -> None:
    limit = memory_of(replace(CONFIG, batch_size=6)).total
    found = find_batch(CONFIG, limit)
    size, peak = confirmed(CONFIG, found)
    assert 0 < size <= found.batch_size and 0 < peak <= limit
    hopeless = replace(found, limit=10**6, batch_size=1)
    assert confirmed(CONFIG, hopeless) == (0, 0)


def test_a_step_is_tried_in_the_recipes_own_space_of_targets() -> None:
    objective = replace(CONFIG.objective, targets="centred")
    assert peak_of_step(replace(CONFIG, objective=objective, batch_size=2)) > 10**8


def test_a_step_that_fails_is_not_called_too_large(capfd: pytest.CaptureFixture[str]) -> None:
    nowhere = replace(CONFIG, runtime=replace(CONFIG.runtime, device="cuda:99"))
    with pytest.raises(ResourceError, match="ended with an error of its own, which stands above"):
        peak_of_step(nowhere)
    assert "Traceback" in capfd.readouterr().err
    unknown = replace(CONFIG, encoder=replace(CONFIG.encoder, name="vit_huger"))
    with pytest.raises(ResourceError, match=r"no step could be tried: encoder\.name 'vit_huger' is unknown"):
        peak_of_step(unknown)


def test_memory_grows_with_what_it_is_for() -> None:
    def total(**changes: object) -> int:
        return step_memory(replace(CONFIG, **changes), 768, SIZES).total  # type: ignore[arg-type]

    plain = total()
    assert total(batch_size=16) > plain > total(grad_accum_steps=8)
    assert total(optimizer=replace(CONFIG.optimizer, average=0.99)) > plain
    assert total(target=TargetConfig("ema")) > plain
    checkpointed = replace(CONFIG.encoder, grad_checkpointing=True)
    assert total(encoder=checkpointed) < plain
    lower = replace(CONFIG, runtime=replace(CONFIG.runtime, precision="bfloat16"))
    assert activations(lower, 768, SIZES) < 0.65 * activations(CONFIG, 768, SIZES)


def test_a_clip_more_costs_what_is_said() -> None:
    one, two = (step_memory(replace(CONFIG, batch_size=n), 768, SIZES) for n in (4, 5))
    assert two.total - one.total == one.of_clip + GRID.clip_bytes


def test_several_gpus_share_clips_and_fsdp_weights_too() -> None:
    config = replace(CONFIG, batch_size=32, encoder=replace(CONFIG.encoder, name="vit_base"))
    alone, ddp = (step_memory(config, 768, SIZES, gpus=n) for n in (1, 4))
    assert ddp.parts["activations"] * 4 == alone.parts["activations"]
    assert ddp.parts["weights"] == alone.parts["weights"]
    fsdp = replace(config, runtime=replace(config.runtime, parallel="fsdp"))
    sharded = step_memory(fsdp, 768, SIZES, gpus=4)
    assert sharded.parts["moments"] * 4 == ddp.parts["moments"]
    assert sharded.parts["weights"] < ddp.parts["weights"] and sharded.total < ddp.total


def test_loaders_take_slots_for_what_they_hold() -> None:
    data = replace(CONFIG.data, num_workers=3, prefetch=4)
    config = replace(CONFIG, data=data)
    assert shared_memory(CONFIG, 1000) == 0
    assert shared_memory(config, 1000) == 3 * 6 * 8 * (GRID.clip_bytes + 1000)
    assert shared_memory(config, 1000, gpus=2) * 2 == shared_memory(config, 1000)
    assert host_memory(config, 768) > host_memory(CONFIG, 768) > checkpoint_bytes(CONFIG, 768)


def test_masks_of_the_largest_step_are_counted() -> None:
    masks = build_masks(CONFIG.masks, GRID)
    largest = largest_sizes(masks, 8, seed=0)
    drawn = [
        sum(g.context_ids.shape[1] + g.target_ids.shape[1] for g in masks.sample(8, 0, step))
        for step in range(8)
    ]
    assert sum(map(sum, largest)) == max(drawn) > min(drawn)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not fit"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_runs_out_is_known_by_its_words(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def test_an_allocation_that_really_fails_is_explained() -> None:
    with (
        pytest.raises(
            ResourceError, match=r"memory ran out \(.*memory.*\): a step of 8 clips, 8 at once"
        ) as e,
        memory_explained(CONFIG, target_size(CONFIG).dim),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    said = str(e.value)
    assert "activations" in said and "lower batch_size, raise grad_accum_steps" in said and "\n" not in said
    assert isinstance(e.value.__cause__, RuntimeError)


def test_other_errors_pass_and_the_sum_is_that_of_a_rank() -> None:
    with pytest.raises(KeyError), memory_explained(CONFIG, 768):
        raise KeyError("x")
    config = replace(CONFIG, batch_size=8, grad_accum_steps=2)
    assert "a step of 4 clips, 2 at once" in str(explain_out_of_memory(config, 768, MemoryError(), ranks=2))
