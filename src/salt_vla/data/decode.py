"""Frames of a video file by number, and a file's facts. Knows neither clips nor views.

Frame n is the picture shown in the middle of slot n, (n + ½) ÷ fps seconds after the first: docs/video.md.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from salt_vla.data import torchcodec_decode
from salt_vla.data.video_damage import Damage, damaged, refuse_lost_packets
from salt_vla.data.video_file import (
    Deadline,
    Rgb,
    Video,
    is_shown,
    open_video,
    orientation,
    refuse_absurd_size,
)
from salt_vla.errors import DataError

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from jaxtyping import UInt8

WORTH_A_SEEK = 16  # frames that nobody wants, before a key frame further on is looked for
MAX_RATE = 1000.0  # frames a second; more is a clock that was taken for a rate
STEADY = 0.9  # share of slots with exactly one picture, from which on a rate is the film's own


@dataclass(frozen=True)
class VideoFacts:
    """What a file's packets and first picture say. Frames 0 … `frames` − 1 can be asked for; `height` and
    `width` are those of the picture as shown, after turning; `fps` is slots a second."""

    frames: int
    fps: float
    height: int
    width: int
    variable_rate: bool
    codec: str


def read_frames(
    path: Path, indices: Sequence[int], fps: float, variable_rate: bool = False
) -> UInt8[np.ndarray, "frames height width 3"]:
    """Frames number `indices` (any order, repeats allowed), as RGB.

    Seeks to the key frame before the first and decodes forward once. Raises `DataError` naming the file for
    anything that cannot be read.
    """
    if not indices:
        raise DataError(f"video {path}: no frames were asked for")
    found = dict(stream_frames(path, indices, fps, variable_rate))
    if len({image.shape for image in found.values()}) > 1:
        raise DataError(f"video {path} changes the size of its pictures between the frames asked for")
    return np.stack([found[index] for index in indices])


def stream_frames(
    path: Path,
    indices: Sequence[int],
    fps: float,
    variable_rate: bool = False,
    deadline: Deadline | None = None,
) -> Iterator[tuple[int, UInt8[np.ndarray, "height width 3"]]]:
    """(number, picture) of every frame in `indices`, once each, as they are decoded: one forward pass that
    leaves out stretches nobody wants where the file's index names a key frame behind them.

    What cannot be given is raised at the end, as a `DataError` about the first such frame.
    """
    missing = sorted(set(indices))
    if missing and missing[0] < 0:
        raise DataError(f"video {path} has no frame {missing[0]}: frames are numbered from 0")
    deadline = deadline or Deadline()
    codecs = torchcodec_decode.trusted_codecs(read_through_pyav)
    if missing and codecs and not variable_rate:
        # What it does not give, PyAV does, or says why nobody can.
        with suppress(torchcodec_decode.NotForTorchcodec):
            for number, image in torchcodec_decode.stream(path, list(missing), fps, codecs, deadline):
                missing.remove(number)
                began = monotonic()
                yield number, image
                deadline.extend(monotonic() - began)
    if missing:
        yield from _through_pyav(path, missing, (fps, variable_rate), deadline)


def read_through_pyav(path: Path, indices: Sequence[int], fps: float) -> np.ndarray:
    """`read_frames` of a constant-rate file, whatever decoder is chosen."""
    found = dict(_through_pyav(path, sorted(set(indices)), (fps, False), Deadline()))
    return np.stack([found[index] for index in indices])


def _through_pyav(
    path: Path, missing: list[int], rate: tuple[float, bool], deadline: Deadline
) -> Iterator[tuple[int, np.ndarray]]:
    """`missing`, ascending, is emptied of the frames that were given."""
    # Some files cannot be entered in the middle: their seek lands too late, or on half a picture.
    for from_start in (False, True):
        with open_video(path, deadline) as video:
            run = _Pass(video, list(missing), rate, from_start)
            to_rgb = Rgb(path)
            for frame, numbers in run:
                if not numbers:
                    continue
                if frame.is_corrupt or frame.pts in run.suspect:
                    if run.from_start:
                        raise damaged(video, numbers[0])
                    continue
                image = to_rgb(frame)
                for number in numbers:
                    missing.remove(number)
                    began = monotonic()
                    yield number, image
                    video.deadline.extend(monotonic() - began)
        if not missing:
            return
    if run.last_seen < missing[0]:
        raise DataError(
            f"video {path} ends before frame {missing[0]}: it is truncated or the index is of another file"
        )
    raise DataError(
        f"video {path} lacks frame {missing[0]} though it has later ones: it is damaged, or has another rate "
        f"than {rate[0]:g} a second"
    )


class _Pass:
    """One way through a file: from the key frame before the first wanted frame, or from the start.

    Iterating gives (picture, the wanted frames that it is shown in), each wanted frame at most once; frames
    that are lost or were passed over are not given.
    """

    def __init__(
        self, video: Video, wanted: Sequence[int], rate: tuple[float, bool], from_start: bool
    ) -> None:
        self.video = video
        self.fps, self.variable_rate = rate
        self.from_start = from_start or not video.is_seekable
        self.last_seen = -1
        self.suspect: set[int | None] = set()  # times of pictures that may show damage
        self._damage = Damage(video)
        self._wanted = wanted  # ascending
        self._behind = 0  # wanted[:behind] lie behind us
        self._packet_slots: set[int] = set()  # of a variable rate: where pictures are due
        self._seeks = 0
        self._sought: float = -math.inf  # the key frame that was last looked for
        self._far = math.ceil(WORTH_A_SEEK / self.fps / video.tick)

    def __iter__(self) -> Iterator[tuple[VideoFrame, list[int]]]:
        if not self.from_start and self._wanted[0]:
            self._seek()
        if self.video.counted:
            return self._in_order()
        return self._held() if self.variable_rate else self._at_their_time()

    def slot(self, timestamp: int) -> int:
        """The first slot whose middle lies after `timestamp`."""
        return math.floor(self.video.seconds(timestamp) * self.fps + 0.5)

    def _in_order(self) -> Iterator[tuple[VideoFrame, list[int]]]:
        for number, frame in enumerate(self._frames()):
            self.last_seen = number
            yield frame, self._take(number, number + 1)

    def _at_their_time(self) -> Iterator[tuple[VideoFrame, list[int]]]:
        for frame in self._frames():
            number = self._number(frame)
            yield frame, self._take(number, number + 1)

    def _held(self) -> Iterator[tuple[VideoFrame, list[int]]]:
        """A picture is shown until the next one comes; the last one as long as it says, one slot at least."""
        held: VideoFrame | None = None
        first = at = end = 0  # `held` is shown from slot `first` on; its own is `at`
        seeks = self._seeks
        for frame in self._frames():
            number = self._number(frame)
            if held is None or seeks != self._seeks:
                # Before the first picture of a file there is nothing else to show.
                first, seeks = (0 if self.from_start else number), self._seeks
            elif number > at:
                yield held, self._take(first, self._before_a_loss(at, number))
                first = number
            held, at = frame, number
            self._packet_slots = {slot for slot in self._packet_slots if slot > at}
            end = max(number + 1, self.slot((frame.pts or 0) + (frame.duration or 0)))
        if held is not None and self._next is not None:
            self.last_seen = max(self.last_seen, end - 1)
            yield held, self._take(first, self._before_a_loss(at, end))

    def _before_a_loss(self, at: int, end: int) -> int:
        """The slot from which on the picture of slot `at` cannot be held: a packet was there, and its
        picture never came."""
        return min((slot for slot in self._packet_slots if at < slot < end), default=end)

    def _number(self, frame: VideoFrame) -> int:
        if frame.pts is None:
            raise DataError(f"video {self.video.path} has frames without timestamps among others with them")
        number = self.slot(frame.pts)
        self.last_seen = max(self.last_seen, number)
        return number

    @property
    def _next(self) -> int | None:
        return self._wanted[self._behind] if self._behind < len(self._wanted) else None

    def _take(self, first: int, end: int) -> list[int]:
        """The wanted frames in [first, end); they and all before them lie behind us from now on."""
        begin, self._behind = self._behind, bisect_left(self._wanted, end, lo=self._behind)
        return [number for number in self._wanted[begin : self._behind] if number >= first]

    def _frames(self) -> Iterator[VideoFrame]:
        """Pictures until nothing is wanted any more."""
        video = self.video
        for packet in video.packets():
            video.deadline.check(video.path)
            if self.variable_rate and packet.pts is not None and is_shown(packet, video):
                self._packet_slots.add(self.slot(packet.pts))
            frames = video.decode(packet)
            self._damage.follow(packet)
            for frame in frames:
                if self._damage.reaches(frame.pts):
                    self.suspect.add(frame.pts)
                yield frame
                if self._next is None:
                    return
            if self._key_frame_ahead(packet):
                self._seek()

    def _key_frame_ahead(self, packet: Packet[Any]) -> bool:
        """Whether the file's index names a key frame before the next wanted frame, a good way on."""
        if self.from_start or self._next is None or packet.dts is None:
            return False
        if self._timestamp(self._next) - packet.dts < self._far:
            return False
        key_frame = self._key_frame_before(self._next)
        # Some seeks land before the key frame of the index: once is enough.
        return key_frame is not None and key_frame > max(packet.dts, self._sought)

    def _key_frame_before(self, number: int) -> int | None:
        """The decoding time of the last key frame before the middle of a slot, where the index has one."""
        index = self.video.stream.index_entries
        at = index.search_timestamp(self._timestamp(number))
        return index[at].timestamp if at >= 0 else None

    def _timestamp(self, number: int) -> int:
        """The last tick before the middle of a slot."""
        tick = self.video.tick
        return self.video.start + math.ceil((number + 0.5) / self.fps * tick.denominator / tick.numerator) - 1

    def _seek(self) -> None:
        assert self._next is not None
        key_frame = self._key_frame_before(self._next)
        self._sought = self._sought if key_frame is None else key_frame
        self._seeks += 1
        self.video.seek(self._timestamp(self._next))


