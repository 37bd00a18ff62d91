"""Fixtures of the unit tests: run directories as training leaves them, written without training."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from salt_vla.config import TrainConfig, to_json
from salt_vla.rundir import RunDirectory, Status, to_json_line

WriteRun = Callable[..., RunDirectory]


def metrics_of(steps: int, every: int = 10, level: float = 0.0) -> list[dict[str, Any]]:
    """A loss that falls from 1 to 0.5 and an R² that rises from 0 to 0.5, both raised by `level`; a train row
    `every` steps and a val row every second time."""
    rows: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        share = step / steps
        scores = {"loss": 1 - share / 2 + level, "r2_position_mean": share / 2 + level}
        pace = {"clips_per_s": 40.0, "data_wait_share": 0.05, "memory_gb": 1.5}
        rows.append({"kind": "train", "step": step} | scores | pace)
        if step % (2 * every) == 0 or step == steps:
            rows.append({"kind": "val", "step": step} | scores)
    return rows


@pytest.fixture
def rows_of() -> Callable[..., list[dict[str, Any]]]:
    return metrics_of


@pytest.fixture
def write_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteRun:
    """`write_run(name, rows, config=None, state="finished", **status)` writes a run below an empty root."""
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))

    def write(
        name: str,
        rows: list[dict[str, Any]] | None = None,
        config: TrainConfig | None = None,
        state: str = "finished",
        **status: Any,
    ) -> RunDirectory:
        run = RunDirectory.named(name)
        run.path.mkdir(parents=True)
        rows = metrics_of(100) if rows is None else rows
        last = rows[-1]["step"] if rows else 0
        run.config_file.write_text(to_json(config or TrainConfig(steps=100, batch_size=4)))
        about = Status(state, **{"step": last, "total_steps": 100, "exit_reason": state} | status)
        (run.path / "status.json").write_text(json.dumps(asdict(about)))
        run.metrics_file.write_text("".join(to_json_line(row) + "\n" for row in rows))
        return run

    return write
