"""Robot suites on recordings with known answers: what is read off them, and who is said to know it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from salt_vla.config import DataConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.signals import Recordings
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.bench import Bench, Side
from salt_vla.evaluation.causal import Windows
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore
from salt_vla.evaluation.linear import LinearProbe
from salt_vla.evaluation.probes import Problem
from salt_vla.evaluation.results import Scored, compared_pairs, renamed, tabulate
from salt_vla.evaluation.robots import (
    Examples,
    Recorded,
    leave_out,
    own_state,
    score_examples,
    task_folds,
)
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.evaluation.statistics import auroc_sums, copy_sums, interval
from salt_vla.evaluation.suites.actions import action_targets
from salt_vla.evaluation.suites.dynamics import leading_components
from salt_vla.evaluation.suites.events import event_targets
from salt_vla.geometry import ClipGeometry

GEOMETRY = ClipGeometry(num_frames=8, image_size=64, tubelet_size=2, patch_size=16)
VIEW = ViewConfig(frame_stride=2)
NO_FILMS = ViewReader(ClipTable.from_clips([], Path()), VIEW, GEOMETRY)
TASKS = ("pull", "push", "reach", "turn")


@pytest.fixture
def bench(tiny_table: ClipTable, tmp_path: Path) -> Bench:
    """Its films are not read here."""

    def side(split: str) -> Side:
        part = tiny_table.select(split=split)
        return Side(part, ClipViews(part.clip_ids, ViewReader(part, VIEW, GEOMETRY), split))

    store = FeatureStore(tmp_path / "features")
    return Bench(
        {}, side("train"), side("validation"), DataConfig(view=VIEW), GEOMETRY, EvalSettings(), store
    )


def recorded(moments: Sequence[int], frames: int = 20, **signals: np.ndarray) -> Recorded:
    """Windows at these moments of one episode, number 5; a signal is (frames, dims)."""
    count = len(moments)
    windows = Windows(
        Side(ClipTable.from_clips([], Path()), ClipViews([], NO_FILMS, "")),
        np.array(moments),
        np.full(count, frames),
        np.full(count, 5),
        ("push",) * count,
    )
    by_name = {name.replace("_", "."): {5: each.astype(np.float32)} for name, each in signals.items()}
    return Recorded(windows, Recordings(10.0, {}, by_name), np.ones(count, bool))


COUNTING = np.arange(20.0)[:, None] * [1.0, 10.0]


def test_a_signal_is_read_relative_to_each_windows_last_frame() -> None:
    side = recorded([3, 9], action=COUNTING)
    assert side.at("action", [-1, 0, 2])[:, :, 0].tolist() == [[2, 3, 5], [8, 9, 11]]


def test_beyond_its_ends_an_episodes_outer_frames_are_held_and_told() -> None:
    side = recorded([1, 10, 18], action=COUNTING)
    assert side.at("action", [-3, 3])[:, :, 0].tolist() == [[0, 4], [7, 13], [15, 19]]
    assert side.has(-3, 3).tolist() == [False, True, False]
    assert side.has(-1, 1).tolist() == [True, True, True]


def test_a_value_that_is_not_a_number_is_named_by_frame_and_episode() -> None:
    broken = COUNTING.copy()
    broken[7, 1] = np.inf
    with pytest.raises(DataError, match=r"'action' is not a number at frame 7 of episode 5"):
        recorded([3, 6], action=broken).at("action", range(3))


def test_a_chunk_is_the_actions_from_the_moment_on() -> None:
    targets = action_targets(recorded([4, 10], action=COUNTING), 4)
    assert list(targets) == ["action", "chunk", "chunk_step_2", "chunk_step_4"]
    assert targets["action"][:, 0].tolist() == [4, 10]
    assert targets["chunk"][0].tolist() == [4, 40, 5, 50, 6, 60, 7, 70]
    assert targets["chunk_step_2"][:, 0].tolist() == [5, 11]
    assert targets["chunk_step_4"][:, 0].tolist() == [7, 13]


def test_a_chunk_of_one_is_the_action() -> None:
    assert list(action_targets(recorded([4], action=COUNTING), 1)) == ["action"]


def test_the_robots_own_state_is_its_place_and_its_last_change() -> None:
    side = replace(recorded([4]), recordings=Recordings(10.0, {}, {"observation.state": {5: COUNTING}}))
    now, both = own_state(side), own_state(side, (0, 2))
    assert now is not None and both is not None
    assert now.tolist() == [[4, 40, 3, 30]]
    assert both.tolist() == [[4, 40, 3, 30, 6, 60, 3, 30]]
    assert own_state(recorded([4], action=COUNTING)) is None


def test_windows_left_out_are_counted_in_a_note(bench: Bench) -> None:
    side = replace(recorded([2, 10, 15, 18], action=COUNTING), asked=np.array([True, True, False, True]))
    kept = leave_out(bench, "s", [side, side], [side.has(0, 4)] * 2, "too late")
    assert [each.tolist() for each in kept] == [[0, 1], [0, 1]]
    assert bench.notes == ["s: 2 of 6 windows are left out: too late"]
    with pytest.raises(DataError, match="every window is left out: too late; a smaller --moment-stride"):
        leave_out(bench, "s", [side, side], [side.has(0, 4), side.has(0, 40)], "too late")


def gripper_and_object() -> Recorded:
    """The gripper closes at frame 10; the object rests, then moves 1 cm a frame from frame 14 on."""
    action = np.zeros((20, 2))
    action[:10, 1] = 1.0
    world = np.zeros((20, 9))
    world[14:, 0] = 0.01 * np.arange(1, 7)
    side = recorded([3, 6, 8, 9, 10, 12, 13, 14, 15])
    signals = {"action": {5: action}, "observation.environment_state": {5: world}}
    return replace(side, recordings=Recordings(10.0, {"action": ("x", "Left_Gripper")}, signals))


def test_events_are_those_of_the_next_frames_alone() -> None:
    side = gripper_and_object()
    (found, again) = event_targets([side, side], 3)
    moments = side.windows.moments
    assert moments[found["gripper_switches"][:, 0] == 1].tolist() == [8, 9]
    assert moments[found["object_starts_moving"][:, 0] == 1].tolist() == [12, 13]
    assert all(np.array_equal(found[name], again[name]) for name in found)


def test_events_need_a_gripper_or_an_object() -> None:
    side = recorded([3], action=COUNTING)
    with pytest.raises(DataError, match=r"whose name holds 'gripper'.*neither"):
        event_targets([side, side], 3)


# Probes


def toy(
    seed: int, episodes: int, first: int, shared: bool = True, clips: int = 8
) -> tuple[Examples, np.ndarray]:
    """The target is a mix of the robot's state and of what only the encoder `knows` sees; `noise` sees
    nothing. Not `shared`: every task has a mix of its own."""
    rng = np.random.default_rng(seed)
    count = episodes * clips
    numbers = first + np.repeat(np.arange(episodes), clips)
    tasks = np.array(TASKS)[numbers % len(TASKS)]
    state, seen = rng.normal(size=(count, 3)), rng.normal(size=(count, 2))
    sign = 1.0 if shared else np.where(np.isin(tasks, ("pull", "push")), 1.0, -1.0)[:, None]
    target = sign * (state[:, :2] + seen)
    noise = rng.normal(size=(count, 40))
    knows = np.concatenate((seen, 0.1 * rng.normal(size=(count, 20))), axis=1)
    return Examples({"knows": knows, "noise": noise}, {"y": target}, numbers, tasks, state), sign


def values(scored: Sequence[Scored], suite: str = "s") -> dict[str, float]:
    return {one.encoder: one.sums.value for one in scored if one.suite == suite}


def test_what_an_encoder_adds_to_the_robots_own_state_is_seen(bench: Bench) -> None:
    (train, _), (test, _) = toy(0, 40, 0), toy(1, 20, 100)
    found = values(score_examples(bench, "s", train, test, causal=True))
    assert list(found) == ["knows", "noise", "constant", "state", "state+knows", "state+noise"]
    assert found["state"] == pytest.approx(0.5, abs=0.15)
    assert found["knows"] == pytest.approx(0.5, abs=0.15)
    assert found["state+knows"] > 0.99
    assert abs(found["state+noise"] - found["state"]) < 0.03
    assert found["noise"] < 0.02 and found["constant"] <= 0


def test_knowledge_that_tasks_share_is_there_for_unseen_ones_and_other_knowledge_is_not(bench: Bench) -> None:
    for shared in (True, False):
        (train, _), (test, _) = toy(0, 40, 0, shared), toy(1, 20, 100, shared)
        scored = score_examples(bench, "s", train, test, causal=True)
        unseen = values(scored, "s/unseen-tasks")["state+knows"]
        assert unseen > 0.98 if shared else unseen < 0.05
        assert all(one.causal for one in scored)
    assert bench.notes == []


def test_the_known_numbers_go_unpenalised_beside_features() -> None:
    """The residuals' ridge (Frisch and Waugh) against the normal equations of both blocks at once."""
    from salt_vla.evaluation.robots import _explained, _without

    (train, _), (test, _) = toy(0, 10, 0), toy(1, 5, 100)
    assert train.known is not None and test.known is not None
    inside, outside = _without(train.known, test.known, train.features["noise"], test.features["noise"])
    explained, said = _explained(train.known, test.known, train.targets)
    left = {"y": train.targets["y"] - explained["y"]}
    fit = LinearProbe().fit(Problem("e", inside, outside, left, train.episodes, 0))["y"]
    ours = fit.predicted + said["y"]

    assert fit.alpha is not None
    mean, scale = inside.mean(0), inside.std(0)
    assert np.allclose(mean, 0, atol=1e-9)  # so that standardising them is all that the probe adds

    def both(side: Examples) -> np.ndarray:
        ones = np.ones((len(side.episodes), 1))
        return np.concatenate([ones, side.known, side.features["noise"] / scale], axis=1)

    x, free = both(train), 1 + train.known.shape[1]
    penalty = np.diag([0.0] * free + [fit.alpha] * len(scale))
    weights = np.linalg.solve(x.T @ x + penalty, x.T @ train.targets["y"])
    assert np.allclose(ours, both(test) @ weights, atol=1e-8)


