"""The online probe: what a run's encoder knows, read out of features that its steps compute anyway.

Keeps the pooled contexts of the last training clips and, at a validation, fits them and scores held-out ones.
Knows batches and arrays of truths; neither data sets nor how a truth came about.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from salt_vla.batches import Batch, rows_of
from salt_vla.cache import Key
from salt_vla.config import TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.training.distributed import World
from salt_vla.training.metrics import effective_rank
from salt_vla.training.ridge import Known, read_out

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64

LEAST_CLIPS = 16  # to fit anything on
RUN_SHARE = 8  # one in so many of a run's clips at most, so that short runs are not spent on their beginning
QUADRANTS = 2  # rows and columns of cells that a picture is pooled in
INITIAL = "_initial"


@dataclass(frozen=True)
class Truths:
    """What is known of clips: `numbers` by target, of each view; `classes` as numbers of a list of names that
    both sides of a split share. `row_of` finds a clip's row. A split's two sides share no episode."""

    row_of: Mapping[str, int]
    episodes: Int64[np.ndarray, " clips"]
    numbers: Mapping[str, Float32[np.ndarray, "clips views dims"]] = field(default_factory=dict)
    classes: Mapping[str, Int64[np.ndarray, " clips"]] = field(default_factory=dict)

    def places(self, keys: list[Key]) -> Int64[np.ndarray, "keys 2"]:
        """(row, view) of each."""
        return np.array([(self.row_of[clip], view) for clip, view in keys], np.int64).reshape(-1, 2)

    def at(self, places: Int64[np.ndarray, "keys 2"]) -> Known:
        rows, views = places.T
        return Known(
            self.episodes[rows],
            {name: values[rows, views] for name, values in self.numbers.items()},
            {name: codes[rows] for name, codes in self.classes.items()},
        )


@dataclass(frozen=True)
class Seen:
    """Features and places of clips, of one step or of several: `step` counts from the oldest, 0."""

    features: Float[Tensor, "clips dims"]
    places: Int64[Tensor, "clips 2"]
    step: Int64[Tensor, " clips"]

    def state(self) -> dict[str, Tensor]:
        return {"features": self.features, "places": self.places, "step": self.step}

    def gathered(self, world: World) -> Seen:
        """Those of all processes, ordered by step and within it by process, which is the order in which one
        process would have seen them; each process has to ask."""
        if world.size == 1:
            return self
        most, width = world.agree(len(self.step)), world.agree(self.features.shape[1])

        def together(mine: Tensor, *dims: int) -> Tensor:
            whole = torch.zeros(world.size, most, *dims, dtype=mine.dtype)
            if len(mine):
                whole[world.rank, : len(mine)] = mine
            return world.sum(whole).flatten(0, 1)

        features, places = together(self.features, width), together(self.places, 2)
        step = together(self.step + 1)  # Places that nobody fills stay 0.
        order = torch.argsort(step, stable=True)[int((step == 0).sum()) :]
        return Seen(features[order], places[order], step[order] - 1)


class OnlineProbe:
    """`see` (micro-)batches, then say whether they were learned from (`learn`) or held out (`row`).

    Holds `runtime.probe_clips` clips (fewer in a short run) of (1 + cells) · width float32 on the device,
    evenly spaced over a batch that is larger; nothing waits for the device between two validations.
    """

    def __init__(self, learned: Truths, held_out: Truths, config: TrainConfig) -> None:
        self.learned, self.held_out = learned, held_out
        batch = config.batch_size
        clips = max(LEAST_CLIPS, min(config.runtime.probe_clips, batch * config.steps // RUN_SHARE))
        self.clips = clips
        self.steps = max(1, clips // -(-batch // self._every(batch)))
        self.cells = cells_of(config.geometry)
        self._window: deque[tuple[Tensor, np.ndarray]] = deque(maxlen=self.steps)
        self._seen: list[tuple[Tensor, list[Key]]] = []

    @torch.no_grad()
    def see(self, context: Float[Tensor, "batch context dim"], batch: Batch) -> None:
        """The encoder's output for the first mask group of a (micro-)batch."""
        group = batch.masks[0]
        every = self._every(batch.global_size)
        chosen = slice(-batch.first_row % every, None, every)
        ids, context = group.context_ids[chosen], context[chosen].detach().float()
        valid = None if group.context_valid is None else group.context_valid[chosen]
        self.cells = self.cells.to(context.device)
        self._seen.append((pooled(context, self.cells[ids], valid), batch.keys[chosen]))

    def learn(self, is_sound: bool = True) -> None:
        """What was seen since was a training step's; one that was left out counts for nothing."""
        features, places = self._taken(self.learned)
        if is_sound:
            self._window.append((features, places))

    def row(self, step: int, world: World, initial: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What was seen since is of held-out clips: a row of metrics, empty where there is too little to fit.

        `initial`: the row of the weights that the run began with, to stand beside this one's figures. Every
        process has to ask; the first one's answer counts.
        """
        features, places = self._taken(self.held_out)
        held = _seen([(features, places)]).gathered(world)
        window = self._all().gathered(world)
        if not world.is_first or min(len(window.step), len(held.step)) < LEAST_CLIPS:
            return {}
        fit, test = self.learned.at(window.places.numpy()), self.held_out.at(held.places.numpy())
        figures = read_out(window.features, fit, held.features, test)
        before = {f"{name}{INITIAL}": initial[name] for name in figures if initial and name in initial}
        # The first of the cells is the whole clip.
        width = held.features.shape[1] // (1 + self.cells.shape[1])
        means = held.features[:, :width].double()
        ranks = {"rankme": effective_rank(means), "rankme_centred": effective_rank(means - means.mean(0))}
        return {
            "kind": "probe",
            "step": step,
            **figures,
            **before,
            **{name: float(value) for name, value in ranks.items()},
            "fit_clips": len(window.step),
            "clips": len(held.step),
            "episodes": len(np.unique(test.episodes)),
        }

    def state(self, world: World) -> dict[str, Tensor]:
        """What a resume needs, of all processes; each has to ask."""
        return self._all().gathered(world).state() if self._window else {}

    def restore(self, tensors: Mapping[str, Tensor], world: World, device: str) -> None:
        """As `state` gave it, or empty: of a run that had no probe, or whose features were others."""
        self._window.clear()
        self._seen.clear()
        if not tensors or self._is_strange(tensors):
            return
        for number in tensors["step"].unique():
            rows = (tensors["step"] == number).nonzero().flatten()
            rows = rows[rows_of(len(rows), (world.rank, world.size))]
            self._window.append((tensors["features"][rows].to(device), tensors["places"][rows].numpy()))

    def _is_strange(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether they are of other clips than those that are learned from, or no such thing at all."""
        if tensors.keys() != {"features", "places", "step"} or tensors["places"].shape[1:] != (2,):
            return True
        most = tensors["places"].amax(0) if len(tensors["places"]) else torch.zeros(2)
        views = min((values.shape[1] for values in self.learned.numbers.values()), default=most[1] + 1)
        return bool(most[0] >= len(self.learned.episodes) or most[1] >= views)

    def _every(self, batch_size: int) -> int:
        """Of a larger batch than there is room for, every so-manieth clip."""
        return -(-batch_size // self.clips)

    def _taken(self, truths: Truths) -> tuple[Tensor, np.ndarray]:
        """What was seen, which is then forgotten."""
        seen, self._seen = self._seen, []
        features = torch.cat([each for each, _ in seen]) if seen else torch.zeros(0, 0)
        return features, truths.places([key for _, keys in seen for key in keys])

    def _all(self) -> Seen:
        return _seen(list(self._window))


def _seen(steps: list[tuple[Tensor, np.ndarray]]) -> Seen:
    steps = steps or [(torch.zeros(0, 0), np.zeros((0, 2), np.int64))]
    counts = torch.tensor([len(places) for _, places in steps])
    return Seen(
        torch.cat([features for features, _ in steps]).cpu(),
        torch.from_numpy(np.concatenate([places for _, places in steps])),
        torch.repeat_interleave(torch.arange(len(steps)), counts),
    )


def cells_of(geometry: ClipGeometry) -> Float[Tensor, "tokens cells"]:
    """Which cell each token lies in: the quarters of the picture, over all time."""
    _, rows, columns = geometry.token_grid
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    cell = (row * QUADRANTS // rows) * QUADRANTS + column * QUADRANTS // columns
    return torch.nn.functional.one_hot(cell.flatten(), QUADRANTS**2).float().repeat(geometry.token_grid[0], 1)


def pooled(
    tokens: Float[Tensor, "batch context dim"],
    cells: Float[Tensor, "batch context cells"],
    valid: Tensor | None,
) -> Float[Tensor, "batch dims"]:
    """The mean of a clip's tokens, then that of each cell's: less the clip's, and zero where none is seen."""
    weights = torch.cat([torch.ones_like(cells[..., :1]), cells], dim=-1)
    if valid is not None:
        weights = weights * valid.unsqueeze(-1)
    counts = weights.sum(dim=1).unsqueeze(-1)
    means = weights.transpose(1, 2) @ tokens / counts.clamp(min=1)
    means[:, 1:] -= means[:, :1]
    means[:, 1:] *= counts[:, 1:] > 0
    return means.flatten(1)
