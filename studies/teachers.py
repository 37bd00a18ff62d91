"""A study's teachers, as caches: the demonstration's pixel teacher, and the same with outlier channels
planted into its latents, as VideoMAE's raw residual stream has them.

Knows caches and one training run; nothing of students.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import xxhash

from salt_vla.cache import CacheWriter, Key, Record, open_cache
from salt_vla.config import TrainConfig
from salt_vla.jobs.build_cache import build_cache, canonical_only
from salt_vla.jobs.data import open_table, split_table
from salt_vla.jobs.demo import train_unless_finished
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, root
from salt_vla.teachers import load_teacher

TEACHER = "study_teacher"
PLAIN, PLANTED = "plain", "planted"
SPLITS = ("train", "validation")
CLIPS_MEASURED = 256


@dataclass(frozen=True)
class Outliers:
    """What is planted into a teacher's latents: `channels` of its width, spread evenly, are replaced by
    `mean` + `deviation` × u, where u has variance 1.

    A `share` of that variance is content, a random direction of the token's own other channels; the rest is
    noise drawn for each (clip, view, token), which nothing in the clip tells: the part of such channels that
    cannot be predicted. So a perfect student of what is predictable explains about `share` of the variance.
    """

    channels: int = 8
    mean: float = 6.66  # 8 · 6.66² ÷ 128 = 2.8; with the other channels' own means the squares add up to 3.1
    deviation: float = 13.8  # 8 · 13.8² ÷ 128 = 11.9; with the other channels' own variance 12.5
    share: float = 0.25
    seed: int = 0

    def places(self, dim: int) -> np.ndarray:
        """(channels,) numbers of the channels that are replaced."""
        return np.linspace(0, dim - 1, self.channels).astype(int)


@dataclass(frozen=True)
class Scale:
    """Per channel of a teacher's own latents, what makes a direction of them have variance 1."""

    mean: np.ndarray
    deviation: np.ndarray
    directions: np.ndarray  # (dim, channels)


def scale_of(latents: np.ndarray, outliers: Outliers) -> Scale:
    """Measured on (tokens, dim) latents."""
    dim = latents.shape[1]
    mean, deviation = latents.mean(0), np.maximum(latents.std(0), 1e-6)
    directions = np.random.default_rng(outliers.seed).normal(size=(dim, outliers.channels))
    directions[outliers.places(dim)] = 0.0
    spread = ((latents - mean) / deviation @ directions).std(0)
    return Scale(mean, deviation, directions / spread)


def plant(latents: np.ndarray, key: Key, scale: Scale, outliers: Outliers) -> np.ndarray:
    """One record's latents (tokens, dim), with outlier channels; a function of its arguments alone."""
    planted = latents.astype(np.float32)
    content = (latents - scale.mean) / scale.deviation @ scale.directions
    drawn = np.random.default_rng([xxhash.xxh3_64_intdigest(key[0].encode()), key[1], outliers.seed])
    noise = drawn.normal(size=content.shape)
    mixed = np.sqrt(outliers.share) * content + np.sqrt(1 - outliers.share) * noise
    planted[:, outliers.places(latents.shape[1])] = outliers.mean + outliers.deviation * mixed
    return planted


@dataclass(frozen=True)
class LatentFacts:
    """What predictors that have learned nothing score on a cache: mean squared errors over all channels of
    raw latents, and the share of the variance that the eight widest channels own."""

    mse_of_zero: float
    mse_of_channel_mean: float
    share_of_top_8: float


def facts_of(latents: np.ndarray) -> LatentFacts:
    """Of (tokens, dim) latents."""
    variances = latents.astype(np.float64).var(0)
    return LatentFacts(
        mse_of_zero=float((latents.astype(np.float64) ** 2).mean()),
        mse_of_channel_mean=float(variances.mean()),
        share_of_top_8=float(np.sort(variances)[-8:].sum() / variances.sum()),
    )


def sample_of(folder: Path, count: int = CLIPS_MEASURED) -> np.ndarray:
    """(tokens, dim) latents, view 0, of clips spread over a cache."""
    cache = open_cache(folder)
    chosen = np.linspace(0, len(cache.clip_ids) - 1, min(count, len(cache.clip_ids))).astype(int)
    return np.concatenate([cache.read(cache.clip_ids[int(place)]) for place in chosen])


def plant_cache(source: Path, folder: Path, scale: Scale, outliers: Outliers) -> None:
    """Write the cache at `folder` from the one at `source`, outliers planted; goes on where it was left off.
    Its provenance is the source's, with a teacher and a fingerprint of its own."""
    original = open_cache(source)
    said = original.manifest.provenance
    told = f"{said['fingerprint']} {asdict(outliers)}"
    mine = said | {
        "teacher": f"{said['teacher']}, outliers planted",
        "fingerprint": xxhash.xxh3_128_hexdigest(told.encode()),
        "planted": asdict(outliers),
    }
    manifest = replace(original.manifest.without_results(), provenance=mine)

    def records(keys: tuple[Key, ...]) -> Iterator[Record]:
        for key in keys:
            yield Record(key, plant(original.read(key[0], view=key[1]), key, scale, outliers))

    with CacheWriter(folder, manifest, original.clip_ids) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, records(shard.keys))
        writer.finish()


def cache_of(teacher: str) -> Path:
    """Where the training latents of `plain` or `planted` lie; `validation` below it."""
    return root() / "caches" / f"study_{teacher}"


def teacher_config(steps: int) -> TrainConfig:
    """`demo_teacher`, on two threads and in float32 whatever the machine gains by less."""
    config = get_recipe("demo_teacher").config
    optimizer = replace(config.optimizer, warmup_steps=steps // 10)
    runtime = replace(config.runtime, precision="float32", threads=2)
    return replace(config, steps=steps, optimizer=optimizer, runtime=runtime)


def make_teachers(steps: int, outliers: Outliers | None = None) -> dict[str, LatentFacts]:
    """Train the pixel teacher and make both caches, as far as they are not there; what each holds."""
    config = teacher_config(steps)
    train_unless_finished(RunDirectory.named(TEACHER), config)
    teacher = load_teacher(RunDirectory.named(TEACHER).path, config.geometry)
    splits = split_table(open_table(config.data.table, config.data.view, config.geometry))
    build_cache(teacher, splits.train, "train", cache_of(PLAIN), config.data)
    build_cache(teacher, splits.validation, "validation", cache_of(PLAIN), canonical_only(config.data))
    latents = sample_of(cache_of(PLAIN))
    found = {PLAIN: facts_of(latents)}
    if outliers is not None:
        scale = scale_of(latents, outliers)
        plant_cache(cache_of(PLAIN), cache_of(PLANTED), scale, outliers)
        plant_cache(cache_of(PLAIN) / "validation", cache_of(PLANTED) / "validation", scale, outliers)
        found[PLANTED] = facts_of(sample_of(cache_of(PLANTED)))
    return found
