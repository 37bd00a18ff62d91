"""The ten-minute pair for a laptop: a small pixel teacher and the student of its cached latents; beside them
a student of its own moving average.

Figures only; what a demo of this size can and cannot show is for its report to say.
"""

from __future__ import annotations

from salt_vla.config import (
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

GEOMETRY = ClipGeometry(num_frames=8, image_size=96, tubelet_size=2, patch_size=16)
TEACHER_STEPS = 800
STUDENT_STEPS = 1000


def _config(target: TargetConfig, objective: ObjectiveConfig, steps: int) -> TrainConfig:
    return TrainConfig(
        encoder=EncoderConfig(
            name="vit_micro_patch16_96", geometry=GEOMETRY, positions="rope", tanh_gelu=True
        ),
        predictor=PredictorConfig(dim=96, depth=4, num_heads=3, positions="rope", tanh_gelu=True),
        data=DataConfig(
            table="metaworld-mini",
            view=ViewConfig(frame_stride=2, num_views=3, crop_scale=(0.75, 1.0), max_shift=8),
            store_views=True,
        ),
        masks=MaskConfig(max_targets=48),
        target=target,
        objective=objective,
        optimizer=OptimizerConfig(
            lr_start=1e-4,
            lr=1e-3,
            lr_final=1e-5,
            warmup_steps=steps // 10,
            weight_decay=0.04,
            weight_decay_final=0.4,
            betas=(0.9, 0.95),
            grad_clip=1.0,
        ),
        runtime=RuntimeConfig(log_every=10, checkpoint_every=25, validate_every=100),
        steps=steps,
        batch_size=16,
    )


RECIPES = (
    Recipe(
        name="demo_teacher",
        summary="Demo stage 1: a 128-wide ViT learns to fill in masked pixels of simulated robots",
        config=_config(
            target=TargetConfig(provider="pixels"),
            objective=ObjectiveConfig(),
            steps=TEACHER_STEPS,
        ),
        hypothesis="A small, weak teacher learns features that a frozen probe reads better than random ones.",
        target="Held-out R² above the mean predictor of every token place.",
        criterion="val.r2_position_mean > 0",
    ),
    Recipe(
        name="demo_student",
        summary="Demo stage 2: a student of the same size predicts the demo teacher's cached latents",
        config=_config(
            target=TargetConfig(provider="cache", source="caches/demo"),
            objective=ObjectiveConfig(targets="centred"),
            steps=STUDENT_STEPS,
        ),
        parent="demo_teacher",
        hypothesis="Targets centred on each token place's mean make the student learn motion, "
        "since the still background no longer owns the variance.",
        target="Probes of action, hand position and velocity above random init, paired over episodes.",
        notes="Predicting 48 masked tokens a group makes a step 30–40 % cheaper; the context is untouched.",
    ),
    Recipe(
        name="demo_jepa",
        summary="The demo's student with V-JEPA's objective: it predicts its own moving average, no cache",
        config=_config(
            target=TargetConfig(provider="ema", momentum=(0.99, 1.0)),
            objective=ObjectiveConfig(),
            steps=STUDENT_STEPS,
        ),
        parent="demo_student",
        hypothesis="At the same steps a moving average of the student is as good a teacher as a frozen one.",
        target="Probes of action, hand position and velocity not below demo_student's, paired over episodes.",
        notes="Its R² and loss are of targets that move with it: they say that it learns, and compare with "
        "no other run. The momentum starts below V-JEPA 2's 0.99925, whose memory is longer than this run.",
    ),
)
