"""What is said of predictions is its formula, whoever computes which part of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from threading import Thread

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import EncoderConfig, TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import BlockSpec, MaskGroup, MultiBlockMasks
from salt_vla.targets import PixelTargets, TargetSpace, Task
from salt_vla.training.distributed import World
from salt_vla.training.metrics import RANK_ROWS, Rank, Scores, Spread, effective_rank

GRID = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)  # 2 × 4 × 4 tokens
MASKS = MultiBlockMasks(GRID, [BlockSpec(2, 0.2), BlockSpec(1, 0.4)])
CONFIG = TrainConfig(encoder=EncoderConfig(name="vit_micro", geometry=GRID))
DIM = 6


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def batch_of(size: int, masks: list[MaskGroup] | None = None) -> Batch:
    frames = torch.zeros(size, 1, 1, 1, 3, dtype=torch.uint8)
    return Batch([("clip", n) for n in range(size)], frames, None, masks or MASKS.sample(size, seed=1))


def task_of(mode: str = "normalised") -> Task:
    return Task(PixelTargets(GRID), TargetSpace(mode, random(GRID.num_tokens, DIM, seed=3)))  # type: ignore[arg-type]


def score(scores: Scores, batch: Batch, task: Task | None = None) -> None:
    """In a world in which all depends on the clip's number in the global batch alone."""
    everything = random(16, GRID.num_tokens, DIM, seed=5)[: batch.global_size] * 2 + 1
    guesses = random(16, GRID.num_tokens, DIM, seed=6)[: batch.global_size]
    mine = slice(batch.first_row, batch.first_row + len(batch.keys))
    predicted = [guesses[mine, : group.target_ids.shape[1]] for group in batch.masks]
    contexts = [guesses[mine, : group.context_ids.shape[1], :4] for group in batch.masks]
    scores.add(predicted, contexts, everything[mine], batch, task or task_of(), CONFIG)


def scored(batch: Batch, task: Task | None = None) -> dict[str, float]:
    scores = Scores()
    score(scores, batch, task)
    return scores.as_row()


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_equal_singular_values_count_as_that_many(rank: int) -> None:
    directions, _ = torch.linalg.qr(random(20, rank))
    basis, _ = torch.linalg.qr(random(8, rank))
    assert effective_rank(7 * directions @ basis.T).item() == pytest.approx(rank, abs=1e-4)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_effective_rank_is_its_formula_from_a_singular_value_decomposition(shape: tuple[int, int]) -> None:
    table = random(*shape) * torch.logspace(0, -3, shape[1])
    singular = np.linalg.svd(table.double().numpy(), compute_uv=False)
    share = singular / singular.sum()
    assert effective_rank(table).item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_effective_rank_sees_no_rounding_as_rank() -> None:
    """Of one direction in 500: the square roots of float32's rounding would add several ranks."""
    assert effective_rank(random(500, 1) @ random(1, 500, seed=1)).item() == pytest.approx(1, abs=1e-3)


def test_effective_rank_of_nothing_or_of_what_is_not_finite_is_not_a_number() -> None:
    assert math.isnan(effective_rank(torch.zeros(4, 3)).item())
    for bad in (math.nan, math.inf):
        assert math.isnan(effective_rank(random(4, 3).index_fill(0, torch.tensor([1]), bad)).item())


def test_rows_of_zeros_change_no_rank() -> None:
    table = random(9, 5)
    padded = torch.cat([table, torch.zeros(30, 5)])
    assert effective_rank(padded).item() == pytest.approx(effective_rank(table).item())


def test_spread_by_hand() -> None:
    """Channels {0, 2, 4, 6} and {5, 5, 5, 5} deviate by √5 and 0."""
    spread = Spread()
    spread.add(torch.tensor([[[0.0, 5.0], [2.0, 5.0], [4.0, 5.0]]]))
    spread.add(torch.tensor([[[6.0, 5.0]]]))
    assert spread.value().item() == pytest.approx(math.sqrt(5) / 2)


def test_spread_survives_a_large_mean() -> None:
    tokens = random(4, 1000, 2) + 10_000
    spread = Spread()
    for part in tokens.split(1):
        spread.add(part)
    assert spread.value().item() == pytest.approx(
        tokens.double().flatten(0, 1).std(dim=0).mean().item(), rel=1e-3
    )


def test_deviations_are_of_what_the_loss_compares() -> None:
    """Centred, what is the same in every clip is no spread."""
    batch = batch_of(8)
    plain, centred = scored(batch), scored(batch, task_of("centred"))
    everything = random(16, GRID.num_tokens, DIM, seed=5)[:8] * 2 + 1
    mean = task_of().space.position_mean
    pieces: dict[str, list[Tensor]] = {"plain": [], "centred": []}
    for group in batch.masks:
        for clip, ids in enumerate(group.target_ids):
            pieces["plain"].append(everything[clip, ids])
            pieces["centred"].append(everything[clip, ids] - mean[ids])
    for row, name in ((plain, "plain"), (centred, "centred")):
        expected = torch.cat(pieces[name]).double().std(dim=0, correction=0).mean().item()
        assert row["target_std"] == pytest.approx(expected, rel=1e-5)
    assert plain["prediction_std"] == centred["prediction_std"] == pytest.approx(1, abs=0.1)


