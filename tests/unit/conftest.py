"""Fixtures of the unit tests: run directories as training leaves them, written without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salt_vla.config import DataConfig, TrainConfig, to_json
from salt_vla.data.clip_table import Clip, ClipTable
from salt_vla.evaluation.bench import Bench, Side
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore
from salt_vla.evaluation.features import TokenModel
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.geometry import ClipGeometry
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


class FilmViews:
    """Pixels of clips, as a store of views gives them."""

    def __init__(self, film: Callable[[Clip], np.ndarray], table: ClipTable) -> None:
        self.films = {clip.clip_id: film(clip) for clip in table.clips()}

    def read_many(self, keys: Sequence[tuple[str, int]], out: np.ndarray | None = None) -> np.ndarray:
        return np.stack([self.films[clip] for clip, _ in keys])

    def read_each(self, keys: Iterable[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], np.ndarray]]:
        return ((key, self.films[key[0]]) for key in keys)


@pytest.fixture
def bench_of(tmp_path: Path) -> Callable[..., Bench]:
    """`bench_of(film, encoders, geometry, cameras=("a",), episodes=16, clips=2, settings=EvalSettings())`:
    a bench over made-up films: `film(clip)` is uint8 (T, H, W, 3). Every second episode is held out; labels
    are "even" and "odd" by the half of the episode's number."""

    def build(
        film: Callable[[Clip], np.ndarray],
        encoders: Mapping[str, TokenModel],
        geometry: ClipGeometry,
        cameras: Sequence[str] = ("a",),
        episodes: int = 16,
        clips: int = 2,
        settings: EvalSettings = EvalSettings(),  # noqa: B008
    ) -> Bench:
        sides = []
        for part, split in enumerate(("train", "validation")):
            rows = [
                Clip(
                    clip_id=f"d/{episode}/{camera}/{number}",
                    dataset="d",
                    source="table",
                    file=f"{episode}.mp4",
                    first_frame=10 * number,
                    episode=episode,
                    episode_first_frame=0,
                    episode_frames=100,
                    camera=camera,
                    label="odd" if episode // 2 % 2 else "even",
                    fps=10.0,
                    variable_rate=False,
                    split=split,
                )
                for camera in cameras
                for episode in range(part, episodes, 2)
                for number in range(clips)
            ]
            table = ClipTable.from_clips(rows, tmp_path)
            views = ClipViews(table.clip_ids, FilmViews(film, table), f"{film.__qualname__} {split}")
            sides.append(Side(table, views))
        store = FeatureStore(tmp_path / "features", num_workers=1)
        return Bench(encoders, *sides, DataConfig(), geometry, settings, store)

    return build
