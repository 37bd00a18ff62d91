"""Films scripted experts at Meta-World tasks and writes the episodes as a LeRobotDataset.

Owns what varies between episodes: task, seed, noise, speed, camera. Must not know how a scene is simulated
or how a data set lies on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from salt_vla.data.lerobot_writer import DatasetLayout, Episode, Feature, writing_dataset
from salt_vla.data.simulation_scene import (
    CONTROL_STEPS_PER_SECOND,
    FIELD_OF_VIEW_DEGREES,
    FRONT_CAMERA,
    CameraPose,
    Scene,
)
from salt_vla.errors import ConfigError
from salt_vla.progress import progress

# Meta-World's name → what a person would tell the robot.
TASKS = {
    "reach": "Move the hand to the red ball.",
    "push": "Push the puck to the green ball.",
    "pick-place": "Pick up the puck and hold it at the blue ball.",
    "drawer-open": "Pull the drawer open.",
    "drawer-close": "Push the drawer shut.",
    "button-press-topdown": "Press the button down from above.",
    "door-open": "Swing the door open by its handle.",
    "window-close": "Slide the window shut.",
    "plate-slide": "Slide the plate into the goal.",
    "faucet-open": "Turn the faucet's handle.",
    "coffee-button": "Press the button of the coffee machine.",
    "lever-pull": "Pull the lever up.",
    "button-press": "Press the button on the side of the box.",
    "door-close": "Swing the door shut.",
    "window-open": "Slide the window open.",
    "plate-slide-side": "Slide the plate sideways into the goal.",
    "faucet-close": "Turn the faucet's handle back.",
    "coffee-push": "Push the mug under the coffee machine.",
    "coffee-pull": "Pull the mug away from the coffee machine.",
    "handle-press": "Press the handle down.",
    "soccer": "Push the ball into the goal.",
    "sweep-into": "Sweep the puck into the hole.",
}
DEFAULT_TASKS = tuple(TASKS)[:12]

FRONT_KEY = "observation.images.front"
MOVING_KEY = "observation.images.moving"
NOISE_SCALES = (0.0, 0.1, 0.3)
NOISE_TIME_CONSTANT_STEPS = 10.0
SPEEDS = (0.7, 1.0)
MAX_OPENING_STEPS = 10
CAMERA_JITTER_METRES = 0.1
CAMERA_JITTER_DEGREES = 5.0
FIRST_VALIDATION_SEED = 1_000_000
SEEDS_PER_DATASET = 2 * FIRST_VALIDATION_SEED

FEATURES = {
    "observation.state": Feature("float32", (4,), ("hand_x", "hand_y", "hand_z", "gripper_opening")),
    "observation.environment_state": Feature(
        "float32",
        (9,),
        tuple(f"{thing}_{axis}" for thing in ("object_1", "object_2", "goal") for axis in "xyz"),
    ),
    "action": Feature("float32", (4,), ("delta_x", "delta_y", "delta_z", "gripper")),
    "next.success": Feature("bool"),
}


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate; the episode counts are per task. The same config gives the same bytes."""

    tasks: tuple[str, ...] = DEFAULT_TASKS
    train_episodes: int = 20
    validation_episodes: int = 10
    image_size: int = 128
    seed: int = 0
    min_steps: int = 40
    max_steps: int = 100
    steps_after_success: int = 8
    video_files_size_in_mb: int = 1
    video_crf: int = 26

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ConfigError(f"Unknown task {unknown[0]!r}; the known ones are {', '.join(TASKS)}.")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ConfigError("tasks must name at least one task, and none twice.")
        most = FIRST_VALIDATION_SEED // len(self.tasks)
        for name in ("train_episodes", "validation_episodes"):
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in 0..{most}.")
        if self.train_episodes + self.validation_episodes == 0:
            raise ConfigError("train_episodes and validation_episodes are both 0; ask for one at least.")
        if not 16 <= self.image_size <= 1024 or self.image_size % 2:
            raise ConfigError(f"image_size is {self.image_size}; it must be even and in 16..1024.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must not be negative.")
        if not 1 <= self.min_steps <= self.max_steps <= 400:
            raise ConfigError(
                f"1 ≤ min_steps ≤ max_steps ≤ 400 is needed, not {self.min_steps}, {self.max_steps}."
            )
        if self.steps_after_success < 0:
            raise ConfigError(f"steps_after_success is {self.steps_after_success}; it must not be negative.")
        if not 0 <= self.video_crf <= 51:
            raise ConfigError(f"video_crf is {self.video_crf}; H.264 knows 0 (lossless) to 51.")


@dataclass(frozen=True)
class EpisodePlan:
    """All that varies between two episodes of a task is drawn from the seed."""

    task: str
    split: str
    seed: int


