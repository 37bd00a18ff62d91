"""Sweeps are ordinary runs that survive being killed, and one table at the end; the best becomes a recipe."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

GRID = ("optimizer.lr=1e-4,1e-3,1e-2", "masks.ratio=0.5,0.75", "objective.targets=raw,normalised")
Sweep = Callable[..., list[object]]


@pytest.fixture
def sweep(salt: Any, workshop: Any) -> Sweep:
    """`sweep(name, *arguments)`: a sweep over the tiny student on tube masks, three steps a run."""

    def command(name: str, *more: object) -> list[object]:
        tiny = salt.train("demo_student", name, masks__strategy="tube", runtime__checkpoint_every=1)
        data = ("--data", workshop.table, "--cache", workshop.cache, "--max-steps", 3)
        varied = [each for each in more if "=" in str(each)]
        return [
            "sweep",
            "run",
            tiny[1],
            *varied,
            *tiny[2:],
            *data,
            *(each for each in more if each not in varied),
        ]

    return command


def rows_of(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["run"]: row for row in table["points"]}


def test_twelve_points_killed_in_the_middle_go_on_and_end_with_one_table(
    salt: Any, sweep: Sweep, curve: Any, weights: Any
) -> None:
    asked = sweep("rates", *GRID)
    process = salt.start(*asked)
    while len(list(salt.root.glob("runs/rates-*/checkpoints/step_*"))) < 8:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    states = {
        path.parent.name: salt.at(path.parent.name).status() for path in salt.root.glob("runs/*/status.json")
    }
    finished = {name for name, status in states.items() if status.state == "finished"}
    assert finished and len(states) < 12
    assert salt.json("sweep", "show", "rates")["status"]["state"] == "killed"
    before = {
        name: (salt.at(name).metrics_file.stat().st_mtime_ns, weights(salt.at(name))) for name in finished
    }

    table = salt.json(*asked)
    assert len(table["points"]) == 12
    assert {row["state"] for row in table["points"]} == {"finished"}
    assert {row["step"] for row in table["points"]} == {3}
    for name, (changed, files) in before.items():
        assert salt.at(name).metrics_file.stat().st_mtime_ns == changed, "a finished run was run again"
        assert weights(salt.at(name)) == files
    values = [row["r2_position_mean"] for row in table["points"]]
    assert values == sorted(values, reverse=True) and table["best"] == table["points"][0]["run"]
    assert rows_of(table)["rates-lr1e-2-ratio0.75-targetsraw"]["lr"] == "1e-2"
    assert json.loads((salt.root / "sweeps/rates/results.json").read_text()) == table
    assert (salt.root / "sweeps/rates/results.md").read_text().count("| rates-") == 12
    assert {path.name for path in (salt.root / "runs").iterdir()} == set(rows_of(table))

    one = states.keys() - finished or finished
    name = sorted(one)[0]
    row = rows_of(table)[name]
    fields = (("optimizer.lr", "lr"), ("masks.ratio", "ratio"), ("objective.targets", "targets"))
    alone = [word for word in asked[2:] if word not in GRID]
    alone[alone.index("rates")] = "alone"
    place = alone.index("--name")
    alone[place:place] = [f"{field}={row[key]}" for field, key in fields]
    salt.ok("train", *alone)
    assert curve(salt.at("alone")) == curve(salt.at(name)), "a sweep's run is the run of these settings"


def test_the_same_command_again_runs_nothing_and_says_the_same(salt: Any, sweep: Sweep) -> None:
    asked = sweep("twice", "optimizer.lr=1e-4,1e-3")
    first = salt.ok(*asked)
    began = [path.read_text() for path in sorted(salt.root.glob("runs/*/log.txt"))]
    again = salt.ok(*asked)
    assert again.out == first.out
    assert [path.read_text() for path in sorted(salt.root.glob("runs/*/log.txt"))] == began
    assert "Best val.r2_position_mean" in first.out
    assert salt.ok("sweep", "show", "twice").out == first.out
    assert [row["name"] for row in salt.json("sweep", "ls")] == ["twice"]


def test_a_stop_is_polite_and_the_same_command_goes_on(salt: Any, sweep: Sweep) -> None:
    asked = sweep("stopped", "optimizer.lr=1e-4,1e-3,1e-2,2e-2,3e-2")
    process = salt.start(*asked)
    while not list(salt.root.glob("runs/stopped-*/checkpoints/step_*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command goes on" in said
    assert salt.json("sweep", "show", "stopped")["status"]["state"] == "stopped"
    assert {row["state"] for row in salt.json(*asked)["points"]} == {"finished"}


@pytest.mark.parametrize("method", ["--random", "--optuna"])
def test_drawn_points_have_one_table_too_and_more_may_be_asked_for(
    salt: Any, sweep: Sweep, method: str
) -> None:
    space = ("optimizer.lr=log:1e-4..1e-2", "masks.ratio=0.5,0.75", "--seed", 3)
    few = salt.json(*sweep("drawn", *space, method, 2))
    more = salt.json(*sweep("drawn", *space, method, 4))
    assert set(rows_of(few)) < set(rows_of(more))
    assert (len(few["points"]), len(more["points"])) == (2, 4)
    fewer = salt(*sweep("drawn", *space, method, 3))
    assert "was started otherwise (trials: 4, not 3)" in fewer.sentence


def test_another_sweep_under_the_same_name_is_refused(salt: Any, sweep: Sweep) -> None:
    salt.ok(*sweep("one", "optimizer.lr=1e-4,1e-3"))
    other = salt(*sweep("one", "optimizer.lr=1e-4,1e-2"))
    assert "sweep 'one' was started otherwise (assignments: " in other.sentence
    assert "--name" in other.sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["predictor.num_heads=3,5"], "point predictor.num_heads=5: predictor.dim=24 is not divisible"),
        (["optimizer.learning_rate=1,2"], "no field 'optimizer.learning_rate'"),
        (["seed=1,2", "--random", 2, "--optuna", 2], "not both"),
        (["seed=1,2", "--random", 0], "--random must be at least 1 point"),
        (["seed=1,2", "--metric", "r2"], "KIND.FIELD"),
        (["seed=1,2", "--name", "../out"], "sweep name '../out'"),
    ],
)
def test_what_cannot_be_swept_is_said_before_the_first_run(
    salt: Any, sweep: Sweep, arguments: list[object], sentence: str
) -> None:
    assert sentence in salt(*sweep("bad", *arguments)).sentence
    assert salt.files() == []


def test_data_that_is_not_there_is_said_once_and_leaves_no_run(salt: Any, sweep: Sweep) -> None:
    lost = salt(*sweep("lost", "seed=1,2", "--data", salt.root / "nowhere.parquet"))
    assert "nowhere.parquet" in lost.sentence
    assert not (salt.root / "runs").exists()


def test_a_point_that_cannot_be_is_a_row_and_the_others_run(salt: Any, sweep: Sweep) -> None:
    """Random points are not known beforehand; a grid's would have been refused."""
    answer = salt(*sweep("some", "predictor.num_heads=3,5", "--random", 2, "--json"))
    rows = rows_of(json.loads(answer.out))
    assert answer.code == 1
    assert rows["some-num_heads3"]["state"] == "finished"
    assert "not divisible" in rows["some-num_heads5"]["note"]
    assert rows["some-num_heads5"]["metric"] is None


