"""Every experiment of the earlier attempt at full shape: 1,568 tokens, latents 768 wide, resumed.

`make test` takes the smallest student; `make torture` all of them, up to ViT-Large.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cli import main
from salt_vla.recipes import get_recipe, seed

NAMES = [recipe.name for recipe in seed.RECIPES]
SMALLEST = "baseline_tiny"


@pytest.fixture(scope="session")
def latents(films: Path) -> Path:
    """A cache 768 wide of a random ViT-Base: one block of it, so that tests need not wait for twelve."""
    asked = ["cache", "build", "--teacher", "random:vit_base_patch16_224", "--layer", "1", "--workers", "1"]
    asked += ["--recipe", SMALLEST, "--data", str(films), "--out", str(films.parent / "latents")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main(asked) == 0, said.getvalue()
    return films.parent / "latents"


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_at_full_shape_runs_three_steps_and_resumes(
    salt: Any, films: Path, latents: Path, name: str, request: pytest.FixtureRequest
) -> None:
    long = request.config.getoption("--torture")
    if name != SMALLEST and not long:
        pytest.skip("the long form is `make torture`")
    # Trying out precisions takes ten steps, which are no part of the promise; 8 processes are of the long.
    settings = ["runtime.precision=float32", *([] if long else ["data.num_workers=0"])]
    asked = [
        "train",
        name,
        *settings,
        "--data",
        films,
        "--cache",
        latents,
        "--batch-size",
        1,
        "--name",
        "run",
    ]
    salt.ok(*asked, "--max-steps", 3)
    assert salt.json("runs", "show", "run")["step"] == 3
    first = salt.at("run").metrics("train")[-1]
    assert first["step"] == 3 and first["loss"] > 0
    salt.ok(*asked, "--max-steps", 4)
    shown = salt.json("runs", "show", "run")
    assert (shown["state"], shown["step"], shown["resumed_from"]) == ("finished", 4, [3])
    assert shown["recipe"]["name"] == name and shown["recipe"]["changed"] == ["batch_size"]
    if get_recipe(name).hypothesis:
        assert shown["verdict"]["verdict"] == "undecided"
    assert salt.at("run").metrics("val")[-1]["r2_position_mean"] < 1