def test_tasks_are_dealt_into_parts_that_share_none_with_what_they_learn_from() -> None:
    (train, _), (test, _) = toy(0, 12, 0), toy(1, 8, 100)
    folds = task_folds(train, test)
    assert not isinstance(folds, str) and len(folds) == 3
    for others, rows in folds:
        assert not set(train.tasks[others]) & set(test.tasks[rows])
    assert sorted(np.concatenate([rows for _, rows in folds]).tolist()) == list(range(len(test.tasks)))


def test_one_task_alone_cannot_be_unseen_and_the_note_says_so(bench: Bench) -> None:
    (train, _), (test, _) = toy(0, 12, 0), toy(1, 8, 100)
    train, test = (replace(side, tasks=np.full(len(side.tasks), "push")) for side in (train, test))
    assert {one.suite for one in score_examples(bench, "s", train, test, causal=True)} == {"s"}
    assert bench.notes == ["s/unseen-tasks is left out: all episodes have the same task"]


def test_too_few_episodes_of_other_tasks_are_said() -> None:
    (train, _), (test, _) = toy(0, 2, 0), toy(1, 2, 100)
    said = task_folds(train, test)
    assert isinstance(said, str) and "fewer than 2 training episodes are left" in said


def test_an_episode_on_both_sides_is_refused(bench: Bench) -> None:
    (train, _), (test, _) = toy(0, 12, 0), toy(1, 8, 11)
    with pytest.raises(DataError, match="episode 11"):
        score_examples(bench, "s", train, test, causal=True)


