"""Blocks that torch compiles keep their names, their weights and what they compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from salt_vla.batches import Batch
from salt_vla.config import EncoderConfig, OptimizerConfig, PredictorConfig, RuntimeConfig, TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import BlockSpec, MultiBlockMasks
from salt_vla.targets import PixelTargets, TargetSpace, Task
from salt_vla.training.learner import Learner, build_learner
from salt_vla.training.step import train_step

GRID = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)
MASKS = MultiBlockMasks(GRID, [BlockSpec(2, 0.2), BlockSpec(1, 0.4)])
TASK = Task(PixelTargets(GRID), TargetSpace("normalised", torch.zeros(GRID.num_tokens, GRID.patch_dim)))
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=1),
    predictor=PredictorConfig(dim=16, depth=1, num_heads=2),
    optimizer=OptimizerConfig(lr_start=1e-3, lr=1e-3, warmup_steps=0, grad_clip=1.0),
    runtime=RuntimeConfig(device="cpu", precision="float32", threads=1),
    steps=100,
    batch_size=4,
)
COMPILED = replace(CONFIG, runtime=replace(CONFIG.runtime, compile=True))


def learner_of(config: TrainConfig) -> Learner:
    return build_learner(config, GRID.patch_dim, "cpu")


def batch_of(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    frames = torch.randint(0, 256, (4, 4, 32, 32, 3), generator=generator).byte()
    return Batch([(f"clip{n}", 0) for n in range(4)], frames, None, MASKS.sample(4, seed=0, step=step))


def test_compiled_blocks_keep_names_and_weights() -> None:
    plain, compiled = learner_of(CONFIG), learner_of(COMPILED)
    for (name, expected), (other, parameter) in zip(
        plain.named_parameters(), compiled.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(expected, parameter)
    assert compiled.networks.state_dict().keys() == plain.networks.state_dict().keys()
    for networks, expected in ((plain.networks, False), (compiled.networks, True)):
        blocks = [*networks.encoder.blocks, *networks.predictor.blocks]
        assert [block._compiled_call_impl is not None for block in blocks] == [expected] * len(blocks)


def test_compiled_steps_are_the_steps(request: pytest.FixtureRequest) -> None:
    """Masks whose sizes change from step to step. Compiling takes half a minute, so only with --torture;
    otherwise the blocks run as they are."""
    if request.config.getoption("--torture"):
        from torch._dynamo.utils import counters

        counters.clear()
        compiled = learner_of(COMPILED)
    else:
        compiled = learner_of(replace(CONFIG, seed=CONFIG.seed))
    plain = learner_of(CONFIG)
    for step in range(4):
        expected = train_step(plain, batch_of(step), TASK, CONFIG, step)
        row = train_step(compiled, batch_of(step), TASK, CONFIG, step)
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    if request.config.getoption("--torture"):
        assert counters["stats"]["unique_graphs"] >= 2 and not counters["graph_break"]
