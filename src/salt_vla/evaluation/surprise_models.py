"""Models that expect a future: predictors of latents, ours and V-JEPA 2's, and two baselines of pixels.

Knows networks as modules, not where their weights lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from salt_vla.config import to_json
from salt_vla.geometry import ClipGeometry
from salt_vla.models import Predictor, VideoEncoder, build_encoder, build_predictor, patchify
from salt_vla.models.loading import fingerprint
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives import normalise
from salt_vla.targets import Task

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from transformers import VJEPA2Model

VJEPA2_FRAMES = 16
VJEPA2_FRAME_STEP = 10  # As in the reference's settings for IntPhys 2.
COPY_LAST, PIXEL_DIFFERENCE = "copy-last-frame", "pixel-difference"


class RunPredictor:
    """Encoder and predictor of a run, held against the run's own targets of the whole window.

    The encoder is given the tokens of the first frames alone, the predictor is asked for all others with the
    mask token of the run's last group, the one of large masks; the distance is L1 in the space that R² is
    scored in: mean |prediction − LN(target)| (SALT, equation 2, without an average over masks).
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        predictor: Predictor,
        task: Task,
        group: int,
        target: str,
        frame_step: int,
        device: str = "cpu",
    ) -> None:
        """`target`: in words, and precise enough to tell it from any other: it is part of the fingerprint."""
        self.encoder = encoder.eval().requires_grad_(False).to(device)
        self.predictor = predictor.eval().requires_grad_(False).to(device)
        self.task, self.group, self.device = task, group, device
        self.target, self.frame_step = target, frame_step
        said = f"{target} {task.space.mode} {group} {to_json(encoder.config)} {to_json(predictor.config)}"
        self.fingerprint = fingerprint(nn.ModuleList([encoder, predictor]), said)

    def untrained(self, seed: int) -> RunPredictor:
        """The same networks at random init, held against the same targets."""
        dim = self.predictor.proj.out_features
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder = build_encoder(self.encoder.config)
            predictor = build_predictor(self.predictor.config, encoder.dim, dim, self.geometry)
        rest = (self.task, self.group, self.target, self.frame_step, self.device)
        return RunPredictor(encoder, predictor, *rest)

    @property
    def geometry(self) -> ClipGeometry:
        return self.encoder.geometry

    @torch.inference_mode()
    def surprise(
        self, clips: UInt8[np.ndarray, "batch frames height width 3"], contexts: Sequence[int], /
    ) -> Float[np.ndarray, "batch contexts"]:
        frames = torch.from_numpy(clips).to(self.device)
        tubelets = patchify(normalise_pixels(frames), self.geometry)
        space = self.task.space
        wanted = space.scored(self.task.provider.targets(frames, None))
        found = []
        for seen, rest in _splits(self.geometry, contexts, len(frames), self.device):
            context = self.encoder.encode_tubelets(tubelets, seen)
            predicted = space.to_scored(self.predictor(context, seen, rest, self.group), rest)
            found.append((predicted - wanted[:, seen.shape[1] :]).abs().mean((1, 2)))
        return torch.stack(found, dim=1).cpu().numpy()


class VJEPA2Predictor:
    """A V-JEPA 2 model of transformers, with its own latents of the whole window as targets.

    Its published folders hold one encoder, the averaged one; it sees the first frames alone here, where
    `VJEPA2Model.forward` would let the whole clip attend to itself before it drops tokens.
    """

    target = "its own layer-normalised latents of the whole window"
    frame_step = VJEPA2_FRAME_STEP

    def __init__(
        self,
        model: VJEPA2Model,
        geometry: ClipGeometry,
        statistics: tuple[tuple[float, float, float], tuple[float, float, float]],
        device: str = "cpu",
    ) -> None:
        """`model.config` says `geometry`, since positions are counted by it."""
        self.model = model.eval().requires_grad_(False).to(device)
        self.geometry, self.device = geometry, device
        self.mean, self.std = statistics
        said = f"{to_json(geometry)} {statistics} {model.config.to_json_string()}"
        self.fingerprint = fingerprint(model, said)

    def untrained(self, seed: int) -> VJEPA2Predictor:
        """The same networks at random init, held against their own latents."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(self.model)(self.model.config)
        return VJEPA2Predictor(model, self.geometry, (self.mean, self.std), self.device)

    @torch.inference_mode()
    def surprise(
        self, clips: UInt8[np.ndarray, "batch frames height width 3"], contexts: Sequence[int], /
    ) -> Float[np.ndarray, "batch contexts"]:
        frames = torch.from_numpy(clips).to(self.device)
        pixels = normalise_pixels(frames, self.mean, self.std).transpose(1, 2)
        wanted = normalise(self._encode(pixels))
        found = []
        splits = _splits(self.geometry, contexts, len(frames), self.device)
        for context, (seen, rest) in zip(contexts, splits, strict=True):
            tokens = self._encode(pixels[:, :context])
            predicted = self.model.predictor(tokens, [seen], [rest]).last_hidden_state
            found.append((predicted - wanted[:, seen.shape[1] :]).abs().mean((1, 2)))
        return torch.stack(found, dim=1).cpu().numpy()

    def _encode(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.model.encoder(pixels).last_hidden_state
        return tokens


class CopyLastFrame:
    """Expects that nothing changes any more: mean |later frame − last frame seen|, colours in 0 … 1."""

    target = "pixels of the frames that come"

    def __init__(self, geometry: ClipGeometry, frame_step: int) -> None:
        self.geometry, self.frame_step = geometry, frame_step
        self.fingerprint = f"{COPY_LAST}-1 {to_json(geometry)}"

    def surprise(
        self, clips: UInt8[np.ndarray, "batch frames height width 3"], contexts: Sequence[int], /
    ) -> Float[np.ndarray, "batch contexts"]:
        colours = clips.astype(np.float32) / 255
        distances = [np.abs(colours[:, c:] - colours[:, c - 1 : c]).mean((1, 2, 3, 4)) for c in contexts]
        return np.stack(distances, axis=1)


class PixelDifference:
    """No expectation at all: mean |frame − the one before it| over the later frames, colours in 0 … 1."""

    target = CopyLastFrame.target

    def __init__(self, geometry: ClipGeometry, frame_step: int) -> None:
        self.geometry, self.frame_step = geometry, frame_step
        self.fingerprint = f"{PIXEL_DIFFERENCE}-1 {to_json(geometry)}"

    def surprise(
        self, clips: UInt8[np.ndarray, "batch frames height width 3"], contexts: Sequence[int], /
    ) -> Float[np.ndarray, "batch contexts"]:
        steps = np.abs(np.diff(clips.astype(np.float32) / 255, axis=1)).mean((2, 3, 4))
        return np.stack([steps[:, context - 1 :].mean(1) for context in contexts], axis=1)


def _splits(
    geometry: ClipGeometry, contexts: Sequence[int], batch: int, device: str
) -> list[tuple[Tensor, Tensor]]:
    """(ids of the tokens of the first frames, ids of all others), each (batch, ids), of every context."""
    ids = torch.arange(geometry.num_tokens, device=device).expand(batch, -1)
    ends = [context // geometry.tubelet_size * geometry.tokens_per_step for context in contexts]
    return [(ids[:, :end], ids[:, end:]) for end in ends]