def test_an_encoder_cannot_be_called_as_a_baseline(bench: Bench) -> None:
    (train, _), (test, _) = toy(0, 12, 0), toy(1, 8, 100)
    train, test = (replace(side, features={"state": side.features["noise"]}) for side in (train, test))
    with pytest.raises(ConfigError, match="'state' is the name of a baseline"):
        score_examples(bench, "s", train, test, causal=True)


def test_what_is_known_without_an_encoder_is_compared_with_itself_alone() -> None:
    names = ["student", "random", "pixels", "state", "state+student", "state+random"]
    pairs = compared_pairs(names, "random")
    assert ("state+student", "state") in pairs and ("state+student", "state+random") in pairs
    assert ("state+random", "state") in pairs
    assert not any(name == "state" for name, _ in pairs)
    assert ("student", "random") in pairs


def test_a_row_keeps_what_is_known_when_its_encoder_is_called_otherwise() -> None:
    assert renamed("state+old", "new") == "state+new"
    assert renamed("old", "new") == "new"
    assert renamed("old+older", "new") == "new"


def test_each_ones_own_latents_are_not_subtracted_from_one_anothers() -> None:
    rng = np.random.default_rng(0)
    episodes = np.repeat(np.arange(12), 3)
    scored = []
    for name in ("student", "random"):
        now, later = rng.normal(size=(2, 36, 4))
        scored.append(Scored(name, "s", "latent", copy_sums(later, 0.5 * (now + later), now, episodes)))
    (result,) = tabulate(scored, 0)
    assert [row.value for row in result.rows] == pytest.approx([0.75, 0.75])
    assert result.comparisons == []


# Events and success: the area under the ROC curve


