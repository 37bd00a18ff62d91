"""Targets are the physical quantities their names say, never looking past the clip."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from salt_vla.data.signals import ClipSignals
from salt_vla.errors import DataError
from salt_vla.evaluation.targets import END_STEPS, TARGETS, Target, at_end, build_targets, missing_targets

FPS, SPAN, CLIPS = 10.0, 15, 4
HAND_SPEED = np.array([0.3, -0.2, 0.1])


def signals() -> ClipSignals:
    """Hands move evenly at `HAND_SPEED`; object 1 rests, then moves 0.05 m in x over the last frame; objects
    2 and the goal stand elsewhere; actions count the frames."""
    seconds = np.arange(SPAN) / FPS
    start = np.arange(CLIPS)[:, None, None] * 0.1
    state = np.zeros((CLIPS, SPAN, 4))
    state[:, :, :3] = start + seconds[None, :, None] * HAND_SPEED
    state[:, :, 3] = 0.5
    world = np.zeros((CLIPS, SPAN, 9))
    world[:, :, :3] = start
    world[:, -1, 0] += 0.05
    world[:, :, 3:] = 9.0
    action = np.broadcast_to(np.arange(SPAN, dtype=np.float64)[None, :, None], (CLIPS, SPAN, 4))
    return ClipSignals(
        clip_ids=tuple(f"clip{i}" for i in range(CLIPS)),
        episodes=np.arange(CLIPS),
        tasks=("push", "reach", "push", "reach"),
        fps=FPS,
        signals={
            "action": action.astype(np.float32),
            "observation.state": state.astype(np.float32),
            "observation.environment_state": world.astype(np.float32),
        },
    )


def test_every_target_of_the_table_is_offered_in_the_tables_order() -> None:
    assert list(build_targets(signals())) == [*TARGETS, "task"]


def test_shapes_and_types_say_what_is_regressed_and_what_classified() -> None:
    for name, values in build_targets(signals()).items():
        assert len(values) == CLIPS
        if name == "task":
            assert values.dtype.kind == "U"
        else:
            assert values.dtype == np.float64
            assert values.shape[1] == (4 if name.startswith("action") else 3)


def test_actions_are_the_last_frames_and_the_mean_over_the_clip() -> None:
    targets = build_targets(signals())
    assert np.allclose(targets["action_end"], SPAN - 1)
    assert np.allclose(targets["action_mean"], (SPAN - 1) / 2)


def test_hand_targets_are_metres_and_metres_per_second() -> None:
    targets = build_targets(signals())
    end = np.arange(CLIPS)[:, None] * 0.1 + HAND_SPEED * (SPAN - 1) / FPS
    assert np.allclose(targets["hand_position"], end, atol=1e-6)
    assert np.allclose(targets["hand_velocity"], HAND_SPEED, atol=1e-5)
    assert np.allclose(targets["hand_velocity_end"], HAND_SPEED, atol=1e-5)


def test_velocity_is_displacement_over_the_clips_duration() -> None:
    velocity = build_targets(signals())["object_velocity"]
    assert np.allclose(velocity[:, 0], 0.05 / ((SPAN - 1) / FPS), atol=1e-5)
    assert np.allclose(velocity[:, 1:], 0)


def test_end_velocity_sees_the_last_frames_only() -> None:
    recorded = signals()
    earlier = recorded.signals["observation.state"].copy()
    earlier[:, : -END_STEPS - 1] = 77.0
    changed = dataclasses.replace(recorded, signals={**recorded.signals, "observation.state": earlier})
    assert np.allclose(build_targets(changed)["hand_velocity_end"], HAND_SPEED, atol=1e-5)
    assert not np.allclose(build_targets(changed)["hand_velocity"], HAND_SPEED, atol=1e-2)


def test_the_object_is_the_first_one_at_the_last_frame() -> None:
    position = build_targets(signals())["object_position"]
    assert np.allclose(position[:, 0], np.arange(CLIPS) * 0.1 + 0.05, atol=1e-6)
    assert np.allclose(position[:, 1], np.arange(CLIPS) * 0.1, atol=1e-6)


def test_a_clip_of_two_frames_still_has_a_velocity() -> None:
    recorded = signals()
    short = {name: values[:, :2] for name, values in recorded.signals.items()}
    targets = build_targets(dataclasses.replace(recorded, signals=short))
    assert np.allclose(targets["hand_velocity_end"], HAND_SPEED, atol=1e-5)


def test_a_clip_of_one_frame_has_no_velocity_and_says_so() -> None:
    recorded = signals()
    single = {name: values[:, :1] for name, values in recorded.signals.items()}
    with pytest.raises(DataError, match="one frame has no velocity"):
        build_targets(dataclasses.replace(recorded, signals=single))


def test_a_data_set_without_a_signal_lacks_its_targets_and_says_why() -> None:
    recorded = signals()
    only_actions = dataclasses.replace(recorded, signals={"action": recorded.signals["action"]})
    assert list(build_targets(only_actions)) == ["action_end", "action_mean", "task"]
    missing = missing_targets(only_actions)
    assert "'observation.state'" in missing["hand_position"]
    assert "'observation.environment_state'" in missing["object_velocity"]
    assert "action_end" not in missing


def test_joint_angles_are_not_sold_as_a_hand_position() -> None:
    recorded = signals()
    joints = np.zeros((CLIPS, SPAN, 7), np.float32)
    other_robot = dataclasses.replace(recorded, signals={**recorded.signals, "observation.state": joints})
    assert "hand_position" not in build_targets(other_robot)
    assert "7 columns where the target reads 4" in missing_targets(other_robot)["hand_position"]


def test_an_action_of_any_width_is_a_target() -> None:
    recorded = signals()
    wide = dataclasses.replace(recorded, signals={"action": np.ones((CLIPS, SPAN, 14), np.float32)})
    assert build_targets(wide)["action_end"].shape == (CLIPS, 14)


def test_a_single_task_is_no_class_target() -> None:
    alone = dataclasses.replace(signals(), tasks=("push",) * CLIPS)
    assert "task" not in build_targets(alone)
    assert missing_targets(alone)["task"] == "all clips have the same task"


def test_a_data_set_with_nothing_to_probe_is_refused() -> None:
    empty = dataclasses.replace(signals(), signals={}, tasks=("push",) * CLIPS)
    with pytest.raises(DataError, match=r"nothing to probe: it needs one of action, observation\.env"):
        build_targets(empty)


def test_a_value_that_is_not_a_number_is_named_by_signal_and_clip() -> None:
    recorded = signals()
    broken = recorded.signals["action"].copy()
    broken[2, 3, 1] = np.nan
    bad = dataclasses.replace(recorded, signals={**recorded.signals, "action": broken})
    with pytest.raises(DataError, match=r"'action' of clip clip2"):
        build_targets(bad)


def test_a_new_target_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TARGETS, "gripper", Target("observation.state", at_end, (3,), width=4))
    assert np.allclose(build_targets(signals())["gripper"], 0.5)
