"""Features on disk: extracted once, streamed to files a batch at a time, gone on with after an interruption.

One file of rows (mapped when read) and one JSON file an encoder, reading and list of clips. Knows nothing of
what is done with features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from salt_vla.data.read_ahead import read_ahead
from salt_vla.data.video_file import OutOfReach
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import DataError, ResourceError
from salt_vla.evaluation.feature_files import Growing, note_of, open_rows
from salt_vla.evaluation.features import CONSTANT, TOKENS, Reading, TokenModel, features_of
from salt_vla.freed_memory import keep_freed_memory
from salt_vla.interrupts import stop_on_signals
from salt_vla.progress import progress
from salt_vla.teachers.base import FrozenTeacher
from salt_vla.teachers.batch_size import largest_batch
from salt_vla.training.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

    from salt_vla.view_store import ViewSource

    Batch = tuple[list[str], UInt8[torch.Tensor, "clips frames size size 3"], dict[str, str]]

LARGEST_BATCH = 64
TOKENS_AT_ONCE = 16_384  # More of them leave a processor's caches, and take gigabytes in a large network.
FORWARD_SHARE = 0.8  # of a limit of memory; the rest is for pixels that wait and for holes between blocks
VERSION = 2


class UnreadableClips(DataError):
    """Clips without pixels, `left_out`: clip → why; features of the others are kept."""

    def __init__(self, left_out: Mapping[str, str]) -> None:
        self.left_out = dict(left_out)
        first = next(iter(self.left_out.values()))
        super().__init__(f"{len(self.left_out)} clips cannot be read; the first: {first}")


@dataclass(frozen=True)
class ClipViews:
    """Clips in order, where their pixels come from, and a hash of everything that decides those pixels."""

    clip_ids: Sequence[str]
    views: ViewSource
    pixels_hash: str
    title: str = ""


@dataclass
class FeatureStore:
    """Files below `folder`, named by what they hold. `batch_size`: clips that go through a network at once
    (0: by their tokens, as many as `memory_limit` bytes allow where that is given). `num_workers`: processes
    that decode ahead of the networks, where pixels come from a decoder. `check` may raise, between batches
    and while another process is waited for."""

    folder: Path
    batch_size: int = 0
    num_workers: int = 0
    memory_limit: int = 0
    check: Callable[[], None] = field(default=lambda: None)

    def features(
        self, encoders: Mapping[str, TokenModel], clips: ClipViews, readings: Sequence[Reading]
    ) -> dict[Reading, dict[str, Float[np.ndarray, " clips *dims"]]]:
        """Every encoder's features under every reading, rows in the clips' order, mapped from their files;
        `constant` has none. What is missing is extracted in one pass over the clips.

        Pooled features are float32, tokens float16. Raises `UnreadableClips` once everything else is kept:
        asked again without those clips, nothing is extracted twice. Raises `DataError` for features that are
        not finite.
        """
        if not len(clips.clip_ids):
            raise DataError("there is no clip to extract features of")
        places = {
            (name, reading): self._place(model, clips, clips.clip_ids, reading)
            for name, model in encoders.items()
            for reading in readings
        }
        while missing := self._missing(places):
            self._extract(encoders, clips, missing)
        found = {
            reading: {name: open_rows(places[name, reading], len(clips.clip_ids)) for name in encoders}
            for reading in readings
        }
        nothing = np.zeros((len(clips.clip_ids), 0), np.float32)
        return {reading: by_name | {CONSTANT: nothing} for reading, by_name in found.items()}

    def kept(
        self, model: TokenModel, clips: ClipViews, reading: Reading
    ) -> Float[np.ndarray, " clips *dims"] | None:
        """One encoder's features of all these clips, where they are on disk; nothing is extracted."""
        path = self._place(model, clips, clips.clip_ids, reading)
        note = note_of(path)
        return None if note is None or note.left_out else open_rows(path, len(clips.clip_ids))

    def _missing(self, places: Mapping[tuple[str, Reading], Path]) -> dict[tuple[str, Reading], Path]:
        missing: dict[tuple[str, Reading], Path] = {}
        for key, path in places.items():
            note = note_of(path)
            if note is None and path not in missing.values():  # Two names may stand for the same weights.
                missing[key] = path
            elif note is not None and note.left_out:
                raise UnreadableClips(note.left_out)
        return missing

    def _place(self, model: TokenModel, clips: ClipViews, clip_ids: Sequence[str], reading: Reading) -> Path:
        said = [VERSION, model.fingerprint, clips.pixels_hash, *clip_ids, repr(reading)]
        return self.folder / f"{xxhash.xxh3_128_hexdigest(json.dumps(said).encode())}.rows"

    def _extract(
        self, encoders: Mapping[str, TokenModel], clips: ClipViews, missing: dict[tuple[str, Reading], Path]
    ) -> None:
        """Fill the missing files; returns early where another process has filled some meanwhile."""
        with stop_on_signals() as stop, ExitStack() as stack:

            def check() -> None:
                stop.check("while reading features")
                self.check()

            # In one order, so that two processes never wait for each other.
            ordered = sorted(missing.items(), key=lambda item: item[1])
            files = {key: stack.enter_context(Growing(path, check)) for key, path in ordered}
            if not any(file.is_done for file in files.values()):
                self._fill(encoders, clips, files, check)
            check()  # What came during the last batch, too.

    def _fill(
        self,
        encoders: Mapping[str, TokenModel],
        clips: ClipViews,
        files: Mapping[tuple[str, Reading], Growing],
        check: Callable[[], None],
    ) -> None:
        if not self.memory_limit:  # It takes more at the peak than a batch was measured to take.
            keep_freed_memory()
        total, names = len(clips.clip_ids), list(dict.fromkeys(name for name, _ in files))
        batch = self.batch_size or _batch_size([encoders[name] for name in names], self.memory_limit)
        # A batch is made of the same clips again, so that its bits are the same.
        start = min(_clips_done(clips.clip_ids, file) for file in files.values()) // batch * batch
        begun = set(clips.clip_ids[:start])
        left_out = {c: why for file in files.values() for c, why in file.left_out.items() if c in begun}
        row = start - len(left_out)
        seconds = dict.fromkeys(names, 0.0)
        with progress(f"Reading features{clips.title}", total, "clips", done=start) as advance:
            for clip_ids, frames, unread in self._batches(clips, start, batch, check):
                check()
                left_out |= unread
                for name in names if clip_ids else ():
                    began = time.perf_counter()
                    mine = [reading for who, reading in files if who == name]
                    with _memory_explained(name, len(frames)):
                        found = features_of(name, encoders[name], frames, mine)
                    seconds[name] += time.perf_counter() - began
                    for reading, values in found.items():
                        files[name, reading].append(
                            row, _kept(name, values, reading, clip_ids), total, left_out
                        )
                row += len(clip_ids)
                advance(len(clip_ids) + len(unread))
        if not row:
            raise DataError(
                f"not one of {total} clips can be read; the first: {next(iter(left_out.values()))}"
            )
        whole = [clip for clip in clips.clip_ids if clip not in left_out]
        for (name, reading), file in files.items():
            about: dict[str, object] = {"encoder": encoders[name].fingerprint, "reading": repr(reading)}
            about |= {"seconds": seconds[name], "clips": len(whole), "pixels": clips.pixels_hash}
            file.finish(self._place(encoders[name], clips, whole, reading), left_out, about)

    def _batches(
        self, clips: ClipViews, start: int, batch: int, check: Callable[[], None]
    ) -> Iterator[Batch]:
        """(clips with pixels, their frames, why others have none)."""
        keys = [(clip, 0) for clip in clips.clip_ids[start:]]
        # A worker makes a reader of its own, and knows of no other kind.
        workers = self.num_workers if type(clips.views) is ViewReader else 0
        with closing(read_ahead(clips.views, keys, workers, check)) as views:
            for _ in range(start, len(clips.clip_ids), batch):
                part = list(islice(views, batch))
                films = {key[0]: pixels for key, pixels in part if isinstance(pixels, np.ndarray)}
                errors = {key[0]: error for key, error in part if isinstance(error, DataError)}
                for error in errors.values():
                    if isinstance(error, OutOfReach):  # Nothing is known of them: not to be left out.
                        raise error
                stacked = np.stack(list(films.values())) if films else np.zeros(0, np.uint8)
                yield list(films), torch.from_numpy(stacked), {c: str(e) for c, e in errors.items()}


