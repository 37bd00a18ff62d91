"""Signs that a film has lost packets or pictures. Knows packets and times, not which pictures are wanted.

A film may lawfully have any times, so only what contradicts its own header or order, and what FFmpeg logs as
an error, counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from salt_vla.errors import DataError

if TYPE_CHECKING:
    from av.packet import Packet

    from salt_vla.data.video_file import Video

IN_ORDER_CODECS = {"vp8", "vp9", "av1"}  # Their packets come in the order in which they are shown.
MAX_REORDER = 16  # pictures; H.264's and HEVC's largest decoded picture buffer (ITU-T H.264, A.3.1)
DURATION_SLACK = 0.05  # of the length that a header says
# Their headers hold a length that was written with the film. Others' FFmpeg guesses from the packets, or
# takes from an index that editing changes.
LENGTH_IN_HEADER = {"matroska,webm", "flv"}


class Damage:
    """Which pictures FFmpeg's complaints may concern: those that come out after one, up to the next key
    frame in the order of decoding."""

    def __init__(self, video: Video) -> None:
        self._video = video
        self._heard = 0
        self._is_there = False
        self._key_frame: int | None = None  # the newest one's time
        self._healed_at: int | None = None

    def follow(self, packet: Packet[Any]) -> None:
        """To be called after each packet was decoded."""
        if packet.is_keyframe and packet.pts is not None:
            self._key_frame = self._healed_at = packet.pts
        heard = len(self._video.complaints) + len(self._video.broken_structure)
        if heard == self._heard:
            return
        self._heard, self._is_there = heard, True
        # Pictures shown before a key frame but decoded after it miss the ones they were made from when a
        # pass begins there; the key frame and what follows it does not need them.
        leads = packet.pts is not None and self._key_frame is not None and packet.pts < self._key_frame
        self._healed_at = self._key_frame if leads else None

    def reaches(self, pts: int | None) -> bool:
        """Whether a picture that comes out now may show damage."""
        return self._is_there and (pts is None or self._healed_at is None or pts < self._healed_at)


def damaged(video: Video, number: int) -> DataError:
    heard = [*video.complaints, *video.broken_structure]
    why = f" (FFmpeg: {heard[-1]})" if heard else ""
    return DataError(f"video {video.path} is damaged at frame {number}{why}; restore the file")


def refuse_lost_packets(video: Video, times: Sequence[tuple[int, int]], codec: str) -> None:
    """Raise `DataError` for a film whose packets contradict its header, or each other; `times` are their
    (begin, duration) in ticks, in the order of the file."""
    if times and not video.counted:
        _refuse_other_length(video, times)
        _refuse_disorder(video, [begin for begin, _ in times], 0 if codec in IN_ORDER_CODECS else MAX_REORDER)
    if video.broken_structure:
        raise DataError(
            f"video {video.path} is truncated or damaged: FFmpeg says {video.broken_structure[0]!r}; "
            "restore the file"
        )


def _refuse_other_length(video: Video, times: Sequence[tuple[int, int]]) -> None:
    stated = _stated_end(video)
    if stated is None:
        return
    begins = np.array(sorted(begin for begin, _ in times)) * float(video.tick)
    end = max(begin + duration for begin, duration in times) * float(video.tick)
    usual = float(np.median(np.diff(begins))) if len(begins) > 1 else stated
    slack = max(2 * usual, DURATION_SLACK * stated)
    found = end if end < stated - slack else float(begins[-1])
    if found < stated - slack or found > stated + slack:
        raise DataError(
            f"video {video.path} ends after {found:.2f} s though its header says {stated:.2f} s: it is "
            "truncated or damaged; restore the file"
        )


def _stated_end(video: Video) -> float | None:
    """Seconds at which the video ends by its header; None where that does not say."""
    container = video.container
    if container.format.name not in LENGTH_IN_HEADER:
        return None
    if len(container.streams) == 1:
        return container.duration / 1e6 if container.duration else None
    # The header's length is the longest stream's; some writers tag each with its own (HH:MM:SS.s).
    hours, *rest = video.stream.metadata.get("DURATION", "").split(":")
    try:
        return 3600 * float(hours) + 60 * float(rest[0]) + float(rest[1])
    except (ValueError, IndexError):
        return None


def _refuse_disorder(video: Video, begins: Sequence[int], reorder: int) -> None:
    ranks = np.empty(len(begins), np.int64)
    ranks[np.argsort(begins, kind="stable")] = np.arange(len(begins))
    late = np.abs(ranks - np.arange(len(begins))) > reorder
    if late.any():
        at = begins[int(late.argmax())] * float(video.tick)
        raise DataError(
            f"video {video.path} has times in disorder at {at:.2f} s: it is damaged; restore the file"
        )