def probe(path: Path) -> VideoFacts:
    """Read through a file's packets, and decode its first picture. Raises `DataError` naming the file for
    what cannot be read, and for what contradicts its own header."""
    shape: tuple[int, int] | None = None
    times: list[tuple[int, int]] = []
    count = 0
    with open_video(path) as video:
        stream = video.stream
        for packet in video.packets():
            video.deadline.check(path)
            if shape is None:
                for frame in video.decode(packet)[:1]:
                    quarters, _ = orientation(frame, path)
                    shape = (frame.width, frame.height) if quarters % 2 else (frame.height, frame.width)
            if packet.size and is_shown(packet, video):
                count += 1
                if packet.pts is not None:
                    times.append((packet.pts, packet.duration or 0))
        if shape is None:
            raise DataError(f"video {path} holds no picture that can be decoded")
        refuse_absurd_size(path, *shape)
        codec = stream.codec_context.codec.canonical_name
        refuse_lost_packets(video, times, codec)
        claims = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
        if video.counted or not times:
            frames, fps, variable = count, next(iter(claims), 25.0), False
        else:
            seconds = sorted((video.seconds(pts), float(video.tick * for_)) for pts, for_ in times)
            frames, fps, variable = _rate(seconds, claims)
        return VideoFacts(frames, fps, *shape, variable, codec)


