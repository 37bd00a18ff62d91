"""The online probe: what a run's encoder knows, read out while it learns, of clips that are read anyway.

Looks at those of the last steps before a validation, to fit, and at that one's, to score. Knows batches and
arrays of truths; neither data sets nor how a truth came about.
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
from salt_vla.models import patchify
from salt_vla.models.pixels import normalise_pixels
from salt_vla.training.distributed import World
from salt_vla.training.learner import Learner
from salt_vla.training.metrics import centred_rank, effective_rank
from salt_vla.training.probe_plan import Plan, ends
from salt_vla.training.ridge import CONSTANT, Known, read_out

if TYPE_CHECKING:
    from jaxtyping import Float, Float32, Int64

LEAST_CLIPS = 8  # on either side, to say anything
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
    """Features and places of clips, and of each the step (from 0) that held it."""

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
        step, is_filled = together(self.step), together(torch.ones_like(self.step)).bool()
        order = torch.argsort(step[is_filled], stable=True)
        return Seen(features[is_filled][order], places[is_filled][order], step[is_filled][order])


class OnlineProbe:
    """`learn` at each step, `hold` each batch of a validation that is due, then ask for its `row`.

    Only the first and the last time step are looked at, whole (`tokens`), which costs a fraction of a step;
    a step that is not among the last `burst` before a validation costs nothing. Keeps, on the device, `clips`
    × (1 + cells) × width float32; nothing waits for the device between two validations.
    """

    def __init__(self, learned: Truths, held_out: Truths, plan: Plan, config: TrainConfig) -> None:
        self.learned, self.held_out = learned, held_out
        self.plan, self.config = plan, config
        self.every = -(-config.batch_size // plan.clips)  # Of a batch larger than that, every so-manieth.
        self.burst = max(1, plan.clips // -(-config.batch_size // self.every))
        self.tokens, self.cells = tokens_and_cells(config.geometry)
        self._window: deque[_Step] = deque(maxlen=self.burst)
        self._held: list[tuple[Tensor, list[Key]]] = []

    def is_due(self, step: int) -> bool:
        return self.plan.is_due(step)

    def learn(self, learner: Learner, batch: Batch, step: int) -> None:
        """The batch of update `step` (from 0), of this process, before that update."""
        if step < self.plan.next_due(step) - self.burst:
            return
        parts = [self._some(learner, part) for part in batch.micro_batches(self.config.grad_accum_steps)]
        keys = batch.keys[self._chosen(batch)]
        self._window.append(_Step(torch.cat(parts), self.learned.places(keys), step))

    def hold(self, learner: Learner, batch: Batch | None) -> None:
        """A batch of held-out clips; None where only other processes have one."""
        if batch is not None:
            self._held.append((self._features(learner, batch.frames), batch.keys))
        else:
            self._accompany(learner)

    def row(self, step: int, world: World, initial: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What was learned and held says after `step` steps: a row of metrics, empty where it is too little.

        `initial`: the row of the weights that the run began with, to stand beside this one's figures. Every
        process has to ask; the first one's answer counts.
        """
        held, self._held = self._held, []
        steps = [_Step(features, self.held_out.places(keys), 0) for features, keys in held]
        tested, fitted = _seen(steps).gathered(world), _seen(self._of_burst(step)).gathered(world)
        if not world.is_first or min(len(fitted.step), len(tested.step)) < LEAST_CLIPS:
            return {}
        known, truth = self.learned.at(fitted.places.numpy()), self.held_out.at(tested.places.numpy())
        figures = read_out(fitted.features, known, tested.features, truth)
        learned = [name for name in figures if not name.endswith(CONSTANT)]
        before = {f"{name}{INITIAL}": initial[name] for name in learned if initial and name in initial}
        # The first of the cells is the whole clip.
        means = tested.features[:, : tested.features.shape[1] // (1 + self.cells.shape[1])].double()
        ranks = {"rankme": effective_rank(means), "rankme_centred": centred_rank(means)}
        return {
            "kind": "probe",
            "step": step,
            **figures,
            **before,
            **{name: float(value) for name, value in ranks.items()},
            "fit_clips": len(fitted.step),
            "clips": len(tested.step),
            "episodes": len(np.unique(truth.episodes)),
        }

    def state(self, step: int, world: World) -> dict[str, Tensor]:
        """What a resume after `step` steps needs, of all processes, each of which has to ask; empty but in
        the last steps before a validation."""
        steps = self._of_burst(self.plan.next_due(step))
        return _seen(steps).gathered(world).state() if world.agree(len(steps)) else {}

    def restore(self, tensors: Mapping[str, Tensor], world: World) -> None:
        """As `state` gave it; empty where there is none, or of other clips than those learned from."""
        self._window.clear()
        self._held.clear()
        if not tensors or self._is_strange(tensors):
            return
        device = self.config.runtime.device
        for step in tensors["step"].unique():
            rows = (tensors["step"] == step).nonzero().flatten()
            rows = rows[rows_of(len(rows), (world.rank, world.size))]
            features, places = tensors["features"][rows].to(device), tensors["places"][rows].numpy()
            self._window.append(_Step(features, places, int(step)))

    def _is_strange(self, tensors: Mapping[str, Tensor]) -> bool:
        if tensors.keys() != {"features", "places", "step"} or tensors["places"].shape[1:] != (2,):
            return True
        row, view = tensors["places"].amax(0)
        views = [values.shape[1] for values in self.learned.numbers.values()]
        return bool(row >= len(self.learned.episodes) or view >= min(views, default=int(view) + 1))

    def _of_burst(self, due: int) -> list[_Step]:
        return [each for each in self._window if due - self.burst <= each.step < due]

    def _chosen(self, batch: Batch) -> slice:
        return slice(-batch.first_row % self.every, None, self.every)

    def _some(self, learner: Learner, batch: Batch) -> Tensor:
        frames = batch.frames[self._chosen(batch)]
        return self._features(learner, frames) if len(frames) else self._accompany(learner)

    def _accompany(self, learner: Learner) -> Tensor:
        """No features; where parameters are shared out, processes look only together."""
        geometry = self.config.geometry
        size = (geometry.image_size, geometry.image_size)
        dims = (1 + self.cells.shape[1]) * learner.encoder.dim
        if learner.is_sharded:
            self._features(learner, torch.zeros(1, geometry.num_frames, *size, 3, dtype=torch.uint8))
        return torch.zeros(0, dims, device=self.config.runtime.device)

    @torch.no_grad()
    def _features(self, learner: Learner, frames: Tensor) -> Tensor:
        config, device = self.config, torch.device(self.config.runtime.device)
        self.tokens, self.cells = self.tokens.to(device), self.cells.to(device)
        tubelets = patchify(normalise_pixels(frames.to(device)), config.geometry)
        lower = "bfloat16" in (config.runtime.precision, config.optimizer.parameters)
        was_training = learner.networks.training
        learner.train(False)
        with torch.autocast(device.type, torch.bfloat16, enabled=lower):
            seen = learner.look(tubelets, self.tokens.expand(len(frames), -1))
        learner.train(was_training)
        return pooled(seen.float(), self.cells)


@dataclass(frozen=True)
class _Step:
    """What this process has seen of the clips of one step."""

    features: Tensor
    places: np.ndarray
    step: int


def _seen(steps: list[_Step]) -> Seen:
    steps = steps or [_Step(torch.zeros(0, 0), np.zeros((0, 2), np.int64), 0)]
    counts = torch.tensor([len(each.places) for each in steps])
    filled = [each.features for each in steps if len(each.features)] or [torch.zeros(0, 0)]
    return Seen(
        torch.cat(filled).cpu(),
        torch.from_numpy(np.concatenate([each.places for each in steps])),
        torch.repeat_interleave(torch.tensor([each.step for each in steps]), counts),
    )


def tokens_and_cells(
    geometry: ClipGeometry,
) -> tuple[Int64[Tensor, "1 tokens"], Float[Tensor, "tokens cells"]]:
    """The tokens of the first and the last time step, and which quarter of which of them each lies in."""
    steps, rows, columns = geometry.token_grid
    ids = torch.arange(geometry.num_tokens).view(steps, rows, columns)[ends(geometry)]
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    quarter = (row * QUADRANTS // rows) * QUADRANTS + column * QUADRANTS // columns
    cell = torch.stack([number * QUADRANTS**2 + quarter for number in range(len(ids))])
    return ids.view(1, -1), torch.nn.functional.one_hot(cell.flatten(), len(ids) * QUADRANTS**2).float()


def pooled(
    tokens: Float[Tensor, "batch tokens dim"], cells: Float[Tensor, "tokens cells"]
) -> Float[Tensor, "batch dims"]:
    """The mean of a clip's tokens, then that of each cell's less the clip's."""
    mean = tokens.mean(dim=1, keepdim=True)
    means = cells.T @ tokens / cells.sum(dim=0).clamp(min=1).unsqueeze(-1)
    return torch.cat([mean, means - mean], dim=1).flatten(1)
