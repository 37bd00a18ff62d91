"""What one setting does is said of runs that differ in it alone, and only of figures that compare."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.config import TrainConfig, override, to_json
from salt_vla.operations.handoff.effects import LOSS_COLUMN, R2_COLUMN, effects
from salt_vla.operations.handoff.facts import RunFacts, facts_of
from salt_vla.recipes import get_recipe
from salt_vla.rundir import RunDirectory, Status, write_text

BASE = override(get_recipe("demo_student").config, ["steps=40", "optimizer.warmup_steps=4"])
Make = Callable[..., RunFacts]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(name, r2, loss, *overrides, seed=0, clips="a", step=40, probes={})`: a finished run."""
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))

    def build(
        name: str, r2: float, loss: float, *fields: str, seed: int = 0, clips: str = "a", step: int = 40,
        probes: dict[str, float] | None = None,
    ) -> RunFacts:  # fmt: skip
        run = RunDirectory(tmp_path / "runs" / name)
        config: TrainConfig = replace(override(BASE, fields), seed=seed)
        write_text(run.config_file, to_json(config))
        write_text(run.path / "clip_table_provenance.json", json.dumps({"clip_table": clips}))
        run.set_status(Status("finished", step=step, total_steps=step, exit_reason="finished"))
        for line in range(1, step + 1):
            run.log_metrics({"kind": "train", "step": line, "loss": loss})
        run.log_metrics({"kind": "val", "step": step, "loss": loss, "r2_position_mean": r2})
        if probes:
            rows = [
                {"encoder": name, "suite": "fixed/grid", "target": target, "metric": "r2", "value": value}
                for target, value in probes.items()
            ]
            suites = [{"suite": "fixed/grid", "clip_table": "c", "rows": rows, "comparisons": []}]
            write_text(run.path / "probes.json", json.dumps({"suites": suites}))
        return facts_of(run)

    return build


def by_column(found: Any) -> dict[str, Any]:
    return {each.column: each for each in found}


def test_three_seeds_give_an_interval_and_its_sign(make: Make) -> None:
    runs = []
    for seed, noise in enumerate((-0.001, 0.0, 0.001)):
        runs.append(make(f"slow{seed}", 0.10 + noise, 1.0, "optimizer.lr=1e-3", seed=seed))
        runs.append(make(f"fast{seed}", 0.15 + 2 * noise, 0.9, "optimizer.lr=2e-3", seed=seed))
    found = by_column(effects(runs))
    assert set(found) == {R2_COLUMN, LOSS_COLUMN}
    r2, loss = found[R2_COLUMN], found[LOSS_COLUMN]
    assert (r2.field, r2.before, r2.after) == ("optimizer.lr", 1e-3, 2e-3)
    assert r2.mean == pytest.approx(0.05)
    # Student's t, two degrees of freedom: 4.3027 × 0.001 ÷ √3.
    assert (r2.low, r2.high) == (pytest.approx(0.05 - 0.002484, abs=1e-6), pytest.approx(0.052484, abs=1e-6))
    assert r2.is_apart and "better (95 %" in r2.sentence
    assert loss.mean == pytest.approx(-0.1) and "better" in loss.sentence  # A loss is better where it is low.
    assert r2.runs == (("slow0", "fast0"), ("slow1", "fast1"), ("slow2", "fast2"))


def test_what_seeds_do_not_agree_in_is_no_difference(make: Make) -> None:
    runs = []
    for seed, difference in enumerate((-0.05, 0.04, 0.02)):
        runs.append(make(f"slow{seed}", 0.10, 1.0, "optimizer.lr=1e-3", seed=seed))
        runs.append(make(f"fast{seed}", 0.10 + difference, 1.0, "optimizer.lr=2e-3", seed=seed))
    r2 = by_column(effects(runs))[R2_COLUMN]
    assert not r2.is_apart and "no difference is shown" in r2.sentence


def test_one_seed_says_so(make: Make) -> None:
    runs = [make("slow", 0.1, 1.0, "optimizer.lr=1e-3"), make("fast", 0.5, 0.5, "optimizer.lr=2e-3")]
    r2 = by_column(effects(runs))[R2_COLUMN]
    assert (r2.low, r2.high, r2.is_apart) == (None, None, False)
    assert "one seed" in r2.sentence and "better" not in r2.sentence


@pytest.mark.parametrize(
    "other",
    [
        {"fields": ("optimizer.lr=2e-3", "batch_size=8")},
        {"fields": ("optimizer.lr=2e-3",), "clips": "b"},
        {"fields": ("optimizer.lr=2e-3",), "seed": 1},
        {"fields": ("optimizer.lr=2e-3",), "step": 30},
        {"fields": ()},
    ],
    ids=["two fields", "other clips", "another seed", "cut short", "no field"],
)
def test_nothing_is_said_of_runs_that_differ_in_more_or_in_nothing(make: Make, other: dict[str, Any]) -> None:
    other = dict(other)
    fields = other.pop("fields")
    runs = [make("one", 0.1, 1.0, "optimizer.lr=1e-3"), make("two", 0.5, 0.5, *fields, **other)]
    assert effects(runs) == []


