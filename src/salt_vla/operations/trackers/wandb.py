"""wandb: the run under one id for as long as it lives, online or, with WANDB_MODE=offline, as files in the
run's folder `wandb/`. Its own variables say where to (WANDB_PROJECT, WANDB_ENTITY, WANDB_BASE_URL) and hold
the key, which only wandb reads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from urllib.parse import urlsplit

import wandb

from salt_vla.operations.trackers.base import PROJECT, Opening, Row, flat
from salt_vla.rundir import Status

SECONDS_TO_OPEN = 60


class Wandb:
    """wandb's own step is the row's number, of which it takes none twice. Charts are drawn over `step`, the
    run's."""

    keeps = False

    def __init__(self, opening: Opening) -> None:
        settings = wandb.Settings(
            init_timeout=SECONDS_TO_OPEN,
            console="off",
            silent=True,
            # The config says what the run is; of the machine and its environment nothing is told.
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=opening.run.name,
            id=opening.identifier,
            resume="allow",
            dir=str(opening.run.path),
            config=opening.config,
            settings=settings,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        used = self._run.settings
        self.is_online = used.mode not in ("offline", "disabled", "dryrun")
        where = urlsplit(used.base_url).hostname if self.is_online else used.mode
        self.destination = f"{where}/{used.entity or ''}/{used.project}/{opening.identifier}"

    def held(self) -> int | None:
        return self._run.starting_step if self.is_online else None

    def send(self, rows: Sequence[tuple[int, Row]]) -> None:
        for number, row in rows:
            self._run.log(flat(row) | {"step": row["step"]}, step=number)

    def rewind(self, step: int) -> None:
        """What was sent stays; the points that come again are drawn after it, over the same steps."""

    def close(self, status: Status) -> None:
        self._run.summary["exit_reason"] = status.exit_reason
        self._run.finish(exit_code=0 if status.state in ("finished", "stopped") else 1)
