"""The benchmark's yardstick computes V-JEPA's step, the same numbers as ours, and is counted rightly."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import VJEPA2Config

from salt_vla.config import EncoderConfig, PredictorConfig, TargetConfig, TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import MaskGroup, build_masks
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives import normalise
from salt_vla.training.flops import group_sizes
from salt_vla.training.learner import build_learner

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GRID = ClipGeometry(num_frames=6, image_size=48, tubelet_size=2, patch_size=8)  # 3 × 6 × 6 tokens
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=2),
    predictor=PredictorConfig(dim=48, depth=2, num_heads=2),
    target=TargetConfig(provider="ema"),
)
DIM = 128


@pytest.fixture(scope="module")
def modules() -> Any:
    """(train_step, vjepa_step), imported from where they lie, as a script would."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield tuple(loaded(name) for name in ("train_step", "vjepa_step"))
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("vjepa_step", None)


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def small_reference() -> VJEPA2Config:
    return VJEPA2Config(
        crop_size=GRID.image_size,
        frames_per_clip=GRID.num_frames,
        tubelet_size=GRID.tubelet_size,
        patch_size=GRID.patch_size,
        hidden_size=DIM,
        num_attention_heads=4,
        num_hidden_layers=2,
        num_pooler_layers=1,
        pred_hidden_size=48,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=2,
        attn_implementation="sdpa",
    )


@pytest.fixture(scope="module")
def reference(modules: tuple[ModuleType, ModuleType]) -> Any:
    torch.manual_seed(0)
    step = modules[1].VJepaStep(small_reference())
    with torch.no_grad():
        for parameter in (*step.parameters, *step.target_encoder.parameters()):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return step


