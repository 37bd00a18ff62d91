"""The table has every encoder on every target, with intervals, and comparisons that can say no."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.probing import ProbeSet, load_probe, probe_suite, run_probe_suite
from salt_vla.evaluation.results import (
    Comparison,
    Row,
    SuiteResult,
    compared_pairs,
    from_objects,
    to_objects,
)

TRAIN_EPISODES, TEST_EPISODES, CLIPS = 40, 30, 4
# How much noise stands between each encoder's features and what is to be predicted.
NOISE = {"student": 0.3, "teacher": 0.3, "random": 3.0, "pixels": 0.5}
CONTRACT = ("encoder", "suite", "target", "metric", "value", "low", "high", "seed")


def one_side(first_episode: int, count: int, seed: int) -> ProbeSet:
    """Six hidden factors: two targets are linear in them, the task is the sign of the first."""
    random = np.random.default_rng([seed, first_episode])
    episodes = np.arange(first_episode, first_episode + count).repeat(CLIPS)
    hidden = random.standard_normal((count, 6)).repeat(CLIPS, axis=0)
    hidden[:, 0] = np.where(episodes % 2, 2.0, -2.0)
    hidden += 0.5 * random.standard_normal(hidden.shape)
    mix = np.random.default_rng(9).standard_normal((6, 24))
    features = {
        name: (hidden @ mix + noise * 5 * random.standard_normal((len(episodes), 24))).astype(np.float32)
        for name, noise in NOISE.items()
    }
    targets = {
        "action_end": hidden[:, :4] + 0.1,
        "hand_velocity": hidden[:, 3:] * 0.2,
        "task": np.array(["push", "reach"])[episodes % 2],
    }
    return ProbeSet(features, targets, episodes)


def both_sides(seed: int = 0) -> tuple[ProbeSet, ProbeSet]:
    return one_side(0, TRAIN_EPISODES, seed), one_side(1000, TEST_EPISODES, seed)


@pytest.fixture(scope="module")
def result() -> SuiteResult:
    return run_probe_suite("grid", *both_sides(), seed=3)


def row_of(result: SuiteResult, encoder: str, target: str) -> Row:
    return next(row for row in result.rows if (row.encoder, row.target) == (encoder, target))


def comparison_of(result: SuiteResult, encoder: str, against: str, target: str) -> Comparison:
    names = (encoder, against, target)
    return next(c for c in result.comparisons if (c.encoder, c.against, c.target) == names)


def without(side: ProbeSet, *encoders: str) -> ProbeSet:
    return dataclasses.replace(side, features={k: v for k, v in side.features.items() if k not in encoders})


def test_every_encoder_and_the_constant_stand_on_every_target(result: SuiteResult) -> None:
    expected = {(e, t) for e in (*NOISE, "constant") for t in ("action_end", "hand_velocity", "task")}
    assert {(row.encoder, row.target) for row in result.rows} == expected
    assert len(result.rows) == len(expected)


def test_rows_carry_the_contracts_fields(result: SuiteResult) -> None:
    for row in result.rows:
        fields = row.as_dict()
        assert tuple(fields)[: len(CONTRACT)] == CONTRACT
        assert (row.suite, row.seed, row.episodes) == ("grid", 3, TEST_EPISODES)
        assert row.clips == TEST_EPISODES * CLIPS
        assert row.metric == ("accuracy" if row.target == "task" else "r2")
        assert row.low <= row.high
        assert all(map(math.isfinite, (row.value, row.low, row.high)))


def test_better_features_score_better(result: SuiteResult) -> None:
    for target in ("action_end", "hand_velocity"):
        assert row_of(result, "student", target).value > 0.7
        assert row_of(result, "random", target).value < row_of(result, "pixels", target).value
        assert row_of(result, "constant", target).value <= 0
    assert row_of(result, "student", "task").value > 0.9
    assert row_of(result, "constant", "task").value == pytest.approx(0.5)


def test_only_the_constant_has_no_penalty(result: SuiteResult) -> None:
    for row in result.rows:
        assert (row.alpha is None) == (row.encoder == "constant")


def test_the_promised_pairs_are_compared_on_every_target(result: SuiteResult) -> None:
    pairs = {("student", "random"), ("student", "teacher"), ("student", "pixels"), ("teacher", "random")}
    for target in ("action_end", "hand_velocity", "task"):
        found = [(c.encoder, c.against) for c in result.comparisons if c.target == target]
        assert set(found) == pairs
        assert len(found) == len(pairs)


def test_a_real_difference_is_apart_and_a_null_one_is_not(result: SuiteResult) -> None:
    real = comparison_of(result, "student", "random", "action_end")
    null = comparison_of(result, "student", "teacher", "action_end")
    assert real.apart and real.low > 0
    assert not null.apart and null.low < 0 < null.high


def test_a_comparison_is_the_difference_of_its_rows(result: SuiteResult) -> None:
    for c in result.comparisons:
        rows = row_of(result, c.encoder, c.target), row_of(result, c.against, c.target)
        assert c.difference == pytest.approx(rows[0].value - rows[1].value)
        assert c.low <= c.difference <= c.high
        assert c.apart == (c.low > 0 or c.high < 0)


def test_a_comparison_can_say_that_the_student_lost() -> None:
    train, test = both_sides()
    swapped = [
        dataclasses.replace(
            side, features={"student": side.features["random"], "random": side.features["student"]}
        )
        for side in (train, test)
    ]
    lost = comparison_of(run_probe_suite("grid", *swapped, seed=0), "student", "random", "action_end")
    assert lost.apart and lost.high < 0


def test_absent_encoders_are_simply_not_compared() -> None:
    train, test = (without(side, "teacher", "pixels") for side in both_sides())
    found = run_probe_suite("grid", train, test, seed=0)
    assert {(c.encoder, c.against) for c in found.comparisons} == {("student", "random")}


def test_other_encoders_are_compared_with_the_reference_and_pixels() -> None:
    pairs = compared_pairs(["mine", "random", "pixels"], "random")
    assert pairs == [("mine", "random"), ("mine", "pixels")]
    assert compared_pairs(["student", "pixels"], "pixels") == [("student", "pixels")]
    assert compared_pairs(["student", "old"], "old") == [("student", "old")]


def test_a_suite_is_pure_in_its_seed(result: SuiteResult) -> None:
    again = run_probe_suite("grid", *both_sides(), seed=3)
    assert again.rows == result.rows
    assert again.comparisons == result.comparisons


def test_the_number_of_threads_does_not_change_the_table(result: SuiteResult) -> None:
    with threadpool_limits(limits=2):
        again = run_probe_suite("grid", *both_sides(), seed=3)
    assert [row.alpha for row in again.rows] == [row.alpha for row in result.rows]
    assert [row.value for row in again.rows] == [row.value for row in result.rows]


def test_a_constant_given_among_the_features_is_not_doubled() -> None:
    train, test = (
        dataclasses.replace(side, features={**side.features, "constant": np.zeros((len(side.episodes), 0))})
        for side in both_sides()
    )
    found = run_probe_suite("grid", train, test, seed=3)
    assert [row.encoder for row in found.rows if row.target == "task"].count("constant") == 1


def test_permuted_held_out_targets_land_at_chance() -> None:
    train, test = both_sides()
    order = np.random.default_rng(1).permutation(TEST_EPISODES)
    rows = (order[:, None] * CLIPS + np.arange(CLIPS)).ravel()
    shuffled = dataclasses.replace(test, targets={"action_end": test.targets["action_end"][rows]})
    found = run_probe_suite("grid", train, shuffled, seed=0)
    assert row_of(found, "student", "action_end").value < 0.1


def test_a_leaking_episode_stops_the_suite() -> None:
    train, _ = both_sides()
    with pytest.raises(DataError, match="episode 39 has clips in both"):
        run_probe_suite("grid", train, one_side(39, 5, 0), seed=0)


def test_broken_features_stop_the_suite_and_name_the_encoder() -> None:
    train, test = both_sides()
    test.features["teacher"][5, 5] = np.nan
    with pytest.raises(DataError, match="'teacher' hold NaN"):
        run_probe_suite("grid", train, test, seed=0)


def test_an_unseen_class_stops_the_suite() -> None:
    train, test = both_sides()
    test.targets["task"][0] = "door"
    with pytest.raises(DataError, match="class 'door' occurs"):
        run_probe_suite("grid", train, test, seed=0)


def test_an_encoder_on_one_side_only_is_named() -> None:
    train, test = both_sides()
    with pytest.raises(DataError, match="'teacher' has features on one side"):
        run_probe_suite("grid", without(train, "teacher"), test, seed=0)


def test_a_target_that_cannot_be_scored_is_left_out_and_noted() -> None:
    train, test = both_sides()
    clips = len(test.episodes)
    odd = dataclasses.replace(test, targets={**test.targets, "hand_velocity": np.full((clips, 3), 0.1)})
    found = run_probe_suite("grid", train, odd, seed=0)
    assert {row.target for row in found.rows} == {"action_end", "task"}
    assert found.notes == ["target 'hand_velocity' is left out: it is the same on every held-out clip"]


def test_a_target_of_one_side_is_left_out_and_noted() -> None:
    train, test = both_sides()
    fewer = dataclasses.replace(test, targets={"task": test.targets["task"]})
    found = run_probe_suite("grid", train, fewer, seed=0)
    assert len(found.notes) == 2
    assert "only one side of the split has it" in found.notes[0]
    with pytest.raises(DataError, match="nothing to probe"):
        run_probe_suite("grid", train, dataclasses.replace(test, targets={}), seed=0)


def test_a_still_dimension_is_said_in_the_row() -> None:
    train, test = both_sides()
    still = test.targets["action_end"].copy()
    still[:, 2] = 1.0
    odd = dataclasses.replace(test, targets={"action_end": still})
    found = run_probe_suite("grid", train, odd, seed=0)
    assert all("dimension(s) 2 do not vary" in row.note for row in found.rows)


def test_rows_that_do_not_fit_the_clips_are_named() -> None:
    with pytest.raises(DataError, match="features of encoder 'student' has 3 rows for 4 clips"):
        ProbeSet({"student": np.zeros((3, 2))}, {}, np.arange(4))
    with pytest.raises(DataError, match="target 'task' has 5 rows for 4 clips"):
        ProbeSet({}, {"task": np.zeros(5)}, np.arange(4))
    with pytest.raises(DataError, match="one side has none"):
        ProbeSet({}, {}, np.arange(0))


def test_rows_and_comparisons_survive_json_as_plain_lists(result: SuiteResult) -> None:
    text = json.dumps({"rows": to_objects(result.rows), "comparisons": to_objects(result.comparisons)})
    read = json.loads(text)
    assert from_objects(Row, read["rows"]) == result.rows
    assert from_objects(Comparison, read["comparisons"]) == result.comparisons


def test_a_malformed_row_is_named(result: SuiteResult) -> None:
    objects = to_objects(result.rows)
    with pytest.raises(ConfigError, match=r"rows\[1\] has unknown field\(s\) extra"):
        from_objects(Row, [objects[0], {**objects[1], "extra": 1}], "rows")
    with pytest.raises(ConfigError, match=r"rows\[0\]\.value must be float"):
        from_objects(Row, [{**objects[0], "value": "high"}], "rows")


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, salt_vla.evaluation as e; "
        "print([m for m in ('torch', 'sklearn', 'numpy') if m in sys.modules]); "
        "print([getattr(e, name).__name__ for name in e.__all__])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded, names = run.stdout.splitlines()
    assert loaded == "[]"
    assert "run_probe_suite" in names and "features_of" in names


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import salt_vla.evaluation

    with pytest.raises(AttributeError, match="no attribute 'attentive_probe'"):
        _ = salt_vla.evaluation.attentive_probe


def test_a_protocol_that_a_probe_does_not_know_is_refused_with_those_that_do() -> None:
    train, test = both_sides()
    with pytest.raises(
        ConfigError, match=r"'knn' knows no protocol 'vjepa2-max'.*: attentive, attentive-small"
    ):
        probe_suite("s", train, test, 0, "knn", "vjepa2-max")


@pytest.mark.parametrize("name", ["linear", "knn"])
def test_probes_of_vectors_put_encoders_in_their_order_of_noise(name: str) -> None:
    train, test = both_sides()
    scored = {(one.encoder, one.target): one for one in probe_suite("s", train, test, 0, name)}
    assert {one.probe for one in scored.values()} == {name} and load_probe(name).reads == "vector"
    for target in ("action_end", "task"):
        values = [scored[who, target].sums.value for who in ("student", "random")]
        assert values[0] > values[1]
