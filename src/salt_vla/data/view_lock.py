"""The view lock: (clip, view number) → the same uint8 pixels, in any process, on any day.

Shared by caching and training, so that a cached latent always belongs to the pixels the student sees.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.decode import read_through_pyav, stream_frames
from salt_vla.data.golden import GOLDEN_CLIPS, GOLDEN_FRAMES, golden_path
from salt_vla.data.sampling import clip_span, sampled_frames
from salt_vla.data.video_file import Deadline, OutOfReach, TooSlow
from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from jaxtyping import UInt8

# Raise this when the pixels of an unchanged configuration change: old caches then refuse to be used.
ALGORITHM = "square-crop-2"
PASS_BYTES = 64 * 2**20  # of views that one way through a file may fill
WAITING_BYTES = 4 * 2**20  # of squares that wait to be resized together, a fifth faster than one by one

Key = tuple[str, int]  # (clip_id, view)


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
        "view": view_settings(view),
        "frames": geometry.num_frames,
        "image_size": geometry.image_size,
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(deciding, sort_keys=True).encode())


def view_settings(view: ViewConfig) -> dict[str, Any]:
    """The settings that decide pixels, by name; how many views are drawn is not among them."""
    return {item.name: getattr(view, item.name) for item in fields(view) if _decides(item, view)}


def _decides(item: Field[Any], view: ViewConfig) -> bool:
    """Fields that came later count where they are used, so that older caches stay what they are."""
    unused = bool(item.metadata.get("added_later")) and getattr(view, item.name) == item.default
    return item.name != "num_views" and not unused


@lru_cache(maxsize=1)
def golden_pixels() -> str:
    """Hash of the golden clips' pixels as this process decodes, converts, cuts and resizes them (some 30 ms,
    once). Through PyAV: torchcodec is used only where its frames are equal."""
    digest = xxhash.xxh3_128()
    for name, fps in GOLDEN_CLIPS.items():
        for picture in read_through_pyav(golden_path(name), GOLDEN_FRAMES, fps):
            for crop, size in (((0.39, 0.0, 1.0), 32), ((0.31, 0.11, 0.57), 48)):
                digest.update(cut(picture, crop, size).tobytes())
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
    picture: UInt8[np.ndarray, "height width 3"], crop: tuple[float, float, float], image_size: int
) -> UInt8[np.ndarray, "size size 3"]:
    """Crop to whole pixels and resize with torch's antialiased bilinear filter for bytes.

    Its arithmetic is integer and the same with and without vector instructions; Pillow's differs by one grey
    level here and there and takes six times as long.
    """
    return resized(square(picture, crop)[None], image_size)[0]


def square(
    picture: UInt8[np.ndarray, "height width 3"], crop: tuple[float, float, float]
) -> UInt8[np.ndarray, "side side 3"]:
    height, width = picture.shape[:2]
    short = min(height, width)
    side = max(round(crop[2] * short), 1)
    left = min(max(round(crop[0] * short), 0), width - side)
    top = min(max(round(crop[1] * short), 0), height - side)
    # Contiguous, and the batch's axis before the permutation: only then has torch its fast path, 5× faster.
    return np.ascontiguousarray(picture[top : top + side, left : left + side])


def resized(
    squares: UInt8[np.ndarray, "n side side 3"], image_size: int
) -> UInt8[np.ndarray, "n size size 3"]:
    import torch  # Here, because commands that only look at tables come by this module too.

    if squares.shape[1] == image_size:
        return squares
    pixels = torch.from_numpy(squares).permute(0, 3, 1, 2)
    size = (image_size, image_size)
    small = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return small.permute(0, 2, 3, 1).numpy()


def _sampling(view: ViewConfig) -> str:
    if view.sampling == "stride":
        return f"at stride {view.frame_stride}"
    return f"at {view.target_fps:g} a second" if view.sampling == "fps" else "over the whole video"


@dataclass
class _Task:
    """One (clip, view) that is being filled with pictures, in whatever order they come."""

    key: Key
    clip: Clip
    frames: tuple[int, ...]
    to_come: int
    pixels: np.ndarray | None = None
    shape: tuple[int, ...] = ()
    crop: tuple[float, float, float] = (0.0, 0.0, 1.0)
    waiting: list[tuple[int, np.ndarray]] = field(default_factory=list)  # (position, square)

    def restart(self) -> None:
        self.to_come, self.pixels = len(self.frames), None
        self.waiting.clear()


class ViewReader:
    """`reader.read(clip_id, view)` decodes; clips of one file that are asked for in a row share one pass.

    Grouping changes the speed, never the pixels. Memory holds the views of one pass, `PASS_BYTES` at most
    (or one view), `WAITING_BYTES` of squares, and one decoded picture. `before_pass` is told which keys are
    decoded next, for whoever wants to know what a decoder died of.
    """

    before_pass: Callable[[list[Key]], None] | None = None

    def __init__(self, table: ClipTable, config: ViewConfig, geometry: ClipGeometry) -> None:
        self.table = table
        self.config = config
        self.geometry = geometry

    @property
    def hash(self) -> str:
        return view_hash(self.config, self.geometry)

    def read(self, clip_id: str, view: int = 0) -> UInt8[np.ndarray, "frames size size 3"]:
        """The view's pixels. Raises `DataError` that begins with the clip's id."""
        ((_, pixels),) = self.read_each([(clip_id, view)])
        if isinstance(pixels, DataError):
            raise pixels
        return pixels

    def read_many(
        self, keys: Sequence[Key], out: UInt8[np.ndarray, "keys frames size size 3"] | None = None
    ) -> UInt8[np.ndarray, "keys frames size size 3"]:
        """Raises the `DataError` of the first key that cannot be read. `out`: what to fill and hand back."""
        size = self.geometry.image_size
        if out is None:
            out = np.empty((len(keys), self.geometry.num_frames, size, size, 3), np.uint8)
        errors: dict[int, DataError] = {}
        clips = [self.table.clip(clip_id) for clip_id, _ in keys]
        places = [(clip.dataset, clip.file, clip.first_frame) for clip in clips]
        order = sorted(range(len(keys)), key=places.__getitem__)  # so that clips of one file share a pass
        for at, (_, pixels) in zip(order, self.read_each([keys[at] for at in order]), strict=True):
            if isinstance(pixels, DataError):
                errors[at] = pixels
            else:
                out[at] = pixels
        if errors:
            raise errors[min(errors)]
        return out

    def read_each(self, keys: Iterable[Key]) -> Iterator[tuple[Key, np.ndarray | DataError]]:
        """Each key with its pixels, or with why it has none, in order."""
        tasks: list[_Task] = []
        view_bytes = self.geometry.num_frames * self.geometry.image_size**2 * 3
        for key in keys:
            task = self._begin(key)
            is_full = len(tasks) * view_bytes >= PASS_BYTES
            if tasks and (isinstance(task, DataError) or is_full or not _same_file(task.clip, tasks[0].clip)):
                yield from self._pass(tasks)
                tasks = []
            if isinstance(task, DataError):
                yield key, task
            else:
                tasks.append(task)
        if tasks:
            yield from self._pass(tasks)

    def _begin(self, key: Key) -> _Task | DataError:
        try:
            clip = self.table.clip(key[0])
            frames = self.frames_of(clip, key[1])
            self.table.video(clip)
        except DataError as error:
            return _about(key, error)
        return _Task(key, clip, frames, len(frames))

    def frames_of(self, clip: Clip, view: int) -> tuple[int, ...]:
        """The file's frames that a view shows, in order. Raises `DataError` where the episode lacks one."""
        self._check_extent(clip)
        # Which frames a view shows does not depend on the pictures' shape, which is not known yet.
        return draw_view(clip, view, self.config, self.geometry, (1, 1)).frames

    def _pass(self, tasks: list[_Task]) -> list[tuple[Key, np.ndarray | DataError]]:
        """All tasks from one way through their file; those that fail are tried again alone, so that nobody
        suffers for another's damage."""
        failure = self._fill(tasks)
        results: list[tuple[Key, np.ndarray | DataError]] = []
        for task in tasks:
            error = failure
            if task.to_come and len(tasks) > 1 and not isinstance(failure, TooSlow):
                task.restart()
                error = self._fill([task])
            if task.to_come:
                assert error is not None
                results.append((task.key, _about(task.key, error)))
            else:
                assert task.pixels is not None
                results.append((task.key, task.pixels))
        return results

    def _fill(self, tasks: list[_Task]) -> DataError | None:
        """Decode once through the file and put every picture where it is wanted; the error that ended it."""
        clip, deadline = tasks[0].clip, Deadline()
        if self.before_pass is not None:
            self.before_pass([task.key for task in tasks])
        wanted: dict[int, list[tuple[_Task, int]]] = {}
        for task in tasks:
            for position, frame in enumerate(task.frames):
                wanted.setdefault(frame, []).append((task, position))
        video = self.table.video(clip)
        try:
            for number, picture in stream_frames(video, list(wanted), clip.fps, clip.variable_rate, deadline):
                for task, position in wanted[number]:
                    self._put(task, position, picture, WAITING_BYTES // len(tasks))
                    task.to_come -= 1
                    if not task.to_come:
                        deadline.restart()
        except DataError as error:
            return error
        return None

    def _put(self, task: _Task, position: int, picture: np.ndarray, may_wait: int) -> None:
        size = self.geometry.image_size
        if task.pixels is None:
            height, width = picture.shape[:2]
            task.shape = picture.shape
            task.crop = draw_view(task.clip, task.key[1], self.config, self.geometry, (height, width)).crop
            task.pixels = np.empty((len(task.frames), size, size, 3), np.uint8)
        if task.shape != picture.shape:
            video = self.table.video(task.clip)
            raise DataError(
                f"video {video} changes the size of its pictures at frame {task.frames[position]}"
            )
        cropped = square(picture, task.crop)
        task.waiting.append((position, cropped))
        if task.to_come == 1 or (len(task.waiting) + 1) * cropped.nbytes > may_wait:
            positions, squares = zip(*task.waiting, strict=True)
            task.pixels[list(positions)] = resized(np.stack(squares), size)
            task.waiting.clear()

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


def _same_file(one: Clip, other: Clip) -> bool:
    names = ("dataset", "file", "fps", "variable_rate")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _about(key: Key, error: DataError) -> DataError:
    kind = OutOfReach if isinstance(error, OutOfReach) else DataError
    return kind(f"clip {key[0]!r}, view {key[1]}: {error}")