def clips(count: int = 2) -> tuple[Tensor, list[MaskGroup]]:
    generator = torch.Generator().manual_seed(1)
    shape = (count, GRID.num_frames, GRID.image_size, GRID.image_size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return frames, build_masks(CONFIG.masks, GRID).sample(count)


def ids_of(groups: list[MaskGroup]) -> list[tuple[Tensor, Tensor]]:
    return [(group.context_ids, group.target_ids) for group in groups]


def theirs_as_ours(state: dict[str, Tensor], blocks: str) -> dict[str, Tensor]:
    """Names of transformers' layers → names of ours; query, key and value become one projection."""
    ours = {}
    for name, tensor in state.items():
        if not name.startswith("layer."):
            continue
        number, rest = name.removeprefix("layer.").split(".", 1)
        if ".query." in name:
            parts = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            ours[f"{blocks}.{number}.attn.qkv.{name.rsplit('.', 1)[1]}"] = torch.cat(parts)
        elif ".key." not in name and ".value." not in name:
            ours[f"{blocks}.{number}.{rest.replace('attention.proj', 'attn.proj')}"] = tensor
    ours |= {f"norm.{kind}": state[f"layernorm.{kind}"] for kind in ("weight", "bias")}
    return ours


def encoder_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    patches = "embeddings.patch_embeddings.proj"
    return theirs_as_ours(state, "blocks") | {
        "patch_embed.weight": state[f"{patches}.weight"].flatten(1),
        "patch_embed.bias": state[f"{patches}.bias"],
    }


def test_the_yardstick_s_loss_is_ours_with_the_same_weights(reference: Any) -> None:
    frames, groups = clips()
    theirs = reference.loss(normalise_pixels(frames).transpose(1, 2), ids_of(groups))
    learner = build_learner(CONFIG, DIM, "cpu")
    target_encoder = build_learner(CONFIG, DIM, "cpu").encoder
    learner.encoder.load_state_dict(encoder_weights(reference.encoder.state_dict()))
    target_encoder.load_state_dict(encoder_weights(reference.target_encoder.state_dict()))
    state = reference.predictor.state_dict()
    weights = theirs_as_ours(state, "blocks") | {
        "mask_tokens": state["embeddings.mask_tokens"].flatten(1),
        "embed.weight": state["embeddings.predictor_embeddings.weight"],
        "embed.bias": state["embeddings.predictor_embeddings.bias"],
        "proj.weight": state["proj.weight"],
        "proj.bias": state["proj.bias"],
    }
    learner.predictor.load_state_dict(weights)
    pixels = normalise_pixels(frames)
    with torch.no_grad():
        whole = normalise(target_encoder(pixels))
        losses = []
        for number, group in enumerate(groups):
            context = learner.encoder(pixels, group.context_ids)
            predicted = learner.predictor(context, group.context_ids, group.target_ids, number)
            wanted = whole.gather(1, group.target_ids.unsqueeze(-1).expand(-1, -1, DIM))
            losses.append((predicted - wanted).abs().mean())
    assert torch.stack(losses).mean().item() == pytest.approx(theirs.item(), abs=1e-5)


def test_the_yardstick_learns_and_its_target_encoder_follows(reference: Any) -> None:
    frames, groups = clips()
    video = normalise_pixels(frames).transpose(1, 2)
    before = [parameter.clone() for parameter in reference.target_encoder.parameters()]
    losses = [reference.step(video, ids_of(groups)) for _ in range(4)]
    assert losses[-1] < losses[0]
    moved = list(reference.target_encoder.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(before, moved, strict=True))


def test_the_yardstick_costs_what_torch_counts(
    modules: tuple[ModuleType, ModuleType], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules[0], "DIM", DIM)
    frames, groups = clips(1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        reference.loss(normalise_pixels(frames).transpose(1, 2), ids_of(groups)).backward()
    expected = modules[0].reference_flops(CONFIG, group_sizes(groups))
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("provider", ["cache", "ema"])
def test_our_contenders_take_the_step_that_is_timed(
    modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, provider: Any
) -> None:
    """Weights move, the moving average with them; time and cost of each step are kept."""
    module = modules[0]
    monkeypatch.setattr(module, "DIM", DIM)
    config = replace(CONFIG, target=TargetConfig(provider=provider))
    learner, task = module.ours(config, "cpu")
    monkeypatch.setattr(module, "ours", lambda *_: (learner, task))
    contenders = module.our_contenders(provider, config, "cpu")
    followed = list(task.provider.encoder.parameters()) if provider == "ema" else []
    watched = [*learner.networks.parameters(), *followed]
    before = [parameter.detach().clone() for parameter in watched]
    for step, contender in enumerate(contenders):
        contender.timed(module.make_work(config, 2, step, "cpu"))
    assert [contender.precision for contender in contenders] == ["float32", "bfloat16"]
    assert all(len(c.seconds) == len(c.cost) == 1 and c.speeds[0] > 0 for c in contenders)
    moved = [not torch.equal(a, b) for a, b in zip(before, watched, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


def test_the_script_prints_what_it_promises(
    modules: tuple[ModuleType, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With small networks in the place of ViT-B: each of its modes, and the table's figures as JSON."""
    module = modules[0]
    monkeypatch.setattr(module, "DIM", DIM)
    monkeypatch.setattr(module, "vit_base_config", small_reference)
    monkeypatch.setattr(module, "TrainConfig", lambda **_: replace(CONFIG, target=TargetConfig()))
    threads = str(torch.get_num_threads())

    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train_step.py", "--threads", threads, *args])
        module.main()
        return capsys.readouterr().out

    result = json.loads(run("--batch", "2", "--seconds", "0", "--json"))
    assert result["rounds"] == 2
    rows = {(row["contender"], row["precision"]): row for row in result["rows"]}
    assert len(rows) == 6
    assert rows["reference", "float32"]["times_reference"]["float32"] == 1.0
    assert rows["cached", "float32"]["gflop_per_clip"] < rows["ema", "float32"]["gflop_per_clip"]
    assert all(len(row["seconds"]) == 2 and row["share_of_peak"] > 0 for row in rows.values())
    assert "scaled_dot_product_flash" in run("--profile", "--batch", "1", "--precision", "float32")
    assert run("--memory", "10").count("│ ") >= 10 * 3
    assert "seconds a clip" in " ".join(run("--linear").split())
