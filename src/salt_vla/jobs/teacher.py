"""Looking at a teacher: what it is, what its targets are like, and which clips it was made for."""

from __future__ import annotations

from typing import Any

import torch

from salt_vla.config import DataConfig, TrainConfig, from_json
from salt_vla.data.clip_table import ClipTable
from salt_vla.jobs.data import open_views
from salt_vla.objectives import normalise
from salt_vla.rundir import RunDirectory, run_or_directory
from salt_vla.teachers import Teacher, load_teacher

SAMPLE_CLIPS = 128
BATCH_SIZE = 32
OUTLIER_SHARE = 0.5  # of all variance in the top 1 % of channels: raw targets would be owned by them


def teacher_and_data(name: str, layer: int | None = None) -> tuple[Teacher, DataConfig]:
    """A teacher, and the data settings (stride, crops, views) of the run that it came from."""
    teacher = load_teacher(name, layer=layer)
    folder = run_or_directory(name).resolve()
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent  # A checkpoint's settings are its run's.
    run = RunDirectory(folder)
    if not run.exists():
        return teacher, DataConfig()
    return teacher, from_json(TrainConfig, run.config_file.read_text(), str(run.config_file)).data


def check_teacher(name: str, teacher: Teacher, table: ClipTable, data: DataConfig) -> dict[str, Any]:
    """Sizes, fingerprint and statistics of raw targets over a sample of clips, with a verdict in words.

    `position_share`: share of the normalised targets' variance that the mean of each token place explains
    (high where the camera stands still); `top_channel_share`: share of the raw variance in the top 1 % of
    channels.
    """
    views, readable = open_views(table, data, teacher.geometry, num_views=1)
    chosen = readable[:: max(1, len(readable) // SAMPLE_CLIPS)][:SAMPLE_CLIPS]
    parts = [
        teacher.latents(torch.from_numpy(views.read_many([(clip, 0) for clip in chosen[i : i + BATCH_SIZE]])))
        for i in range(0, len(chosen), BATCH_SIZE)
    ]
    raw = torch.cat(parts).cpu().double()
    flat = raw.flatten(0, 1)
    channel_variance = flat.var(dim=0)
    top = max(1, round(0.01 * teacher.dim))
    top_share = float(channel_variance.topk(top).values.sum() / channel_variance.sum())
    scored = normalise(raw).double()
    centred = scored - scored.mean(dim=(0, 1))
    position = scored.mean(dim=0) - scored.mean(dim=(0, 1))
    position_share = float(position.square().mean() / centred.square().mean())
    return {
        "name": name,
        "dim": teacher.dim,
        "parameters": teacher.num_parameters,
        "geometry": str(teacher.geometry),
        "fingerprint": teacher.fingerprint,
        "clips": len(chosen),
        "mean_square": float(flat.square().mean()),
        "token_std": float(raw.std(dim=-1).mean()),
        "top_channel_share": top_share,
        "position_share": position_share,
        "verdict": _verdict(float(channel_variance.sum()), top_share, position_share),
    }


def _verdict(variance: float, top_share: float, position_share: float) -> str:
    if variance < 1e-8:
        return "useless: its latents do not vary between clips or tokens"
    notes = []
    if top_share > OUTLIER_SHARE:
        notes.append(
            f"{top_share:.0%} of the raw variance lies in 1 % of the channels: normalise the targets"
        )
    if position_share > OUTLIER_SHARE:
        notes.append(
            f"{position_share:.0%} of the variance is the mean of each token place: "
            "read R² against position means, and consider centred targets"
        )
    return "usable" + ("; " + "; ".join(notes) if notes else "")
