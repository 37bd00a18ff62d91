"""One training step, and one validation pass: from a batch to a loss and to explained variance."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import TrainConfig
from salt_vla.errors import CacheError
from salt_vla.models import patchify
from salt_vla.models.photometric import jittered
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives import objective
from salt_vla.targets import Task
from salt_vla.training.guards import judge
from salt_vla.training.learner import Learner
from salt_vla.training.metrics import Scores
from salt_vla.training.online_probe import OnlineProbe
from salt_vla.training.optimizer import changed_share, sample_of, set_rates
from salt_vla.training.state import RunState

if TYPE_CHECKING:
    from jaxtyping import Bool


def forward(
    learner: Learner,
    batch: Batch,
    task: Task,
    config: TrainConfig,
    step: int,
    scores: Scores | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a (micro-)batch and its parts: predict each group's targets from its context, compare."""
    device = batch.frames.device.type
    lower = "bfloat16" in (config.runtime.precision, config.optimizer.parameters)
    as_student = lower and task.provider.follows_precision
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=as_student):
        scored = task.space.scored(task.provider.targets(batch.frames, batch.records))
    pixels = jittered(batch.frames, batch.jitter, config.data.photometric)
    tubelets = patchify(normalise_pixels(pixels), config.geometry)
    kept = (
        residuals_kept(config, batch, step, len(learner.encoder.blocks))
        if learner.networks.training
        else None
    )
    with torch.autocast(device, torch.bfloat16, enabled=lower):
        predicted, contexts = learner.call(tubelets, batch.masks, kept)
    targets = [task.space.trained(scored, group.target_ids) for group in batch.masks]
    if learner.networks.training:
        task.space.gather(scored)
    if scores is not None:
        scores.add(predicted, contexts, scored, batch, task, config)
    valid = [group.context_valid for group in batch.masks]
    return objective(predicted, targets, config.objective, contexts, valid)


def train_step(
    learner: Learner,
    batch: Batch,
    task: Task,
    config: TrainConfig,
    step: int,
    scored: bool = True,
    state: RunState | None = None,
    probe: OnlineProbe | None = None,
) -> dict[str, Any]:
    """Update number `step` (from 0). Returns the step's metrics, with R² where `scored`; what decides whether
    the step is sound is counted in `state`.

    Where it is not, the parameters stay as they were and the row's `bad` says why; raises `RunError` instead
    where `guards.on_bad_step` is `stop`.
    """
    state = RunState(step) if state is None else state
    lr, weight_decay = set_rates(learner.optimizer, config, step)
    learner.optimizer.zero_grad(set_to_none=True)
    scores = Scores() if scored else None
    loss, parts = accumulate(learner, batch, task, config, step, scores)
    norm = learner.clip_gradients(config.optimizer.grad_clip)
    # The only wait for the device: whether an update is sound has to be known before it is made.
    total, length = torch.stack([loss, norm.float()]).tolist()
    reason = judge(state, config.guards, total, length)
    if probe is not None and not reason:
        probe.learn(learner, batch, step)
    before = sample_of(learner.named_parameters()) if scored else []
    if reason:
        task.space.forget()
    else:
        learner.optimizer.step()
        task.after_step(learner.encoder, step, learner.world.sum)
    state.steps_since_line += 1
    state.clipped_since_line += length > config.optimizer.grad_clip
    row = {"kind": "train", "step": step + 1, "loss": total, "lr": lr, "weight_decay": weight_decay}
    row |= {"grad_norm": length} | ({"bad": reason} if reason else {})
    if scores is not None:
        changed = changed_share(before, learner.named_parameters())
        row |= parts | scores.shared(learner.world).as_row() | {"changed_share": changed} | state.as_line()
    return row


def accumulate(
    learner: Learner,
    batch: Batch,
    task: Task,
    config: TrainConfig,
    step: int,
    scores: Scores | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Gradients of the batch, over all its micro-batches and processes, into the parameters; its loss, and
    where it is scored the loss's parts."""
    losses: list[Tensor] = []
    parts: list[dict[str, Tensor]] = []
    for number, micro in enumerate(batch.micro_batches(config.grad_accum_steps), start=1):
        with learner.sharing(number == config.grad_accum_steps):
            loss, named = forward(learner, micro, task, config, step, scores)
            (loss / config.grad_accum_steps).backward()
        losses.append(loss.detach())
        parts.append(named)
    total = learner.world.mean(torch.stack(losses).mean()).float()
    if scores is None or len(parts[0]) < 2:
        return total, {}
    mean = learner.world.mean
    return total, {name: mean(torch.stack([p[name] for p in parts]).mean()).item() for name in parts[0]}


def residuals_kept(
    config: TrainConfig, batch: Batch, step: int, depth: int
) -> Bool[Tensor, "batch groups depth 2"] | None:
    """Which residuals stochastic depth leaves in: a function of (seed, step) for the global batch, of which
    this part takes its rows, so that neither micro-batches nor processes change anything."""
    rate = config.encoder.drop_path
    if not rate:
        return None
    drawn = np.random.default_rng([config.seed, step, depth]).random(
        (batch.global_size, len(batch.masks), depth, 2), dtype=np.float32
    )
    dropped = torch.from_numpy(drawn[batch.first_row : batch.first_row + len(batch.keys)])
    linear = torch.linspace(0, rate, depth) if depth > 1 else torch.zeros(1)
    return (dropped >= linear[:, None]).to(batch.frames.device, non_blocking=True)


@torch.no_grad()
def validate(
    learner: Learner,
    batches: Iterable[Batch],
    task: Task,
    config: TrainConfig,
    step: int,
    device: str,
    probe: OnlineProbe | None = None,
) -> dict[str, Any]:
    """Loss and R² on held-out clips (view 0, masks that are the same at every validation), of which
    `batches` are this process' share. The loss is the regression alone: other terms depend on batches."""
    learner.train(False)
    scores = Scores()
    loss_sum, clips = 0.0, 0
    for batch in learner.world.in_step(batches):
        if batch is None:
            learner.accompany(config)
            if probe is not None:
                probe.hold(learner, None)
            continue
        batch = batch.to(device)
        _, parts = forward(learner, batch, task, config, step, scores)
        if probe is not None:
            probe.hold(learner, batch)
        loss_sum += parts["regression"].item() * len(batch.keys)
        clips += len(batch.keys)
    learner.train()
    sums = learner.world.sum(torch.tensor([loss_sum, clips], dtype=torch.float64))
    loss_sum, clips = sums[0].item(), int(sums[1])
    if not clips:
        raise CacheError("not one held-out clip could be read; `salt-vla cache verify` names what is damaged")
    row = {"kind": "val", "step": step, "loss": loss_sum / clips, "clips": clips}
    return row | scores.shared(learner.world).as_row()
