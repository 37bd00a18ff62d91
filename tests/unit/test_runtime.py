"""How the work is done is as asked for: flags of torch, a measured precision, activations thrown away."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from salt_vla.batches import Batch
from salt_vla.config import EncoderConfig, OptimizerConfig, PredictorConfig, RuntimeConfig, TrainConfig
from salt_vla.errors import ConfigError, RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import RandomMasks
from salt_vla.targets import PixelTargets, TargetSpace, Task
from salt_vla.training.learner import build_learner
from salt_vla.training.runtime import apply_runtime, resolve_device, resolve_precision
from salt_vla.training.step import train_step

GRID = ClipGeometry(num_frames=4, image_size=64, tubelet_size=2, patch_size=8)  # 128 tokens
TASK = Task(PixelTargets(GRID), TargetSpace("normalised", torch.zeros(GRID.num_tokens, GRID.patch_dim)))
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=3),
    predictor=PredictorConfig(dim=32, depth=2, num_heads=2),
    optimizer=OptimizerConfig(lr_start=1e-3, lr=1e-3, warmup_steps=0, grad_clip=1.0),
    runtime=RuntimeConfig(device="cpu", precision="float32", threads=1),
    batch_size=4,
)


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    apply_runtime(replace(CONFIG, runtime=replace(CONFIG.runtime, threads=threads)))


def batch() -> Batch:
    frames = torch.randint(0, 256, (4, 4, 64, 64, 3), generator=torch.Generator().manual_seed(0)).byte()
    masks = RandomMasks(GRID, ratio=0.5).sample(4)
    return Batch([(f"clip{n}", 0) for n in range(4)], frames, None, masks)


def runtime(**changes: Any) -> TrainConfig:
    return replace(CONFIG, runtime=replace(CONFIG.runtime, **changes))


def test_torch_computes_as_the_settings_say_and_as_the_next_ones_say() -> None:
    apply_runtime(runtime(cudnn_benchmark=True, allow_tf32=True, deterministic=True, threads=2))
    assert torch.backends.cudnn.benchmark and torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "high" and torch.get_num_threads() == 2
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    apply_runtime(runtime())
    assert not torch.backends.cudnn.benchmark and not torch.are_deterministic_algorithms_enabled()
    assert torch.get_float32_matmul_precision() == "highest" and torch.get_num_threads() == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_run_of_a_gpu_is_refused_where_there_is_none() -> None:
    with pytest.raises(RunError, match="was started on a CUDA GPU and there is none now"):
        apply_runtime(runtime(device="cuda"))


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_step_can_be_computed_by_deterministic_kernels_alone(deterministic: bool) -> None:
    config = runtime(deterministic=deterministic)
    apply_runtime(config)
    losses = set()
    for _ in range(2):
        learner = build_learner(config, GRID.patch_dim, "cpu")
        losses.add(tuple(train_step(learner, batch(), TASK, config, step)["loss"] for step in range(2)))
    assert len(losses) == 1


def test_what_was_measured_is_said() -> None:
    said: list[str] = []
    chosen = resolve_precision(runtime(precision="auto"), batch(), TASK, said.append).runtime.precision
    (line,) = said
    assert line.startswith(f"precision {chosen}: a step takes float32 ")
    assert line.count(" ms") == 2 and "bfloat16 " in line


def test_parameters_in_bfloat16_leave_nothing_to_measure() -> None:
    said: list[str] = []
    config = runtime(precision="auto")
    config = replace(config, optimizer=replace(config.optimizer, parameters="bfloat16"))
    assert resolve_precision(config, batch(), TASK, said.append).runtime.precision == "bfloat16"
    assert not said


def forwards_and_bytes_kept(checkpointing: bool) -> tuple[dict[str, int], int, float]:
    """How often each network's attention runs in a step, what autograd keeps meanwhile, and the loss."""
    config = replace(
        CONFIG,
        encoder=replace(CONFIG.encoder, grad_checkpointing=checkpointing),
        predictor=replace(CONFIG.predictor, grad_checkpointing=checkpointing),
    )
    learner = build_learner(config, GRID.patch_dim, "cpu")
    counts = {"encoder": 0, "predictor": 0}
    kept: dict[int, int] = {}

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            counts[name] += 1

        return hook

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for name in counts:
        for block in getattr(learner, name).blocks:
            block.attn.register_forward_hook(count(name))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = train_step(learner, batch(), TASK, config, 0)["loss"]
    return counts, sum(kept.values()), loss


def test_activation_checkpointing_is_really_on() -> None:
    """Every block of both networks is computed twice, much less is kept, and the loss is the same."""
    plain, kept, loss = forwards_and_bytes_kept(checkpointing=False)
    again, kept_less, same = forwards_and_bytes_kept(checkpointing=True)
    assert plain == {"encoder": 3, "predictor": 2}
    assert again == {"encoder": 6, "predictor": 4}
    assert kept_less < 0.6 * kept
    assert same == loss


@pytest.mark.parametrize("device", ["meta", "mps", "vulkan", "abacus"])
@pytest.mark.skipif(sys.platform == "darwin", reason="of machines without MPS")
def test_a_device_that_computes_nothing_here_is_one_sentence(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"^runtime\.device '{device}' cannot be used here") as raised:
        resolve_device(replace(CONFIG, runtime=replace(CONFIG.runtime, device=device)))
    assert len(str(raised.value)) < 400 and "\n" not in str(raised.value)
