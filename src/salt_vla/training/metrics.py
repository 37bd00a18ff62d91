"""What a step's predictions are worth: sums that can be added up over groups, batches and processes.

Stays on the device until it is asked for a row; knows nothing of losses and parameters.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import TrainConfig
from salt_vla.targets import Task, nearest_context
from salt_vla.training.distributed import World

BASELINES = ("channel_mean", "position_mean", "copy_nearest")
RANKS = ("prediction_rank", "encoder_rank")
POINT = 1e-6  # of tokens' length: deviations below it are float32's
RANK_ROWS = 512  # tokens that an effective rank is taken of, at most: what its eigenvalues cost bounds it


@dataclass
class ExplainedVariance:
    """R² of predictions against three baseline predictors, gathered over groups and batches.

    R² = 1 − Σ(prediction − target)² ÷ Σ(baseline − target)², as `objectives.explained_variance`, in sums so
    that batches can be added up. Baselines: the training mean per channel, the training mean per token place
    and channel, and a copy of the nearest visible token's own target.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)  # squared errors, float64

    def add(self, predicted: Tensor, targets: Tensor, baselines: dict[str, Tensor]) -> None:
        for name, guess in ({"residual": predicted} | baselines).items():
            # Norms of tokens first: no second table as large as the predictions.
            lengths = torch.linalg.vector_norm(guess - targets, dim=-1)
            _add_to(self.sums, name, lengths.double().square().sum())

    def as_row(self) -> dict[str, Tensor]:
        residual = self.sums["residual"]
        totals = {name: self.sums[name] for name in BASELINES}
        return {f"r2_{n}": torch.where(t > 0, 1 - residual / t, math.nan) for n, t in totals.items()}


@dataclass
class Spread:
    """Standard deviations of tokens: over all of them, of each channel (n, not n − 1), then their mean."""

    sums: dict[str, Tensor] = field(default_factory=dict)  # tokens, Σ and Σ² a channel, float64

    def add(self, tokens: Tensor) -> None:
        """(batch, tokens, dim)"""
        rows = tokens.flatten(0, 1)
        mean = rows.mean(dim=0)
        squares = (rows - mean).square_().sum(dim=0).double()
        count = torch.full((), float(len(rows)), dtype=torch.float64, device=rows.device)
        _add_to(self.sums, "count", count)
        _add_to(self.sums, "first", mean.double() * count)
        # About zero, from those about the mean; errors of a rounded mean are of second order.
        _add_to(self.sums, "second", squares + mean.double().square() * count)

    def value(self) -> Tensor:
        first, second = (self.sums[name] / self.sums["count"] for name in ("first", "second"))
        return (second - first.square()).clamp(min=0).sqrt().mean()


