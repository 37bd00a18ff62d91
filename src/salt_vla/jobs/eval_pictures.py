"""Pictures of an evaluation: one held-out clip's tokens as every encoder sees them, where attention goes, and
the clips that lie nearest.

Knows which clip to show and from where features come; not how a sheet is drawn.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from salt_vla.errors import DataError
from salt_vla.evaluation.arrangements import motion
from salt_vla.evaluation.bench import Bench, Side
from salt_vla.evaluation.features import Pixels, Reading, TokenModel
from salt_vla.evaluation.ranking import unit_rows
from salt_vla.evaluation.rollout import attention_rollout
from salt_vla.reports.eval_sheets import Gathered, Neighbour, neighbour_sheet, rollout_sheet
from salt_vla.reports.patches import FramesArray
from salt_vla.reports.sheets import pca_strip
from salt_vla.rundir import write_bytes
from salt_vla.teachers.pixel import EncoderTeacher

TOKENS, ATTENTION = "tokens.png", "attention.png"
NEIGHBOURS = 5
CLIPS_LOOKED_AT = 256


def draw_evaluation(bench: Bench, folder: Path, clip_id: str = "") -> list[Path]:
    """Sheets of one held-out clip into `folder`: `tokens.png` (principal components over time),
    `attention.png` (rollout, of the encoders that show their attention) and `neighbours-<encoder>.png`; the
    files. `clip_id`: which clip; else the one that moves most among the first camera's first 256.

    Raises `DataError` for a clip that is not held out.
    """
    side, row = _chosen(bench, clip_id)
    frames = _film(side, row)
    drawn = {TOKENS: _tokens(bench, frames)}
    showing = {name: model for name, model in bench.encoders.items() if isinstance(model, EncoderTeacher)}
    if showing:
        drawn[ATTENTION] = _attention(bench, showing, frames)
    for number, (name, png) in enumerate(_neighbours(bench, side, row, frames).items()):
        file = f"neighbours-{re.sub('[^A-Za-z0-9._-]+', '-', name)}.png"
        drawn[f"{number}-{file}" if file in drawn else file] = png
    for file, png in drawn.items():
        write_bytes(folder / file, png)
    return [folder / file for file in drawn]


def _chosen(bench: Bench, clip_id: str) -> tuple[Side, int]:
    """The clips of one camera, and the row of the one to show."""
    if clip_id:
        if clip_id not in bench.test.clips.clip_ids:
            raise DataError(f"clip {clip_id!r} is not held out here; `salt-vla data show` has ids")
        side = bench.test.of_camera(bench.test.clips.clip(clip_id).camera)
        return side, side.clips.clip_ids.index(clip_id)
    side = bench.test.of_camera(bench.cameras[0])
    looked_at = side.only(side.clips.clip_ids[:CLIPS_LOOKED_AT])
    return side, int(motion(bench, looked_at).argmax())


def _film(side: Side, row: int) -> FramesArray:
    return side.views.views.read_many([(side.clips.clip_ids[row], 0)])[0]


@torch.inference_mode()
def _tokens(bench: Bench, frames: FramesArray) -> bytes:
    clip = torch.from_numpy(frames)[None]
    tokens = {name: model.latents(clip)[0].float().cpu().numpy() for name, model in bench.encoders.items()}
    return pca_strip(frames, tokens, bench.geometry)


def _attention(bench: Bench, showing: Mapping[str, TokenModel], frames: FramesArray) -> bytes:
    """Of each encoder what all its tokens gather, and what the one gathers where most moves."""
    token = _where_most_moves(bench, frames)
    rows = []
    for name, model in showing.items():
        shares = attention_rollout(name, model, torch.from_numpy(frames)[None])[0].numpy()
        rows.append(Gathered(f"{name}, all tokens", shares.mean(0)))
        rows.append(Gathered(f"{name}, the marked token", shares[token], token))
    return rollout_sheet(frames, rows, bench.geometry)


def _where_most_moves(bench: Bench, frames: FramesArray) -> int:
    """The token of the middle time step whose place changes most over the clip."""
    steps, rows, columns = bench.geometry.token_grid
    patches = Pixels(bench.geometry).latents(torch.from_numpy(frames)[None])[0].numpy()
    change = np.ptp(patches.reshape(steps, rows * columns, -1), axis=0).mean(-1)
    return steps // 2 * rows * columns + int(change.argmax())


def _neighbours(bench: Bench, side: Side, row: int, frames: FramesArray) -> dict[str, bytes]:
    """A sheet an encoder: the training clips of the same camera nearest to the clip, as `retrieval` ranks."""
    clip = side.clips.clip(side.clips.clip_ids[row])
    train = bench.train.of_camera(clip.camera)
    reading = Reading(bench.settings.poolings[0])
    of_train, of_test = (bench.features(each, [reading])[reading] for each in (train, side))
    labels = train.clips.rows["label"].to_pylist()
    sheets = {}
    for name in bench.encoders:
        mean = np.asarray(of_train[name]).mean(0, dtype=np.float64).astype(np.float32)
        near = unit_rows(of_train[name] - mean) @ unit_rows(of_test[name][row : row + 1] - mean)[0]
        found = [
            Neighbour(_film(train, n), labels[n] or "no label", float(near[n]), labels[n] == clip.label)
            for n in np.argsort(-near, kind="stable")[:NEIGHBOURS].tolist()
        ]
        asked = f"asked of {name}: {clip.label or clip.clip_id}"
        sheets[name] = neighbour_sheet(frames, asked, found, bench.geometry)
    return sheets