def test_a_run_whose_settings_held_for_a_part_of_it_shows_no_effect(make: Make) -> None:
    runs = [make("slow", 0.1, 1.0, "optimizer.lr=1e-3"), make("fast", 0.5, 0.5, "optimizer.lr=2e-3")]
    change = {"step": 39, "changed": [{"field": "optimizer.lr", "before": 1e-3, "after": 2e-3}]}
    file = runs[1].run.path / "config_changes.jsonl"
    file.write_text(json.dumps(change) + "\n")
    assert effects([facts_of(run.run) for run in runs]) == []
    file.write_text(json.dumps(change).replace("optimizer.lr", "runtime.threads") + "\n")
    assert len(effects([facts_of(run.run) for run in runs])) == 2


def test_branches_are_held_against_branches_from_the_same_weights(make: Make) -> None:
    runs = [make("slow", 0.1, 1.0, "optimizer.lr=1e-3"), make("fast", 0.5, 0.5, "optimizer.lr=2e-3")]
    for run, places in zip(runs, ((0, 20), (20, 20)), strict=True):
        for number, step in enumerate(places):
            if step:
                record = {"run": "long", "step": step, "changed": {}}
                (run.run.path / "branch.json").write_text(json.dumps(record))
            found = effects([facts_of(run.run) for run in runs])
            assert len(found) == (2 if run is runs[1] or not number else 0)


def test_a_seed_that_ran_twice_counts_once_and_both_are_named(make: Make) -> None:
    runs = [make("slow", 0.1, 1.0, "optimizer.lr=1e-3"), make("fast", 0.5, 0.5, "optimizer.lr=2e-3")]
    runs.append(make("slow-again", 0.2, 1.0, "optimizer.lr=1e-3"))
    r2 = by_column(effects(runs))[R2_COLUMN]
    assert r2.mean == pytest.approx(0.35) and r2.seeds == 1
    assert "one seed" in r2.sentence and "fast − slow, fast − slow-again" in r2.sentence


def test_how_a_run_was_computed_is_no_difference(make: Make) -> None:
    runs = [
        make("one", 0.1, 1.0, "optimizer.lr=1e-3", "runtime.threads=1"),
        make("two", 0.2, 1.0, "optimizer.lr=2e-3", "runtime.threads=4", "data.num_workers=2"),
    ]
    assert {each.field for each in effects(runs)} == {"optimizer.lr"}


def test_masks_are_compared_by_probes_alone(make: Make) -> None:
    """Under other masks loss and R² are of another task."""
    runs = [
        make("end", 0.1, 1.0, "masks.truncate=end", probes={"action": 0.6, "hand": 0.8}),
        make("pad", 0.9, 0.1, "masks.truncate=pad", probes={"action": 0.5}),
    ]
    found = effects(runs)
    assert [each.column for each in found] == ["probe fixed/grid, action (clips c)"]
    assert found[0].mean == pytest.approx(-0.1)


def test_a_figure_is_of_the_seeds_that_have_it(make: Make) -> None:
    runs = []
    for seed in range(3):
        probes = {"action": 0.5} if seed < 2 else None
        runs.append(make(f"slow{seed}", 0.1, 1.0, "optimizer.lr=1e-3", seed=seed, probes=probes))
        probes = {"action": 0.6} if seed else None
        runs.append(make(f"fast{seed}", 0.2, 1.0, "optimizer.lr=2e-3", seed=seed, probes=probes))
    found = by_column(effects(runs))
    assert len(found[R2_COLUMN].runs) == 3
    (probe,) = (each for column, each in found.items() if column.startswith("probe "))
    assert probe.runs == (("slow1", "fast1"),) and "one seed" in probe.sentence
    assert next(iter(found)) == R2_COLUMN


def test_losses_of_other_targets_are_never_compared(make: Make) -> None:
    runs = [
        make("raw", 0.1, 11.5, "objective.targets=raw"),
        make("normalised", 0.2, 0.4, "objective.targets=normalised"),
    ]
    assert effects(runs) == []
    assert runs[0].space_key != runs[1].space_key


def test_a_damaged_run_hides_no_effect(make: Make) -> None:
    runs = [make("slow", 0.1, 1.0, "optimizer.lr=1e-3"), make("fast", 0.5, 0.5, "optimizer.lr=2e-3")]
    bad = make("bad", 0.5, 0.5)
    bad.run.config_file.write_text("{")
    damaged = facts_of(bad.run)
    assert damaged.problem and damaged.config is None
    assert len(effects([*runs, damaged])) == 2
