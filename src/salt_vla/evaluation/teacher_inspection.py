"""What a teacher shows without any film: its biases, and whether its tokens know their place.

Asks a module for its parameters and a function for latents; knows no family of teachers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salt_vla.geometry import ClipGeometry

if TYPE_CHECKING:
    from jaxtyping import Float

Latents = Callable[[Tensor], Tensor]  # uint8 (batch, frames, height, width, 3) → (batch, tokens, dim)

GREY = 128
MAGENTA = (255, 0, 255)
MARKS = 8
# Of positions: places of a time step below which chance and order look alike; the least spread of vectors
# (relative to their size; in units of the dtype's rounding) that can be judged: bits that fell the other way
# look like a shuffled table; and the borders of a judgement. Measured: `neighbours`
# of sinusoids 0.1 … 0.65, of shuffled ones 0.94 … 1.1, of random tables 0.9 … 1; `nearest` ÷ `chance` of the
# former two 0.2 … 1, of the latter above 1.05; `directions` of the former two 0.04 … 0.6, of the latter
# above 0.9.
FEWEST_PLACES = 16
LEAST_SPREAD, ROUNDINGS = 1e-5, 4
ORDERED, SHUFFLED, CLUSTERED, FEW_DIRECTIONS = 0.8, 0.88, 0.75, 0.7


@dataclass(frozen=True)
class QueryValueBiases:
    """How many query and value biases a network has, and how many of them are zero throughout."""

    total: int
    zero: int


@dataclass(frozen=True)
class TokenOrder:
    """Of `tried` places that were repainted one by one, at how many the token of that place changed most.

    On grids of six rows and more a neighbour of the same time step counts too, and as many more as the
    tower's own patches span: image towers of another patch size are resampled to the clip's grid. `tried` is
    0 where that would be half of the grid, or where numbers are not finite.
    """

    tried: int
    found: int


@dataclass(frozen=True)
class PositionOrder:
    """Whether vectors that stand for places of a grid lie as the places do; mean squared distances are in
    units of that of random pairs.

    `neighbours`: of places side by side. `nearest`: of each vector and the one most like it; `chance`: the
    same for Gaussian vectors of the same covariance. `directions`: in how many directions they spread
    (Σλ)² ÷ Σλ², as a share of what independent ones would. `spread`: how much they differ, as a share of
    their size. An ordered table has close neighbours; a shuffled one still has close companions and few
    directions, which shuffling does not change, but they are not neighbours; random numbers have neither.
    Below `least_spread` what differs may be rounding.
    """

    neighbours: float
    nearest: float
    chance: float
    directions: float
    spread: float
    places: int
    of_table: bool
    least_spread: float = LEAST_SPREAD

    @property
    def judgement(self) -> str:
        """`ordered`, `shuffled`, or `unknown` where there is no order of any kind to be seen.

        Directions are looked at in tables only: a network can squeeze the tokens of any table into few.
        """
        if self.places < FEWEST_PLACES or self.spread < self.least_spread:
            return "unknown"
        if self.neighbours < ORDERED:
            return "ordered"
        structured = self.nearest < CLUSTERED * self.chance
        structured |= self.of_table and self.directions < FEW_DIRECTIONS
        return "shuffled" if structured and self.neighbours > SHUFFLED else "unknown"


_BIAS = re.compile(r"(^|[._])(q|v|query|value|q_proj|v_proj)([._])bias$")
_JOINT_BIAS = re.compile(r"(^|\.)qkv\.bias$")


def query_value_biases(module: nn.Module) -> QueryValueBiases:
    """Of every attention: biases of their own (`q_bias`, `query.bias`, `q_proj.bias` …), or the first and
    last third of a joint one (`qkv.bias`)."""
    found = []
    for name, tensor in module.state_dict().items():
        if _JOINT_BIAS.search(name):
            third = len(tensor) // 3
            found += [tensor[:third], tensor[-third:]]
        elif _BIAS.search(name):
            found.append(tensor)
    return QueryValueBiases(len(found), sum(not bool(tensor.any()) for tensor in found))


def token_order(latents: Latents, geometry: ClipGeometry, own_rows: int | None = None) -> TokenOrder:
    """Repaint one tubelet of a grey clip at a time: the token of that place must change most.

    `own_rows`: how many rows of patches the network sees, where they are resampled to the geometry's. Finds
    outputs in another order than the geometry's (rows and columns or time and space exchanged).
    """
    drawn = torch.randperm(geometry.num_tokens, generator=torch.Generator().manual_seed(0))
    places = drawn[:MARKS]  # Drawn: evenly spaced ones tend to lie on diagonals, which transposing keeps.
    is_coarse = own_rows is not None and own_rows < geometry.token_grid[1]
    clips = torch.stack(
        [_grey(geometry), *(_marked(geometry, _cell(geometry, int(p), own_rows), is_coarse) for p in places)]
    )
    plain, *marked = found = latents(clips).float().cpu()
    reach = _reach(geometry.token_grid[1], own_rows)
    if not torch.isfinite(found).all() or (reach and 2 * (2 * reach + 1) ** 2 > geometry.tokens_per_step):
        return TokenOrder(0, 0)
    most = torch.stack([(tokens - plain).norm(dim=-1).argmax() for tokens in marked])
    rows, columns = geometry.token_grid[1:]
    time, row, column = (
        (split(most) - split(places)).abs()
        for split in (
            lambda ids: ids // (rows * columns),
            lambda ids: ids // columns % rows,
            lambda ids: ids % columns,
        )
    )
    return TokenOrder(len(places), int(((time == 0) & (row <= reach) & (column <= reach)).sum()))


def _reach(rows: int, own_rows: int | None) -> int:
    """How far from a place that was repainted the token that changes most may be, in rows and columns."""
    least = 1 if rows >= 6 else 0
    return max(least, round(rows / own_rows)) if own_rows and own_rows < rows else least


def _cell(geometry: ClipGeometry, place: int, own_rows: int | None) -> list[int]:
    """The places of the clip's grid that lie in the same patch of the network's own, coarser one: a change in
    one of them alone is diluted there."""
    _, rows, columns = geometry.token_grid
    own = min(own_rows or rows, rows)
    first = place - place % (rows * columns)
    row, column = place // columns % rows, place % columns
    lines, stripes = (
        [other for other in range(rows) if other * own // rows == at * own // rows] for at in (row, column)
    )
    return [first + line * columns + stripe for line in lines for stripe in stripes]


def position_order(latents: Latents, module: nn.Module, geometry: ClipGeometry) -> PositionOrder:
    """Of the position table that `module` holds, where one is found and its order can be judged; else of the
    tokens of a grey clip, which differ in nothing but their place.

    Blind to what is mirrored or transposed, to a wrong order of the time steps, and to grids of fewer than
    16 places.
    """
    for table in _position_tables(module, geometry):
        order = _measure(table, of_table=True)
        if order.judgement != "unknown":
            return order
    rounding = max((torch.finfo(p.dtype).eps for p in module.parameters()), default=0.0)
    order = _measure(_tokens_of_grey(latents, geometry), of_table=False)
    return replace(order, least_spread=max(LEAST_SPREAD, ROUNDINGS * rounding))


def _position_tables(
    module: nn.Module, geometry: ClipGeometry
) -> Iterator[Float[Tensor, "steps rows columns dim"]]:
    """Tensors of the module with `pos` in their name that have a row for each token, or for each place of a
    square (after up to one row of another kind, as for CLS)."""
    for name, part in module.named_modules():
        own = {
            **vars(part),
            **dict(part.named_parameters(recurse=False)),
            **dict(part.named_buffers(recurse=False)),
        }
        for key, tensor in own.items():
            if not isinstance(tensor, Tensor) or "pos" not in f"{name}.{key}".lower() or tensor.ndim < 2:
                continue
            if tensor.ndim > 3 or (tensor.ndim == 3 and len(tensor) != 1) or not tensor.is_floating_point():
                continue
            rows = tensor.detach().double().cpu().reshape(-1, tensor.shape[-1])
            if len(rows) == geometry.num_tokens:
                yield rows.unflatten(0, geometry.token_grid)
                continue
            for extra in (0, 1):
                side = math.isqrt(len(rows) - extra)
                if side * side == len(rows) - extra:
                    yield rows[extra:].unflatten(0, (1, side, side))
                    break


def _tokens_of_grey(latents: Latents, geometry: ClipGeometry) -> Float[Tensor, "clips rows columns dim"]:
    """Normalised tokens of the middle time step of three grey clips.

    One place of each is painted over, since rotary positions show only between tokens that differ; it is
    given the mean of the places above and below.
    """
    steps, rows, columns = geometry.token_grid
    marks = [(rows // 2, columns // 2), (rows // 4, columns // 4), (max(rows - 2, 0), min(1, columns - 1))]
    places = [[(t * rows + row) * columns + column for t in range(steps)] for row, column in marks]
    found = latents(torch.stack([_marked(geometry, ids) for ids in places]))
    tokens = found.double().cpu().unflatten(1, (steps, rows, columns))[:, steps // 2]
    for clip, (row, column) in zip(tokens, marks, strict=True):
        clip[row, column] = (clip[row - 1, column] + clip[(row + 1) % rows, column]) / 2
    return F.layer_norm(tokens, tokens.shape[-1:])


def _measure(grids: Float[Tensor, "grids rows columns dim"], of_table: bool) -> PositionOrder:
    """The mean over up to eight grids."""
    places = grids.shape[1] * grids.shape[2]
    chosen = grids[:: -(-len(grids) // 8)]
    if places < 2 or not torch.isfinite(grids).all():
        return PositionOrder(1.0, 1.0, 1.0, 1.0, 0.0, places, of_table)
    measured = [_distances(grid, seed) for seed, grid in enumerate(chosen)]
    neighbours, nearest, chance, directions, spread = torch.tensor(measured).mean(dim=0).tolist()
    return PositionOrder(neighbours, nearest, chance, directions, spread, places, of_table)


def _distances(grid: Float[Tensor, "rows columns dim"], seed: int) -> tuple[float, ...]:
    """(neighbours, nearest, chance, directions, spread) of one grid."""
    flat = grid.flatten(0, 1)
    pairs, nearest = _pairs_and_nearest(flat)
    if pairs <= 0:
        return 1.0, 1.0, 1.0, 1.0, 0.0
    spread = (pairs / max(float(flat.square().sum(dim=-1).mean()), 1e-30)) ** 0.5
    sizes = torch.linalg.svdvals(flat - flat.mean(dim=0))
    directions = float(sizes.square().sum() ** 2 / sizes.pow(4).sum())
    others, dim = len(flat) - 1, flat.shape[1]
    generator = torch.Generator().manual_seed(seed)
    chances = []
    for _ in range(8):
        drawn = torch.randn(len(flat), len(sizes), dtype=torch.float64, generator=generator) * sizes
        of_drawn, nearest_drawn = _pairs_and_nearest(drawn)
        chances.append(nearest_drawn / of_drawn)
    beside = torch.cat([(grid[1:] - grid[:-1]).flatten(0, 1), (grid[:, 1:] - grid[:, :-1]).flatten(0, 1)])
    neighbours = float(beside.square().sum(dim=-1).mean())
    chance = sum(chances) / len(chances)
    return neighbours / pairs, nearest / pairs, chance, directions * (others + dim) / (others * dim), spread


def _pairs_and_nearest(points: Float[Tensor, "points dim"]) -> tuple[float, float]:
    """Mean squared distance of all pairs, and from each point to the nearest other."""
    squared = torch.cdist(points, points).square()
    count = len(points)
    pairs = float(squared.sum()) / (count * (count - 1))
    return pairs, float(squared.fill_diagonal_(torch.inf).min(dim=1).values.mean())


def _grey(geometry: ClipGeometry) -> Tensor:
    size = geometry.image_size
    return torch.full((geometry.num_frames, size, size, 3), GREY, dtype=torch.uint8)


def _marked(geometry: ClipGeometry, places: list[int], is_coarse: bool = False) -> Tensor:
    """A grey clip with noise in the tubelets of these tokens; one colour where a filter would level noise."""
    clip = _grey(geometry)
    _, rows, columns = geometry.token_grid
    patch, tubelet = geometry.patch_size, geometry.tubelet_size
    noise = torch.Generator().manual_seed(0)
    shape = (tubelet, patch, patch, 3)
    paint = torch.randint(0, 256, shape, dtype=torch.uint8, generator=noise)
    if is_coarse:
        paint[:] = torch.tensor(MAGENTA, dtype=torch.uint8)
    for place in places:
        step, row, column = place // (rows * columns), place // columns % rows, place % columns
        top, left, first = row * patch, column * patch, step * tubelet
        clip[first : first + tubelet, top : top + patch, left : left + patch] = paint
    return clip