def plan_episodes(config: SimulationConfig) -> list[EpisodePlan]:
    """The episodes in order: train first, tasks taking turns; no seed is in both splits."""
    plans = []
    for split, rounds, first in (
        ("train", config.train_episodes, 0),
        ("validation", config.validation_episodes, FIRST_VALIDATION_SEED),
    ):
        first += config.seed * SEEDS_PER_DATASET
        for number in range(rounds * len(config.tasks)):
            plans.append(EpisodePlan(config.tasks[number % len(config.tasks)], split, first + number))
    return plans


def simulate(config: SimulationConfig, out: Path) -> Path:
    """Simulate, film and write the data set to the new folder `out`; returns it."""
    plans = plan_episodes(config)
    layout = DatasetLayout(
        fps=CONTROL_STEPS_PER_SECOND,
        features=FEATURES,
        cameras=(FRONT_KEY, MOVING_KEY),
        image_shape=(config.image_size, config.image_size),
        robot_type="sawyer",
        video_files_size_in_mb=config.video_files_size_in_mb,
        video_crf=config.video_crf,
        extra_info={"simulation": {"field_of_view_degrees": FIELD_OF_VIEW_DEGREES}},
    )
    with writing_dataset(out, layout) as writer, ExitStack() as open_scenes:
        # All scenes stay open because tasks take turns and making one costs as much as an episode.
        scenes = {
            task: open_scenes.enter_context(closing(Scene(task, config.image_size))) for task in config.tasks
        }
        split = ""
        with progress("simulate", total=len(plans), unit="episodes") as advance:
            for plan in plans:
                if plan.split != split:
                    split = plan.split
                    writer.start_split(split)
                writer.add_episode(film_episode(scenes[plan.task], plan, config))
                advance(1, note=plan.task)
    return out


def film_episode(scene: Scene, plan: EpisodePlan, config: SimulationConfig) -> Episode:
    rng = np.random.default_rng(plan.seed)
    noise_scale = float(rng.choice(NOISE_SCALES))
    speed = float(rng.uniform(*SPEEDS))
    moving_camera = FRONT_CAMERA.jittered(rng, CAMERA_JITTER_METRES, CAMERA_JITTER_DEGREES)
    cameras = {FRONT_KEY: FRONT_CAMERA, MOVING_KEY: moving_camera}
    films: dict[str, list[np.ndarray]] = {key: [] for key in cameras}
    states: list[np.ndarray] = []
    things: list[np.ndarray] = []
    actions: list[np.ndarray] = []
    successes: list[bool] = []

    controls = _controls(scene, rng, noise_scale, speed)
    state = scene.reset(plan.seed)
    while not _is_over(successes, config):
        for key, pose in cameras.items():
            films[key].append(scene.film(pose))
        states.append(np.append(state.hand, state.gripper_opening))
        things.append(state.objects_and_goal)
        action = next(controls)
        state = scene.step(action)
        actions.append(action)
        successes.append(state.success)

    columns = {
        "observation.state": np.array(states, np.float32),
        "observation.environment_state": np.array(things, np.float32),
        "action": np.array(actions, np.float32),
        "next.success": np.array(successes),
    }
    metadata = {
        "simulation/task": plan.task,
        "simulation/seed": plan.seed,
        "simulation/noise": noise_scale,
        "simulation/speed": speed,
        "simulation/success": any(successes),
        **_pose_columns("front", FRONT_CAMERA),
        **_pose_columns("moving", moving_camera),
    }
    return Episode(TASKS[plan.task], columns, {key: np.stack(film) for key, film in films.items()}, metadata)


def _controls(
    scene: Scene, rng: np.random.Generator, noise_scale: float, speed: float
) -> Iterator[np.ndarray]:
    """The actions applied: a push in a random direction, then the expert, slowed down and disturbed."""
    opening_steps = int(rng.integers(MAX_OPENING_STEPS + 1))
    direction = rng.normal(size=3)
    opening = np.append(direction / np.linalg.norm(direction), -1.0)
    # An Ornstein-Uhlenbeck process: noise the arm drifts with, instead of noise it averages out.
    memory = math.exp(-1 / NOISE_TIME_CONSTANT_STEPS)
    drift = np.zeros(3)
    step = 0
    while True:
        drift = memory * drift + noise_scale * math.sqrt(1 - memory**2) * rng.normal(size=3)
        action = opening.copy() if step < opening_steps else scene.expert_action().astype(np.float64)
        action[:3] = action[:3] * speed + drift
        yield np.clip(action, -1, 1).astype(np.float32)
        step += 1


def _is_over(successes: list[bool], config: SimulationConfig) -> bool:
    steps = len(successes)
    if steps < config.min_steps:
        return False
    done = any(successes) and steps - (successes.index(True) + 1) >= config.steps_after_success
    return done or steps >= config.max_steps


def _pose_columns(camera: str, pose: CameraPose) -> dict[str, list[float]]:
    return {
        f"simulation/camera/{camera}/position": list(pose.position),
        f"simulation/camera/{camera}/look_at": list(pose.look_at),
    }
