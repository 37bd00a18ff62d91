"""V-JEPA's training step put together plainly from the modules of transformers' `VJEPA2Model`.

The yardstick of `train_step.py`, and independent of this package: student on visible tokens, predictor in the
order of positions, target encoder over all tokens, L1 on layer-normalised targets, AdamW, moving average.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import VJEPA2Config, VJEPA2Model
from transformers.models.vjepa2.modeling_vjepa2 import VJEPA2Encoder, VJEPA2Predictor

Ids = tuple[Tensor, Tensor]  # int64 (batch, context), (batch, target)
MOMENTUM = 0.99925


def vit_base_config(depth: int = 12) -> VJEPA2Config:
    """ViT-B on 16 frames of 224², with V-JEPA 2's predictor; eager mode, SDPA."""
    return VJEPA2Config(
        crop_size=224,
        frames_per_clip=16,
        tubelet_size=2,
        patch_size=16,
        hidden_size=768,
        num_attention_heads=12,
        num_hidden_layers=depth,
        num_pooler_layers=1,
        pred_hidden_size=384,
        pred_num_attention_heads=6,
        pred_num_hidden_layers=depth,
        pred_num_mask_tokens=2,
        attn_implementation="sdpa",
    )


def seen(tokens: Tensor, ids: Tensor) -> Tensor:
    return torch.gather(tokens, 1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


class VJepaStep:
    """Student, predictor, target encoder and optimizer, and one update of them all."""

    def __init__(self, config: VJEPA2Config, device: str = "cpu") -> None:
        model = VJEPA2Model(config).to(device).train()
        self.encoder: VJEPA2Encoder = model.encoder
        self.predictor: VJEPA2Predictor = model.predictor
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.parameters = [*self.encoder.parameters(), *self.predictor.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=2e-4, betas=(0.9, 0.95), weight_decay=0.04)

    def context(self, patches: Tensor, ids: Tensor) -> Tensor:
        """Embedded patches of all places → the encoder's output at `ids` alone."""
        x = seen(patches, ids)
        for layer in self.encoder.layer:
            x = layer(x, ids)[0]
        return self.encoder.layernorm(x)

    def predict(self, context: Tensor, context_ids: Tensor, target_ids: Tensor, group: int) -> Tensor:
        p = self.predictor
        x, places = p.embeddings(context, [context_ids], [target_ids], mask_index=group)
        order = torch.argsort(places, dim=1)
        x, places = p.sort_tokens(x, places, order)
        for layer in p.layer:
            x = layer(x, places)[0]
        return p.proj(p.unsort_tokens(p.layernorm(x), order)[:, context_ids.shape[1] :])

    def loss(self, video: Tensor, groups: Sequence[Ids]) -> Tensor:
        """`video`: normalised, (batch, frames, 3, height, width)."""
        with torch.no_grad():
            whole = self.target_encoder(video).last_hidden_state
            whole = F.layer_norm(whole.float(), whole.shape[-1:])
        patches = self.encoder.embeddings(video)
        losses = []
        for number, (context_ids, target_ids) in enumerate(groups):
            predicted = self.predict(self.context(patches, context_ids), context_ids, target_ids, number)
            losses.append(F.l1_loss(predicted.float(), seen(whole, target_ids)))
        return torch.stack(losses).mean()

    def step(self, video: Tensor, groups: Sequence[Ids], bfloat16: bool = False) -> float:
        self.optimizer.zero_grad()
        with torch.autocast(video.device.type, torch.bfloat16, enabled=bfloat16):
            loss = self.loss(video, groups)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            followers = list(self.target_encoder.parameters())
            torch._foreach_mul_(followers, MOMENTUM)
            torch._foreach_add_(followers, list(self.encoder.parameters()), alpha=1 - MOMENTUM)
        return loss.item()
