"""Runs beside one another: like is compared with like, and seeds allow no more to be said than they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from scipy import stats

from salt_vla.config import EncoderConfig, ObjectiveConfig, OptimizerConfig, TargetConfig, TrainConfig
from salt_vla.errors import RunError
from salt_vla.operations.compare import Comparison, compare
from salt_vla.operations.compare_seeds import Entry, group_runs, interval, paired_differences
from salt_vla.operations.compare_tables import tables_of
from salt_vla.rundir import RunDirectory

WriteRun = Callable[..., RunDirectory]
Rows = Callable[..., list[dict[str, Any]]]
CONFIG = TrainConfig(steps=100, batch_size=4)
FASTER = replace(CONFIG, optimizer=OptimizerConfig(lr=9e-4))


def _cost(run: RunDirectory, clips: int = 4, flops: float = 1e15, an_epoch: int = 100) -> None:
    cost = {"clips_a_step": clips, "flops_a_step": flops, "clips_an_epoch": an_epoch}
    (run.path / "cost.json").write_text(json.dumps(cost))


def _text(found: Comparison) -> str:
    return "\n".join(str(table) for table in tables_of(found))


def test_only_settings_that_differ_are_shown(write_run: WriteRun) -> None:
    write_run("a", config=CONFIG)
    write_run("b", config=replace(FASTER, seed=3))
    found = compare(["a", "b"])
    assert {row.field: row.values for row in found.settings} == {
        "optimizer.lr": (CONFIG.optimizer.lr, 9e-4),
        "seed": (0, 3),
    }


def test_figures_are_the_last_the_best_the_last_hundred_and_the_epochs(write_run: WriteRun) -> None:
    rows = [{"kind": "train", "step": step, "loss": 200.0 - step} for step in range(1, 151)]
    rows += [{"kind": "train", "step": 151, "loss": 300.0}]
    run = write_run("a", rows)
    _cost(run, clips=4, an_epoch=200)
    write_run("b", rows[:5])
    figures = compare(["a", "b"], "train.loss").runs[0].figures["train.loss"]
    assert (figures.last, figures.best, figures.best_step) == (300.0, 50.0, 150)
    assert figures.last_mean == pytest.approx((sum(range(50, 149)) + 300) / 100)
    # 50 steps of 4 clips an epoch of 200.
    means = [sum(200 - step for step in range(first, first + 50)) / 50 for first in (1, 51, 101)]
    assert figures.epoch_means == (*map(pytest.approx, means), 300.0)


def test_curves_are_read_at_equal_steps_clips_and_flops(write_run: WriteRun) -> None:
    """The second sees twice the clips a step, each at half the cost."""
    rows = [{"kind": "val", "step": step, "r2_position_mean": step / 1000} for step in range(10, 101, 10)]
    _cost(write_run("a", rows), clips=4, flops=2e15)
    _cost(write_run("b", rows, replace(CONFIG, batch_size=8)), clips=8, flops=2e15)
    found = compare(["a", "b"])
    at = {(row.axis, row.x): row.values for row in found.equal}
    assert at["steps", 50.0] == (0.05, 0.05)
    assert at["clips", 200.0] == (0.05, 0.02)  # 50 steps, and 25, of which the last line is at 20
    assert at["flops", 100e15] == (0.05, 0.05)
    assert max(x for axis, x in at if axis == "clips") == 400.0


def test_before_its_first_line_a_run_has_no_figure(write_run: WriteRun) -> None:
    write_run(
        "a",
        [
            {"kind": "val", "step": 90, "r2_position_mean": 0.9},
            {"kind": "val", "step": 100, "r2_position_mean": 1},
        ],
    )
    write_run("b")
    assert [row.values[0] for row in compare(["a", "b"]).equal if row.axis == "steps"] == [
        None,
        None,
        None,
        1.0,
    ]


def test_what_a_step_cost_is_not_guessed(write_run: WriteRun) -> None:
    """An older run has no cost on record; one that changed its batches on its way has more than one."""
    write_run("old")
    changed = write_run("changed")
    _cost(changed)
    change = {"step": 50, "changed": [{"field": "batch_size", "before": 2, "after": 4}]}
    (changed.path / "config_changes.jsonl").write_text(json.dumps(change) + "\nrubbish\n")
    found = compare(["old", "changed"])
    assert {row.axis for row in found.equal} == {"steps"}
    assert [run.clips for run in found.runs] == [4, None]
    assert "old has no cost.json" in found.notes[0] and "changed batch_size" in found.notes[1]


@pytest.mark.parametrize(
    ("other", "column", "why"),
    [
        (replace(CONFIG, target=TargetConfig(provider="pixels")), "val.r2_position_mean", "target.provider"),
        (replace(CONFIG, target=TargetConfig(provider="ema")), "val.loss", "move with it"),
        (replace(CONFIG, objective=ObjectiveConfig(loss="smooth_l1")), "val.loss", "objective.loss"),
    ],
)
def test_figures_that_measure_different_things_are_not_ranked(
    write_run: WriteRun, other: TrainConfig, column: str, why: str
) -> None:
    write_run("a", config=CONFIG)
    write_run("b", config=other)
    found = compare(["a", "b"], column)
    assert len(found.incomparable) == 1 and why in found.incomparable[0]
    assert found.paired == ()
    assert "Not to be ranked" in _text(found)


def test_figures_on_other_clips_or_of_another_teacher_are_not_ranked(write_run: WriteRun) -> None:
    for name, config in (("a", CONFIG), ("b", FASTER), ("c", FASTER)):
        run = write_run(name, config=config)
        for file in ("clip_table_provenance.json", "cache_provenance.json"):
            (run.path / file).write_text(json.dumps({"of": name if name == "c" else "both"}))
    said = compare(["a", "b", "c"]).incomparable
    assert len(said) == 2
    assert all("the teacher or its cached latents, the clips" in each for each in said)


def test_the_same_objective_is_no_matter_for_r2(write_run: WriteRun) -> None:
    write_run("a", config=CONFIG)
    write_run("b", config=replace(CONFIG, objective=ObjectiveConfig(loss="smooth_l1")))
    assert compare(["a", "b"], "val.r2_position_mean").incomparable == ()


def test_seeds_of_one_experiment_are_taken_together_and_paired(write_run: WriteRun, rows_of: Rows) -> None:
    levels = {"a": [0.0, 0.02, 0.01], "b": [0.11, 0.12, 0.13]}
    for name, config in (("a", CONFIG), ("b", FASTER)):
        for seed, level in enumerate(levels[name]):
            write_run(f"{name}{seed}", rows_of(100, level=level), replace(config, seed=seed))
    found = compare([f"{name}{seed}" for name in "ab" for seed in range(3)])
    first, second = found.groups
    assert (first.runs, first.seeds) == (("a0", "a1", "a2"), (0, 1, 2))
    values = [0.5 + level for level in levels["b"]]
    low, high = stats.t.interval(0.95, 2, loc=0.62, scale=stats.sem(values))
    assert (second.mean, second.low, second.high) == tuple(map(pytest.approx, (0.62, low, high)))
    (pair,) = found.paired
    differences = [b - a for a, b in zip(levels["a"], levels["b"], strict=True)]
    low, high = stats.t.interval(0.95, 2, loc=0.11, scale=stats.sem(differences))
    assert (pair.mean, pair.low, pair.high) == tuple(map(pytest.approx, (0.11, low, high)))
    assert pair.differences == tuple(map(pytest.approx, differences))
    assert pair.apart and pair.seeds == (0, 1, 2)
    assert "95 %, Student's t over 3 seeds" in _text(found)


@pytest.mark.parametrize(("seeds", "said"), [(1, "one seed"), (2, "2 seeds, too few for an interval")])
def test_below_three_seeds_nothing_is_claimed(
    write_run: WriteRun, rows_of: Rows, seeds: int, said: str
) -> None:
    for seed in range(seeds):
        write_run(f"a{seed}", rows_of(100), replace(CONFIG, seed=seed))
        write_run(f"b{seed}", rows_of(100, level=0.4), replace(FASTER, seed=seed))
    found = compare([f"{name}{seed}" for name in "ab" for seed in range(seeds)])
    (pair,) = found.paired
    assert (pair.low, pair.high, pair.apart, pair.note) == (None, None, False, said)
    assert "cannot be said" in _text(found)


def test_a_seed_that_ran_twice_counts_once() -> None:
    groups = group_runs(
        [Entry(f"run{n}", replace(CONFIG, seed=seed), 1.0) for n, seed in enumerate([1, 1, 1, 2])]
    )
    assert [group.note for group in groups] == ["2 seeds, too few for an interval"]
    twice = group_runs([Entry("a", CONFIG, 1.0), Entry("b", FASTER, 2.0), Entry("c", FASTER, 4.0)])
    everyone = {frozenset(("a", other)) for other in "bc"}
    assert [row.differences for row in paired_differences(twice, everyone)] == [(2.0,)]
    assert paired_differences(twice, {frozenset(("b", "c"))}) == ()


def test_groups_are_of_runs_that_differ_in_nothing_that_is_computed() -> None:
    slow = replace(CONFIG, seed=1, runtime=replace(CONFIG.runtime, threads=7, checkpoint_every=3))
    bigger = replace(CONFIG, encoder=EncoderConfig(name="vit_small"))
    runs = [("a", CONFIG, 1.0), ("b", slow, 2.0), ("c", bigger, 3.0), ("d", None, None), ("e", None, 1)]
    groups = group_runs([Entry(*run) for run in runs])
    assert [group.runs for group in groups] == [("a", "b"), ("c",), ("d",), ("e",)]
    assert groups[2].note == "no figure"


Harm = Callable[[RunDirectory], None]


def _cut(run: RunDirectory) -> None:
    run.trim_metrics(60)


def _change(run: RunDirectory) -> None:
    change = {"step": 99, "changed": [{"field": "optimizer.lr", "before": 1.0, "after": 2.0}]}
    (run.path / "config_changes.jsonl").write_text("[1]\n" + json.dumps(change) + "\n")


def _branch(run: RunDirectory) -> None:
    (run.path / "branch.json").write_text('{"run": "long", "step": 20, "changed": {}}')


def _learn_from_others(run: RunDirectory) -> None:
    (run.path / "clip_table_provenance.json").write_text('{"clip_table": "others"}')


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (_cut, "b3 (figure of step 60)"),
        (_change, "b3 changed optimizer.lr on its way"),
        (_branch, "began from long@20"),
        (_learn_from_others, "b3 (figure of step 100; other data)"),
    ],
)
def test_a_run_that_came_there_otherwise_is_in_no_group_and_no_pair(
    write_run: WriteRun, rows_of: Rows, harm: Harm, why: str
) -> None:
    """Its settings are those of the others but for the seed, and its figure is far off."""
    for name, config in (("a", CONFIG), ("b", FASTER)):
        for seed in range(4):
            rows = rows_of(100, level=seed / 100 + 9 * (name + str(seed) == "b3"))
            write_run(f"{name}{seed}", rows, replace(config, seed=seed))
    harm(RunDirectory.named("b3"))
    found = compare([f"{name}{seed}" for name in "ab" for seed in range(4)])
    assert [group.runs for group in found.groups] == [("a0", "a1", "a2", "a3"), ("b0", "b1", "b2"), ("b3",)]
    assert found.groups[1].mean == pytest.approx(0.51)
    assert [pair.seeds for pair in found.paired] == [(0, 1, 2)]
    assert why in "\n".join(found.apart) and why in _text(found)
    assert found.to_json()["apart"] == list(found.apart)


def test_what_decides_nothing_may_change_on_the_way(write_run: WriteRun) -> None:
    for seed in range(2):
        run = write_run(f"a{seed}", config=replace(CONFIG, seed=seed))
    fields = ("runtime.threads", "runtime.log_every", "data.num_workers", "data.table")
    change = {"step": 9, "changed": [{"field": name, "before": 1, "after": 2} for name in fields]}
    (run.path / "config_changes.jsonl").write_text(json.dumps(change))
    found = compare(["a0", "a1"])
    assert [group.runs for group in found.groups] == [("a0", "a1")] and found.apart == ()


def test_figures_of_different_lengths_are_no_pair(write_run: WriteRun, rows_of: Rows) -> None:
    """Also where both are whole: what the steps are worth is no matter of the settings beside them."""
    write_run("a", rows_of(100))
    write_run("b", rows_of(200), replace(FASTER, steps=200))
    found = compare(["a", "b"])
    assert found.paired == () and "different steps" in found.apart[0]
    assert [row.values for row in found.equal if row.axis == "steps" and row.x == 100.0] == [(0.5, 0.25)]


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert interval([2.0, 2.0, 2.0])[:3] == (2.0, 2.0, 2.0)


def test_probes_stand_beside_one_another(write_run: WriteRun) -> None:
    row: dict[str, Any] = {"encoder": "a", "suite": "front/grid", "target": "action", "metric": "r2"}
    row |= {"value": 0.5, "low": 0.4, "high": 0.6}
    run = write_run("a")
    suite = {"suite": "front/grid", "clip_table": "one", "step": 60, "rows": [row]}
    others = suite | {"clip_table": "two", "step": 100, "rows": [row | {"value": 0.7, "low": None}]}
    damaged = [{"suite": "x", "rows": 5}, 3, suite | {"rows": [row | {"suite": {}}, 4]}]
    (run.path / "probes.json").write_text(json.dumps({"suites": [suite, others, *damaged]}))
    write_run("b")
    tables = [table for table in tables_of(compare(["a", "b"])) if table.part == "Probes"]
    assert {table.title: table.rows for table in tables} == {
        "Probes, front/grid (clips one)": (("action (r2)", "0.5 [0.4, 0.6] @ 60", ""),),
        "Probes, front/grid (clips two)": (("action (r2)", "0.7", ""),),
    }


@pytest.mark.parametrize(
    "file", ["config.json", "status.json", "probes.json", "cost.json", "clip_table_provenance.json"]
)
@pytest.mark.parametrize("text", ["{", "[]", '{"suites": 3}'])
def test_one_damaged_run_hides_no_other(write_run: WriteRun, file: str, text: str) -> None:
    write_run("a")
    run = write_run("b", config=FASTER)
    (run.path / file).write_text(text)
    found = compare(["a", "b"])
    assert found.runs[0].figures["val.loss"].best == 0.5
    assert json.loads(json.dumps(found.to_json()))["column"] == "val.r2_position_mean"
    assert "b" in _text(found)


def test_a_run_without_a_line_is_shown_without_figures(write_run: WriteRun) -> None:
    write_run("a")
    write_run("b", [], state="failed", exit_reason="ImportError: gone")
    found = compare(["a", "b"])
    assert found.runs[1].figures == {} and found.equal == ()
    assert "failed: ImportError: gone" in _text(found)


def test_a_column_that_no_run_has_is_a_sentence(write_run: WriteRun) -> None:
    for name in ("a", "b"):
        write_run(name)
    with pytest.raises(RunError, match=r"no.* column 'val.r2_position'; perhaps .*val.r2_position_mean"):
        compare(["a", "b"], "val.r2_position")
    with pytest.raises(RunError, match="there is no run at"):
        compare(["a", "c"])
