"""What a source lists (stretches of video files), and how clips are cut from it.

Knows no layout of any data set and opens no video: frames and rates are in the segments already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.data.sampling import clip_span
from salt_vla.errors import ConfigError, DataError

HASH_STEPS = 2**32
# Far beyond what anybody trains on; without them a typing error is a hang.
MAX_FRAMES = 4096  # of a clip
MAX_CLIPS = 10_000  # of a video
MAX_LENGTH = 10_000_000  # frames of a video
MAX_STRIDE = 1_000_000
FPS_RANGE = (0.001, 1000.0)


@dataclass(frozen=True)
class Segment:
    """A stretch of one file that clips may be cut from: a whole video, an episode, a labelled span.

    `key` is the source's own name for it and begins with the data set's: clip ids are made of it. `group` is
    what may never be divided between splits. Where the source's tables do not say where it lies,
    `first_frame`, `frames` and `fps` are None until the file is measured; `start` and `end` (seconds of the
    file) then bound it. An empty `split` is drawn by group.
    """

    key: str
    file: str
    group: str
    split: str = ""
    label: str = ""
    camera: str = ""
    start: float | None = None
    end: float | None = None
    first_frame: int | None = None
    frames: int | None = None
    fps: float | None = None
    variable_rate: bool = False
    episode: int | None = None


@dataclass(frozen=True)
class Problem:
    """What a source names but cannot give: the key, the file and the reason, in words."""

    key: str
    file: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """All that a source found below `root`, under the name `dataset`; `unlisted` counts the video files there
    that its lists do not name."""

    dataset: str
    source: str
    root: Path
    segments: tuple[Segment, ...]
    problems: tuple[Problem, ...] = ()
    unlisted: int = 0


@dataclass(frozen=True)
class SourceOptions:
    """What a caller may ask of a source: a name for the data set (empty: its own), only some cameras, the
    folder that a list's paths are relative to (empty: the list's own), and a hub repository's revision."""

    dataset: str = ""
    cameras: tuple[str, ...] = ()
    videos: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        if "/" in self.dataset or self.dataset in (".", "..") or not self.dataset.isprintable():
            raise ConfigError(f"a data set's name is one word for its clips' ids, not {self.dataset!r:.60}")


@dataclass(frozen=True)
class Cutting:
    """How clips are cut: every `hop` frames, or `clips_per_video` evenly spread ones (one: the middle).

    `validation_share` of the groups without a split of their own become `validation`, chosen by a hash of the
    group's name, so that new videos never move old ones.
    """

    view: ViewConfig = field(default_factory=ViewConfig)
    num_frames: int = 16
    hop: int = 16
    clips_per_video: int = 0
    validation_share: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.num_frames <= MAX_FRAMES:
            raise ConfigError(
                f"num_frames must be at least 1 and at most {MAX_FRAMES}, not {self.num_frames}"
            )
        if self.clips_per_video > MAX_CLIPS:
            raise ConfigError(f"clips_per_video must be at most {MAX_CLIPS}, not {self.clips_per_video}")
        if self.view.frame_stride > MAX_STRIDE:
            raise ConfigError(f"frame_stride must be at most {MAX_STRIDE}, not {self.view.frame_stride}")
        low, high = FPS_RANGE
        if self.view.sampling == "fps" and not low <= self.view.target_fps <= high:
            raise ConfigError(f"target_fps must lie in {low}..{high:g}, not {self.view.target_fps}")
        if self.clips_per_video < 0 or (self.hop < 1 and not self.clips_per_video):
            raise ConfigError(
                f"hop is {self.hop} and clips_per_video {self.clips_per_video}; clips must be at least one "
                "frame apart, or at least one a video"
            )
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"validation_share must lie in [0, 1), not {self.validation_share}")


def cut_clips(listing: Listing, cutting: Cutting) -> tuple[ClipTable, list[Problem]]:
    """The clip table of a measured listing, and the segments that give none, with reasons.

    Raises `DataError` when no segment gives a clip.
    """
    clips: list[Clip] = []
    problems = list(listing.problems)
    for segment in listing.segments:
        if measured(segment)[0] > MAX_LENGTH:
            reason = f"too long: {segment.frames} frames are said to be there, more than {MAX_LENGTH}"
            problems.append(Problem(segment.key, segment.file, reason))
            continue
        starts = clip_starts(segment, cutting)
        if not starts:
            problems.append(Problem(segment.key, segment.file, _too_short(segment, cutting)))
        clips += [_clip(listing, segment, cutting, i, start) for i, start in enumerate(starts)]
    if not clips:
        why = f"; the first of {len(problems)}: {problems[0].key}: {problems[0].reason}" if problems else ""
        raise DataError(f"{listing.root} ({listing.source}) gives no clip{why}")
    return ClipTable.from_clips(clips, listing.root), problems


def clip_starts(segment: Segment, cutting: Cutting) -> list[int]:
    """First frames of a segment's clips, counted from the segment's first frame."""
    frames, fps = measured(segment)
    span = clip_span(cutting.view, cutting.num_frames, fps, frames)
    if frames < 1:
        return []
    if span > frames:
        return [0] if cutting.view.short == "hold" else []
    if cutting.view.sampling == "uniform":
        return [0]
    room = frames - span
    if cutting.clips_per_video:
        count = cutting.clips_per_video
        return sorted({(2 * i + 1) * room // (2 * count) for i in range(count)})
    return list(range(0, room + 1, cutting.hop))


def measured(segment: Segment) -> tuple[int, float]:
    """(frames, fps) of a segment that has been measured."""
    if segment.frames is None or segment.fps is None or segment.first_frame is None:
        raise TypeError(f"segment {segment.key!r} has not been measured")
    return segment.frames, segment.fps


def drawn_split(group: str, validation_share: float) -> str:
    """`validation` for that share of groups, decided by the group's name alone."""
    drawn = xxhash.xxh3_64_intdigest(f"split#{group}".encode()) % HASH_STEPS
    return "validation" if drawn < validation_share * HASH_STEPS else "train"


def group_number(group: str) -> int:
    """A number for a group that has none of its own: positive, the same everywhere."""
    return xxhash.xxh3_64_intdigest(group.encode()) >> 1


def _too_short(segment: Segment, cutting: Cutting) -> str:
    frames, fps = measured(segment)
    needed = clip_span(cutting.view, cutting.num_frames, fps, frames)
    return f"too short: {frames} frames, a clip needs {needed}"


def _clip(listing: Listing, segment: Segment, cutting: Cutting, number: int, start: int) -> Clip:
    frames, fps = measured(segment)
    assert segment.first_frame is not None
    return Clip(
        clip_id=clip_id(segment.key, cutting, number, start),
        dataset=listing.dataset,
        source=listing.source,
        file=segment.file,
        first_frame=segment.first_frame + start,
        episode=group_number(segment.group) if segment.episode is None else segment.episode,
        episode_first_frame=segment.first_frame,
        episode_frames=frames,
        camera=segment.camera,
        label=segment.label,
        fps=fps,
        variable_rate=segment.variable_rate,
        split=segment.split or drawn_split(segment.group, cutting.validation_share),
    )


def clip_id(key: str, cutting: Cutting, number: int, start: int) -> str:
    """The segment's key, alone where it gives one clip; else with the clip's start or its number."""
    if cutting.view.sampling == "uniform" or cutting.clips_per_video == 1:
        return key
    if cutting.clips_per_video:
        return f"{key}/{number}-of-{cutting.clips_per_video}"
    return f"{key}/{start:06d}"
