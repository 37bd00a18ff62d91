"""How much a film surprises a model: windows of it, and how far each future is from what was predicted.

Knows films as pictures that come one after another, and models by one method; neither data sets nor
checkpoints.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from salt_vla.data.view_lock import cut
from salt_vla.errors import ConfigError, DataError

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, UInt8

    from salt_vla.geometry import ClipGeometry

CENTRE = 0.5  # of the longer side: the canonical view's square


class SurpriseModel(Protocol):
    """Anything that expects a future. `fingerprint`: of everything that decides the numbers. `target`: in
    words, what the predictions are held against. `frame_step`: film frames between two of its clips."""

    @property
    def geometry(self) -> ClipGeometry: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def target(self) -> str: ...

    @property
    def frame_step(self) -> int: ...

    def surprise(
        self, clips: UInt8[np.ndarray, "batch frames height width 3"], contexts: Sequence[int], /
    ) -> Float[np.ndarray, "batch contexts"]:
        """For each clip and number of its first frames that are seen: the mean distance between what was
        predicted of all later frames and what came. The seen part must not depend on the later frames."""
        ...


@dataclass(frozen=True)
class Windows:
    """Which windows of a film are looked at. `context_frames`: how many frames of a window are seen before
    its rest is predicted; () is half of it. `frame_steps`: film frames from one of its frames to the next; ()
    is the model's own. `stride`: frames of a window (each `frame_step` film frames) from the start of one to
    the next. `early`: at the film's start shorter contexts are looked at too, so that what happens before a
    whole context has passed is not missed (the reference's `max_context_mode`). `batch`: windows at once.
    """

    context_frames: tuple[int, ...] = ()
    frame_steps: tuple[int, ...] = ()
    stride: int = 2
    early: bool = True
    batch: int = 8

    def __post_init__(self) -> None:
        for what, values in (
            ("context frames", self.context_frames),
            ("frame step", self.frame_steps),
            ("stride", (self.stride,)),
            ("batch", (self.batch,)),
        ):
            if any(value < 1 for value in values) or len(set(values)) != len(values):
                raise ConfigError(f"windows: {what} must be different numbers of 1 or more, not {values}")

    def of(self, model: SurpriseModel) -> Windows:
        """With the model's own numbers where none were given. Raises `ConfigError` for contexts that do not
        fit its clips."""
        geometry = model.geometry
        frames, tubelet = geometry.num_frames, geometry.tubelet_size
        if frames <= tubelet:
            raise ConfigError(f"clips of {frames} frames are one time step: there is no future to predict")
        contexts = self.context_frames or (max(frames // 2 // tubelet, 1) * tubelet,)
        for context in contexts:
            if context % tubelet or not 0 < context < frames:
                raise ConfigError(
                    f"a context of {context} frames does not fit clips of {frames} frames in time steps of "
                    f"{tubelet}; choose from {', '.join(map(str, range(tubelet, frames, tubelet)))}"
                )
        return Windows(contexts, self.frame_steps or (model.frame_step,), self.stride, self.early, self.batch)


@dataclass(frozen=True, order=True)
class Setting:
    """One way to look at a film: how much is seen, at which pace."""

    context_frames: int
    frame_step: int

    def __str__(self) -> str:
        return f"context {self.context_frames}, step {self.frame_step}"


@dataclass(frozen=True)
class Curve:
    """Surprise along a film in one setting. `starts`: the film frame that each window begins with; `first`:
    the first film frame that was predicted; ascending."""

    setting: Setting
    starts: Int64[np.ndarray, " windows"]
    first: Int64[np.ndarray, " windows"]
    values: Float[np.ndarray, " windows"]

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def max(self) -> float:
        return float(self.values.max())


@dataclass(frozen=True)
class FilmSurprise:
    """A film's curves, one a setting. `mean` and `max` are over windows, then over settings: none is chosen
    by its result."""

    curves: tuple[Curve, ...] = field(default_factory=tuple)

    @property
    def mean(self) -> float:
        return float(np.mean([curve.mean for curve in self.curves]))

    @property
    def max(self) -> float:
        return float(np.mean([curve.max for curve in self.curves]))


def film_surprise(
    model: SurpriseModel,
    frames: Iterable[UInt8[np.ndarray, "height width 3"]],
    windows: Windows = Windows(),
    name: str = "film",
) -> FilmSurprise:
    """Surprise of every window of a film, whose pictures (all of one size; cut to the centre's square and
    resized as the canonical view is) may come from an array or a decoder: one window's span of them and one
    batch are held. Raises `DataError` for a film that is shorter than one window."""
    return film_surprises({name: model}, frames, windows, name)[name]


def film_surprises(
    models: dict[str, SurpriseModel],
    frames: Iterable[UInt8[np.ndarray, "height width 3"]],
    windows: Windows = Windows(),
    name: str = "film",
) -> dict[str, FilmSurprise]:
    """`film_surprise` of several models whose clips have one geometry, with one pass over the film; steps and
    contexts that were left open are the first one's."""
    first = next(iter(models.values()))
    windows = windows.of(first)
    geometry = first.geometry
    for other, model in models.items():
        if model.geometry != geometry:
            raise ConfigError(f"{other!r} takes clips of {model.geometry}, not {geometry}")
    collected = {key: _Collected(model, windows) for key, model in models.items()}
    for step, start, clip in _clips(frames, geometry, windows):
        for each in collected.values():
            each.add(step, start, clip)
    if any(each.lacks_a_step for each in collected.values()):
        span = (geometry.num_frames - 1) * max(windows.frame_steps) + 1
        raise DataError(
            f"{name} is shorter than one window of {span} frames ({geometry.num_frames} frames at step "
            f"{max(windows.frame_steps)}); choose a smaller frame step or leave the film out"
        )
    return {key: each.result() for key, each in collected.items()}


def _clips(
    frames: Iterable[UInt8[np.ndarray, "height width 3"]], geometry: ClipGeometry, windows: Windows
) -> Iterator[tuple[int, int, UInt8[np.ndarray, "frames size size 3"]]]:
    """(frame step, first film frame, clip) of each window, as soon as its last picture has come."""
    count = geometry.num_frames
    spans = {step: (count - 1) * step + 1 for step in windows.frame_steps}
    held: deque[np.ndarray] = deque(maxlen=max(spans.values()))
    for number, picture in enumerate(frames):
        held.append(_square(picture, geometry.image_size))
        for step, span in spans.items():
            start = number - span + 1
            if start >= 0 and start % (windows.stride * step) == 0:
                offset = len(held) - span
                yield step, start, np.stack([held[offset + n * step] for n in range(count)])


def _square(picture: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    height, width = picture.shape[:2]
    if height == width == side:
        return picture
    short = min(height, width)
    return cut(picture, (CENTRE * (width / short - 1), CENTRE * (height / short - 1), 1.0), side)


class _Collected:
    """One model's windows: waiting for a batch, and what came of those that went through."""

    def __init__(self, model: SurpriseModel, windows: Windows) -> None:
        self.model, self.windows = model, windows
        self._waiting: dict[int, list[tuple[int, np.ndarray]]] = {step: [] for step in windows.frame_steps}
        self._found: dict[Setting, list[tuple[int, int, float]]] = {
            Setting(context, step): [] for step in windows.frame_steps for context in windows.context_frames
        }

    @property
    def lacks_a_step(self) -> bool:
        return any(
            not waiting and not self._found[Setting(self.windows.context_frames[0], step)]
            for step, waiting in self._waiting.items()
        )

    def add(self, step: int, start: int, clip: np.ndarray) -> None:
        if start == 0 and self.windows.early:
            self._look_early(step, clip)
        waiting = self._waiting[step]
        waiting.append((start, clip))
        if len(waiting) == self.windows.batch:
            self._look(step)

    def result(self) -> FilmSurprise:
        for step in self._waiting:
            self._look(step)
        curves = []
        for setting, found in sorted(self._found.items()):
            starts, first, values = zip(*sorted(found, key=lambda each: each[1]), strict=True)
            curves.append(Curve(setting, np.array(starts), np.array(first), np.array(values, np.float64)))
        return FilmSurprise(tuple(curves))

    def _look(self, step: int) -> None:
        waiting, self._waiting[step] = self._waiting[step], []
        if not waiting:
            return
        contexts = self.windows.context_frames
        values = self._values(np.stack([clip for _, clip in waiting]), contexts)
        for (start, _), row in zip(waiting, values, strict=True):
            for context, value in zip(contexts, row, strict=True):
                self._found[Setting(context, step)].append((start, start + context * step, float(value)))

    def _look_early(self, step: int, clip: np.ndarray) -> None:
        """The film's first window once more, with every context that is shorter than the setting's."""
        contexts = self.windows.context_frames
        tubelet = self.model.geometry.tubelet_size
        shorter = list(range(tubelet, max(contexts), tubelet))
        if not shorter:
            return
        values = dict(zip(shorter, self._values(clip[None], shorter)[0], strict=True))
        for context in contexts:
            for length in shorter:
                if length < context:
                    entry = (0, length * step, float(values[length]))
                    self._found[Setting(context, step)].append(entry)

    def _values(self, clips: np.ndarray, contexts: Sequence[int]) -> np.ndarray:
        values = self.model.surprise(clips, contexts)
        if values.shape != (len(clips), len(contexts)) or not np.isfinite(values).all():
            raise DataError(
                f"surprises of {len(clips)} windows came as {values.shape} with "
                f"{int((~np.isfinite(values)).sum())} that are no numbers; the model's weights may be damaged"
            )
        return values