def test_collapsed_predictions_have_neither_spread_nor_rank() -> None:
    batch, scores = batch_of(8), Scores()
    same = [random(DIM).expand(*group.target_ids.shape, DIM) for group in batch.masks]
    contexts = [random(8, group.context_ids.shape[1], DIM) for group in batch.masks]
    scores.add(same, contexts, random(8, GRID.num_tokens, DIM), batch, task_of(), CONFIG)
    row = scores.as_row()
    assert row["prediction_std"] == pytest.approx(0, abs=1e-6) and row["target_std"] > 0.5
    assert row["prediction_rank"] == pytest.approx(1, abs=1e-4)
    assert row["encoder_rank"] > 5


def test_a_row_of_predictions_that_are_not_finite_can_be_written() -> None:
    batch, scores = batch_of(2), Scores()
    broken = [torch.full((*group.target_ids.shape, DIM), math.nan) for group in batch.masks]
    contexts = [random(2, group.context_ids.shape[1], DIM) for group in batch.masks]
    scores.add(broken, contexts, random(2, GRID.num_tokens, DIM), batch, task_of(), CONFIG)
    row = scores.as_row()
    assert all(math.isnan(row[name]) for name in ("r2_position_mean", "prediction_std", "prediction_rank"))
    assert math.isfinite(row["target_std"]) and math.isfinite(row["encoder_rank"])


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_say_what_the_whole_says(parts: int) -> None:
    """The effective ranks too: the tokens they are taken of go by the clip's number in the global batch."""
    batch, scores = batch_of(8), Scores()
    for part in batch.micro_batches(parts):
        score(scores, part)
    assert scores.as_row() == pytest.approx(scored(batch), rel=1e-6, abs=1e-6)


def test_rank_takes_bounded_work_from_any_batch() -> None:
    """A few tokens of each of few clips; one of every so many of many clips, at places that differ."""
    for size, tokens, global_size in ((8, 400, 8), (100, 3, 1000), (3, 2, 3)):
        rank, batch = Rank(), replace(batch_of(3), keys=[("clip", 0)] * size, global_size=global_size)
        values = torch.arange(size * tokens, dtype=torch.float32).view(size, tokens, 1) + 1
        rank.add(values, batch)
        table = rank.table().flatten().long() - 1
        assert len(table) == len(set(table.tolist())) <= RANK_ROWS
        assert len(set((table % tokens).tolist())) > 1
    rank.rows = [torch.ones(400, 1)] * 5
    assert len(rank.table()) == RANK_ROWS


@pytest.mark.parametrize(("size", "first"), [(1000, 0), (600, 400)])
def test_a_parts_clips_are_those_that_the_whole_batch_would_take(size: int, first: int) -> None:
    numbers = torch.arange(1000, dtype=torch.float32).view(1000, 1, 1)
    whole, part = Rank(), Rank()
    of_all = replace(batch_of(1), keys=[("clip", 0)] * 1000, global_size=1000)
    whole.add(numbers, of_all)
    of_part = replace(of_all, keys=[("clip", 0)] * size, first_row=first)
    part.add(numbers[first : first + size], of_part)
    expected = [n for n in whole.table().flatten().tolist() if n >= first]
    assert part.table().flatten().tolist() == expected and len(expected) > 100


def test_rank_is_about_the_mean_of_the_tokens() -> None:
    """Three directions far from the origin: seen from there, they are nearly one."""
    directions, _ = torch.linalg.qr(random(64, 3) - random(64, 3).mean(dim=0))
    tokens = (directions @ torch.linalg.qr(random(8, 3, seed=1))[0].T + 100).view(4, 16, 8)
    rank = Rank()
    rank.add(tokens, batch_of(4))
    assert rank.value().item() == pytest.approx(3, abs=0.05)
    assert effective_rank(tokens.flatten(0, 1)).item() < 1.1


def test_padding_is_no_part_of_the_encoders_rank() -> None:
    batch = batch_of(4)
    contexts = random(4, 10, 5)
    valid = torch.arange(12) < torch.tensor([10, 10, 10, 10]).unsqueeze(1)
    plain, padded = Rank(), Rank()
    plain.add(contexts, batch)
    padded.add(torch.cat([contexts, 99 * random(4, 2, 5, seed=8)], dim=1), batch, valid)
    assert padded.value().item() == pytest.approx(plain.value().item(), rel=1e-6)


def in_two(work: Callable[[World], None]) -> None:
    """Two processes that are threads here, and really talk by gloo."""
    store, failures = dist.HashStore(), []

    def run(rank: int) -> None:
        try:
            group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=30))
            work(World(rank, 2, group=group))
        except BaseException as error:  # noqa: BLE001 - handed to the test's own thread.
            failures.append(error)

    threads = [Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_two_processes_say_together_what_one_says() -> None:
    batch, rows = batch_of(8), {}
    halves = list(batch.micro_batches(2))

    def work(world: World) -> None:
        scores = Scores()
        score(scores, halves[world.rank])
        rows[world.rank] = scores.shared(world).as_row()

    in_two(work)
    assert rows[0] == rows[1] == pytest.approx(scored(batch), rel=1e-6, abs=1e-6)


def test_alone_nothing_is_shared() -> None:
    scores = Scores()
    assert scores.shared(World()) is scores
