"""One Meta-World task with its expert, filmed by free cameras without a screen.

The only room that knows mujoco and metaworld, and it imports them only when a scene is made. Must not know
episodes, noise or data sets.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
import warnings
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Any

import numpy as np

from salt_vla.errors import ResourceError

CONTROL_STEPS_PER_SECOND = 80
FIELD_OF_VIEW_DEGREES = 32.0
OBSERVATION_OBJECT_1 = slice(4, 7)
OBSERVATION_OBJECT_2 = slice(11, 14)
OBSERVATION_GOAL = slice(36, 39)
NO_OPENGL = "MuJoCo found no OpenGL to draw with{}; apt-get install libosmesa6, or set MUJOCO_GL=egl."
NO_SIMULATOR = "The simulator is not installed; install the extra: pip install 'salt-vla[sim]'."
SUPERSAMPLING = 2
# A third of the robot's triangles stand outside of every view this package films; MuJoCo draws groups 0
# to 2 only.
PARTS_OUT_OF_VIEW = ("head", "right_arm_base_link", "right_l0")
UNDRAWN_GROUP = 5


@dataclass(frozen=True)
class CameraPose:
    """Where a camera stands and what it looks at, in metres; the robot stands at the origin, facing +y."""

    position: tuple[float, float, float]
    look_at: tuple[float, float, float]

    def jittered(self, rng: np.random.Generator, metres: float, degrees: float) -> CameraPose:
        """Moved by up to `metres` along each axis, then turned by up to `degrees` both ways."""
        offset = rng.uniform(-metres, metres, 3)
        turn = rng.uniform(-degrees, degrees, 2)
        position = np.asarray(self.position) + offset
        distance, azimuth, elevation = _spherical(np.asarray(self.look_at) - position)
        azimuth, elevation = math.radians(azimuth + turn[0]), math.radians(elevation + turn[1])
        level = math.cos(elevation)
        direction = np.array([level * math.cos(azimuth), level * math.sin(azimuth), math.sin(elevation)])
        look_at = position + distance * direction
        return CameraPose(tuple(position.tolist()), tuple(look_at.tolist()))


# From the robot's left and slightly behind: the handles and buttons face the robot, so a camera opposite
# to it would film their backs.
FRONT_CAMERA = CameraPose(position=(0.95, 0.15, 0.75), look_at=(0.0, 0.63, 0.16))


@dataclass(frozen=True)
class SceneState:
    """What the simulator tells after a step: metres, and the gripper's opening in 0..1."""

    hand: np.ndarray
    gripper_opening: float
    objects_and_goal: np.ndarray
    success: bool


class Scene:
    """A task's environment, expert and renderer, made once and used for many episodes."""

    def __init__(self, task: str, image_size: int) -> None:
        mujoco = _load_mujoco()
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP

        self._mujoco = mujoco
        self._environment: Any = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)
        self._environment.seeded_rand_vec = True
        self._environment._freeze_rand_vec = False  # otherwise every reset repeats the first goal
        self._make_expert = ENV_POLICY_MAP[f"{task}-v3"]
        self._renderer = self._make_renderer(image_size)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE

    def reset(self, seed: int) -> SceneState:
        """Begin an episode whose object and goal places are a pure function of the seed."""
        self._environment.seed(seed)
        self._expert = self._make_expert()
        self._environment.reset()
        # Resetting moves bodies and goals without computing what follows from it; a step at rest does.
        return self.step(np.zeros(4, np.float32))

    def step(self, action: np.ndarray) -> SceneState:
        self._observation, _, _, _, outcome = self._environment.step(action)
        seen = self._observation
        places = [seen[part] for part in (OBSERVATION_OBJECT_1, OBSERVATION_OBJECT_2, OBSERVATION_GOAL)]
        return SceneState(seen[:3].copy(), float(seen[3]), np.concatenate(places), bool(outcome["success"]))

    def expert_action(self) -> np.ndarray:
        """What the scripted expert would do now: hand motion and gripper effort, (4,) in −1..1."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant.s. may be too high")
            return np.clip(self._expert.get_action(self._observation), -1, 1).astype(np.float32)

    def film(self, pose: CameraPose) -> np.ndarray:
        """The picture from this pose, uint8 (size, size, 3)."""
        view = np.asarray(pose.look_at) - np.asarray(pose.position)
        self._camera.distance, self._camera.azimuth, self._camera.elevation = _spherical(view)
        self._camera.lookat[:] = pose.look_at
        self._renderer.update_scene(self._environment.data, self._camera)
        fine = self._renderer.render().astype(np.uint16)
        rows = fine[0::2] + fine[1::2]
        return ((rows[:, 0::2] + rows[:, 1::2] + 2) // SUPERSAMPLING**2).astype(np.uint8)

    def close(self) -> None:
        self._renderer.close()
        self._environment.close()

    def _make_renderer(self, image_size: int) -> Any:
        model, mujoco = self._environment.model, self._mujoco
        # Shadows, reflections and multisampling make software rendering ten times slower. Averaging 2×2
        # pixels smooths edges too, costs little where triangles are what counts, and halves the film's size.
        side = SUPERSAMPLING * image_size
        for part in PARTS_OUT_OF_VIEW:
            model.geom_group[model.geom_bodyid == model.body(part).id] = UNDRAWN_GROUP
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = model.vis.global_.offheight = side
        model.vis.global_.fovy = FIELD_OF_VIEW_DEGREES
        try:
            renderer = mujoco.Renderer(model, side, side)
        except (mujoco.FatalError, RuntimeError, ImportError, AttributeError) as error:
            raise _no_opengl() from error
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            renderer.scene.flags[flag] = 0
        return renderer


def _load_mujoco() -> Any:
    if any(importlib.util.find_spec(name) is None for name in ("mujoco", "metaworld")):
        raise ResourceError(NO_SIMULATOR)
    _choose_headless_opengl()
    try:
        import mujoco
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        # Importing mujoco loads the OpenGL that MUJOCO_GL names; each kind fails in its own way.
        raise _no_opengl() from error
    return mujoco


def _choose_headless_opengl() -> None:
    """Set MUJOCO_GL where nobody has, before mujoco is imported, which reads it once."""
    if sys.platform != "linux":
        return
    if not os.environ.get("MUJOCO_GL"):
        if find_library("OSMesa"):
            os.environ["MUJOCO_GL"] = "osmesa"
        elif find_library("EGL"):
            os.environ["MUJOCO_GL"] = "egl"
        else:
            raise _no_opengl()
    if os.environ["MUJOCO_GL"] == "egl":
        os.environ.setdefault("EGL_PLATFORM", "surfaceless")


def _no_opengl() -> ResourceError:
    choice = os.environ.get("MUJOCO_GL")
    return ResourceError(NO_OPENGL.format(f" (MUJOCO_GL is {choice})" if choice else ""))


def _spherical(vector: np.ndarray) -> tuple[float, float, float]:
    """Length, azimuth and elevation in degrees, as MuJoCo's free camera wants them."""
    length = float(np.linalg.norm(vector))
    azimuth = math.degrees(math.atan2(vector[1], vector[0]))
    return length, azimuth, math.degrees(math.asin(vector[2] / length))
