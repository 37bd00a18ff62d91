"""What is simulated is decided without a simulator: the plan, its seeds, the cameras, and what is refused."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from salt_vla.data.simulation import DEFAULT_TASKS, TASKS, SimulationConfig, plan_episodes
from salt_vla.data.simulation_scene import FRONT_CAMERA, CameraPose
from salt_vla.errors import ConfigError


def test_default_is_the_embedded_data_set() -> None:
    plans = plan_episodes(SimulationConfig())
    assert len(DEFAULT_TASKS) == 12
    assert Counter(plan.split for plan in plans) == {"train": 240, "validation": 120}
    per_task = Counter((plan.split, plan.task) for plan in plans)
    assert set(per_task.values()) == {20, 10}


def test_train_comes_first_and_tasks_take_turns() -> None:
    plans = plan_episodes(SimulationConfig(tasks=("push", "reach"), train_episodes=2, validation_episodes=1))
    assert [(plan.split, plan.task) for plan in plans] == [
        ("train", "push"),
        ("train", "reach"),
        ("train", "push"),
        ("train", "reach"),
        ("validation", "push"),
        ("validation", "reach"),
    ]


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_no_seed_is_in_both_splits_or_used_twice(seed: int) -> None:
    plans = plan_episodes(SimulationConfig(seed=seed, train_episodes=300, validation_episodes=50))
    assert len({plan.seed for plan in plans}) == len(plans)


def test_other_data_set_seeds_give_other_episodes() -> None:
    first = {plan.seed for plan in plan_episodes(SimulationConfig(seed=0))}
    second = {plan.seed for plan in plan_episodes(SimulationConfig(seed=1))}
    assert not first & second


def test_more_training_episodes_leave_the_others_as_they_were() -> None:
    small = plan_episodes(SimulationConfig(train_episodes=2, validation_episodes=1))
    large = plan_episodes(SimulationConfig(train_episodes=5, validation_episodes=1))
    assert set(small) <= set(large)


def test_every_task_has_a_sentence_of_its_own() -> None:
    assert len(set(TASKS.values())) == len(TASKS)
    assert all(sentence[0].isupper() and sentence.endswith(".") for sentence in TASKS.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tasks": ("reach", "juggle")},
            r"Unknown task 'juggle'; the known ones are reach, push, pick-place",
        ),
        ({"tasks": ()}, "at least one task"),
        ({"tasks": ("reach", "reach")}, "none twice"),
        ({"train_episodes": -1}, r"train_episodes is -1; it must lie in 0\.\."),
        ({"validation_episodes": 10**6}, "validation_episodes is 1000000"),
        ({"train_episodes": 0, "validation_episodes": 0}, "ask for one at least"),
        ({"image_size": 129}, "image_size is 129"),
        ({"image_size": 8}, "image_size is 8"),
        ({"seed": -3}, "seed is -3"),
        ({"min_steps": 50, "max_steps": 40}, "min_steps"),
        ({"max_steps": 1000}, "400"),
        ({"steps_after_success": -1}, "steps_after_success is -1"),
        ({"video_crf": 60}, "video_crf is 60"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SimulationConfig(**settings)
    assert "\n" not in str(caught.value)


def test_moving_camera_stays_within_its_bounds() -> None:
    rng = np.random.default_rng(0)
    front = np.subtract(FRONT_CAMERA.look_at, FRONT_CAMERA.position)
    largest = 0.0
    for _ in range(200):
        pose = FRONT_CAMERA.jittered(rng, metres=0.1, degrees=5.0)
        moved = np.subtract(pose.position, FRONT_CAMERA.position)
        assert np.all(np.abs(moved) <= 0.1)
        aimed = np.subtract(FRONT_CAMERA.look_at, pose.position)
        view = np.subtract(pose.look_at, pose.position)
        assert np.linalg.norm(view) == pytest.approx(np.linalg.norm(aimed))
        cosine = view @ aimed / np.linalg.norm(view) / np.linalg.norm(aimed)
        angle = math.degrees(math.acos(min(cosine, 1.0)))
        largest = max(largest, angle)
        assert angle <= 5 * math.sqrt(2) + 1e-6
        assert np.linalg.norm(view) == pytest.approx(np.linalg.norm(front), abs=0.2)
    assert largest > 4


def test_camera_without_jitter_is_the_camera() -> None:
    pose = FRONT_CAMERA.jittered(np.random.default_rng(0), metres=0.0, degrees=0.0)
    np.testing.assert_allclose(pose.position, FRONT_CAMERA.position)
    np.testing.assert_allclose(pose.look_at, FRONT_CAMERA.look_at)


def test_pose_is_a_pure_function_of_the_generator() -> None:
    poses = {FRONT_CAMERA.jittered(np.random.default_rng(4), 0.1, 5.0) for _ in range(3)}
    assert len(poses) == 1
    assert isinstance(poses.pop(), CameraPose)
