"""`eval`: any encoder directory, one command, one table, the same figures every time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from salt_vla.data.clip_table import ClipTable
from salt_vla.jobs.eval_encoders import encoder_names
from salt_vla.registry import PROBES, SUITES, SURPRISE

FIELDS = {"encoder", "suite", "target", "metric", "value", "low", "high", "seed"}


@pytest.fixture(scope="module")
def rows(workshop: Any) -> list[dict[str, Any]]:
    return workshop.salt.json("eval", "teacher", "--suite", "probes", "--data", workshop.dataset)


def test_rows_hold_the_contracts_fields(rows: list[dict[str, Any]]) -> None:
    assert all(row.keys() >= FIELDS for row in rows)
    assert {row["encoder"] for row in rows} == {"teacher", "random", "pixels", "constant"}
    assert {row["suite"] for row in rows} == {
        f"{camera}/{pooling}" for camera in ("front", "side") for pooling in ("grid", "step", "mean")
    }
    assert {row["metric"] for row in rows} == {"r2", "accuracy"}
    assert all(row["low"] <= row["high"] for row in rows)


def test_the_constant_predictor_explains_nothing(rows: list[dict[str, Any]]) -> None:
    """Held out, the training mean is at best as good as the held-out mean."""
    constant = [row for row in rows if row["encoder"] == "constant" and row["metric"] == "r2"]
    assert constant and all(row["value"] <= 1e-6 for row in constant)


def test_a_run_its_checkpoint_and_the_data_sets_table_give_the_same_figures(
    workshop: Any, rows: list[dict[str, Any]]
) -> None:
    def figures(found: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(r["suite"], r["target"], r["value"], r["low"], r["high"]) for r in found]

    checkpoint = workshop.teacher / "checkpoints" / "step_00000006"
    again = workshop.salt.json(
        *("eval", checkpoint, "--suite", "probes", "--data", workshop.table, "--frame-stride", 2)
    )
    assert {row["encoder"] for row in again} == {"step_00000006", "random", "pixels", "constant"}
    assert figures(again) == figures(rows)


def test_the_table_for_people_names_encoders_and_targets(workshop: Any) -> None:
    answer = workshop.salt.ok("eval", "teacher", "--data", workshop.table)
    for word in ("teacher", "random", "pixels", "constant", "action", "task"):
        assert word in answer.out, word


def test_namesakes_are_told_apart_by_the_run(workshop: Any, tmp_path: Path) -> None:
    """`best` of two runs: nobody has to rename what a run needs."""
    for run in ("a", "b"):
        checkpoints = tmp_path / run / "checkpoints"
        shutil.copytree(workshop.teacher / "checkpoints" / "step_00000006", checkpoints / "step_00000006")
        (checkpoints / "best").symlink_to("step_00000006")
    paths = [str(tmp_path / run / "checkpoints" / "best") for run in ("a", "b")]
    told = workshop.salt.ok("eval", *paths, "--data", workshop.table, "--frame-stride", 2).out
    assert "a/best" in told and "b/best" in told
    assert encoder_names([*paths, f"{paths[0]}/average"]) == ["a/best", "b/best", "average"]
    assert encoder_names([f"{paths[0]}/"]) == ["best"]


def test_a_runs_figures_are_kept_beside_it_once_a_suite_and_data_set(
    workshop: Any, rows: list[dict[str, Any]]
) -> None:
    def kept() -> dict[str, Any]:
        return json.loads((workshop.teacher / "probes.json").read_text())

    own = [row for row in rows if row["encoder"] == "teacher"]
    assert [row for suite in kept()["suites"] for row in suite["rows"]] == own
    assert {suite["step"] for suite in kept()["suites"]} == {6}
    pairs = [pair for suite in kept()["suites"] for pair in suite["comparisons"]]
    assert {(pair["encoder"], pair["against"]) for pair in pairs} == {("teacher", "random")}
    before = kept()
    workshop.salt.ok("eval", workshop.teacher, "--data", workshop.dataset)
    assert kept() == before
    other = before["suites"][0] | {"clip_table": "another"}
    (workshop.teacher / "probes.json").write_text(json.dumps({"suites": [other]}))
    workshop.salt.ok("eval", "teacher", "--data", workshop.dataset)
    assert kept() == {"suites": [other, *before["suites"]]}


def test_figures_of_another_probe_are_kept_beside_the_linear_ones(
    workshop: Any, rows: list[dict[str, Any]]
) -> None:
    workshop.salt.ok("eval", "teacher", "--data", workshop.dataset)
    others = workshop.salt.json("eval", "teacher", "--data", workshop.dataset, "--probe", "knn")
    kept = json.loads((workshop.teacher / "probes.json").read_text())["suites"]
    by_name = {suite["suite"]: suite for suite in kept}
    assert [row["value"] for row in by_name["front/grid (knn)"]["rows"]] == [
        row["value"] for row in others if (row["encoder"], row["suite"]) == ("teacher", "front/grid")
    ]
    assert by_name["front/grid"]["rows"] == [
        row for row in rows if (row["encoder"], row["suite"]) == ("teacher", "front/grid")
    ]


def test_figures_that_cannot_be_kept_are_given_all_the_same(
    workshop: Any, rows: list[dict[str, Any]]
) -> None:
    kept = workshop.teacher / "probes.json"
    before = kept.read_bytes()
    kept.write_text("no JSON")
    answer = workshop.salt("eval", "teacher", "--data", workshop.dataset, "--json")
    kept.write_bytes(before)
    assert answer.code == 0 and json.loads(answer.out) == rows
    assert "not kept" in answer.err and "probes.json is damaged" in answer.err


def test_a_run_that_trains_on_meanwhile_is_what_was_read_of_it(workshop: Any, tmp_path: Path) -> None:
    from salt_vla.jobs.eval_encoders import load_entries, parse_specs, training_cost

    run = tmp_path / "runs" / "t"
    shutil.copytree(workshop.salt.at("teacher").path, run)
    (entry,) = load_entries(parse_specs([str(run)]))
    last = max((run / "checkpoints").glob("step_*"))
    shutil.copytree(last, last.with_name("step_99999999"))
    assert training_cost(entry.spec.what)["training_steps"] == int(last.name[5:])
    assert training_cost(str(run))["training_steps"] == 99999999
    assert (entry.label, entry.place) == ("t", run)


def test_a_checkpoint_is_not_taken_for_its_run(workshop: Any, salt: Any) -> None:
    checkpoint = workshop.teacher / "checkpoints" / "step_00000006"
    copied = salt.root / "runs" / "copy"
    shutil.copytree(checkpoint, copied / "checkpoints" / "step_00000006")
    salt.ok("eval", checkpoint, copied, "--data", workshop.table, "--frame-stride", 2)
    assert not list(salt.root.rglob("probes.json")), "neither is a run with settings"


def test_eval_leaves_features_and_nothing_else_behind(workshop: Any, rows: list[dict[str, Any]]) -> None:
    before = workshop.salt.files()
    workshop.salt.ok("eval", "teacher", "--data", workshop.table, "--json")
    assert {file for file in workshop.salt.files() if not str(file).startswith("features/")} == {
        file for file in before if not str(file).startswith("features/")
    }


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "eval needs at least one encoder"),
        (("nobody",), "'nobody'"),
        (("teacher", "--suite", "olympics", "--detach"), "there is no suite 'olympics'; suites: "),
        (("--detach",), "eval needs at least one encoder"),
        (("teacher", "--suite", "olympics"), "there is no suite 'olympics'; suites: "),
        (("teacher", "--data", "nowhere"), "nowhere"),
        (("teacher", "--frame-stride", "0"), "--frame-stride must be at least 1, not 0"),
        (("teacher", "--seed", "-1"), "seed must lie in 0 … 4294967295, not -1"),
        (("teacher", "teacher"), "two encoders are called 'teacher'"),
        (("teacher", "--device", "nowhere"), "--device 'nowhere' cannot be used here"),
        (("teacher", "--diagnose", "--device", "meta"), "device 'meta' cannot be used here"),
        (("teacher", "--against", "nobody"), "is called so, but teacher, random, pixels"),
        (("teacher", "--poolings", "mean", "mean"), "--poolings needs one or several of grid, step, mean"),
        (("teacher", "--suite", "probes", "dense", "--horizon", "9"), "--horizon: no suite of this call"),
        (("teacher", "--frame-step", "3"), "--frame-step: no suite of this call (probes) reads it"),
        (("teacher", "--suite", "dense", "probes", "--poolings", "mean"), "suite dense: dense reads"),
        (("teacher", "--pictures", "/dev/null"), "--pictures /dev/null is no folder to write into"),
        (("=teacher",), "begins with '='; write LABEL=teacher"),
        (("teachr",), "did you mean teacher?"),
        (("teacher", "--suite", "intphys2", "--data", "nowhere"), "give --data the one that the film pairs"),
        (("teacher", "--memory-limit", "lots"), "'lots' is no amount of memory"),
    ],
)
def test_what_cannot_be_evaluated_is_a_sentence(
    workshop: Any, arguments: tuple[str, ...], named: str
) -> None:
    data = () if "--data" in arguments else ("--data", str(workshop.table))
    assert named in workshop.salt("eval", *arguments, *data).sentence


def test_data_of_no_known_layout_names_a_command_that_takes_it(workshop: Any, tmp_path: Path) -> None:
    said = workshop.salt("eval", "teacher", "--data", tmp_path).sentence
    assert f"`salt-vla data index {tmp_path} --source …` makes a clip table of it" in said


def test_the_help_names_every_suite_and_probe(salt: Any) -> None:
    told = " ".join(salt("eval", "--help").out.replace("│", " ").split())
    assert [name for name in (*SUITES, *SURPRISE, *PROBES) if name not in told] == []


def test_a_folder_or_file_that_is_no_encoder_is_a_sentence(workshop: Any, tmp_path: Path) -> None:
    for what in (workshop.dataset, workshop.table, workshop.cache, tmp_path):
        assert str(what) in workshop.salt("eval", what, "--data", workshop.table).sentence


def test_a_table_of_held_out_clips_alone_is_a_sentence(workshop: Any, tmp_path: Path) -> None:
    ClipTable.read(workshop.table).select(split="validation").write(tmp_path / "held.parquet")
    said = workshop.salt("eval", "teacher", "--data", tmp_path / "held.parquet").sentence
    assert "clips of the split validation and none of train" in said


def test_weights_that_do_not_fit_are_a_sentence(workshop: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(workshop.teacher / "checkpoints" / "step_00000006", broken)
    config = broken / "encoder.json"
    config.write_text(config.read_text().replace('"depth": 1', '"depth": 2'))
    arguments = ("--data", workshop.table, "--frame-stride", 2)
    assert "does not fit encoder.json" in workshop.salt("eval", broken, *arguments).sentence
    config.unlink()
    assert "lacks encoder.json" in workshop.salt("eval", broken, *arguments).sentence


def test_an_encoder_of_other_clips_cannot_stand_in_the_same_table(
    workshop: Any, salt: Any, tmp_path: Path
) -> None:
    other = ("encoder.geometry.num_frames=2", "--data", workshop.table, "--max-steps", 1)
    command = salt.train("demo_teacher", "other")
    salt.ok(*command[:-2], *other[:1], *command[-2:], *other[1:])
    said = salt("eval", workshop.teacher, tmp_path / "runs" / "other", "--data", workshop.table).sentence
    assert "'other' takes clips of" in said


def test_a_teacher_is_checked_in_words_and_figures(workshop: Any) -> None:
    found = workshop.salt.json("teacher", "check", "teacher", "--data", workshop.table)
    assert found.keys() >= {"name", "dim", "fingerprint", "verdict", "clips", "mean_square", "token_std"}
    assert found["dim"] == 128 and found["clips"] == 26
    assert 0 <= found["position_share"] <= 1 and 0 < found["top_share"] <= 1
    assert found["verdict"].startswith("usable")
    in_words = workshop.salt.ok("teacher", "check", "teacher", "--data", workshop.table).out
    assert found["fingerprint"] in in_words.replace("\n", "")
    assert "'nobody'" in workshop.salt("teacher", "check", "nobody").sentence
