"""The view lock: (clip, view number) → the same uint8 pixels, in any process, on any day.

Shared by caching and training, so that a cached latent always belongs to the pixels the student sees.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import Field, dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from PIL import Image

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.decode import frame_shape, read_frames
from salt_vla.data.golden import GOLDEN_CLIPS, GOLDEN_FRAMES, golden_path
from salt_vla.data.sampling import clip_span, sampled_frames
from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from jaxtyping import UInt8

# Raise this when the pixels of an unchanged configuration change: old caches then refuse to be used.
ALGORITHM = "square-crop-1"
SHARED_BYTES = 64 * 2**20  # Episodes with more pixels are decoded clip by clip instead of whole.


@dataclass(frozen=True)
class View:
    """Where a view looks: frames of the file, and a square (left, top, side) as shares of the short side."""

    frames: tuple[int, ...]
    crop: tuple[float, float, float]


def view_hash(view: ViewConfig, geometry: ClipGeometry) -> str:
    """Of everything besides the clip table that decides pixels.

    No library's version is in it, but the pixels that the libraries give for the golden clips: decision 0008.
    """
    deciding = {
        "algorithm": ALGORITHM,
        "golden": golden_pixels(),
        "view": {field.name: getattr(view, field.name) for field in fields(view) if _decides(field, view)},
        "frames": geometry.num_frames,
        "image_size": geometry.image_size,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(deciding, sort_keys=True).encode())


def _decides(field: Field[Any], view: ViewConfig) -> bool:
    """Fields that came later count where they are used, so that older caches stay what they are."""
    unused = bool(field.metadata.get("added_later")) and getattr(view, field.name) == field.default
    return field.name != "num_views" and not unused


@lru_cache(maxsize=1)
def golden_pixels() -> str:
    """Hash of the golden clips' pixels as this process decodes, converts, cuts and resizes them (some 30 ms,
    once)."""
    digest = xxhash.xxh3_128()
    for name, fps in GOLDEN_CLIPS.items():
        frames = read_frames(golden_path(name), GOLDEN_FRAMES, fps)
        for crop, size in (((0.39, 0.0, 1.0), 32), ((0.31, 0.11, 0.57), 48)):
            digest.update(cut(frames, View(GOLDEN_FRAMES, crop), size).tobytes())
    return digest.hexdigest()


def draw_view(
    clip: Clip, view: int, config: ViewConfig, geometry: ClipGeometry, shape: tuple[int, int]
) -> View:
    """The view's frames and crop for a file of (height, width) `shape`.

    View 0: the centred square of the short side, no shift. Others: a square of area share uniform in
    `crop_scale` anywhere in the frame, and a shift uniform in ±`max_shift` frames, cut to the episode.
    """
    height, width = shape
    short = min(height, width)
    shift, side = 0, 1.0
    place = (0.5, 0.5)
    if view > 0:
        rng = np.random.default_rng(xxhash.xxh3_64_intdigest(f"{clip.clip_id}#{view}".encode()))
        side = float(np.sqrt(rng.uniform(*config.crop_scale)))
        place = (float(rng.uniform()), float(rng.uniform()))
        shift = int(rng.integers(-config.max_shift, config.max_shift + 1))
    frames = tuple(
        clip.episode_first_frame + frame
        for frame in sampled_frames(
            config, geometry.num_frames, clip.fps, clip.episode_frames, clip.start_in_episode, shift
        )
    )
    left, top = (place[0] * (width / short - side), place[1] * (height / short - side))
    return View(frames, (left, top, side))


def cut(
    frames: UInt8[np.ndarray, "frames height width 3"], view: View, image_size: int
) -> UInt8[np.ndarray, "frames size size 3"]:
    """Crop and resize with one antialiased filter whose arithmetic is integer, so equal everywhere."""
    short = min(frames.shape[1:3])
    left, top, side = (value * short for value in view.crop)
    box = (left, top, min(left + side, frames.shape[2]), min(top + side, frames.shape[1]))
    size = (image_size, image_size)
    out = [Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR, box=box) for frame in frames]
    return np.stack([np.asarray(image) for image in out])


def _sampling(view: ViewConfig) -> str:
    if view.sampling == "stride":
        return f"at stride {view.frame_stride}"
    return f"at {view.target_fps:g} a second" if view.sampling == "fps" else "over the whole video"


class ViewReader:
    """`reader.read(clip_id, view)` decodes; clips of one episode asked for in a row share one decoding.

    `shared_bytes` bounds what one shared episode may hold; it changes the speed, never the pixels.
    """

    def __init__(
        self, table: ClipTable, config: ViewConfig, geometry: ClipGeometry, shared_bytes: int = SHARED_BYTES
    ) -> None:
        self.table = table
        self.config = config
        self.geometry = geometry
        self.shared_bytes = shared_bytes
        self._shapes: dict[str, tuple[int, int]] = {}
        self._episodes: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_episodes": OrderedDict()}  # A worker decodes its own.

    @property
    def hash(self) -> str:
        return view_hash(self.config, self.geometry)

    def read(self, clip_id: str, view: int = 0) -> UInt8[np.ndarray, "frames size size 3"]:
        """The view's pixels. Raises `DataError` that begins with the clip's id."""
        clip = self.table.clip(clip_id)
        try:
            return self._render(clip, view)
        except DataError as error:
            raise DataError(f"clip {clip_id!r}, view {view}: {error}") from error

    def read_many(self, keys: Sequence[tuple[str, int]]) -> UInt8[np.ndarray, "keys frames size size 3"]:
        return np.stack([self.read(clip_id, view) for clip_id, view in keys])

    def _render(self, clip: Clip, view: int) -> np.ndarray:
        self._check_extent(clip)
        height, width = shape = self._shape(clip)
        drawn = draw_view(clip, view, self.config, self.geometry, shape)
        if clip.episode_frames * height * width * 3 <= self.shared_bytes:
            frames = self._episode(clip)[[index - clip.episode_first_frame for index in drawn.frames]]
        else:
            frames = read_frames(self.table.video(clip), drawn.frames, clip.fps)
        return cut(frames, drawn, self.geometry.image_size)

    def _check_extent(self, clip: Clip) -> None:
        span = clip_span(self.config, self.geometry.num_frames, clip.fps, clip.episode_frames)
        start, whole = clip.start_in_episode, clip.episode_frames
        if 0 <= start <= whole - span or (self.config.short == "hold" and start == 0 and 0 < whole < span):
            return
        clip_is = f"{self.geometry.num_frames} frames {_sampling(self.config)}"
        if whole < span:
            raise DataError(f"its episode has {whole} frames, too few for {clip_is}")
        raise DataError(
            f"{clip_is} from frame {start} of its episode reach beyond the episode's {whole}; index the data "
            "set for these clips"
        )

    def _shape(self, clip: Clip) -> tuple[int, int]:
        if clip.file not in self._shapes:
            self._shapes[clip.file] = frame_shape(self.table.video(clip))
        return self._shapes[clip.file]

    def _episode(self, clip: Clip) -> np.ndarray:
        key = (clip.file, clip.episode_first_frame)
        if key not in self._episodes:
            last = clip.episode_first_frame + clip.episode_frames
            indices = range(clip.episode_first_frame, last)
            self._episodes[key] = read_frames(self.table.video(clip), indices, clip.fps)
            while len(self._episodes) > 2:
                self._episodes.popitem(last=False)
        self._episodes.move_to_end(key)
        return self._episodes[key]