def test_a_run_of_that_name_with_other_settings_is_left_alone(
    salt: Any, sweep: Sweep, student: Any, curve: Any
) -> None:
    salt.ok(*student("mine-lr1e-4", "--max-steps", 2))
    before = curve(salt.at("mine-lr1e-4"))
    answer = salt(*sweep("mine", "optimizer.lr=1e-4,1e-3", "--json"))
    assert answer.code == 1
    note = rows_of(json.loads(answer.out))["mine-lr1e-4"]["note"]
    assert "other settings" in note and "--allow-change" not in note, "`sweep run` has no such option"
    assert curve(salt.at("mine-lr1e-4")) == before


def test_the_same_sweep_goes_on_from_any_folder(
    salt: Any, sweep: Sweep, workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (salt.root / "caches").mkdir()
    (salt.root / "caches/l").symlink_to(workshop.cache)
    (salt.root / "clips.parquet").symlink_to(workshop.table)
    asked = sweep("there", "optimizer.lr=1e-4,1e-2")
    data, cache = asked.index("--data") + 1, asked.index("--cache") + 1
    first = {}
    for folder, below in ((salt.root, ""), (salt.root / "caches", "../")):
        monkeypatch.chdir(folder)
        asked[data], asked[cache] = f"{below}clips.parquet", f"{below}caches/l"
        first = first or salt.json(*asked)
        assert salt.json(*asked) == first


def test_a_metric_with_a_typo_ends_the_sweep_after_its_first_run(salt: Any, sweep: Sweep) -> None:
    refused = salt(*sweep("typo", "optimizer.lr=1e-4,1e-2", "--metric", "val.r2_positon_mean"))
    assert "perhaps val.r2_position_mean" in refused.sentence
    assert len(list((salt.root / "runs").iterdir())) == 1
    assert len(salt.json(*sweep("typo", "optimizer.lr=1e-4,1e-2"))["points"]) == 2


def test_a_loss_is_best_where_it_is_low(salt: Any, sweep: Sweep) -> None:
    table = salt.json(*sweep("low", "optimizer.lr=1e-4,1e-2", "--metric", "val.loss"))
    losses = [row["val_loss"] for row in table["points"]]
    assert losses == sorted(losses) and table["points"][0]["metric"] == losses[0]


def test_the_best_becomes_a_recipe_that_runs(salt: Any, sweep: Sweep, workshop: Any) -> None:
    table = salt.json(*sweep("won", "optimizer.lr=1e-4,1e-2"))
    assert "won_best: demo_student with lr" in salt.ok("sweep", "promote", "won", "--steps", 5).out
    shown = salt.json("recipes", "show", "won_best")
    best = rows_of(table)[table["best"]]
    assert shown["config"]["optimizer"]["lr"] == float(best["lr"])
    assert shown["config"]["masks"]["strategy"] == "tube", "what held for all points holds here"
    assert (shown["config"]["steps"], shown["parent"]) == (5, "demo_student")
    assert "sweep won" in shown["hypothesis"] and shown["criterion"].startswith(
        "val.r2_position_mean > parent"
    )
    salt.ok("train", "won_best", "runtime.checkpoint_every=5", "--name", "long")
    status = salt.json("runs", "show", "long")
    assert (status["state"], status["step"], status["recipe"]["name"]) == ("finished", 5, "won_best")
    assert "no finished run of demo_student" in status["verdict"]["reason"]


def test_promoting_again_under_a_taken_name_or_too_early_is_refused(salt: Any, sweep: Sweep) -> None:
    salt.ok(*sweep("won", "optimizer.lr=1e-4,1e-2"))
    salt.ok("sweep", "promote", "won", "--as", "mine")
    salt.ok("sweep", "promote", "won", "--as", "mine")
    assert (
        "another recipe 'mine'"
        in salt("sweep", "promote", "won", "optimizer.grad_clip=7", "--as", "mine").sentence
    )
    assert "recipe of this package" in salt("sweep", "promote", "won", "--as", "demo_student").sentence
    assert "no sweep at" in salt("sweep", "promote", "lost").sentence
    assert "no sweep at" in salt("sweep", "show", "lost").sentence


def test_a_damaged_sweep_hides_no_other(salt: Any, sweep: Sweep) -> None:
    salt.ok(*sweep("good", "optimizer.lr=1e-4,1e-2"))
    damaged: Path = salt.root / "sweeps" / "bad" / "sweep.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    rows = {row["name"]: row for row in salt.json("sweep", "ls")}
    assert rows["good"]["points"] == 2 and "not valid JSON" in rows["bad"]["recipe"]
