"""Pictures of a run: drawn from what lies on disk, where people and the dashboard look for them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from salt_vla.cli import train as train_command
from salt_vla.rundir import RunDirectory


@pytest.fixture
def drawn(workshop: Any, salt: Any) -> RunDirectory:
    """A copy of the workshop's teacher, so that nothing of the shared one is written."""
    shutil.copytree(workshop.teacher, salt.root / "runs" / "teacher")
    return RunDirectory(salt.root / "runs" / "teacher")


def _pixels(png: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png.read_bytes())).convert("RGB"))


def test_masks_and_components_are_drawn_and_drawn_alike(drawn: RunDirectory, salt: Any) -> None:
    before = {file: file.read_bytes() for file in drawn.path.rglob("*") if file.is_file()}
    said = salt.ok("runs", "pictures", "teacher").out.split()
    masks, tokens = (drawn.pictures / name for name in ("masks.png", "pca.png"))
    assert said == [str(masks), str(tokens)]
    for png in (masks, tokens):
        assert min(_pixels(png).shape[:2]) > 300 and _pixels(png).std() > 20
    first = masks.read_bytes(), tokens.read_bytes()
    salt.ok("runs", "pictures", "teacher")
    assert (masks.read_bytes(), tokens.read_bytes()) == first
    assert {file: file.read_bytes() for file in before} == before


def test_another_clip_gives_another_picture(drawn: RunDirectory, salt: Any, tiny_table: Any) -> None:
    salt.ok("runs", "pictures", "teacher")
    first = (drawn.pictures / "pca.png").read_bytes()
    salt.ok("runs", "pictures", "teacher", "--clip", tiny_table.clip_ids[-1])
    assert (drawn.pictures / "pca.png").read_bytes() != first
    assert "nowhere/7" in salt("runs", "pictures", "teacher", "--clip", "nowhere/7").sentence


def test_before_the_first_checkpoint_there_are_masks(drawn: RunDirectory, salt: Any) -> None:
    shutil.rmtree(drawn.checkpoints)
    salt.ok("runs", "pictures", "teacher")
    assert [file.name for file in drawn.pictures.iterdir()] == ["masks.png"]


def test_what_cannot_be_drawn_is_a_sentence(drawn: RunDirectory, salt: Any) -> None:
    assert "no run" in salt("runs", "pictures", "nobody").sentence
    config = json.loads(drawn.config_file.read_text())
    config["data"]["table"] = str(salt.root / "gone.parquet")
    drawn.config_file.write_text(json.dumps(config))
    assert "gone.parquet" in salt("runs", "pictures", "teacher").sentence
    drawn.config_file.unlink()
    drawn.set_status(drawn.status())
    assert "before it had settings" in salt("runs", "pictures", "teacher").sentence
    assert not drawn.pictures.exists()


def test_a_run_that_took_long_draws_them_at_its_end(
    salt: Any, pixels: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    salt.ok(*pixels("short", "--max-steps", 2))
    assert not salt.at("short").pictures.exists()
    monkeypatch.setattr(train_command, "LONG_ENOUGH_FOR_PICTURES", 0.0)
    salt.ok(*pixels("long", "--max-steps", 2))
    assert sorted(file.name for file in salt.at("long").pictures.iterdir()) == ["masks.png", "pca.png"]


def test_pictures_never_fail_a_run(
    salt: Any, pixels: Callable[..., list[object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_command, "LONG_ENOUGH_FOR_PICTURES", 0.0)
    run = salt.at("full")
    run.path.mkdir(parents=True)
    run.pictures.write_text("a file where the folder should be")
    salt.ok(*pixels("full", "--max-steps", 2))
    assert run.status().state == "finished"
    assert "no pictures: " in run.log_file.read_text()
