"""Pictures of a run, for people and for the dashboard: what its masks hide of a held-out clip, and what its
encoder makes of the film.

Everything is read anew from the run's directory and its data; nothing that a resume needs is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from salt_vla.config import TrainConfig, from_json
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import DataError, RunError, UserError
from salt_vla.jobs.data import open_table, read_or_quarantine, split_table
from salt_vla.jobs.evaluate import load_model, random_model
from salt_vla.masks import build_masks
from salt_vla.models.loading import step_directories
from salt_vla.reports.patches import FramesArray
from salt_vla.reports.sheets import mask_sheet, pca_strip
from salt_vla.rundir import RunDirectory, write_bytes

MASKS, TOKENS = "masks.png", "pca.png"
CLIPS_TRIED = 8


@dataclass(frozen=True)
class Film:
    """A held-out clip as the run sees it: uint8 (T, H, W, 3)."""

    clip_id: str
    frames: FramesArray


def draw_pictures(run: RunDirectory, clip_id: str | None = None) -> list[Path]:
    """Write the run's `pictures/`: its masks and, once there is a checkpoint, the principal components of
    its tokens over time, beside those of the same encoder before it has learned anything; the files.

    Raises `RunError` where there is no run or it has no settings yet, `DataError` where no clip can be read.
    """
    if not run.require().config_file.is_file():
        raise RunError(f"run {run.name!r} ended before it had settings; there is nothing to draw")
    config = from_json(TrainConfig, run.config_file.read_bytes(), str(run.config_file))
    film = _film(config, clip_id)
    drawn = {MASKS: _masks(config, film.frames)}
    steps = step_directories(run.checkpoints)
    if steps:
        drawn[TOKENS] = _tokens(run, config, film.frames, *steps[-1])
    for name, png in drawn.items():
        write_bytes(run.pictures / name, png)
    return [run.pictures / name for name in drawn]


def draw_at_end(run: RunDirectory) -> None:
    """As `draw_pictures`, of a run that has finished; what goes wrong is a line of its log, since the run has
    done its work."""
    try:
        draw_pictures(run)
    except (UserError, OSError, RuntimeError) as error:  # PyTorch raises the last, out of memory too.
        run.log(f"no pictures: {error}; `salt-vla runs pictures {run.name}` tries again")


def _film(config: TrainConfig, clip_id: str | None) -> Film:
    """The clip asked for, or the first held-out one that can be read."""
    table = open_table(config.data.table, config.data.view, config.geometry)
    clips = table.only([clip_id]) if clip_id is not None else split_table(table).validation
    if not len(clips):
        raise DataError(f"there is no clip {clip_id!r} in {config.data.table}; `salt-vla data show` has ids")
    chosen = clips.clip_ids[:CLIPS_TRIED]
    reader = ViewReader(clips, config.data.view, config.geometry)
    problem = ""
    for record, name in zip(read_or_quarantine(reader, [(each, 0) for each in chosen]), chosen, strict=True):
        if record.array is not None:
            return Film(name, record.array)
        problem = problem or record.reason
    raise DataError(f"none of {len(chosen)} held-out clips can be read; the first: {problem}")


def _masks(config: TrainConfig, frames: FramesArray) -> bytes:
    """Of the first step's batch, so that what the batch takes away from a clip is seen too."""
    groups = build_masks(config.masks, config.geometry).sample(config.batch_size, config.seed, 0)
    of_first = [
        (group.context_ids[0].numpy(), group.target_ids[0].numpy())
        for group in (each.at([0]) for each in groups)
    ]
    return mask_sheet(frames, of_first, config.geometry)


@torch.inference_mode()
def _tokens(run: RunDirectory, config: TrainConfig, frames: FramesArray, step: int, folder: Path) -> bytes:
    models = {
        f"{run.name} at step {step:,}": load_model(str(folder), run.name),
        "random": random_model(config.encoder, config.seed % 2**32),
    }
    clip = torch.from_numpy(frames)[None]
    tokens = {name: model.latents(clip)[0].float().cpu().numpy() for name, model in models.items()}
    return pca_strip(frames, tokens, config.geometry)
