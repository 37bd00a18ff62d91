"""SALT for robots: pretrain a video encoder against a frozen teacher's cached latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from salt_vla.jobs.seed_train import train
    from salt_vla.models.loading import load_encoder

__all__ = ["load_encoder", "train"]


def __getattr__(name: str) -> Any:
    # Loaded when asked for, so that `import salt_vla` costs nothing.
    if name == "load_encoder":
        from salt_vla.models.loading import load_encoder

        return load_encoder
    if name == "train":
        from salt_vla.jobs.seed_train import train

        return train
    raise AttributeError(f"module 'salt_vla' has no attribute {name!r}")
