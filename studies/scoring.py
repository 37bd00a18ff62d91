"""What a study says of one student: explained variance on held-out clips, channel by channel, and probes.

Knows a finished run's files, not how it was trained nor what a study varies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cell, Score, finished, folder_of, run_cells
from joined import Joined
from torch import Tensor

from salt_vla.batches import Batch, Batches, parts_of
from salt_vla.cache import open_cache
from salt_vla.config import DataConfig, MaskConfig, TrainConfig
from salt_vla.evaluation.features import TokenModel, pool_tokens
from salt_vla.evaluation.probing import ProbeSet, run_probe_suite
from salt_vla.evaluation.results import SuiteResult
from salt_vla.evaluation.seeds import scores_from_arrays, scores_to_arrays
from salt_vla.evaluation.statistics import EpisodeSums
from salt_vla.evaluation.targets import build_targets
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import open_table, open_views, split_table
from salt_vla.jobs.evaluate import load_model, random_model
from salt_vla.masks import build_masks
from salt_vla.models import build_predictor, gather_tokens, patchify
from salt_vla.models.loading import encoder_directory, load_encoder, read_tensors
from salt_vla.models.pixels import normalise_pixels
from salt_vla.registry import SIGNALS, resolve
from salt_vla.rundir import root, write_atomically
from salt_vla.targets import CachedTargets, TargetSpace, nearest_context
from salt_vla.training.networks import Networks
from salt_vla.view_store import ViewSource

Sums = dict[tuple[str, str], EpisodeSums]  # (encoder, target) → sums
BASELINES = ("channel_mean", "position_mean", "copy_nearest")
STUDENT = "student"
PROBED = ("action_mean", "hand_position", "hand_velocity")
POOLING, CAMERA = "grid", "observation.images.front"
SUITE = "front/grid"
CLIPS = 128
CLIPS_AT_ONCE = 32


@dataclass(frozen=True)
class Side:
    """Clips of one side of the split, and what is probed on them."""

    clip_ids: list[str]
    views: ViewSource
    targets: Mapping[str, np.ndarray]
    episodes: np.ndarray

    def batches(self) -> Iterator[Tensor]:
        """uint8 (clips, frames, height, width, 3)."""
        for start in range(0, len(self.clip_ids), CLIPS_AT_ONCE):
            chosen = self.clip_ids[start : start + CLIPS_AT_ONCE]
            yield torch.from_numpy(self.views.read_many([(clip, 0) for clip in chosen]))


@dataclass
class Errors:
    """Sums over held-out tokens, for the student and for predictors that have learned nothing: squared errors
    by channel, and |error|^power over all."""

    power: float
    squares: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    count: int = 0

    def add(self, predicted: dict[str, Tensor], targets: Tensor) -> None:
        """`predicted`: by name, (batch, target, dim) or what broadcasts to it."""
        for name, values in predicted.items():
            error = (values - targets).double().flatten(0, -2)
            self.squares[name] = self.squares.get(name, torch.zeros(())) + error.square().sum(0)
            self.losses[name] = self.losses.get(name, 0.0) + error.abs().pow(self.power).sum().item()
        self.count += targets.numel()

    def r2(self, baseline: str, channels: Sequence[int] | None = None) -> float:
        """1 − student's ÷ baseline's squared errors, over all channels or some."""
        mine, theirs = self.squares[STUDENT], self.squares[baseline]
        if channels is not None:
            mine, theirs = mine[list(channels)], theirs[list(channels)]
        return 1 - float(mine.sum() / theirs.sum())

    def mean(self) -> float:
        """The student's mean |error|^power, without the division by the power that the loss has."""
        return self.losses[STUDENT] / self.count

    def of_mean_predictor(self) -> float:
        """The student's loss as a share of the loss of predicting each channel's mean."""
        return self.losses[STUDENT] / self.losses["channel_mean"]


def load_networks(cell: Cell, target_dim: int) -> tuple[Networks, TargetSpace]:
    """A run's last checkpoint, and the space that its targets are compared in."""
    folder = encoder_directory(cell.run.path)
    encoder = load_encoder(folder)
    predictor = build_predictor(cell.config.predictor, encoder.dim, target_dim, cell.config.geometry)
    predictor.load_state_dict(read_tensors(folder / "predictor.safetensors"))
    mean = read_tensors(cell.run.path / "target_statistics.safetensors")["position_mean"]
    return Networks(encoder, predictor).eval(), TargetSpace(cell.config.objective.targets, mean)


def held_out(config: TrainConfig, masks: MaskConfig) -> tuple[Batches, CachedTargets]:
    """Held-out clips with their cached latents; `canonical` gives view 0 of some."""
    table = split_table(open_table(config.data.table, config.data.view, config.geometry)).validation
    latents = open_cache(root() / config.target.source / "validation")
    views, readable = open_views(table, config.data, config.geometry, num_views=1)
    batches = Batches(
        parts_of(table, readable),
        views,
        build_masks(masks, config.geometry),
        batch_size=config.batch_size,
        num_views=1,
        seed=0,
        steps=1,
        cache=latents,
    )
    return batches, CachedTargets(latents.encoding)


@torch.no_grad()
def errors_under(cell: Cell, masks: MaskConfig, clips: int = CLIPS) -> Errors:
    """The student's errors on held-out clips, in the space of its own targets, under these masks."""
    batches, provider = held_out(cell.config, masks)
    networks, space = load_networks(cell, provider.dim)
    errors = Errors(cell.config.objective.power)
    for batch in batches.canonical(clips, cell.config.batch_size):
        scored = space.scored(provider.targets(batch.frames, batch.records))
        tubelets = patchify(normalise_pixels(batch.frames), cell.config.geometry)
        predicted, _ = networks(tubelets, batch.masks)
        for guesses, targets in _guesses(predicted, scored, batch, space, cell.config):
            errors.add(guesses, targets)
    return errors


