"""Encoder and predictor as one module, called once a (micro-)batch.

So whatever wraps a module (several processes, compilation) has one thing to wrap. Knows masks, not targets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from salt_vla.masks import MaskGroup
from salt_vla.models import Predictor, VideoEncoder

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int64


class Networks(nn.Module):
    """For each mask group: encode what is visible, predict what is not."""

    def __init__(self, encoder: VideoEncoder, predictor: Predictor) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor

    def compile_blocks(self) -> None:
        """Let torch compile each transformer block when it is first called; names and weights stay."""
        for blocks in (self.encoder.blocks, self.predictor.blocks):
            for block in blocks:
                block.compile(dynamic=True)  # Contexts change their size at every step.

    def forward(
        self,
        tubelets: Float[Tensor, "batch tokens patch_dim"],
        masks: list[MaskGroup],
        keep: Bool[Tensor, "batch groups depth 2"] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(predictions, contexts), one of each a mask group: (batch, target, target_dim) and (batch, context,
        encoder_dim). `keep`: which residuals stochastic depth leaves in; None: the encoder draws them."""
        predicted, contexts = [], []
        for number, group in enumerate(masks):
            kept = None if keep is None else keep[:, number]
            context = self.encoder.encode_tubelets(
                tubelets, group.context_ids, group.context_valid, keep=kept
            )
            predicted.append(
                self.predictor(context, group.context_ids, group.target_ids, number, group.context_valid)
            )
            contexts.append(context)
        return predicted, contexts

    def look(
        self, tubelets: Float[Tensor, "batch tokens patch_dim"], ids: Int64[Tensor, "batch seen"]
    ) -> Float[Tensor, "batch seen encoder_dim"]:
        """What the encoder makes of those tokens alone; nothing is predicted."""
        return self.encoder.encode_tubelets(tubelets, ids)
