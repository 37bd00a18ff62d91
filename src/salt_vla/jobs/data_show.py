"""`data show`: chosen or random clips of any table on one picture, with a recipe's masks if asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from salt_vla.config import MaskConfig, TrainConfig, ViewConfig, override
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import ConfigError, DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import open_table, read_or_quarantine
from salt_vla.jobs.data_index import cutting_of
from salt_vla.masks import MaskGroup, build_masks, report_masks
from salt_vla.progress import progress
from salt_vla.recipes import get_recipe
from salt_vla.reports.contact import ShownClip, contact_sheet

CLIPS = 8
MOST_CLIPS = 96
MOST_PIXELS = 2048  # of a clip's side


@dataclass(frozen=True)
class Choice:
    """Which clips: those of `clip_ids`, and `random` further ones drawn by `seed`; neither: 8 spread over the
    table."""

    clip_ids: Sequence[str] = ()
    random: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Look:
    """How clips are looked at: which view of them, at what geometry, under which masks (None: none), whose
    figures are those of batches of `batch_size`."""

    view: ViewConfig
    geometry: ClipGeometry
    number: int = 0
    masks: MaskConfig | None = None
    batch_size: int = 0


@dataclass(frozen=True)
class Shown:
    """The sheet as a PNG, how many clips are on it, (clip id, reason) of those that cannot be read, and what
    the masks do in the batches of a run."""

    png: bytes
    clips: int
    unreadable: list[tuple[str, str]]
    masks: Sequence[str] = ()


def look_at(
    spec: str,
    recipe: str | None = None,
    masked: bool = False,
    number: int = 0,
    num_frames: int | None = None,
    frame_stride: int | None = None,
    image_size: int | None = None,
    assignments: Sequence[str] = (),
) -> Look:
    """How the clips of `spec` are to be looked at: as a table was cut, at a recipe's size, crops and masks,
    with its fields changed by `assignments`.

    What is asked for by name goes before the table, and the table before the recipe.
    Raises `ConfigError` for what does not fit together.
    """
    if number < 0:
        raise ConfigError(f"--view must be 0 or more, not {number}")
    config = override(TrainConfig() if recipe is None else get_recipe(recipe).config, assignments)
    geometry, view = config.geometry, config.data.view
    cut = cutting_of(spec)
    frames = geometry.num_frames
    if cut is not None:
        frames = cut.num_frames
        sampled = {
            name: getattr(cut.view, name) for name in ("frame_stride", "sampling", "target_fps", "short")
        }
        view = replace(view, **sampled)
    if frame_stride is not None:
        view = replace(view, frame_stride=frame_stride, sampling="stride")
    frames = Cutting(view, num_frames or frames).num_frames  # Refuses absurd ones.
    size = image_size or geometry.image_size
    if size > MOST_PIXELS:
        raise ConfigError(f"--image-size must be at most {MOST_PIXELS}, not {size}")
    tubelet = geometry.tubelet_size if masked or frames % geometry.tubelet_size == 0 else 1
    patch = geometry.patch_size if masked or size % geometry.patch_size == 0 else size
    masks = config.masks if masked else None
    return Look(view, ClipGeometry(frames, size, tubelet, patch), number, masks, config.batch_size)


def show(spec: str, choice: Choice, look: Look) -> Shown:
    """Draw the sheet. Raises `DataError` for an empty table, an unknown clip, or too many of them."""
    if choice.seed < 0:
        raise ConfigError(f"--seed must be 0 or more, not {choice.seed}")
    table = open_table(spec, look.view, look.geometry)
    clips = choose(table, choice)
    reader = ViewReader(table, look.view, look.geometry)
    groups: list[MaskGroup] = []
    said: list[str] = []
    if look.masks is not None:
        masks = build_masks(look.masks, look.geometry)
        groups = masks.sample(len(clips), choice.seed)
        said = report_masks(masks, look.batch_size, choice.seed).lines
    shown, unreadable = [], []
    with progress("Reading clips", len(clips), "clips") as advance:
        for row, clip_id in enumerate(clips):
            (record,) = read_or_quarantine(reader, [(clip_id, look.number)])
            clip = table.clip(clip_id)
            reason = record.reason.removeprefix(f"clip {clip_id!r}, view {look.number}: ")
            # Of one clip alone: without the padding that other clips ask for.
            of_clip = [
                (g.context_ids[0].numpy(), g.target_ids[0].numpy()) for g in (g.at([row]) for g in groups)
            ]
            shown.append(ShownClip(clip_id, describe(clip, table), record.array, reason, of_clip))
            if record.array is None:
                unreadable.append((clip_id, reason))
            advance(1)
    title = f"{spec}: {len(clips)} of {len(table)} clips, view {look.number}"
    return Shown(contact_sheet(shown, look.geometry, title, said), len(clips), unreadable, said)


def choose(table: ClipTable, choice: Choice) -> list[str]:
    """The ids to show: the chosen ones in the order given, then the drawn ones in the table's."""
    if not len(table):
        raise DataError(f"there are no clips in {table.name}")
    chosen = list(dict.fromkeys(choice.clip_ids))
    for clip_id in chosen:
        table.clip(clip_id)  # Says so where there is none.
    if choice.random < 0:
        raise ConfigError(f"--random must be 0 or more, not {choice.random}")
    rest = [clip_id for clip_id in table.clip_ids if clip_id not in set(chosen)]
    if choice.random:
        count = min(choice.random, len(rest))
        drawn = np.random.default_rng(choice.seed).choice(len(rest), count, replace=False)
        chosen += [rest[place] for place in np.sort(drawn)]
    elif not chosen:
        places = np.linspace(0, len(rest) - 1, min(CLIPS, len(rest))).astype(int)
        chosen = [rest[place] for place in places]
    if len(chosen) > MOST_CLIPS:
        raise ConfigError(f"{len(chosen)} clips do not fit on one sheet; choose at most {MOST_CLIPS}")
    return chosen


def describe(clip: Clip, table: ClipTable) -> str:
    """The line below a clip's id: what is known of it beside its pixels."""
    dataset = clip.dataset if len(table.roots) > 1 else ""
    camera = clip.camera.rsplit(".", 1)[-1]
    place = f"frame {clip.first_frame} of {Path(clip.file).name}"
    known = (dataset, clip.split, camera, clip.label, place)
    return " · ".join(part for part in known if part)
