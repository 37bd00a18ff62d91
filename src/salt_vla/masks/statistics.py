"""What a strategy's masks do to a batch, counted: how much is masked, seen, dropped, padded, or visible at
another time. Knows masks alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from salt_vla.masks.groups import BoolArray, MaskGroup
from salt_vla.masks.strategies import Masks


@dataclass(frozen=True)
class GroupStatistics:
    """One mask group over some batches; tokens are means a clip, `drawn` ones before clips were brought to
    one size. `masked`: share of the clip's tokens, as drawn. `context_dropped`: share of the drawn context
    that no encoder sees. `padding`: share of the entries computed that stand for nothing.
    `visible_elsewhen`: share of the predicted tokens whose place is seen at another time step.
    """

    group: int
    masked: float
    context_drawn: float
    context: float
    target_drawn: float
    target: float
    context_dropped: float
    padding: float
    visible_elsewhen: float

    def __str__(self) -> str:
        said = f"group {self.group}: {self.masked:.0%} masked; "
        said += f"context {_change(self.context_drawn, self.context)} tokens"
        said += f", {self.context_dropped:.0%} dropped" * bool(self.context_dropped)
        said += f", {self.padding:.0%} of the entries padding" * bool(self.padding)
        said += f"; predicted {_change(self.target_drawn, self.target)} tokens"
        return f"{said}, {self.visible_elsewhen:.0%} of them visible at another time"


def _change(before: float, after: float) -> str:
    return f"{after:.0f}" if round(before) == round(after) else f"{before:.0f} → {after:.0f}"


@dataclass(frozen=True)
class MaskReport:
    """The statistics of every group, and of which steps' batches they are."""

    batch_size: int
    batches: int
    groups: list[GroupStatistics]

    @property
    def lines(self) -> list[str]:
        clips = "1 clip" if self.batch_size == 1 else f"{self.batch_size} clips"
        steps = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        return [f"masks over {steps} of {clips}, {group}" for group in self.groups]


def report_masks(masks: Masks, batch_size: int, seed: int = 0) -> MaskReport:
    """Statistics of the first steps' masks: enough batches to say a size within a few per cent, few enough
    to be counted in a fraction of a second."""
    batches = max(1, min(64, 2048 // batch_size))
    return MaskReport(batch_size, batches, mask_statistics(masks, batch_size, batches, seed))


def mask_statistics(masks: Masks, batch_size: int, batches: int, seed: int = 0) -> list[GroupStatistics]:
    """What the masks of steps 0 … `batches` − 1 are, one row a group."""
    sums = np.zeros((masks.num_groups, 6))
    for step in range(batches):
        for number, (masked, group) in enumerate(masks.split(batch_size, seed, step)):
            sums[number] += _counted(masked, group, masks.geometry.tokens_per_step)
    return [_of_group(number, row / (batches * batch_size)) for number, row in enumerate(sums, 1)]


def _counted(masked: BoolArray, group: MaskGroup, tokens_per_step: int) -> np.ndarray:
    """Sums over the batch: tokens, masked, seen, computed, predicted, and of those seen elsewhen."""
    seen = group.context_ids.numel() if group.context_valid is None else int(group.context_valid.sum())
    visible = np.zeros((len(masked), tokens_per_step), dtype=bool)
    # Padding repeats an id that is seen, so that it changes nothing here.
    np.put_along_axis(visible, group.context_ids.numpy() % tokens_per_step, True, axis=1)
    elsewhen = np.take_along_axis(visible, group.target_ids.numpy() % tokens_per_step, axis=1)
    counts = (masked.size, masked.sum(), seen, group.context_ids.numel(), elsewhen.size, elsewhen.sum())
    return np.array(counts, dtype=float)


def _of_group(number: int, mean: np.ndarray) -> GroupStatistics:
    tokens, masked, seen, entries, target, elsewhen = (float(value) for value in mean)
    return GroupStatistics(
        group=number,
        masked=masked / tokens,
        context_drawn=tokens - masked,
        context=seen,
        target_drawn=masked,
        target=target,
        context_dropped=1 - seen / (tokens - masked),
        padding=1 - seen / entries,
        visible_elsewhen=elsewhen / target,
    )
