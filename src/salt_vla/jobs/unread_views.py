"""When views that could not be read stop a build, and what can be done then.

Asked before a shard is published, and before a cache is called complete. Knows films and what a cache lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from salt_vla.cache import CacheWriter
from salt_vla.cache.ledger import Contents
from salt_vla.cache.writer import Shard
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.video_file import OutOfReach
from salt_vla.errors import DataError
from salt_vla.jobs.data_index import MAX_BAD_SHARE

AGAIN = "mend the files and run again"


def repair_cure(folder: Path) -> str:
    """How latents in quarantine are tried again."""
    return (
        f"mend the files, then `salt-vla cache repair {folder} --quarantined --teacher … --data …` computes "
        "their latents"
    )


def refuse_too_many_bad(bad: int, total: int, folder: Path, cure: str = AGAIN) -> None:
    """More than `MAX_BAD_SHARE` of a cache's views in quarantine are no accident: `DataError`."""
    if bad > MAX_BAD_SHARE * total:
        raise DataError(
            f"{bad} of {total} clip views could not be read, more than {MAX_BAD_SHARE:.0%}; "
            f"{folder}/quarantine.json names each with its reason; {cure}"
        )


@dataclass(frozen=True)
class Approval:
    """Of a cache that `writer` makes. `cure`: what brings back views that are in quarantine. `table`: whose
    films are decoded while it is made, and have to stay the same."""

    writer: CacheWriter
    cure: str
    table: ClipTable | None = None

    def beginning(self) -> None:
        """Refuse to go on with a cache of which too much is in quarantine already."""
        bad, total = self.writer.ledger.num_quarantined, self.writer.num_keys
        if bad > MAX_BAD_SHARE * total:
            raise DataError(
                f"{bad} of the {total} clip views of {self.writer.folder} are in quarantine already, more "
                f"than {MAX_BAD_SHARE:.0%}, though it is unfinished; {self.cure}"
            )

    def shard(self, shard: Shard, errors: Sequence[DataError]) -> None:
        """Refuse a shard before it is published, so that after the cure the same command makes it: one of
        other films than those the build began with, one of which every file is out of reach, one that
        makes too many bad. `errors`: of those of its views that have no pixels. Raises `DataError`."""
        clips = list(dict.fromkeys(clip_id for clip_id, _ in shard.keys))
        if self.table is not None and (film := self.table.changed_file(clips)):
            raise DataError(
                f"video {film} is another one than when this build began, and nothing was kept of the shard "
                "it lies in; put it back and run the same command again, or build another cache of the new "
                "film"
            )
        if len(errors) == len(shard.keys) > 1 and all(isinstance(error, OutOfReach) for error in errors):
            raise DataError(
                f"not one of {len(errors)} clip views in a row can be read, as when a disk is not there, and "
                f"nothing was kept of them; the first is {errors[0]}; the same command then goes on"
            )
        bad, total = self.writer.ledger.num_quarantined + len(errors), self.writer.num_keys
        if errors and bad > MAX_BAD_SHARE * total:
            # Films that were bad from the start are others once they are mended, and with them the cache.
            has_begun = bool(self.writer.ledger.done)
            again = (
                "run the same command again" if has_begun else f"remove {self.writer.folder} and run again"
            )
            raise DataError(
                f"{bad} of {total} clip views could not be read so far, more than {MAX_BAD_SHARE:.0%}; the "
                f"last is {errors[-1]}; `salt-vla data check` names each: mend the files, or leave such "
                f"clips out of the table, {'and ' if has_begun else ''}{again}"
            )

    def whole(self, contents: Contents) -> None:
        """Refuse to call a cache complete of which too much is in quarantine."""
        bad, total = len(contents.quarantine), self.writer.num_keys
        refuse_too_many_bad(bad, total, self.writer.folder, self.cure)
