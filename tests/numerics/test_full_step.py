"""Loss and every gradient of a whole step are those of a plain float64 computation, written out here from the
formulas, a clip at a time, without padding, gathering or fused attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from salt_vla.batches import Batch
from salt_vla.cache import Encoding
from salt_vla.config import EncoderConfig, MaskConfig, ObjectiveConfig, PredictorConfig, TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import build_masks
from salt_vla.targets import CachedTargets, TargetSpace, Task
from salt_vla.training.learner import Learner, build_learner
from salt_vla.training.step import forward

GRID = ClipGeometry(num_frames=6, image_size=40, tubelet_size=2, patch_size=8)  # 3 × 5 × 5 tokens
WIDTH, CLIPS = 12, 3
LATENTS = Encoding("float16", (GRID.num_tokens, WIDTH))
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=2),
    predictor=PredictorConfig(dim=48, depth=2, num_heads=3),
    objective=ObjectiveConfig(power=1.0, targets="normalised"),
    batch_size=CLIPS,
)
CONFIG = replace(CONFIG, runtime=replace(CONFIG.runtime, device="cpu", precision="float32", threads=1))
State = dict[str, Tensor]


def batch_of(config: TrainConfig) -> Batch:
    generator = torch.Generator().manual_seed(5)
    frames = torch.randint(0, 256, (CLIPS, 6, 40, 40, 3), generator=generator).byte()
    latents = torch.randn(CLIPS, *LATENTS.shape, generator=generator).numpy()
    records = np.stack([np.frombuffer(LATENTS.encode(array), dtype=np.uint8) for array in latents])
    masks = build_masks(config.masks, GRID).sample(CLIPS, seed=1, step=3)
    return Batch([(str(n), 0) for n in range(CLIPS)], frames, torch.from_numpy(records), masks)


def learner_of(config: TrainConfig) -> Learner:
    """Far from the start, where biases are zero and all attention is flat."""
    learner = build_learner(config, target_dim=WIDTH, device="cpu")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in learner.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return learner


def turned(x: Tensor, ids: list[int]) -> Tensor:
    """RoPE of one head (tokens, channels): each axis turns its pairs, the second half of an axis' channels by
    the same frequencies as the first."""
    share, token = 2 * ((x.shape[1] // 3) // 2), torch.tensor(ids).double()
    columns = list(x.T)
    for axis, place in enumerate((token // 25, token % 25 // 5, token % 5)):
        for pair in range(share // 2):
            a, b = axis * share + 2 * pair, axis * share + 2 * pair + 1
            first, second = (
                place * 10000.0 ** (-(channel % (share // 2)) / (share // 2))
                for channel in (2 * pair, 2 * pair + 1)
            )
            columns[a] = x[:, a] * first.cos() - x[:, b] * first.sin()
            columns[b] = x[:, b] * second.cos() + x[:, a] * second.sin()
    return torch.stack(columns, dim=1)


def linear(w: State, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(w: State, name: str, x: Tensor) -> Tensor:
    mean, variance = x.mean(dim=-1, keepdim=True), x.var(dim=-1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def block(w: State, name: str, x: Tensor, ids: list[int], heads: int, rope: bool) -> Tensor:
    q, k, v = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x)).chunk(3, dim=-1)
    size, answers = q.shape[1] // heads, []
    for head in range(heads):
        of_head = slice(head * size, (head + 1) * size)
        query, key = (turned(y[:, of_head], ids) if rope else y[:, of_head] for y in (q, k))
        answers.append((query @ key.T / size**0.5).softmax(dim=-1) @ v[:, of_head])
    x = x + linear(w, f"{name}.attn.proj", torch.cat(answers, dim=-1))
    hidden = linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x))
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return x + linear(w, f"{name}.mlp.fc2", hidden)


def plain_loss(w: State, tables: State, batch: Batch, contexts: list[list[list[int]]]) -> Tensor:
    """The mean over mask groups of the mean |prediction − LN(target)| over clips, targets and channels."""
    mean, std = (torch.tensor(v).double() for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    film = ((batch.frames.double() / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    kernel = w["encoder.patch_embed.weight"].view(128, 3, 2, 8, 8)
    patches = F.conv3d(film, kernel, w["encoder.patch_embed.bias"], stride=(2, 8, 8)).flatten(2).mT
    assert batch.records is not None
    latents = batch.records.view(torch.float16).double().view(CLIPS, *LATENTS.shape)
    centred = latents - latents.mean(dim=-1, keepdim=True)
    normed = centred / (latents.var(dim=-1, correction=0, keepdim=True) + 1e-5).sqrt()
    rope, losses = not tables, []
    for number, group in enumerate(batch.masks):
        errors = []
        for clip in range(CLIPS):
            seen, asked = contexts[number][clip], group.target_ids[clip].tolist()
            x = patches[clip, seen] + (0 if rope else tables["encoder"][seen])
            for name in ("encoder.blocks.0", "encoder.blocks.1"):
                x = block(w, name, x, seen, 4, rope)
            x = linear(w, "predictor.embed", norm(w, "encoder.norm", x))
            x = torch.cat([x, w["predictor.mask_tokens"][number].expand(len(asked), -1)])
            x = x + (0 if rope else tables["predictor"][seen + asked])
            for name in ("predictor.blocks.0", "predictor.blocks.1"):
                x = block(w, name, x, seen + asked, 3, rope)
            answer = linear(w, "predictor.proj", norm(w, "predictor.norm", x[len(seen) :]))
            errors.append((answer - normed[clip, asked]).abs())
        losses.append(torch.stack(errors).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("positions", ["rope", "sincos"])
@pytest.mark.parametrize("truncate", ["end", "pad", "even"])
def test_loss_and_gradients_are_those_of_the_formulas(positions: str, truncate: str) -> None:
    config = replace(
        CONFIG,
        encoder=replace(CONFIG.encoder, positions=positions),  # type: ignore[arg-type]
        predictor=replace(CONFIG.predictor, positions=positions),  # type: ignore[arg-type]
        masks=MaskConfig(truncate=truncate, max_targets=7),  # type: ignore[arg-type]
    )
    learner, batch = learner_of(config), batch_of(config)
    task = Task(CachedTargets(LATENTS), TargetSpace("normalised", torch.zeros(LATENTS.shape)))
    loss, _ = forward(learner, batch, task, config, step=0)
    loss.backward()

    weights = {n: p.detach().double().requires_grad_() for n, p in learner.named_parameters()}
    networks = {"encoder": learner.encoder, "predictor": learner.predictor}
    tables = {name: network.positions.double() for name, network in networks.items()}  # type: ignore[operator]
    contexts = [
        [
            ids[: int(valid.sum())].tolist()
            for ids, valid in zip(
                group.context_ids,
                torch.ones_like(group.context_ids) if group.context_valid is None else group.context_valid,
                strict=True,
            )
        ]
        for group in batch.masks
    ]
    assert (len({len(ids) for ids in contexts[0]}) > 1) == (truncate == "pad")
    expected = plain_loss(weights, {} if positions == "rope" else tables, batch, contexts)
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in learner.named_parameters():
        theirs = weights[name].grad
        assert theirs is not None and theirs.any() and parameter.grad is not None, name
        # float32's rounding, against the largest gradient of the tensor.
        distance = (parameter.grad.double() - theirs).abs().max() / theirs.abs().max()
        assert distance < 1e-4, (name, float(distance))
