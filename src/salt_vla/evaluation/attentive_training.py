"""Trains many attentive heads at once on the same minibatches of tokens, which are read from a mapped file.

Knows tokens, goals and rates; neither what a target is called nor how the best head is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from salt_vla.errors import DataError
from salt_vla.evaluation.attentive_head import AttentiveHead, answers
from salt_vla.evaluation.probes import deviation_floor
from salt_vla.progress import progress
from salt_vla.training.schedules import cosine

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

ROUNDS = 20  # How often heads are looked at; as many as the reference trains epochs.
# Activations of one pass, in bytes; more clips than fit are passed in parts.
ACTIVATION_BYTES = 1 << 30
KEPT_A_BLOCK = 24  # tensors as large as the tokens, kept for the gradient of a self-attention block
SAMPLED_CLIPS = 4096  # from which the tokens' mean and deviation are taken
PREDICTED_AT_ONCE = 64


@dataclass(frozen=True)
class Recipe:
    """How heads are trained: AdamW, the rate falling from its start to 0 as a cosine, no warm-up.

    `rates` × `decays` are tried at once. `epochs` are raised until there are `min_steps`. `standardised`:
    channels are scaled by the training clips' mean and deviation.
    """

    rates: tuple[float, ...]
    decays: tuple[float, ...]
    batch: int
    epochs: int = ROUNDS
    min_steps: int = 0
    standardised: bool = True

    @property
    def grid(self) -> list[tuple[float, float]]:
        return [(rate, decay) for decay in self.decays for rate in self.rates]

    def steps(self, clips: int) -> int:
        return max(self.epochs * -(-clips // self.batch), self.min_steps, ROUNDS)


@dataclass(frozen=True)
class Goal:
    """One target as heads are trained on it: classes as numbers (clips,), or standardised quantities (clips,
    dims)."""

    values: Tensor
    outputs: int

    @property
    def is_class(self) -> bool:
        return not self.values.is_floating_point()

    def loss(self, said: Float[Tensor, "clips outputs"], rows: Tensor) -> Tensor:
        """Cross-entropy, or mean squared error."""
        wanted = self.values[rows].to(said.device)
        said = said.float()
        return F.cross_entropy(said, wanted) if self.is_class else F.mse_loss(said, wanted)


@dataclass
class Trained:
    """A head, the goal it is trained on, and with which rate and decay; `rounds`: after how many of `ROUNDS`
    it stops."""

    head: AttentiveHead
    goal: Goal
    rate: float
    decay: float
    rounds: int = ROUNDS


def device_named(device: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)


class Tokens:
    """The tokens of one encoder's clips, on one side of the split; rows are read when they are asked for."""

    def __init__(
        self, encoder: str, values: np.ndarray, like: Tokens | None = None, device: str = "auto"
    ) -> None:
        """Scaled as `like` is, or not at all; batches go to `device`."""
        if values.ndim != 3 or not len(values) or not all(values.shape[1:]):
            raise DataError(
                f"an attentive probe reads (clips, tokens, dim), not {values.shape} of {encoder!r}"
            )
        self.encoder, self.values = encoder, values
        self.device = device_named(device)
        self.mean: np.ndarray = np.zeros(values.shape[2], np.float32) if like is None else like.mean
        self.scale: np.ndarray = np.ones(values.shape[2], np.float32) if like is None else like.scale

    def standardise(self, rows: Int64[np.ndarray, " rows"]) -> None:
        """Scale channels by their mean and deviation over these clips (at most 4,096 of them, evenly spread),
        the deviation with a floor as linear probes have it."""
        chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLED_CLIPS)).astype(np.int64)]
        total, squares, count = np.zeros(self.values.shape[2]), np.zeros(self.values.shape[2]), 0
        for start in range(0, len(chosen), PREDICTED_AT_ONCE):
            part = self._read(chosen[start : start + PREDICTED_AT_ONCE]).astype(np.float64)
            total, squares = total + part.sum((0, 1)), squares + (part**2).sum((0, 1))
            count += part.shape[0] * part.shape[1]
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
        floor = deviation_floor(deviation) or 1.0
        self.mean, self.scale = mean.astype(np.float32), np.maximum(deviation, floor).astype(np.float32)

    def batch(self, rows: Int64[np.ndarray, " rows"]) -> Float[Tensor, "rows tokens dim"]:
        """These clips' tokens, scaled, on the device."""
        scaled = (self._read(rows) - self.mean) / self.scale
        return torch.from_numpy(scaled).to(self.device, non_blocking=True)

    def ahead(self, batches: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Every batch of rows with its tokens, the next one read while this one is used."""
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for i, rows in enumerate(batches):
                now = coming.result() if coming else self.batch(rows)
                coming = reader.submit(self.batch, batches[i + 1]) if i + 1 < len(batches) else None
                yield rows, now

    def _read(self, rows: np.ndarray) -> np.ndarray:
        values = np.asarray(self.values[rows], np.float32)
        if not np.isfinite(values).all():
            raise DataError(
                f"features of encoder {self.encoder!r} hold NaN or infinite values; check the encoder"
            )
        return values


def train(
    title: str,
    heads: Sequence[Trained],
    tokens: Tokens,
    rows: Int64[np.ndarray, " rows"],
    recipe: Recipe,
    seed: int,
    after_round: Callable[[int, Sequence[Trained]], None],
) -> None:
    """Train all heads on these rows, in an order that `seed` decides; after each of `ROUNDS` equal parts of
    the way those that are still trained are handed over. A head whose numbers overflow is left so."""
    steps = recipe.steps(len(rows))
    batches = _batches(rows, recipe.batch, steps, seed)
    ends = {steps * done // ROUNDS: done for done in range(1, ROUNDS + 1)}
    live = list(heads)
    groups = [{"params": [*one.head.parameters()], "weight_decay": one.decay} for one in heads]
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    with progress(title, steps, "steps") as advance:
        for step, (chosen, inputs) in enumerate(tokens.ahead(batches), start=1):
            for one, group in zip(heads, optimizer.param_groups, strict=True):
                group["lr"] = cosine(step, start=one.rate, final=0.0, total_steps=steps)
            _gradients(live, inputs, torch.from_numpy(chosen))
            optimizer.step()
            optimizer.zero_grad()  # To None: heads that have stopped are passed over.
            advance()
            if step in ends:
                after_round(ends[step], live)
                live = [one for one in live if one.rounds > ends[step]]
            if not live:
                return


def predict(
    heads: Sequence[Trained], tokens: Tokens, rows: Int64[np.ndarray, " rows"]
) -> list[Float[np.ndarray, "rows outputs"]]:
    """What each head says of these clips: probabilities of classes, or standardised quantities."""
    said: list[list[np.ndarray]] = [[] for _ in heads]
    at_once = _clips_at_once(heads, tokens.values.shape[1:], PREDICTED_AT_ONCE)
    parts = [rows[start : start + at_once] for start in range(0, len(rows), at_once)]
    with torch.inference_mode():
        for _, inputs in tokens.ahead(parts):
            with _precision(inputs):
                found = answers([one.head for one in heads], inputs)
            for one, mine, values in zip(heads, said, found, strict=True):
                values = values.float()
                mine.append((values.softmax(1) if one.goal.is_class else values).cpu().numpy())
    return [np.concatenate(mine) for mine in said]


def _gradients(heads: Sequence[Trained], inputs: Tensor, rows: Tensor) -> None:
    """Add the gradient of every head's own loss. Deep heads go one after the other, else the activations of
    all of them would lie in memory."""
    is_deep = any(len(one.head.blocks) for one in heads)
    for together in [[one] for one in heads] if is_deep else [heads]:
        at_once = _clips_at_once(together, inputs.shape[1:], len(rows))
        for start in range(0, len(rows), at_once):
            part = rows[start : start + at_once]
            with _precision(inputs):
                said = answers([one.head for one in together], inputs[start : start + at_once])
            losses = [one.goal.loss(values, part) for one, values in zip(together, said, strict=True)]
            (torch.stack(losses).sum() * (len(part) / len(rows))).backward()


def _precision(inputs: Tensor) -> torch.autocast:
    """bfloat16 on a GPU, as the reference computes in half precision; float32 elsewhere."""
    return torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.device.type == "cuda")


def _clips_at_once(heads: Sequence[Trained], shape: Sequence[int], wanted: int) -> int:
    """So many that their activations keep to `ACTIVATION_BYTES`."""
    tokens, dim = shape
    depth = max(len(one.head.blocks) for one in heads)
    questions = sum(one.head.num_heads for one in heads)
    a_clip = 4 * tokens * (dim * (3 + KEPT_A_BLOCK * depth) + 3 * questions)
    return max(1, min(wanted, ACTIVATION_BYTES // a_clip))


def _batches(rows: np.ndarray, size: int, steps: int, seed: int) -> list[np.ndarray]:
    """Every clip once an epoch, each epoch in an order of its own; the last batch of one may be smaller."""
    found: list[np.ndarray] = []
    random = np.random.default_rng(seed)
    while len(found) < steps:
        order = random.permutation(rows)
        found += [order[start : start + size] for start in range(0, len(order), size)]
    return found[:steps]
