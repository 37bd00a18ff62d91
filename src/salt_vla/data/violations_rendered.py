"""Violations of plain physics, drawn here: a ball that rolls, flies or falls in a small room.

A pure function of (seed, scene): colours, camera, speeds and places differ from scene to scene. Lengths are
in picture widths, times in sixteenths of a film, so that any size and length shows the same. Knows no model.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import zoom

from salt_vla.data.violations import ViolationPair, World, switched
from salt_vla.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float

CONDITIONS = ("permanence", "hidden-colour", "gravity", "solidity", "teleport", "colour")
TICKS = 16  # a film's length
FEWEST_FRAMES = 8  # with fewer, what is hidden has no frame to be hidden in
MIDDLE = TICKS / 2  # when it happens
FLOOR = 0.86
BOUNCE = 0.85  # of the speed is left after hitting something
SUBSTEPS = 64  # of a tick, in free fall
PAN = 0.008  # largest speed of the camera, widths a tick


@dataclass(frozen=True)
class _Ball:
    """Where it is at each frame (widths from the left, from the top) and what it looks like."""

    x: Float[np.ndarray, " frames"]
    y: Float[np.ndarray, " frames"]
    radius: float
    colour: tuple[float, float, float]
    is_there: bool = True


@dataclass(frozen=True)
class _Room:
    """The still part of a scene. `screen`, `shelf`: (left, top, right, bottom); a screen hides what is behind
    it. `pan`: how far the camera has moved to the right at each frame, in whole pixels."""

    wall: Float[np.ndarray, "height width 3"]
    pan: np.ndarray
    screen: tuple[float, float, float, float] | None = None
    shelf: tuple[float, float, float, float] | None = None
    colour: tuple[float, float, float] = (0.5, 0.5, 0.5)


def rendered_pairs(seed: int, scene: int, num_frames: int, image_size: int) -> Iterator[ViolationPair]:
    """Every condition's pairs of one scene, films of `num_frames` × `image_size`².

    permanence: what rolled behind a screen does not come out, or something comes out where nothing went in.
    hidden-colour: it comes out in another colour. gravity: a thrown ball does not fall. solidity: a ball
    falls through a shelf. teleport: it is somewhere else at once. colour: it changes colour in full sight.
    """
    if num_frames < FEWEST_FRAMES or num_frames % 2 or image_size < 16:
        raise ConfigError(
            f"violations need films of an even {FEWEST_FRAMES} frames or more and of 16 pixels or more, not "
            f"{num_frames} frames of {image_size} pixels"
        )
    for number, condition in enumerate(CONDITIONS):
        rng = np.random.default_rng([seed, scene, number])
        yield from _pairs(condition, f"{condition}-{scene}", rng, num_frames, image_size)


def _pairs(
    condition: str, scene: str, rng: np.random.Generator, frames: int, size: int
) -> Iterator[ViolationPair]:
    at = frames // 2
    time = np.arange(frames) * TICKS / frames
    hue = rng.uniform()
    colours = [colorsys.hsv_to_rgb((hue + turn) % 1, rng.uniform(0.75, 1), 0.95) for turn in (0.0, 0.45)]
    room = _draw_room(rng, time, size)
    radius = rng.uniform(0.075, 0.1)
    if condition in ("gravity", "solidity"):
        flies, room = (_thrown if condition == "gravity" else _dropped)(rng, time, radius, room)
        balls = [_Ball(x, y, radius, colours[0]) for x, y in flies]
        worlds = [_render(room, ball, size) for ball in balls]
        return switched(condition, scene, worlds, at, both_ways=False)
    speed, side, centre = rng.uniform(0.045, 0.06), rng.choice((-1.0, 1.0)), rng.uniform(0.44, 0.56)
    # Its middle is the room's where it is hidden, half a frame before the films part.
    x = centre + side * speed * (time - time[at] + TICKS / frames / 2)
    ball = _Ball(x, np.full(frames, FLOOR - radius), radius, colours[0])
    other = replace(ball, colour=colours[1])
    if condition in ("permanence", "hidden-colour"):
        half = radius + speed * max(0.75, TICKS / frames) + 1.5 / size
        screen = (centre - half, FLOOR - 2 * radius - rng.uniform(0.08, 0.3), centre + half, FLOOR + 0.02)
        room = replace(room, screen=screen, colour=tuple(rng.uniform(0.25, 0.7, 3)))
    if condition == "permanence":
        other = replace(ball, is_there=False)
    elif condition == "teleport":
        other = replace(ball, x=x - side * rng.uniform(0.3, 0.38))
    return switched(condition, scene, [_render(room, each, size) for each in (ball, other)], at)


_Flights = list[tuple[np.ndarray, np.ndarray]]


def _thrown(rng: np.random.Generator, time: np.ndarray, radius: float, room: _Room) -> tuple[_Flights, _Room]:
    """A ball on a parabola, and one for which gravity points up from the highest point on."""
    speed, side = rng.uniform(0.03, 0.045), rng.choice((-1.0, 1.0))
    x = 0.5 + side * speed * (time - MIDDLE)
    top, strength = rng.uniform(0.46, 0.54), rng.uniform(0.0085, 0.01)
    fallen = strength / 2 * (time - MIDDLE) ** 2
    return [(x, top + fallen), (x, np.where(time <= MIDDLE, top + fallen, top - fallen))], room


def _dropped(
    rng: np.random.Generator, time: np.ndarray, radius: float, room: _Room
) -> tuple[_Flights, _Room]:
    """A ball that falls onto a shelf in the middle of the film, with the shelf and as if it was not there."""
    gravity = rng.uniform(0.009, 0.011)
    start = rng.uniform(0.1, 0.16)
    shelf = start + gravity / 2 * MIDDLE**2  # where the ball's centre turns
    middle, half = rng.uniform(0.4, 0.6), rng.uniform(0.16, 0.26)
    x = np.full(len(time), middle + rng.uniform(-0.06, 0.06))
    place = (middle - half, shelf + radius, middle + half, shelf + radius + 0.05)
    flights = [(x, _fall(time, start, gravity, floor)) for floor in (shelf, FLOOR - radius)]
    return flights, replace(room, shelf=place, colour=tuple(rng.uniform(0.2, 0.6, 3)))


def _fall(time: np.ndarray, start: float, gravity: float, floor: float) -> np.ndarray:
    """Heights (from the top) in free fall from rest, bouncing off `floor`."""
    step = float(time[1] - time[0]) / SUBSTEPS
    y, speed, heights = start, 0.0, [start]
    for _ in range(len(time) - 1):
        for _ in range(SUBSTEPS):
            speed += gravity * step
            y += speed * step
            if y > floor:
                y, speed = 2 * floor - y, -BOUNCE * speed
        heights.append(y)
    return np.array(heights)


def _draw_room(rng: np.random.Generator, time: np.ndarray, size: int) -> _Room:
    """A wall with soft stains, a floor of boards, and a camera that stands or moves slowly."""
    # The camera looks at the middle of a wall that is wider than the picture.
    reach = int(np.ceil(PAN * TICKS * size)) + 1
    width = size + 2 * reach
    above, below = (
        np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.1, 0.45), v)) for v in (0.6, 0.8)
    )
    blend = np.linspace(0, 1, size)[:, None, None]
    wall = np.broadcast_to(above * (1 - blend) + below * blend, (size, width, 3)).copy()
    coarse = rng.normal(0, 0.05, (6, 9, 1))
    wall += zoom(coarse, (size / 6, width / 9, 1), order=1)
    boards = np.array(colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.2, 0.5), rng.uniform(0.35, 0.6)))
    joints = (np.arange(width) * 8 // size % 2)[None, :, None] * 0.06
    wall[round(FLOOR * size) :] = boards - joints
    pan = rng.uniform(-PAN, PAN) * rng.integers(2)
    return _Room(wall.clip(0, 1), np.rint(pan * (time - MIDDLE) * size).astype(int))


def _render(room: _Room, ball: _Ball, size: int) -> World:
    reach = (room.wall.shape[1] - size) // 2
    moved = (room.pan / size)[:, None, None]
    # Middles of pixels, in widths; across: in the room, not in the picture.
    across = (np.arange(size) + 0.5)[None, None] / size + moved
    down = ((np.arange(size) + 0.5) / size)[None, :, None]
    film = np.stack([room.wall[:, reach + pan : reach + pan + size] for pan in room.pan])
    if room.shelf is not None:
        film[_inside(room.shelf, across, down)] = room.colour
    dx, dy = across - ball.x[:, None, None], down - ball.y[:, None, None]
    alpha = ((ball.radius - np.hypot(dx, dy)) * size + 0.5).clip(0, 1) * ball.is_there
    light = 0.8 - 0.25 * (dx + dy) / ball.radius
    shade = (light[..., None] * np.array(ball.colour)).clip(0, 1)
    film += alpha[..., None] * (shade - film)
    cover = alpha > 0
    if room.screen is not None:
        hidden = _inside(room.screen, across, down)
        film[hidden] = room.colour
        cover &= ~hidden
    return World((film * 255).round().astype(np.uint8), cover)


def _inside(box: tuple[float, float, float, float], across: np.ndarray, down: np.ndarray) -> np.ndarray:
    left, top, right, bottom = box
    return (across >= left) & (across < right) & (down >= top) & (down < bottom)