def test_area_under_the_curve_is_scikit_learns_with_ties() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(300) < 0.2).astype(float)
    score = np.round(truth + rng.normal(size=300), 1)
    sums = auroc_sums(truth[:, None], score[:, None], np.arange(300) // 6)
    assert sums.value == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert sums.metric == "auroc" and sums.clips.sum() == 300


def test_ties_are_halves_and_perfect_ranks_are_one() -> None:
    truth = np.array([[0.0], [1.0], [0.0], [1.0]])
    episodes = np.arange(4)
    assert auroc_sums(truth, np.zeros((4, 1)), episodes).value == pytest.approx(0.5)
    assert auroc_sums(truth, truth, episodes).value == 1
    assert auroc_sums(truth, -truth, episodes).value == 0


def test_the_areas_interval_is_that_of_resampling_it_anew() -> None:
    """First order against the area computed on each resample of the same episodes."""
    rng = np.random.default_rng(3)
    episodes = np.repeat(np.arange(60), 5)
    truth = (rng.random(60) < 0.4)[episodes].astype(float)
    score = truth + rng.normal(size=60)[episodes] + rng.normal(size=300)
    sums = auroc_sums(truth[:, None], score[:, None], episodes)
    areas = []
    for _ in range(600):
        rows = np.concatenate([np.flatnonzero(episodes == e) for e in rng.integers(0, 60, 60)])
        areas.append(roc_auc_score(truth[rows], score[rows]))
    found, (low, high) = interval(sums), np.quantile(areas, [0.025, 0.975])
    assert found.low < sums.value < found.high
    assert found.high - found.low == pytest.approx(high - low, rel=0.2)


def test_an_area_needs_both_kinds() -> None:
    with pytest.raises(DataError, match="clips of both kinds"):
        auroc_sums(np.ones((4, 1)), np.ones((4, 1)), np.arange(4))


def test_order_is_compared_within_a_part_of_unseen_tasks(bench: Bench) -> None:
    """Parts have means of their own, which would rank whole tasks: the constant predictor stays at a half."""
    rng = np.random.default_rng(0)
    sides = []
    for first, episodes in ((0, 40), (100, 24)):
        numbers = first + np.repeat(np.arange(episodes), 4)
        tasks = np.array(TASKS)[numbers % 4]
        happens = rng.random(len(numbers)) < np.where(tasks == "pull", 0.9, 0.2)
        features = {"knows": (happens + 0.01 * rng.normal(size=len(numbers)))[:, None]}
        sides.append(Examples(features, {"y": happens[:, None].astype(float)}, numbers, tasks))
    scored = score_examples(bench, "s", *sides, causal=True, score=auroc_sums)
    for suite in ("s", "s/unseen-tasks"):
        found = values(scored, suite)
        assert found["constant"] == pytest.approx(0.5)
        assert found["knows"] > 0.99


def test_a_known_task_says_nothing_of_another(bench: Bench) -> None:
    (train, _), (test, _) = toy(0, 40, 0), toy(1, 20, 100)
    names = np.array(TASKS)
    train, test = (
        replace(side, known=(side.tasks[:, None] == names).astype(float)) for side in (train, test)
    )
    scored = score_examples(bench, "s", train, test, causal=True, known="task")
    assert "task+knows" in values(scored) and "task" in values(scored)
    assert list(values(scored, "s/unseen-tasks")) == ["knows", "noise", "constant"]


def test_foreseeing_is_measured_against_copying() -> None:
    now, later = np.zeros((6, 3)), np.ones((6, 3))
    episodes = np.arange(6) // 2
    assert copy_sums(later, now, now, episodes).value == 0
    assert copy_sums(later, later, now, episodes).value == 1
    assert copy_sums(later, 0.5 * later, now, episodes).value == pytest.approx(0.75)
    assert copy_sums(later, -later, now, episodes).value == pytest.approx(-3)
    with pytest.raises(DataError, match="copying is exact"):
        copy_sums(now, later, now, episodes)


def test_latents_are_kept_to_their_leading_components_without_a_favoured_axis() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(3, 200)) * np.array([[10.0], [3.0], [1.0]])
    train, test = rng.normal(size=(60, 3)) @ mix, rng.normal(size=(20, 3)) @ mix
    inside, outside = leading_components("e", train, test)
    assert inside.shape == (60, 3) and outside.shape == (20, 3)
    scale = train.std(0)

    def distances(values: np.ndarray) -> np.ndarray:
        return np.linalg.norm(values[:, None] - values[None], axis=2)

    whole, kept = np.concatenate([train, test]) / scale, np.concatenate([inside, outside])
    assert np.allclose(distances(whole), distances(kept))
    sizes = np.sort(kept.std(0))
    assert sizes[0] > 0.1 * sizes[-1]
    wide = rng.normal(size=(300, 200))
    assert leading_components("e", wide, wide[:7])[1].shape == (7, 128)
