"""Features on disk: extracted once, streamed to files a batch at a time, gone on with after an interruption.

One file of rows (mapped when read) and one JSON file an encoder, reading and list of clips. Knows nothing of
what is done with features.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
import xxhash

from salt_vla.errors import CacheError, DataError
from salt_vla.evaluation.features import CONSTANT, TOKENS, Reading, TokenModel, features_of
from salt_vla.files import read_json, write_text, writing_to
from salt_vla.progress import progress

if TYPE_CHECKING:
    from jaxtyping import Float

    from salt_vla.view_store import ViewSource

BATCH_SIZE = 64
VERSION = 1


@dataclass(frozen=True)
class ClipViews:
    """Clips in order, where their pixels come from, and a hash of everything that decides those pixels."""

    clip_ids: Sequence[str]
    views: ViewSource
    pixels_hash: str
    title: str = ""


@dataclass
class FeatureStore:
    """Files below `folder`, named by what they hold. `None`: features are kept in memory alone."""

    folder: Path
    batch_size: int = BATCH_SIZE
    check: Callable[[], None] = field(default=lambda: None)

    def features(
        self, encoders: Mapping[str, TokenModel], clips: ClipViews, readings: Sequence[Reading]
    ) -> dict[Reading, dict[str, Float[np.ndarray, " clips *dims"]]]:
        """Every encoder's features under every reading, rows in the clips' order, mapped from their files;
        `constant` has none. What is missing is extracted in one pass over the clips.

        Pooled features are float32, tokens float16. Raises `DataError` for a clip that cannot be read and for
        features that are not finite.
        """
        if not len(clips.clip_ids):
            raise DataError("there is no clip to extract features of")
        self.folder.mkdir(parents=True, exist_ok=True)
        places = {
            (name, reading): self._place(model, clips, reading)
            for name, model in encoders.items()
            for reading in readings
        }
        missing: dict[tuple[str, Reading], Path] = {}
        for key, path in places.items():  # Two names may stand for the same weights.
            if path not in missing.values() and not path.with_suffix(".json").is_file():
                missing[key] = path
        if missing:
            self._extract(encoders, clips, missing)
        found = {
            reading: {name: self._open(places[name, reading], len(clips.clip_ids)) for name in encoders}
            for reading in readings
        }
        nothing = np.zeros((len(clips.clip_ids), 0), np.float32)
        return {reading: by_name | {CONSTANT: nothing} for reading, by_name in found.items()}

    def _place(self, model: TokenModel, clips: ClipViews, reading: Reading) -> Path:
        said = [VERSION, model.fingerprint, clips.pixels_hash, *clips.clip_ids, repr(reading)]
        return self.folder / f"{xxhash.xxh3_128_hexdigest(json.dumps(said).encode())}.rows"

    def _extract(
        self, encoders: Mapping[str, TokenModel], clips: ClipViews, missing: dict[tuple[str, Reading], Path]
    ) -> None:
        total = len(clips.clip_ids)
        with ExitStack() as stack:
            growing = {key: stack.enter_context(_Growing(path, total)) for key, path in missing.items()}
            start = min(file.rows for file in growing.values())
            with progress(f"Reading features{clips.title}", total, "clips", done=start) as advance:
                for first, frames in self._batches(clips, start):
                    self.check()
                    for name, model in encoders.items():
                        mine = [reading for who, reading in growing if who == name]
                        if not mine:
                            continue
                        for reading, values in features_of(name, model, frames, mine).items():
                            _require_finite(name, values, clips.clip_ids[first : first + len(values)])
                            kind = np.float16 if reading.pooling == TOKENS else np.float32
                            growing[name, reading].append(first, values.astype(kind))
                    advance(len(frames))
            for (name, reading), file in growing.items():
                file.finish({"encoder": encoders[name].fingerprint, "reading": repr(reading), "clips": total})

    def _batches(self, clips: ClipViews, start: int) -> Iterator[tuple[int, torch.Tensor]]:
        for first in range(start, len(clips.clip_ids), self.batch_size):
            chosen = clips.clip_ids[first : first + self.batch_size]
            yield first, torch.from_numpy(clips.views.read_many([(clip, 0) for clip in chosen]))

    def _open(self, path: Path, total: int) -> np.ndarray:
        said = read_json(path.with_suffix(".json"), dict)
        shape, dtype = tuple(said["shape"]), np.dtype(said["dtype"])
        size = path.stat().st_size if path.is_file() else 0
        if shape[0] != total or size != math.prod(shape) * dtype.itemsize:
            raise CacheError(f"features {path} are damaged: {size} bytes; remove it and its .json")
        return np.memmap(path, dtype, "r", shape=shape)


def _require_finite(name: str, values: np.ndarray, clip_ids: Sequence[str]) -> None:
    is_whole = np.isfinite(values).reshape(len(values), -1).all(1)
    if not is_whole.all():
        raise DataError(
            f"features of encoder {name!r} hold NaN or infinite values at clip "
            f"{clip_ids[int(np.argmin(is_whole))]!r}; check the encoder"
        )


class _Growing:
    """One file being written, rows appended in order; what an earlier process wrote whole is kept."""

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total = path, total
        self.partial, self.note = path.with_suffix(".partial"), path.with_suffix(".partial.json")
        self.rows, self.said = 0, dict[str, object]()
        self.file: BinaryIO

    def __enter__(self) -> _Growing:
        with writing_to(self.partial):
            self.file = self.partial.open("a+b")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise CacheError(
                f"another process extracts these features: {self.partial}; wait for it"
            ) from error
        if self.note.is_file():
            said = read_json(self.note, dict)
            row_bytes = math.prod(said["shape"][1:]) * np.dtype(said["dtype"]).itemsize
            self.rows = os.fstat(self.file.fileno()).st_size // row_bytes
            self.said = said
            self.file.truncate(self.rows * row_bytes)
        else:
            self.file.truncate(0)
        return self

    def append(self, first: int, values: np.ndarray) -> None:
        """Rows `first` and following; those that are there already are left."""
        if not self.said:
            self.said = {"shape": [self.total, *values.shape[1:]], "dtype": values.dtype.str}
            write_text(self.note, json.dumps(self.said))
        new = values[max(self.rows - first, 0) :]
        with writing_to(self.partial):
            self.file.write(np.ascontiguousarray(new).tobytes())
        self.rows += len(new)

    def finish(self, said: dict[str, object]) -> None:
        with writing_to(self.partial):
            self.file.flush()
            os.fsync(self.file.fileno())
            self.partial.replace(self.path)
        write_text(self.path.with_suffix(".json"), json.dumps(self.said | said, indent=1))
        self.note.unlink(missing_ok=True)

    def __exit__(self, *exc: object) -> None:
        self.file.close()
