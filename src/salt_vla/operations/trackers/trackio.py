"""trackio: a local database (`trackio show` draws it), or the Space or server that its own variables name
(TRACKIO_SPACE_ID, TRACKIO_SERVER_URL).
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import trackio

from salt_vla.operations.trackers.base import PROJECT, Opening, Row, flat
from salt_vla.rundir import Status


class Trackio:
    """A run by its name and identifier: runs of one name below several roots do not mix."""

    keeps = False

    def __init__(self, opening: Opening) -> None:
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        where = os.environ.get("TRACKIO_SPACE_ID") or ("server" * ("TRACKIO_SERVER_URL" in os.environ))
        name = f"{opening.run.name}-{opening.identifier}"
        self.destination = f"{where or 'local'}/{project}/{name}"
        self._run = trackio.init(
            project=project,
            name=name,
            config=opening.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def held(self) -> int | None:
        return None

    def send(self, rows: Sequence[tuple[int, Row]]) -> None:
        for _, row in rows:
            self._run.log(flat(row), step=row["step"])

    def rewind(self, step: int) -> None:
        """What was sent stays; the points that come again are drawn after it, over the same steps."""

    def close(self, status: Status) -> None:
        self._run.finish()