@dataclass
class Rank:
    """RankMe (Garrido et al., arXiv:2210.02885, equation 1) of tokens about their mean: from 1 (all on one
    line, or in one point) to min(rows, channels). Seen from the origin, as by the paper, what normalised
    tokens have in common would be the largest of their directions.

    Of up to `RANK_ROWS` rows, evenly spaced over the clips of the global batch and over their tokens.
    """

    rows: list[Tensor] = field(default_factory=list)

    def add(self, tokens: Tensor, batch: Batch, valid: Tensor | None = None) -> None:
        """(batch, tokens, dim); padding, at a row's end, is left out."""
        clips_in_all = batch.global_size * len(batch.masks)
        count = min(max(1, RANK_ROWS // clips_in_all), tokens.shape[1])
        every = math.ceil(clips_in_all / RANK_ROWS)
        # By the clip's number in the global batch: whoever computes it, the same tokens are taken.
        clips = torch.arange(-batch.first_row % every, len(tokens), every, device=tokens.device).unsqueeze(1)
        lengths = torch.full_like(clips, tokens.shape[1]) if valid is None else valid.sum(dim=1)[clips]
        length = lengths.clamp(min=count)
        places = torch.arange(count, device=tokens.device) * length // count
        places = (places + clips + batch.first_row) % length
        chosen = tokens.detach()[clips, places].float()
        # Rows of zeros, where a clip has fewer tokens than are taken, change no singular value.
        self.rows.append(chosen.masked_fill((places >= lengths).unsqueeze(-1), 0).flatten(0, 1))

    def table(self) -> Tensor:
        """At most `RANK_ROWS` of the rows, evenly spaced: those of many batches are thinned out."""
        rows = torch.cat(self.rows)
        if len(rows) <= RANK_ROWS:
            return rows
        return rows[torch.arange(RANK_ROWS, device=rows.device) * len(rows) // RANK_ROWS]

    def value(self) -> Tensor:
        rows = self.table().double()
        there = rows.any(dim=1, keepdim=True)
        about = (rows - rows.sum(dim=0) / there.sum()) * there
        return torch.where(there.any(), _rank_about(about, rows), effective_rank(about))


def centred_rank(rows: Tensor) -> Tensor:
    """`effective_rank` of a table about its mean; 1 for rows that are one point but for rounding."""
    return _rank_about(rows - rows.mean(dim=0), rows)


def _rank_about(about: Tensor, rows: Tensor) -> Tensor:
    # Of a single point nothing is left but rounding, which is of any rank.
    return torch.where(about.norm() <= POINT * rows.norm(), 1.0, effective_rank(about))


def effective_rank(rows: Tensor) -> Tensor:
    """exp of the entropy of a table's singular values, each divided by their sum; rows × channels. NaN where
    it is all zeros or not finite."""
    # The smaller Gram matrix, in float64: a square root of float32's rounding would be worth many ranks.
    table = torch.nan_to_num(rows.double(), posinf=0, neginf=0)
    gram = table @ table.T if len(table) < table.shape[1] else table.T @ table
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum()
    rank = torch.special.entr(share).sum().exp()
    return torch.where(rows.isfinite().all(), rank, math.nan)


@dataclass
class Scores:
    """Everything that is said of predictions, gathered over the (micro-)batches of a step or a pass."""

    explained: ExplainedVariance = field(default_factory=ExplainedVariance)
    targets: Spread = field(default_factory=Spread)
    predictions: Spread = field(default_factory=Spread)
    prediction_rank: Rank = field(default_factory=Rank)
    encoder_rank: Rank = field(default_factory=Rank)

    @torch.no_grad()
    def add(
        self,
        predicted: list[Tensor],
        contexts: list[Tensor],
        scored: Tensor,
        batch: Batch,
        task: Task,
        config: TrainConfig,
    ) -> None:
        """`scored`: the targets of all tokens in the space of R²; the rest as `Networks` gives it."""
        space = task.space
        rows = torch.arange(len(scored), device=scored.device).unsqueeze(1)
        for z, context, group in zip(predicted, contexts, batch.masks, strict=True):
            ids, z = group.target_ids, z.detach().float()
            targets = scored[rows, ids]
            copied = nearest_context(group.context_ids, ids, config.geometry, group.context_valid)
            baselines = {
                "channel_mean": space.channel_mean,
                "position_mean": space.position_mean[ids],
                "copy_nearest": scored[rows, copied],
            }
            self.explained.add(space.to_scored(z, ids), targets, baselines)
            # As the loss sees them: where they are centred, what is the same in every clip is no spread.
            self.targets.add(space.to_trained(targets, ids))
            self.predictions.add(z)
            self.prediction_rank.add(z, batch)
            self.encoder_rank.add(context, batch, group.context_valid)

    def shared(self, world: World) -> Scores:
        """Those of all processes together; each of them has to ask, and one at least has seen a clip."""
        if world.size == 1:
            return self
        whole, sums = Scores(), ("explained", "targets", "predictions")
        mine = {
            f"{part}/{name}": tensor.cpu()
            for part in sums
            for name, tensor in getattr(self, part).sums.items()
        }
        mine |= {part: getattr(self, part).table().cpu() for part in RANKS if getattr(self, part).rows}
        shapes = json.dumps({name: list(tensor.shape) for name, tensor in mine.items()})
        said = world.tell(shapes, teller=world.size - world.agree(world.size - world.rank if mine else 0))
        for name, shape in json.loads(said).items():
            part, _, key = name.partition("/")
            if key:
                summand = mine[name] if mine else torch.zeros(shape, dtype=torch.float64)
                getattr(whole, part).sums[key] = world.sum(summand)
                continue
            # A place for each process' rows; those that stay zero count nothing.
            places = torch.zeros(world.size, RANK_ROWS, shape[1])
            if mine:
                places[world.rank, : len(mine[name])] = mine[name]
            rows = world.sum(places).flatten(0, 1)
            getattr(whole, part).rows = [rows[rows.any(dim=1)]]
        return whole

    @torch.no_grad()
    def as_row(self) -> dict[str, float]:
        """Columns of `metrics.jsonl`; waits for the device, once."""
        columns = self.explained.as_row() | {
            "target_std": self.targets.value(),
            "prediction_std": self.predictions.value(),
            "prediction_rank": self.prediction_rank.value(),
            "encoder_rank": self.encoder_rank.value(),
        }
        values: list[float] = torch.stack(list(columns.values())).tolist()
        return dict(zip(columns, values, strict=True))


def _add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value
