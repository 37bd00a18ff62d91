"""The published settings of SALT: stage 1 ("V-Pixel" teachers) and stage 2 (students of frozen teachers); and
of V-JEPA 2, whose teacher is the student's own moving average.

All use batches of 3,072 clips, computed here as 96 parts of 32 (`grad_accum_steps`; any divisor gives the
same step). The number of predictor heads and AdamW's betas are V-JEPA 2's, which SALT follows.
"""

from __future__ import annotations

from dataclasses import replace

from salt_vla.config import (
    VJEPA_BLOCKS,
    DataConfig,
    EncoderConfig,
    MaskConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PredictorConfig,
    Recipe,
    RuntimeConfig,
    TargetConfig,
    TrainConfig,
    ViewConfig,
)
from salt_vla.geometry import ClipGeometry


def _config(encoder: str, target: TargetConfig, steps: int) -> TrainConfig:
    return TrainConfig(
        encoder=EncoderConfig(name=encoder, geometry=ClipGeometry(), positions="rope"),
        predictor=PredictorConfig(dim=384, depth=12, num_heads=12, positions="rope"),
        data=DataConfig(view=ViewConfig(frame_stride=4), num_workers=8),
        masks=MaskConfig(strategy="multiblock", blocks=VJEPA_BLOCKS, truncate="end"),
        target=target,
        objective=ObjectiveConfig(power=1.0, targets="normalised"),
        optimizer=OptimizerConfig(
            lr_start=2e-4,
            lr=6.25e-4,
            lr_final=1e-6,
            warmup_steps=10_000,
            weight_decay=0.04,
            weight_decay_final=0.4,
            betas=(0.9, 0.999),
            grad_clip=0.02,
        ),
        runtime=RuntimeConfig(log_every=20, checkpoint_every=1000, validate_every=1000),
        steps=steps,
        batch_size=3072,
        grad_accum_steps=96,
    )


# Measured at 8 × 14 × 14 tokens: the short-range group's context after truncation is 358 tokens in batches of
# 24 clips, as the reference draws them on each GPU, and 208 in one of 3,072.
_NOTES = (
    "A step's masks are drawn for its 3,072 clips together, and cut to the shortest context of them all (208 "
    "tokens of the short-range group, 358 at 24 clips). A batch is 7.4 GB of frames; each loader process "
    "holds two in /dev/shm: lower data.num_workers where that is too much."
)


def _vpixel(short: str, encoder: str) -> Recipe:
    return Recipe(
        name=f"vpixel_{short}",
        summary=f"SALT stage 1: {encoder} reconstructs the pixels of masked blocks",
        config=_config(encoder, TargetConfig(provider="pixels"), steps=40_000),
        hypothesis="A teacher trained on pixels alone is good enough for stage 2.",
        target="Its student's frozen probe, not its own loss, is what counts.",
        notes=_NOTES,
    )


def _salt(short: str, encoder: str, target: str) -> Recipe:
    return Recipe(
        name=f"salt_{short}",
        summary=f"SALT stage 2: {encoder} predicts the frozen teacher's latents",
        config=_config(encoder, TargetConfig(provider="cache"), steps=200_000),
        parent=f"vpixel_{short}",
        hypothesis="A frozen teacher replaces the moving average of V-JEPA at less compute.",
        target=target,
        notes=_NOTES,
    )


UNCLIPPED = 1e9


def _vjepa2_vitl() -> TrainConfig:
    """From the configurations that its authors publish beside their code (facebookresearch/vjepa2, in
    configs/train/vitl16: pretrain-256px-16f and the cooldown's); the length of its phases is the paper's
    (arXiv 2506.09985): 12,000 steps of warm-up, 228,000 at one rate, 12,000 of cooldown."""
    config = _config(
        "vit_large_patch16_256", TargetConfig(provider="ema", momentum=(0.99925, 0.99925)), 252_000
    )
    return replace(
        config,
        encoder=replace(
            config.encoder, geometry=ClipGeometry(num_frames=16, image_size=256), grad_checkpointing=True
        ),
        predictor=replace(config.predictor, grad_checkpointing=True),
        data=replace(
            config.data,
            view=ViewConfig(sampling="fps", target_fps=4.0, num_views=1000, crop_scale=(0.3, 1.0)),
        ),
        optimizer=replace(
            config.optimizer,
            lr_start=1e-4,
            lr=5.25e-4,
            lr_final=1e-6,
            schedule="cooldown",
            warmup_steps=12_000,
            cooldown_steps=12_000,
            weight_decay=0.04,
            weight_decay_final=0.04,
            grad_clip=UNCLIPPED,
        ),
    )


_OWN_TARGETS = "Its targets move with it, so its loss and R² compare with those of no other run; probes do. "
VJEPA2_VITL = Recipe(
    name="vjepa2_vitl",
    summary="V-JEPA 2: vit_large predicts the latents of its own moving average",
    config=_vjepa2_vitl(),
    hypothesis="A slow average of the student gives targets that keep improving and do not collapse.",
    target="Frozen attentive probe: 73.7 on SSv2.",
    notes=_OWN_TARGETS
    + "Departures: crops keep their aspect (published: 0.75 to 1.35), the cooldown stays at 16 frames "
    "(published: 64), and the data are one table. The published code does not clip gradients.",
)


def _vjepa_vitb() -> Recipe:
    salt = _salt("vitb", "vit_base_patch16_224", target="")
    return Recipe(
        name="vjepa_vitb",
        summary="salt_vitb with V-JEPA's objective and nothing else changed: no cache, an EMA target encoder",
        config=replace(salt.config, target=TargetConfig(provider="ema", momentum=(0.998, 1.0))),
        parent="salt_vitb",
        hypothesis="At the same clips and steps a frozen teacher does as well as a moving average.",
        target="Frozen probes of the two encoders on the same clips, with intervals.",
        notes=_OWN_TARGETS + "Its momentum rises as V-JEPA's did.",
    )


RECIPES = (
    _vpixel("vitti", "vit_tiny_patch16_224"),
    _vpixel("vits", "vit_small_patch16_224"),
    _vpixel("vitb", "vit_base_patch16_224"),
    _vpixel("vitl", "vit_large_patch16_224"),
    _salt("vitb", "vit_base_patch16_224", target="No ViT-B figure is published; this would be the first."),
    _salt("vitl", "vit_large_patch16_224", target="Frozen attentive probe: 74.9 on SSv2, 85.4 on K400."),
    _vjepa_vitb(),
    VJEPA2_VITL,
)
