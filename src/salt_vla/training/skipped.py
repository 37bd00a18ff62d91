"""Counts the damaged records that a run did without, says each once in its log, and stops a run of too many.

Knows batches and the run directory; what took a record's place is the batches' business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from salt_vla.batches import Batch
from salt_vla.cache import CorruptRecord
from salt_vla.errors import CacheError
from salt_vla.rundir import RunDirectory

MAX_SHARE = 0.01  # of the records read; more is no accident but a damaged disk
MIN_TO_STOP = 10  # damaged ones: of a few records, one is more than the share


@dataclass
class Tally:
    """Clips that batches have held so far, and damaged records among those asked for."""

    clips: int = 0
    corrupt: int = 0

    def as_row(self) -> dict[str, int]:
        """What a row of metrics says: nothing where all was well."""
        return {"corrupt_records": self.corrupt} if self.corrupt else {}


class SkippedRecords:
    """What has been said in the run's log is not said again, whichever process said it."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self._said = set(run.log_file.read_text().splitlines()) if run.log_file.exists() else set()

    def watch(self, batches: Iterable[Batch], tally: Tally, may_be_none: bool = False) -> Iterator[Batch]:
        """The batches that hold clips, each counted when it is taken. Raises `CacheError` when too large a
        share of the records is damaged, or when not one clip could be read (unless there `may_be_none`)."""
        is_empty, damaged = True, None
        for batch in batches:
            tally.clips += len(batch.keys)
            tally.corrupt += len(batch.corrupt)
            for damaged in batch.corrupt:
                self._say(f"skipped: {damaged}")
            if batch.corrupt and tally.corrupt >= max(MIN_TO_STOP, MAX_SHARE * tally.clips):
                raise _too_many(tally, batch.corrupt[-1])
            if batch.keys:
                is_empty = False
                yield batch
        if is_empty and damaged is not None and not may_be_none:
            raise _too_many(tally, damaged)

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.run.log(line)


def _too_many(tally: Tally, damaged: CorruptRecord) -> CacheError:
    return CacheError(
        f"{tally.corrupt} records were damaged while {tally.clips} clips were read, too many to go on "
        f"without: the last in {damaged.folder}, {damaged.file}; `salt-vla cache verify` names all of them "
        "and `salt-vla cache repair` computes them again, then the same command goes on"
    )
