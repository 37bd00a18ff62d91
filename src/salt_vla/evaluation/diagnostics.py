"""What features are like, whatever they are good for: spectrum, effective rank, likeness (CKA), latency.

Knows arrays and token models; neither targets nor tables.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

from salt_vla.errors import DataError
from salt_vla.evaluation.latent_statistics import effective_rank
from salt_vla.training.metrics import POINT

if TYPE_CHECKING:
    from jaxtyping import Float

    from salt_vla.evaluation.features import TokenModel

FEWEST_CLIPS = 4  # of a debiased CKA
WARM_UP = 2


@dataclass(frozen=True)
class Spectrum:
    """Of one encoder's features about their mean: `shares` of the variance by principal axis, largest first;
    `effective_rank` is RankMe (arXiv 2210.02885, without its ε), `dims` the number of features."""

    dims: int
    effective_rank: float
    shares: Float[np.ndarray, " axes"]


def spectrum(features: Float[np.ndarray, "clips dims"]) -> Spectrum:
    """Of at least two clips; at most clips − 1 axes can be seen. Features without variance have rank 0."""
    if features.ndim != 2 or len(features) < 2:
        raise DataError(f"a spectrum needs one vector a clip of 2 clips or more, not {features.shape}")
    centred = _about_mean(features)
    small = centred @ centred.T if centred.shape[1] > len(centred) else centred.T @ centred
    power = np.clip(np.linalg.eigvalsh(small)[::-1], 0, None)
    shares = power / power.sum() if power.sum() > 0 else power
    return Spectrum(features.shape[1], effective_rank(torch.from_numpy(small)), shares)


def vary(features: Float[np.ndarray, "clips dims"]) -> bool:
    """Not one point, up to rounding."""
    return bool(_about_mean(features).any())


def _about_mean(features: Float[np.ndarray, "clips dims"]) -> Float[np.ndarray, "clips dims"]:
    """Zeros where the clips are one point but for rounding, which is of any rank and like anything."""
    centred = features - features.mean(0, dtype=np.float64)
    is_point = np.linalg.norm(centred) <= POINT * np.linalg.norm(features.astype(np.float64))
    return np.zeros_like(centred) if is_point else np.asarray(centred)


def cka(first: Float[np.ndarray, "clips dims"], second: Float[np.ndarray, "clips others"]) -> float:
    """Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414) of two encoders on the same clips,
    from the unbiased estimate of HSIC (Song et al., JMLR 13, 2012, eq. 5): 1 for features that differ by a
    rotation and a scale, about 0 (below it, too) for unrelated ones however wide they are.

    Raises `DataError` for fewer than four clips, other clips, and features that do not vary.
    """
    return float(likeness({"first": first, "second": second})["first", "second"])


def _kernel(features: np.ndarray) -> np.ndarray:
    """Inner products of clips about their mean, without those with themselves."""
    centred = _about_mean(features)
    products = centred @ centred.T
    np.fill_diagonal(products, 0.0)
    return np.asarray(products)


def _hsic(k: np.ndarray, m: np.ndarray) -> float:
    n = len(k)
    rows, columns = k.sum(0), m.sum(0)
    found = (k * m).sum() + rows.sum() * columns.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows @ columns
    return float(found / (n * (n - 3)))


def likeness(features: Mapping[str, Float[np.ndarray, "clips dims"]]) -> dict[tuple[str, str], float]:
    """CKA of every two encoders, each pair once. Raises `DataError` as `cka`."""
    counts = sorted({len(each) for each in features.values()})
    if len(counts) > 1 or (counts and counts[0] < FEWEST_CLIPS):
        said = " and ".join(map(str, counts))
        raise DataError(f"CKA needs the same {FEWEST_CLIPS} clips or more of all encoders, not {said}")
    kernels = {name: _kernel(each) for name, each in features.items()}
    own = {name: _hsic(kernel, kernel) for name, kernel in kernels.items()}
    still = [name for name, each in own.items() if each <= 0]
    if still:
        raise DataError(f"CKA needs features that vary from clip to clip; leave out {', '.join(still)}")
    return {
        (one, other): _hsic(kernels[one], kernels[other]) / float(np.sqrt(own[one] * own[other]))
        for one, other in combinations(kernels, 2)
    }


@dataclass(frozen=True)
class Latency:
    """Seconds of one clip, the middle and the slow one of twenty, and frames a second of a stream in which
    every `stride` new frames ask for the features of the last whole clip."""

    p50: float
    p95: float
    stride: int
    frames_per_second: float


def latency(model: TokenModel, repeats: int = 20) -> Latency:
    """Measured with clips of noise, one at a time, on the model's device and with the threads as they are."""
    geometry = model.geometry
    side, count, stride = geometry.image_size, geometry.num_frames, geometry.tubelet_size
    frames = count + stride * (repeats + WARM_UP)
    drawn = np.random.default_rng(0).integers(0, 256, (frames, side, side, 3), np.uint8)
    window: deque[np.ndarray] = deque(drawn[:count], maxlen=count)
    spent, streamed = [], 0.0
    with torch.inference_mode():
        for turn in range(repeats + WARM_UP):
            began = time.perf_counter()
            start = count + stride * turn
            window.extend(drawn[start : start + stride])
            clip = torch.from_numpy(np.stack(window)[None])
            copied = time.perf_counter()
            model.latents(clip).float().cpu()  # To the processor, so that a GPU's work is over.
            ended = time.perf_counter()
            if turn >= WARM_UP:
                spent.append(ended - copied)
                streamed += ended - began
    p50, p95 = np.quantile(spent, [0.5, 0.95])
    return Latency(float(p50), float(p95), stride, stride * repeats / streamed)
