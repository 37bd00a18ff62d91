"""Robot suites on films whose law is known: what can be seen is found, what cannot is not, and bad data is
answered with a sentence.

A world of colours: green is the action that is taken next, red a place that actions move, blue says that the
episode will succeed, and a bright corner that the gripper is about to close.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salt_vla.config import DataConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.lerobot_writer import DatasetLayout, Episode, Feature, writing_dataset
from salt_vla.data.segments import Cutting
from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Bench
from salt_vla.evaluation.features import Pixels
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.settings import EvalSettings
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data_index import index_data
from salt_vla.jobs.eval_score import open_bench
from salt_vla.registry import SUITES, resolve

GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=16)
VIEW = ViewConfig(frame_stride=2)
CAMERA = "observation.images.front"
FRAMES, HORIZON, STRIDE = 36, 4, 6
TASKS = ("lift", "pull", "push", "turn")
FEATURES = {
    "observation.state": Feature("float32", (2,), ("place", "noise")),
    "action": Feature("float32", (2,), ("move", "gripper")),
    "next.success": Feature("bool"),
}


def episode(number: int, without: tuple[str, ...], all_succeed: bool, tasks: tuple[str, ...]) -> Episode:
    rng = np.random.default_rng(number)
    move = np.empty(FRAMES)
    move[0] = rng.uniform(-1, 1)
    for t in range(1, FRAMES):
        move[t] = np.clip(0.8 * move[t - 1] + 0.5 * rng.normal(), -1, 1)
    place = 0.5 + rng.uniform(-0.2, 0.2) + np.concatenate([[0], 0.05 * move.cumsum()[:-1]])
    closing = int(rng.integers(8, FRAMES - 6))
    gripper = np.where(np.arange(FRAMES) < closing, 1.0, 0.0)
    succeeds = all_succeed or number // len(TASKS) % 2 == 0
    success = np.zeros(FRAMES, bool)
    success[-3:] = succeeds
    film = np.empty((FRAMES, 32, 32, 3))
    film[..., 0] = (40 + 140 * np.clip(place, 0, 1))[:, None, None]
    film[..., 1] = (110 + 70 * move)[:, None, None]
    film[..., 2] = 170 if succeeds else 60
    film[max(closing - HORIZON, 0) : closing, :16, :16] += 60
    columns = {
        "observation.state": np.column_stack([place, rng.normal(size=FRAMES)]).astype(np.float32),
        "action": np.column_stack([move, gripper]).astype(np.float32),
        "next.success": success,
    }
    kept = {name: values for name, values in columns.items() if name not in without}
    return Episode(tasks[number % len(tasks)], kept, {CAMERA: film.clip(0, 255).astype(np.uint8)})


def write(
    folder: Path,
    without: tuple[str, ...] = (),
    all_succeed: bool = False,
    tasks: tuple[str, ...] = TASKS,
    episodes: int = 48,
) -> ClipTable:
    features = {name: feature for name, feature in FEATURES.items() if name not in without}
    layout = DatasetLayout(30, features, (CAMERA,), (32, 32), "colours", video_crf=4)
    with writing_dataset(folder, layout) as writer:
        writer.start_split("train")
        for number in range(episodes):
            if number == episodes * 2 // 3:
                writer.start_split("validation")
            writer.add_episode(episode(number, without, all_succeed, tasks))
    return index_data(folder, Cutting(VIEW, GEOMETRY.num_frames))[0]


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> ClipTable:
    return write(tmp_path_factory.mktemp("colours") / "data")


Open = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """`bench(table, **settings)`: pixels alone."""
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path / "root"))

    def make(table: ClipTable, **settings: Any) -> Bench:
        wanted = EvalSettings(**({"horizon": HORIZON, "moment_stride": STRIDE} | settings))
        data = DataConfig(view=VIEW, store_views=False)
        return open_bench({"pixels": Pixels(GEOMETRY)}, table, data, GEOMETRY, wanted)

    return make


def figures(scored: list[Scored], suite: str) -> dict[tuple[str, str], float]:
    return {(one.encoder, one.target): one.sums.value for one in scored if one.suite == suite}


def ask(suite: str, bench: Bench) -> list[Scored]:
    scored: list[Scored] = resolve(SUITES, suite)(bench)
    return scored


def test_an_action_that_can_be_seen_is_predicted_and_a_later_one_less(
    colours: ClipTable, bench: Open
) -> None:
    scored = ask("action-prediction", opened := bench(colours))
    for suite in ("action-prediction/front", "action-prediction/front/unseen-tasks"):
        found = figures(scored, suite)
        # Of the gripper, the other half, only the corner before it closes can be seen.
        assert found["pixels", "action"] > 0.45
        assert found["pixels", "action"] > found["pixels", "chunk_step_2"] > found["pixels", "chunk_step_4"]
        assert found["state", "action"] < 0.35
        assert found["state+pixels", "action"] > found["state", "action"] + 0.1
        assert found["constant", "action"] <= 0
    assert all(one.causal for one in scored)
    assert opened.notes == [
        "action-prediction/front: 48 of 288 windows are left out: fewer than 4 frames (the horizon) are left "
        "of the episode"
    ]


def test_inverse_dynamics_reads_actions_from_both_ends_and_is_not_causal(
    colours: ClipTable, bench: Open
) -> None:
    scored = ask("inverse-dynamics", bench(colours))
    found = figures(scored, "inverse-dynamics/front")
    assert found["pixels", "action"] > 0.45 and found["state+pixels", "chunk"] > found["state", "chunk"]
    assert (
        found["pixels", "chunk_step_4"]
        > figures(ask("action-prediction", bench(colours)), "action-prediction/front")[
            "pixels", "chunk_step_4"
        ]
    )
    assert not any(one.causal for one in scored)


def test_a_foreseen_latent_holds_where_actions_lead(colours: ClipTable, bench: Open) -> None:
    scored = ask("forward-dynamics", bench(colours))
    found = figures(scored, "forward-dynamics/front")
    assert found["pixels", "latent"] > 0.2  # Green and the corner are noise to come; red is foreseen.
    place = {key: value for key, value in found.items() if key[1].startswith("state")}
    # The second column of the state is noise, so that nobody gets beyond a half.
    assert place["pixels", "state"] > place["pixels", "state_if_copied"] + 0.02
    assert abs(place["pixels", "state"] - place["pixels", "state_if_seen"]) < 0.05
    assert place["state", "state"] > 0.4
    assert {one.target for one in scored if not one.causal} == {"state_if_seen"}
    assert "not to be compared" in next(one.note for one in scored if one.target == "latent")


def test_a_place_that_can_be_seen_is_read_at_the_moment(colours: ClipTable, bench: Open) -> None:
    scored = ask("state", bench(colours))
    assert {one.target for one in scored} == {"state", "state_velocity"}
    for suite in ("state/front", "state/front/unseen-tasks"):
        assert 0.42 < figures(scored, suite)["pixels", "state"] < 0.52  # Its other half is noise.
    assert all(one.causal for one in scored)


def test_an_event_that_announces_itself_is_foreseen(colours: ClipTable, bench: Open) -> None:
    scored = ask("events", opened := bench(colours))
    for suite in ("events/front", "events/front/unseen-tasks"):
        found = figures(scored, suite)
        assert found["pixels", "gripper_switches"] > 0.95
        assert abs(found["state", "gripper_switches"] - 0.5) < 0.25
        assert found["constant", "gripper_switches"] == pytest.approx(0.5)
    said = next(note for note in opened.notes if "gripper_switches happens" in note)
    events, windows = int(said.split()[4]), int(said.split()[6])
    assert 5 <= events <= 16 and windows == 16 * 5


def test_success_is_told_from_what_shows_it_and_not_from_the_task(colours: ClipTable, bench: Open) -> None:
    scored = ask("success", bench(colours))
    for share in (25, 50, 75):
        found = figures(scored, f"success/front/at-{share}")
        assert found["pixels", "succeeds"] == 1
        assert abs(found["task", "succeeds"] - 0.5) < 0.2
        assert ("task+pixels", "succeeds") in found
        unseen = figures(scored, f"success/front/at-{share}/unseen-tasks")
        assert unseen["pixels", "succeeds"] == 1 and ("task", "succeeds") not in unseen
    assert {int(one.sums.clips.sum()) for one in scored} == {16}


def test_features_are_extracted_once_for_all_suites(colours: ClipTable, bench: Open) -> None:
    opened = bench(colours)
    for suite in ("action-prediction", "inverse-dynamics", "forward-dynamics", "state", "events"):
        ask(suite, opened)
    assert len(list(opened.store.folder.glob("*.rows"))) == 2  # A side each.


def refusal(suite: str, bench: Bench) -> str:
    with pytest.raises(DataError) as error:
        ask(suite, bench)
    return str(error.value)


def test_what_a_suite_needs_and_the_data_lacks_is_named(tmp_path: Path, bench: Open) -> None:
    opened = bench(write(tmp_path / "data", without=("action", "next.success"), episodes=6))
    for suite in ("action-prediction", "inverse-dynamics", "forward-dynamics"):
        said = refusal(suite, opened)
        assert f"suite {suite!r} needs the feature 'action', which" in said
        assert "lacks; it has: observation.state" in said
    assert "needs the feature 'next.success'" in refusal("success", opened)
    assert "whose name holds 'gripper'" in refusal("events", opened)


def test_without_a_state_there_is_no_state_to_beat(tmp_path: Path, bench: Open) -> None:
    opened = bench(write(tmp_path / "data", without=("observation.state",), episodes=12))
    assert {one.encoder for one in ask("action-prediction", opened)} == {"pixels", "constant"}
    assert {one.target for one in ask("forward-dynamics", opened)} == {"latent"}
    assert "it needs one of observation.environment_state, observation.state" in refusal("state", opened)


def test_a_horizon_longer_than_any_episode_is_refused(colours: ClipTable, bench: Open) -> None:
    said = refusal("action-prediction", bench(colours, horizon=500))
    assert "every window is left out: fewer than 500 frames (the horizon) are left of the episode" in said
    assert "the episode ends within 36 frames" in refusal("forward-dynamics", bench(colours, horizon=36))


def test_one_task_is_a_note_and_no_table(tmp_path: Path, bench: Open) -> None:
    opened = bench(write(tmp_path / "data", tasks=("lift",), episodes=9))
    scored = ask("action-prediction", opened)
    assert {one.suite for one in scored} == {"action-prediction/front"}
    assert "action-prediction/front/unseen-tasks is left out: all episodes have the same task" in opened.notes


def test_episodes_that_all_succeed_are_nothing_to_tell_apart(tmp_path: Path, bench: Open) -> None:
    opened = bench(write(tmp_path / "data", all_succeed=True, episodes=6))
    assert "all episodes of one side of the split succeed" in refusal("success", opened)


def test_clips_spread_over_whole_videos_have_no_moments(colours: ClipTable, bench: Open) -> None:
    opened = bench(colours)
    whole = replace(opened, data=replace(opened.data, view=ViewConfig(sampling="uniform")))
    assert "no moment of it can be asked about" in refusal("action-prediction", whole)


def test_the_command_puts_what_is_known_without_an_encoder_beside(workshop: Any, salt: Any) -> None:
    command = ("eval", f"mine={workshop.teacher}", "--suite", "action-prediction", "--data", workshop.dataset)
    rows = salt.json(*command, "--horizon", 4, "--moment-stride", 8)
    names = {"mine", "random", "pixels"}
    expected = names | {f"state+{name}" for name in names} | {"state", "constant"}
    for suite in ("front", "side", "front/unseen-tasks", "side/unseen-tasks"):
        mine = [row for row in rows if row["suite"] == f"action-prediction/{suite}"]
        assert {row["encoder"] for row in mine} == expected
        assert {row["target"] for row in mine} == {"action", "chunk", "chunk_step_2", "chunk_step_4"}
    assert all(row["causal"] for row in rows)
    again = salt.json(*command, "--horizon", 4, "--moment-stride", 8)
    assert again == rows
    assert "every window is left out" in salt(*command, "--horizon", 300).sentence
    assert "moment_stride must be 1 frame or more" in salt(*command, "--moment-stride", 0).sentence
