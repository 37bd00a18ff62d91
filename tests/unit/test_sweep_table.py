"""A sweep's folder: believed where it fits, named where it is damaged, and whole without its recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.config import override, to_json
from salt_vla.errors import ConfigError, RunError
from salt_vla.jobs.sweep import promote, run_sweep
from salt_vla.jobs.sweep_points import propose
from salt_vla.jobs.sweep_spec import SweepSpec
from salt_vla.jobs.sweep_table import SweepFolder, read_table, require_metric
from salt_vla.recipes import get_recipe
from salt_vla.recipes.stored import recipe_file, store
from salt_vla.rundir import RunDirectory, Status, write_text

RECIPE = replace(get_recipe("demo_student"), name="mine", parent="demo_student")
LRS = ("optimizer.lr=1e-4,1e-2", "masks.strategy=tube")
Swept = Callable[..., SweepFolder]


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Swept:
    """`swept(*assignments, **spec)`: a finished sweep over RECIPE as `run_sweep` leaves it, the later points
    the better."""
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    store(RECIPE)

    def make(*assignments: str, **more: Any) -> SweepFolder:
        spec = SweepSpec("s", "mine", assignments or LRS, **more)
        sweep = SweepFolder("s")
        sweep.keep_spec(spec, RECIPE)
        axes = sweep.axes()
        while (point := propose(spec, axes, sweep.points(), [])) is not None:
            sweep.add_point(point)
            run, number = RunDirectory.named(point.run), len(sweep.points())
            write_text(run.config_file, to_json(override(RECIPE.config, point.assignments(axes))))
            run.set_status(Status("finished", step=3, total_steps=3))
            for step in (1, 2):
                run.log_metrics({"kind": "val", "step": step, "r2_position_mean": 0.1 * number, "loss": 1.0})
        return sweep

    return make


@pytest.mark.parametrize(
    "recipe", [None, "{", to_json(replace(RECIPE, config=get_recipe("salt_vitb").config))]
)
def test_a_sweep_outlives_its_recipe(swept: Swept, recipe: str | None) -> None:
    sweep = swept("optimizer.lr=1e-4..1e-2", method="random", trials=3)
    before = read_table(sweep)
    recipe_file("mine").unlink()
    if recipe is not None:
        recipe_file("mine").write_text(recipe)
    assert read_table(sweep) == before
    best, _ = promote("s")
    assert best.parent == "mine" and best.config.encoder == RECIPE.config.encoder


def test_a_recipe_that_has_changed_is_another_sweep(swept: Swept) -> None:
    sweep = swept()
    sweep.keep_spec(sweep.spec(), replace(RECIPE, summary="said better"))
    changed = replace(RECIPE, config=override(RECIPE.config, ["optimizer.grad_clip=7"]))
    with pytest.raises(RunError, match=r"recipe mine has changed since: optimizer\.grad_clip"):
        sweep.keep_spec(sweep.spec(), changed)


def test_a_sweep_without_points_is_no_sweep_yet(swept: Swept) -> None:
    sweep = swept()
    sweep.points_file.unlink()
    sweep.spec_file.write_text("{")
    sweep.keep_spec(SweepSpec("s", "mine", LRS, seed=3), RECIPE)
    assert sweep.spec().seed == 3


@pytest.mark.parametrize(
    "points",
    [
        "[1]",
        '[{"run": "x"}]',
        '[{"values": "ab", "run": "x"}]',
        '[{"values": [1], "run": "x"}]',
        '[{"values": [], "run": "s-lr1e-4"}]',
        '[{"values": ["zz"], "run": "s-lr1e-4"}]',
    ],
)
def test_points_that_are_none_of_this_sweep_are_named(swept: Swept, points: str) -> None:
    sweep = swept()
    sweep.points_file.write_text(points)
    with pytest.raises(RunError, match=r"points\.json is damaged"):
        read_table(sweep)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("val.r2_positon_mean", "perhaps val.r2_position_mean"),
        ("val.kind", "no figure 'val.kind'"),
        ("vall.loss", "perhaps val.loss"),
    ],
)
def test_a_metric_that_no_run_has_is_refused_and_may_be_mended(swept: Swept, metric: str, said: str) -> None:
    sweep = swept(metric=metric)
    point = sweep.points()[0]
    with pytest.raises(RunError, match="has no figure") as refused:
        require_metric(sweep.spec(), point)
    assert said in str(refused.value)
    assert read_table(sweep).best is None
    sweep.keep_spec(replace(sweep.spec(), metric="val.loss"), RECIPE)
    require_metric(sweep.spec(), point)
    assert read_table(sweep).best is not None


def test_a_figure_that_is_null_is_there_and_ranks_nowhere(swept: Swept) -> None:
    sweep = swept()
    best = read_table(sweep).best
    assert best is not None and best["run"] == "s-lr1e-2"
    RunDirectory.named("s-lr1e-2").log_metrics({"kind": "val", "step": 3, "r2_position_mean": float("nan")})
    require_metric(sweep.spec(), sweep.points()[1])
    best = read_table(sweep).best
    assert best is not None and best["run"] == "s-lr1e-4"


def test_optunas_points_were_proposed_for_their_metric(swept: Swept) -> None:
    sweep = swept()
    write_text(sweep.spec_file, to_json(replace(sweep.spec(), method="optuna", trials=2)))
    with pytest.raises(RunError, match=r"metric: 'val\.r2_position_mean', not 'val.loss'"):
        sweep.keep_spec(replace(sweep.spec(), metric="val.loss"), RECIPE)
    write_text(sweep.spec_file, to_json(replace(sweep.spec(), metric="val.nothing")))
    sweep.keep_spec(replace(sweep.spec(), metric="val.loss", trials=4), RECIPE)
    assert sweep.spec().trials == 4


def test_a_promoted_recipe_has_what_its_summary_says(swept: Swept) -> None:
    swept("runtime.precision=float32,bfloat16", "steps=8,9", "optimizer.lr=1e-4,1e-2")
    recipe, _ = promote("s")
    config = recipe.config
    assert (config.runtime.precision, config.steps, config.optimizer.lr) == ("bfloat16", 9, 1e-2)
    assert "precision bfloat16, steps 9, lr 1e-2" in recipe.summary
    assert recipe.criterion == "val.r2_position_mean > parent at the same steps"
    longer, _ = promote("s", "longer", steps=20, overrides=["optimizer.lr=0.5"])
    assert (longer.config.runtime.precision, longer.config.steps) == ("bfloat16", 20)
    assert "mine with precision bfloat16, the best" in longer.summary
    assert "steps" not in longer.summary and "lr" not in longer.summary


def test_promoting_nothing_is_refused(swept: Swept) -> None:
    swept()
    with pytest.raises(
        ConfigError, match=r"nothing that sweep 's' varied is left \(optimizer\.lr given anew\)"
    ):
        promote("s", overrides=["optimizer.lr=1"])


def test_a_sweep_is_of_one_process(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = swept().spec()
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="without torchrun"):
        run_sweep(spec)


def test_a_damaged_list_of_points_hides_no_other_sweep(
    swept: Swept, capsys: pytest.CaptureFixture[str]
) -> None:
    from salt_vla.cli import main

    swept().points_file.write_text('[{"run": "x"}]')
    write_text(SweepFolder("t").spec_file, to_json(SweepSpec("t", "mine", LRS)))
    assert main(["sweep", "ls", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert "points.json is damaged" in rows["s"]["recipe"] and rows["t"]["recipe"] == "mine"