def _rate(pictures: list[tuple[float, float]], claims: list[float]) -> tuple[int, float, bool]:
    """(slots, slots a second, whether the rate is variable) from (begin, duration) in seconds, ascending.

    A rate at which every slot has its own picture makes the film a constant-rate one. Else the rate is one
    that most pictures keep (a film that lost some), or the average.
    """
    begins = np.array([begin for begin, _ in pictures])
    begins = begins[begins > -1e-9]
    if len(begins) < 2:
        return max(len(begins), 1), next((rate for rate in claims if 0 < rate <= MAX_RATE), 25.0), False
    end = pictures[-1][0] + pictures[-1][1]
    gaps = np.diff(begins)
    candidates = [*claims, (len(begins) - 1) / max(float(begins[-1] - begins[0]), 1e-6)]
    candidates.append(1 / max(float(np.median(gaps)), 1e-6))
    sane = [rate for rate in candidates if 0 < rate <= MAX_RATE]
    steady: float | None = None
    for rate in sane:
        slots = np.floor(begins * rate + 0.5).astype(np.int64)
        if np.array_equal(slots, np.arange(len(slots))):
            return len(slots), rate, False
        if steady is None and len(np.unique(slots)) >= STEADY * max(slots[-1] + 1, len(slots)):
            steady = rate
    rate = steady or min(len(begins) / max(end, 1e-6), MAX_RATE)
    last = math.floor(begins[-1] * rate + 0.5)
    return max(last + 1, math.floor(end * rate + 0.5)), rate, True