def _guesses(
    predicted: list[Tensor], scored: Tensor, batch: Batch, space: TargetSpace, config: TrainConfig
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """For each mask group what everyone predicts, and what is true."""
    for z, group in zip(predicted, batch.masks, strict=True):
        ids = group.target_ids
        copied = nearest_context(group.context_ids, ids, config.geometry, group.context_valid)
        guesses = {
            STUDENT: space.to_scored(z, ids),
            "channel_mean": space.channel_mean,
            "position_mean": space.position_mean[ids],
            "copy_nearest": gather_tokens(scored, copied),
        }
        yield guesses, gather_tokens(scored, ids)


def scores_of(
    cell: Cell, also: Mapping[str, MaskConfig], own_channels: Sequence[int] | None = None
) -> dict[str, Any]:
    """Explained variance under the cell's own masks and under others by name (there over some channels too,
    where they are given), the loss beside the mean predictor's, and probes, whose sums are kept beside the
    record."""
    torch.set_num_threads(1)
    own = errors_under(cell, cell.config.masks)
    found: dict[str, Any] = {
        "own": {name: own.r2(name) for name in BASELINES},
        "mean_error": own.mean(),
        "loss_of_mean_predictor": own.of_mean_predictor(),
    }
    for name, masks in also.items():
        errors = errors_under(cell, masks)
        found[name] = {baseline: errors.r2(baseline) for baseline in BASELINES}
        if own_channels is not None:
            found[f"{name}_own_channels"] = {n: errors.r2(n, own_channels) for n in BASELINES}
    models = {STUDENT: load_model(str(cell.run.path), STUDENT)}
    keep_sums(cell.run.name, cell.study, probes(models, cell.config))
    return found


@cache
def probe_sides(data: DataConfig, geometry: ClipGeometry) -> tuple[Side, Side]:
    """Learning and held-out clips of one camera, view 0, with their recorded signals."""
    splits = split_table(open_table(data.table, data.view, geometry))
    sides = []
    for whole, num_views in ((splits.train, data.view.num_views), (splits.validation, 1)):
        views, readable = open_views(whole, data, geometry, num_views)
        clips = whole.select(camera=CAMERA).only(readable)
        source = clips.rows["source"].to_pylist()[0]
        signals = resolve(SIGNALS, source)(clips, geometry.num_frames, data.view)
        values = build_targets(signals)
        targets = {name: values[name] for name in PROBED}
        sides.append(Side(clips.clip_ids, views, targets, signals.episodes))
    return sides[0], sides[1]


def features_of(models: Mapping[str, TokenModel], side: Side) -> dict[str, np.ndarray]:
    """(clips, features) of every model, tokens pooled as the demonstration's first table does."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for frames in side.batches():
        for name, model in models.items():
            found[name].append(pool_tokens(model.latents(frames), model.geometry, POOLING).numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def probes(models: Mapping[str, TokenModel], config: TrainConfig) -> SuiteResult:
    """Ridge probes of the targets in `PROBED`, of these models and of the constant predictor."""
    learning, unseen = (
        ProbeSet(features_of(models, side), side.targets, side.episodes)
        for side in probe_sides(config.data, config.geometry)
    )
    return run_probe_suite(SUITE, learning, unseen, config.seed)


def baseline_probes(config: TrainConfig, teacher: str) -> SuiteResult:
    """What students are held to: their architecture at random init, of the same seed, and with seed 0 their
    teacher, which is the same for all."""
    torch.set_num_threads(1)
    models = {"random": random_model(config.encoder, config.seed)}
    if config.seed == 0:
        models["teacher"] = load_model(teacher, "teacher")
    return probes(models, config)


def keep_sums(name: str, study: str, result: SuiteResult) -> None:
    """Keep the episode sums of probes, by which seeds are joined and encoders paired."""
    arrays = scores_to_arrays([result])

    def save(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    write_atomically(sums_file(name, study), save)


def sums_file(name: str, study: str) -> Path:
    return folder_of(study) / f"{name}.npz"


def read_sums(name: str, study: str) -> Sums:
    """What `keep_sums` wrote."""
    with np.load(sums_file(name, study), allow_pickle=False) as arrays:
        (found,) = scores_from_arrays({key: arrays[key] for key in arrays.files}).values()
    return found


def run_seeds(cells: Sequence[Cell], score: Score, jobs: int, teacher: str) -> None:
    """Seed by seed all cells and what they are held to, as far as that is not on record."""
    for seed in dict.fromkeys(cell.config.seed for cell in cells):
        mine = [cell for cell in cells if cell.config.seed == seed]
        run_cells(mine, score, jobs)
        baselines, study = f"baselines-s{seed}", mine[0].study
        if not sums_file(baselines, study).exists():
            keep_sums(baselines, study, baseline_probes(mine[0].config, teacher))


def join_baselines(study: str, seeds: int) -> Joined:
    """What `run_seeds` has kept."""
    kept = [seed for seed in range(seeds) if sums_file(f"baselines-s{seed}", study).exists()]
    sums = tuple(read_sums(f"baselines-s{seed}", study) for seed in kept)
    return Joined("baselines", tuple({"seed": seed} for seed in kept), sums)


def join(name: str, cells: Sequence[Cell]) -> Joined:
    """Those of some cells that are finished; they differ in their seed alone."""
    done = [(cell, result) for cell in cells if (result := finished(cell)) is not None]
    sums = tuple(read_sums(cell.run.name, cell.study) for cell, _ in done)
    return Joined(name, tuple(result for _, result in done), sums)
