"""A verdict rests on figures that measure the same thing on the same clips; all else stays undecided."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.config import Recipe, TrainConfig, override, to_json
from salt_vla.errors import RunError
from salt_vla.recipes import get_recipe
from salt_vla.recipes.stored import store
from salt_vla.rundir import RunDirectory, Status, write_text
from salt_vla.verdicts import Verdict, conclude, note_recipe, noted_recipe, noted_verdict

PARENT = Recipe(
    "parent_recipe",
    "what is to be beaten",
    override(get_recipe("demo_student").config, ("steps=10",)),
    hypothesis="It learns.",
    target="R² above 0.",
    criterion="val.r2_position_mean > 0",
)
CHILD = replace(
    PARENT,
    name="child_recipe",
    config=override(PARENT.config, ("optimizer.lr=0.5",)),
    parent="parent_recipe",
    criterion="val.r2_position_mean > parent",
)
MakeRun = Callable[..., RunDirectory]


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeRun:
    """`make_run(name, recipe, r2, config=…, state=…, step=…, clips=…, cache=…)`: a run's directory as
    training leaves it."""
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    store(PARENT)

    def make(
        name: str,
        recipe: Recipe,
        r2: float | None,
        config: TrainConfig | None = None,
        state: str = "finished",
        step: int = 10,
        clips: str = "a",
        cache: str = "c",
        **figures: float,
    ) -> RunDirectory:
        run = RunDirectory.named(name)
        settings = config or recipe.config
        write_text(run.config_file, to_json(settings))
        run.set_status(Status(state, step=step, total_steps=settings.steps))
        for what, value in (("clip_table", clips), ("cache", cache)):
            write_text(run.path / f"{what}_provenance.json", json.dumps({"hash": value}))
        run.log_metrics({"kind": "val", "step": 5, "r2_position_mean": -9.0})
        run.log_metrics({"kind": "val", "step": step, "r2_position_mean": r2} | figures)
        note_recipe(run, recipe, settings)
        return run

    return make


def verdict_of(run: RunDirectory) -> Verdict:
    verdict = conclude(run)
    assert verdict is not None
    assert noted_verdict(run) == json.loads(json.dumps(vars(verdict)))
    return verdict


@pytest.mark.parametrize(("r2", "answer"), [(0.2, "confirmed"), (0.0, "refuted"), (-0.3, "refuted")])
def test_a_figure_is_held_against_a_number(make_run: MakeRun, r2: float, answer: str) -> None:
    verdict = verdict_of(make_run("p", PARENT, r2))
    assert (verdict.verdict, verdict.value, verdict.against, verdict.parent_run) == (answer, r2, 0.0, "")


@pytest.mark.parametrize(("r2", "answer"), [(0.5, "confirmed"), (0.4, "refuted"), (0.1, "refuted")])
def test_a_child_is_held_against_its_parents_run(make_run: MakeRun, r2: float, answer: str) -> None:
    make_run("p", PARENT, 0.4)
    verdict = verdict_of(make_run("c", CHILD, r2))
    assert (verdict.verdict, verdict.value, verdict.against, verdict.parent_run) == (answer, r2, 0.4, "p")
    assert "run p" in verdict.reason and "without an interval" in verdict.reason


def test_a_margin_is_asked_for(make_run: MakeRun) -> None:
    make_run("p", PARENT, 0.4)
    strict = replace(CHILD, criterion="val.r2_position_mean >= parent + 0.2")
    assert verdict_of(make_run("near", strict, 0.55)).verdict == "refuted"
    assert verdict_of(make_run("far", strict, 0.65)).against == pytest.approx(0.6)


def test_no_verdict_without_the_parents_run(make_run: MakeRun) -> None:
    verdict = verdict_of(make_run("c", CHILD, 0.9))
    assert verdict.verdict == "undecided" and "no finished run of parent_recipe" in verdict.reason


@pytest.mark.parametrize(
    "unfit",
    [
        {"state": "killed"},
        {"step": 7},
        {"clips": "others"},
        {"config": override(PARENT.config, ("batch_size=4",))},
        {"config": override(PARENT.config, ("optimizer.warmup_steps=3",))},
    ],
    ids=str,
)
def test_a_run_that_does_not_compare_is_no_parents_run(make_run: MakeRun, unfit: dict[str, Any]) -> None:
    make_run("p", PARENT, 0.1, **unfit)
    assert verdict_of(make_run("c", CHILD, 0.9)).verdict == "undecided"


@pytest.mark.parametrize(
    "change", ["seed=7", "runtime.threads=3", "data.num_workers=2", "target.source=x", "data.table=y"]
)
def test_what_decides_nothing_may_differ(make_run: MakeRun, change: str) -> None:
    make_run("p", PARENT, 0.1, config=override(PARENT.config, (change,)))
    assert verdict_of(make_run("c", CHILD, 0.9)).verdict == "confirmed"


def test_both_may_be_changed_alike(make_run: MakeRun) -> None:
    make_run("p", PARENT, 0.1, config=override(PARENT.config, ("batch_size=4",)))
    run = make_run("c", CHILD, 0.9, config=override(CHILD.config, ("batch_size=4",)))
    assert verdict_of(run).verdict == "confirmed"
    assert noted_recipe(run)["changed"] == ["batch_size"]
    assert noted_recipe(run)["differs_from_parent"] == ["optimizer.lr"]


def test_the_parents_run_of_the_same_seed_is_preferred(make_run: MakeRun) -> None:
    make_run("p0", PARENT, 0.1)
    make_run("p7", PARENT, 0.5, config=override(PARENT.config, ("seed=7",)))
    assert (
        verdict_of(make_run("c7", CHILD, 0.3, config=override(CHILD.config, ("seed=7",)))).verdict
        == "refuted"
    )
    assert verdict_of(make_run("c0", CHILD, 0.3)).parent_run == "p0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("objective.targets=raw", "objective.targets"),
        ("masks.ratio=0.9", "masks.ratio"),
        ("masks.max_targets=7", "masks.max_targets"),
        ("target.provider=ema", "move with it"),
        ("encoder.geometry.num_frames=4", "encoder.geometry.num_frames"),
    ],
)
@pytest.mark.parametrize("criterion", ["val.r2_position_mean > parent", "val.loss < parent"])
def test_no_verdict_across_tasks_or_target_spaces(
    make_run: MakeRun, change: str, said: str, criterion: str
) -> None:
    make_run("p", PARENT, 0.1, loss=1.0)
    other = replace(CHILD, config=override(CHILD.config, (change,)), criterion=criterion)
    verdict = verdict_of(make_run("c", other, 0.9, loss=0.1))
    assert verdict.verdict == "undecided" and verdict.against is None
    assert said in verdict.reason and "salt-vla eval" in verdict.reason


def test_no_verdict_between_two_caches(make_run: MakeRun) -> None:
    make_run("p", PARENT, 0.1, cache="another teacher")
    assert "cached latents" in verdict_of(make_run("c", CHILD, 0.9)).reason


def test_a_term_of_the_objective_spoils_the_loss_and_not_r2(make_run: MakeRun) -> None:
    make_run("p", PARENT, 0.1, loss=1.0)
    term = replace(CHILD, config=override(CHILD.config, ("objective.variance_weight=1",)))
    assert verdict_of(make_run("r2", term, 0.9, loss=0.5)).verdict == "confirmed"
    by_loss = replace(term, criterion="val.loss < parent")
    assert "objective.variance_weight" in verdict_of(make_run("loss", by_loss, 0.9, loss=0.5)).reason


def test_probes_compare_across_target_spaces(make_run: MakeRun) -> None:
    probed = replace(
        CHILD, config=override(CHILD.config, ("objective.targets=raw",)), criterion="probe.action > parent"
    )
    for name, recipe, value in (("p", PARENT, 0.3), ("c", probed, 0.4)):
        make_run(name, recipe, 0.0).log_metrics({"kind": "probe", "step": 10, "action": value})
    assert verdict_of(RunDirectory.named("c")).verdict == "confirmed"


def test_a_run_cut_short_decides_nothing(make_run: MakeRun) -> None:
    verdict = verdict_of(make_run("p", PARENT, 0.9, step=8))
    assert (verdict.verdict, verdict.reason) == ("undecided", "stopped at step 8 of 10")


@pytest.mark.parametrize("r2", [None, float("nan"), "text", True])
def test_a_last_figure_that_is_no_number_decides_nothing(make_run: MakeRun, r2: float | None) -> None:
    """Whatever it was before: the run has gone astray since."""
    assert "has no val.r2_position_mean" in verdict_of(make_run("p", PARENT, r2)).reason


def test_a_parents_run_that_was_given_what_the_child_has_is_none(make_run: MakeRun) -> None:
    """A sweep's own point, or any run of the parent with the child's settings, is the child itself."""
    child = replace(CHILD, config=override(CHILD.config, ("steps=20",)))
    make_run("point", PARENT, 0.1, config=CHILD.config)
    make_run("other", PARENT, 0.1, config=override(PARENT.config, ("optimizer.lr=0.7",)))
    assert verdict_of(make_run("c", child, 0.9, step=20)).verdict == "undecided"
    make_run("p", PARENT, 0.2)
    assert verdict_of(make_run("c", child, 0.9, step=20)).parent_run == "p"


def test_both_may_be_changed_alike_where_the_recipes_differ_too(make_run: MakeRun) -> None:
    child = replace(CHILD, config=override(CHILD.config, ("steps=20",)))
    both = ("steps=6",)
    make_run("p", PARENT, 0.1, config=override(PARENT.config, both), step=6)
    run = make_run("c", child, 0.9, config=override(child.config, both), step=6)
    assert verdict_of(run).verdict == "confirmed"


def test_a_child_that_was_made_its_parent_decides_nothing(make_run: MakeRun) -> None:
    make_run("p", PARENT, 0.1)
    assert verdict_of(make_run("c", CHILD, 0.9, config=PARENT.config)).verdict == "undecided"


def test_the_same_steps_are_asked_for_where_the_criterion_says_so(make_run: MakeRun) -> None:
    config = override(CHILD.config, ("steps=20",))
    child = replace(CHILD, config=config, criterion="val.r2_position_mean > parent at the same steps")
    make_run("short", PARENT, 0.1)
    make_run("point", PARENT, 0.1, config=config, step=20)
    verdict = verdict_of(make_run("c", child, 0.9, step=20))
    assert verdict.verdict == "undecided" and "as many steps" in verdict.reason
    make_run("p", PARENT, 0.2, config=override(PARENT.config, ("steps=20",)), step=20)
    assert verdict_of(make_run("c", child, 0.9, step=20)).parent_run == "p"


def test_no_verdict_between_two_teachers_in_the_loop(make_run: MakeRun) -> None:
    write_text(make_run("p", PARENT, 0.1).path / "teacher_provenance.json", '{"fingerprint": "other"}')
    assert "the teacher" in verdict_of(make_run("c", CHILD, 0.9)).reason


@pytest.mark.parametrize("text", ['{"x": 1}', '{"name": 1}', "[]", "{"])
def test_damaged_notes_of_a_run_are_named(make_run: MakeRun, text: str) -> None:
    run = make_run("p", PARENT, 0.1)
    for file, read in (("recipe.json", noted_recipe), ("verdict.json", noted_verdict)):
        write_text(run.path / file, text)
        with pytest.raises(RunError, match=rf"{file} is damaged"):
            read(run)


def test_a_target_in_words_alone_is_left_to_people(make_run: MakeRun) -> None:
    verdict = verdict_of(make_run("p", replace(PARENT, criterion=""), 0.9))
    assert verdict.verdict == "undecided" and "R² above 0." in verdict.reason


def test_a_recipe_that_claims_nothing_has_no_verdict(make_run: MakeRun) -> None:
    run = make_run("p", replace(PARENT, hypothesis="", target="", criterion=""), 0.9)
    assert conclude(run) is None and noted_verdict(run) == {}


def test_a_damaged_neighbour_keeps_nobody_from_a_verdict(make_run: MakeRun) -> None:
    make_run("p", PARENT, 0.1)
    (make_run("q", PARENT, 0.1).path / "recipe.json").write_text("{")
    assert verdict_of(make_run("c", CHILD, 0.9)).parent_run == "p"


def test_a_run_of_other_settings_says_nothing_of_a_hypothesis(make_run: MakeRun) -> None:
    """But for its seed, its folders, and how it is computed."""
    verdict = verdict_of(make_run("p", PARENT, 0.9, config=override(PARENT.config, ("encoder.depth=1",))))
    assert verdict.verdict == "undecided" and verdict.value == 0.9
    assert "departs from parent_recipe in encoder.depth" in verdict.reason
    alike = override(PARENT.config, ("seed=4", "data.table=y", "runtime.threads=3", "data.num_workers=2"))
    assert verdict_of(make_run("q", PARENT, 0.9, config=alike)).verdict == "confirmed"


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("config_changes.jsonl", '{"changed": [{"field": "optimizer.lr"}, {"field": 5}]}', "optimizer.lr"),
        ("branch.json", '{"run": "long", "step": 5}', "long@5"),
    ],
)
def test_settings_or_weights_of_before_decide_nothing(
    make_run: MakeRun, file: str, text: str, said: str
) -> None:
    """Neither on the run itself nor as the parent's run that another is held against."""
    odd = make_run("p", PARENT, 0.4)
    write_text(odd.path / file, text)
    verdict = verdict_of(odd)
    assert verdict.verdict == "undecided" and said in verdict.reason
    assert "no finished run of parent_recipe" in verdict_of(make_run("c", CHILD, 0.9)).reason
