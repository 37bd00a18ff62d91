"""The loss of a step: the regression that the settings name, plus the terms they give a weight."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salt_vla.config import ObjectiveConfig
from salt_vla.errors import ConfigError
from salt_vla.objectives.contrastive import info_nce
from salt_vla.objectives.vicreg import covariance_term, pooled, variance_term
from salt_vla.registry import LOSSES, resolve

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def check_objective(config: ObjectiveConfig, clips: int) -> None:
    """Raise `ConfigError` for a regression that nobody knows, and for terms that compare the `clips` computed
    at a time where that is a single one: it has no deviation."""
    if config.loss not in LOSSES:
        near = difflib.get_close_matches(config.loss, LOSSES)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ConfigError(
            f"objective.loss {config.loss!r} is unknown; {meant}known: {', '.join(sorted(LOSSES))}"
        )
    if _has_vicreg(config) and config.regularised != "predictions" and clips < 2:
        raise ConfigError(
            f"objective.regularised {config.regularised!r} compares clips, but one is computed at a time; "
            "raise batch_size, or lower grad_accum_steps or the number of processes"
        )


def objective(
    predicted: Sequence[Float[Tensor, "batch target dim"]],
    targets: Sequence[Float[Tensor, "batch target dim"]],
    config: ObjectiveConfig,
    contexts: Sequence[Float[Tensor, "batch context width"]] = (),
    valid: Sequence[Bool[Tensor, "batch context"] | None] = (),
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss of a step and its named parts, one entry a mask group in each list.

    `targets` are in the objective's own space already; `contexts` are the encoder's outputs and `valid` says
    which of them are no padding (None: all). Terms over a batch are of the clips at hand: where a step is
    split, of each micro-batch and each process by itself.
    """
    total = resolve(LOSSES, config.loss)(predicted, targets, config)
    parts = {"regression": total.detach()}
    if _has_vicreg(config):
        for suffix, rows in _regularised(predicted, config, contexts, valid):
            variance = torch.stack([variance_term(r, config.variance_target) for r in rows]).mean()
            covariance = torch.stack([covariance_term(r) for r in rows]).mean()
            total = total + config.variance_weight * variance + config.covariance_weight * covariance
            parts |= {f"variance{suffix}": variance.detach(), f"covariance{suffix}": covariance.detach()}
    if config.contrastive_weight:
        contrastive, chance = info_nce(predicted, targets, config.contrastive_temperature)
        total = total + config.contrastive_weight * contrastive
        parts |= {"contrastive": contrastive.detach(), "contrastive_chance": total.new_tensor(chance)}
    return total, parts


def _has_vicreg(config: ObjectiveConfig) -> bool:
    return bool(config.variance_weight or config.covariance_weight)


def _regularised(
    predicted: Sequence[Tensor],
    config: ObjectiveConfig,
    contexts: Sequence[Tensor],
    valid: Sequence[Tensor | None],
) -> list[tuple[str, list[Tensor]]]:
    """(columns' suffix, tables of rows × channels whose terms are averaged): all predicted tokens as one
    table; of the encoder the pooled contexts of each mask group, like VICReg's two branches."""
    chosen: list[tuple[str, list[Tensor]]] = []
    if config.regularised != "encoder":
        chosen.append(("", [torch.cat([z.flatten(0, 1) for z in predicted])]))
    # A single clip, as the last of a validation may be alone, has no deviation from others.
    if config.regularised != "predictions" and len(contexts[0]) > 1:
        masks = valid or [None] * len(contexts)
        chosen.append(("_encoder", [pooled(c, v) for c, v in zip(contexts, masks, strict=True)]))
    return chosen