def _batch_size(models: Sequence[TokenModel], memory_limit: int = 0) -> int:
    """That suits the largest of them. Raises `ResourceError` where one clip needs more than the limit."""
    most = max(model.geometry.num_tokens for model in models)
    batch = min(max(TOKENS_AT_ONCE // most, 1), LARGEST_BATCH)
    if not memory_limit:
        return batch
    networks = [each for each in models if isinstance(each, FrozenTeacher)]
    room = int(FORWARD_SHARE * memory_limit)
    try:
        return min([batch, *(largest_batch(each, room, batch) for each in networks)])
    except ResourceError as error:
        raise ResourceError(f"{error} (of --memory-limit {FORWARD_SHARE:.0%} are for this)") from error


@contextmanager
def _memory_explained(name: str, clips: int) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise ResourceError(
            f"memory ran out ({said}) while {clips} clip{'s' * (clips > 1)} passed encoder {name!r}; let "
            "fewer of them pass at once with --memory-limit, as 4GB, or take --device cpu"
        ) from error


def _clips_done(clip_ids: Sequence[str], file: Growing) -> int:
    """How many of the clips, from the first on, are in the file or known to be unreadable."""
    rows = 0
    for number, clip in enumerate(clip_ids):
        rows += clip not in file.left_out
        if rows > file.rows:
            return number
    return len(clip_ids)


def _kept(name: str, values: np.ndarray, reading: Reading, clip_ids: Sequence[str]) -> np.ndarray:
    """As it is kept; `DataError` for what is no number, or too large for a token's 16 bits."""
    with np.errstate(over="ignore"):
        kept = values.astype(np.float16 if reading.pooling == TOKENS else np.float32)
    is_whole = np.isfinite(kept).reshape(len(kept), -1).all(1)
    if not is_whole.all():
        raise DataError(
            f"features of encoder {name!r} hold NaN or infinite values at clip "
            f"{clip_ids[int(np.argmin(is_whole))]!r}; check the encoder"
        )
    return kept
