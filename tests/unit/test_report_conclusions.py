"""The conclusions: every outcome has its sentence, and none claims what the intervals do not show."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from salt_vla.reports.conclusions import conclusions
from salt_vla.reports.rows import EVERY_SEED

GOOD = {"r2_channel_mean": 0.7, "r2_position_mean": 0.2, "r2_copy_nearest": 0.1}
APART = 0.05


def pair(target: str, against: str, value: float, **more: Any) -> dict[str, Any]:
    """The student against another: apart when the difference is larger than 0.05."""
    row = {"encoder": "student", "against": against, "suite": "held_out", "target": target, "metric": "r2"}
    row |= {"difference": value, "low": value - APART, "high": value + APART, "seed": 0}
    return row | {"apart": abs(value) > APART} | more


def value(encoder: str, target: str, figure: float, suite: str = "held_out") -> dict[str, Any]:
    row = {"encoder": encoder, "suite": suite, "target": target, "metric": "r2", "seed": 0}
    return row | {"value": figure, "low": figure - APART, "high": figure + APART}


def said(comparisons: list[dict[str, Any]], **more: Any) -> list[str]:
    arguments: dict[str, Any] = {"rows": [], "validation_r2": GOOD, "num_seeds": 1} | more
    return conclusions(comparisons=comparisons, **arguments)


def test_the_first_sentence_says_what_training_did_for_action_and_velocity() -> None:
    first, *_ = said([pair("action_mean", "random", 0.1), pair("hand_velocity", "random", 0.2)])
    assert first == (
        "The student beats the same encoder at random initialisation on action mean "
        "(+0.100 [+0.050, +0.150]) and hand velocity (+0.200 [+0.150, +0.250]), "
        "paired intervals apart from zero."
    )


def test_a_win_on_one_headline_target_does_not_hide_the_other() -> None:
    first, *_ = said([pair("action_mean", "random", 0.1), pair("hand_velocity", "random", 0.01)])
    assert "beats" in first and first.endswith("; on hand velocity no difference can be shown.")


def test_a_student_like_random_init_is_said_to_be_so() -> None:
    first, *_ = said([pair("action_mean", "random", 0.01), pair("hand_velocity", "random", -0.02)])
    assert first == (
        "The student does not beat the same encoder at random initialisation: "
        "no difference can be shown on action mean and hand velocity."
    )


def test_a_student_worse_than_random_init_is_said_to_be_so() -> None:
    first, *_ = said([pair("action_mean", "random", -0.1), pair("hand_velocity", "random", 0.0)])
    assert "does not beat" in first and "it is worse on action mean (−0.100 [−0.150, −0.050])" in first
    assert "on hand velocity no difference can be shown" in first


def test_wins_losses_and_draws_stand_in_one_sentence() -> None:
    first, *_ = said(
        [
            pair("action_mean", "random", 0.1),
            pair("action_end", "random", -0.1),
            pair("hand_velocity", "random", 0.0),
        ]
    )
    assert "beats" in first and "but is worse on action end" in first and "on hand velocity no diff" in first


def test_without_action_or_velocity_all_targets_are_the_headline() -> None:
    first, second, *_ = said([pair("task", "random", 0.1)])
    assert first.startswith("The student beats the same encoder") and "task (+0.100" in first
    assert "its teacher" in second


def test_without_a_comparison_with_random_init_nothing_is_claimed() -> None:
    first, *_ = said([pair("action_mean", "teacher", 0.1)])
    assert first.startswith("Nothing is claimed about what training added")


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (0.1, "Training helped on task (+0.100)."),
        (-0.1, "Training hurt on task (−0.100)."),
        (0.01, "On task no effect of training can be shown."),
    ],
)
def test_the_other_targets_get_a_sentence_of_their_own(difference: float, text: str) -> None:
    assert said([pair("action_mean", "random", 0.1), pair("task", "random", difference)])[1] == text


@pytest.mark.parametrize(("rival", "name"), [("teacher", "its teacher"), ("pixels", "downsampled pixels")])
class TestRivals:
    def test_a_student_that_wins_everywhere_beats_it(self, rival: str, name: str) -> None:
        text = f"The student beats {name} on action mean (+0.100), paired intervals apart from zero."
        assert text in said([pair("action_mean", rival, 0.1)])

    def test_a_student_that_draws_does_not_beat_it(self, rival: str, name: str) -> None:
        text = f"The student does not beat {name}: no difference can be shown on action mean."
        assert text in said([pair("action_mean", rival, 0.04)])

    def test_a_student_that_loses_is_worse(self, rival: str, name: str) -> None:
        text = f"The student does not beat {name}: it is worse on action mean (−0.100)."
        assert text in said([pair("action_mean", rival, -0.1)])

    def test_a_comparison_that_was_not_made_is_said_not_to_be(self, rival: str, name: str) -> None:
        assert f"The student was not compared with {name}." in said([pair("action_mean", "random", 0.1)])

    def test_a_comparison_told_by_the_rival_counts_too(self, rival: str, name: str) -> None:
        row = pair("action_mean", "student", 0.1, encoder=rival)
        assert f"The student does not beat {name}: it is worse on action mean (−0.100)." in said([row])

    def test_many_targets_are_summed_up(self, rival: str, name: str) -> None:
        targets = {"action_mean": -0.3, "task": -0.1, "hand_position": -0.2, "hand_velocity": -0.15}
        text = f"does not beat {name}: it is worse on 4 targets by 0.100 (task) to 0.300 (action mean)."
        assert any(text in sentence for sentence in said([pair(t, rival, d) for t, d in targets.items()]))


def test_a_target_that_nothing_is_read_from_is_named() -> None:
    rows = [
        value("student", "task", 0.12),
        value("constant", "task", 0.1),
        value("student", "action_mean", 0.5),
    ]
    rows.append(value("constant", "action_mean", 0.0))
    (sentence,) = [s for s in said([], rows=rows) if "constant" in s]
    assert sentence.startswith("Nothing is read out on task: ")


def test_targets_that_clear_the_constant_predictor_are_not_mentioned() -> None:
    rows = [
        value("student", "task", 0.5),
        value("constant", "task", 0.1),
        value("student", "action_end", 0.0),
    ]
    assert not any("constant" in sentence for sentence in said([], rows=rows))


def r2(channel: float | None, position: float | None, copy: float | None) -> str:
    figures = {"r2_channel_mean": channel, "r2_position_mean": position, "r2_copy_nearest": copy}
    (sentence,) = [s for s in said([], validation_r2=figures) if "R²" in s]
    return sentence


def test_predictions_that_beat_every_baseline_have_learned_what_changes() -> None:
    assert r2(0.7, 0.2, 0.1) == (
        "The student's predictions beat the per-position mean (held-out R² +0.200) and copying the nearest "
        "visible token (R² +0.100): it has learned something of what changes in a clip."
    )


def test_predictions_below_the_per_position_mean_have_learned_the_background() -> None:
    assert r2(0.68, -0.83, -0.4) == (
        "The student does not beat the per-position mean (held-out R² −0.830; "
        "+0.680 against the channel mean): it has learned the static background."
    )


def test_copying_is_mentioned_where_it_alone_is_beaten() -> None:
    assert r2(0.68, -0.2, 0.3).endswith("It does beat copying the nearest visible token (R² +0.300).")


@pytest.mark.parametrize("position", [0.0, 0.004])
def test_a_hair_above_the_baseline_is_not_beating_it(position: float) -> None:
    assert r2(0.68, position, 0.3).startswith("The student does not beat the per-position mean")


def test_predictions_worse_than_copying_say_so() -> None:
    sentence = r2(0.7, 0.2, -0.1)
    assert "but not copying the nearest visible token (R² −0.100)" in sentence and "neighbouring" in sentence


def test_predictions_below_the_channel_mean_have_learned_nothing() -> None:
    assert r2(-0.1, -0.9, -0.9) == (
        "The student's predictions do not beat the mean of each channel (held-out R² −0.100): "
        "it has learned nothing of its targets."
    )


def test_r2_without_the_copying_baseline_claims_less() -> None:
    assert r2(0.7, 0.2, None).endswith("it has learned more than the static background.")


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_r2_that_was_not_measured_is_not_claimed(missing: float | None) -> None:
    assert r2(0.7, missing, 0.2).startswith("R² on held-out clips was not measured")
    assert r2(missing, 0.2, 0.2).startswith("R² on held-out clips was not measured")


def test_r2_figures_may_be_absent_altogether() -> None:
    assert any("was not measured" in sentence for sentence in said([], validation_r2={}))


def test_another_suite_gets_one_sentence_of_counts() -> None:
    new = [
        pair("action_mean", "pixels", 0.3, suite="new_cameras"),
        pair("task", "pixels", -0.3, suite="new_cameras"),
        pair("task", "random", 0.3, suite="new_cameras"),
    ]
    sentences = said([pair("action_mean", "random", 0.1), *new])
    assert (
        "New cameras: the student is ahead of the same encoder at random initialisation on 1 of 1 targets "
        "and downsampled pixels on 1 of 2 targets (behind on 1)."
    ) in sentences
    named = said(new, suite="held_out", suite_names={"new_cameras": "cameras never trained on"})
    assert any(sentence.startswith("Cameras never trained on: the student") for sentence in named)
    assert "not compared with downsampled pixels" in " ".join(sentences), "the main suite speaks for itself"


def test_the_suite_to_speak_of_can_be_named() -> None:
    rows = [pair("task", "random", 0.1), pair("action_mean", "random", 0.2, suite="new_cameras")]
    assert "action mean (+0.200" in said(rows, suite="new_cameras")[0]


def test_one_seed_is_said_to_be_one_seed() -> None:
    assert said([])[-1].startswith("All this is one seed")


def test_several_seeds_say_what_counts_as_a_difference() -> None:
    rows = [pair("action_mean", "random", 0.1, seed=seed) for seed in (0, 1, 2)]
    assert said(rows, num_seeds=3)[-1] == (
        "Figures are means over 3 seeds; a difference counts only where its paired interval "
        f"({EVERY_SEED}) excludes zero."
    )


def test_a_win_in_two_of_three_seeds_is_no_win() -> None:
    rows = [pair("action_mean", "random", d, seed=seed) for seed, d in enumerate((0.1, 0.2, 0.01))]
    assert said(rows, num_seeds=3)[0].startswith("The student does not beat the same encoder")


def test_an_empty_run_still_has_conclusions() -> None:
    sentences = said([], validation_r2={})
    assert len(sentences) == 5 and all(sentence.endswith(".") for sentence in sentences)


def test_beating_is_never_said_where_nothing_is_apart() -> None:
    for a, b, c in itertools.product((-0.05, 0.0, 0.05), repeat=3):
        rows = [pair("action_mean", "random", a), pair("task", "teacher", b), pair("task", "pixels", c)]
        assert not any("student beats" in sentence for sentence in said(rows, validation_r2={}))
