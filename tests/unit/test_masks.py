"""Masks are pure, sorted, disjoint and exact, and their statistics are those of the algorithms they name."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_vla.config import VJEPA_BLOCKS, BlockSpec, MaskConfig
from salt_vla.errors import ConfigError
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import (
    MaskGroup,
    MaskStrategy,
    MultiBlockMasks,
    RandomMasks,
    TopUpBlockMasks,
    TubeMasks,
    build_masks,
)
from salt_vla.recipes import all_recipes

FULL = ClipGeometry()
DEMO = ClipGeometry(num_frames=8, image_size=96)
STRATEGIES = ("multiblock", "random", "tube", "topup_block")
TRUNCATIONS = ("end", "random", "pad", "even")
ODD = ClipGeometry(num_frames=6, image_size=40, tubelet_size=2, patch_size=8)
ODD_BLOCKS = (BlockSpec(3, 0.4, 0.5), BlockSpec(2, 0.75), BlockSpec(5, 0.1, 0.7, (0.5, 2.0)))

geometries = st.builds(
    lambda steps, tubelet, side, patch: ClipGeometry(steps * tubelet, side * patch, tubelet, patch),
    steps=st.integers(1, 6),
    tubelet=st.integers(1, 2),
    side=st.integers(3, 8),
    patch=st.sampled_from([1, 16]),
)
block_specs = st.builds(
    BlockSpec,
    num_blocks=st.integers(1, 4),
    spatial_scale=st.floats(0.02, 0.5),
    temporal_scale=st.floats(0.1, 1.0),
    aspect_ratio=st.sampled_from([(0.75, 1.5), (1.0, 1.0), (0.5, 2.0)]),
)
mask_configs = st.builds(
    MaskConfig,
    strategy=st.sampled_from(STRATEGIES),
    blocks=st.lists(block_specs, min_size=1, max_size=3).map(tuple),
    ratio=st.floats(0.2, 0.8),
    truncate=st.sampled_from(TRUNCATIONS),
    max_targets=st.integers(0, 12),
)


def bit_masks(ids: torch.Tensor, geometry: ClipGeometry) -> np.ndarray:
    """(batch, time, rows, columns), True where a token's id is listed."""
    bits = torch.zeros(len(ids), geometry.num_tokens, dtype=torch.bool).scatter_(1, ids, True)
    return bits.reshape(-1, *geometry.token_grid).numpy()


def real(group: MaskGroup) -> list[list[int]]:
    """Each clip's context without its padding."""
    if group.context_valid is None:
        return group.context_ids.tolist()
    rows = zip(group.context_ids, group.context_valid, strict=True)
    return [ids[valid].tolist() for ids, valid in rows]


def assert_same(first: list[MaskGroup], second: list[MaskGroup]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.context_ids, b.context_ids)
        assert torch.equal(a.target_ids, b.target_ids)


def digest(strategy: MaskStrategy, draws: list[tuple[int, int, int]] = [(3, 11, 5)]) -> str:  # noqa: B006
    """Of all ids and their shapes, over (seed, step, batch size)."""
    told = hashlib.sha256()
    for seed, step, batch in draws:
        for group in strategy.sample(batch, seed=seed, step=step):
            for ids in (group.context_ids, group.target_ids):
                told.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())
    return told.hexdigest()[:16]


@pytest.mark.parametrize(
    ("expected", "geometry", "config"),
    [
        ("cceb7278ba13e74b", FULL, MaskConfig()),
        ("078741f7ab2dc228", FULL, MaskConfig(truncate="random")),
        ("1a9c20600b8b8c50", DEMO, MaskConfig(max_targets=20)),
        ("e99406d6ea4dfda9", ODD, MaskConfig(blocks=ODD_BLOCKS)),
        ("f605717ae89443c8", ODD, MaskConfig(blocks=ODD_BLOCKS, truncate="random", max_targets=9)),
        ("0fb250c0ec07249b", FULL, MaskConfig(strategy="random", ratio=0.9)),
        ("9300f807b380715d", FULL, MaskConfig(strategy="tube", max_targets=100)),
        ("b0d310fb664b4bbb", FULL, MaskConfig(strategy="topup_block")),
    ],
)
def test_masks_of_a_seed_and_step_are_what_they_were(expected, geometry, config):
    """A run that was begun under an earlier version goes on with the masks it would have had. The second of
    the odd blocks often masks a whole clip, which is then drawn again."""
    draws = [(0, 0, 1), (3, 11, 5), (2**40, 10**6, 24), (1, 2, 7), (5, 5, 64)]
    assert digest(build_masks(config, geometry), draws) == expected


@settings(max_examples=200, deadline=None)
@given(geometry=geometries, config=mask_configs, batch=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_ids_are_int64_sorted_disjoint_and_inside_the_grid(geometry, config, batch, seed):
    groups = build_masks(config, geometry).sample(batch, seed=seed, step=7)
    assert len(groups) == config.num_groups
    for group in groups:
        for ids in (group.context_ids, group.target_ids):
            assert ids.dtype == torch.int64
            assert ids.shape[0] == batch and ids.shape[1] >= 1
            assert int(ids.min()) >= 0 and int(ids.max()) < geometry.num_tokens
        for ids in (*real(group), *group.target_ids.tolist()):
            assert ids and ids == sorted(set(ids))
        context, target = bit_masks(group.context_ids, geometry), bit_masks(group.target_ids, geometry)
        assert not (context & target).any()
        if config.max_targets:
            assert group.target_ids.shape[1] <= config.max_targets


@settings(max_examples=100, deadline=None)
@given(geometry=geometries, config=mask_configs, batch=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_padding_stands_at_the_end_repeats_a_seen_token_and_exists_only_where_asked_for(
    geometry, config, batch, seed
):
    for group in build_masks(config, geometry).sample(batch, seed=seed):
        if group.context_valid is None:
            assert group.context_sizes is None
            continue
        assert config.truncate == "pad" and config.strategy == "multiblock"
        sizes = group.context_valid.sum(dim=1)
        assert group.context_sizes == tuple(sizes.tolist())
        assert int(sizes.max()) == group.context_ids.shape[1] > int(sizes.min())
        for ids, valid, size in zip(group.context_ids, group.context_valid, sizes, strict=True):
            assert valid[:size].all() and not valid[size:].any()
            assert (ids[size:] == ids[size - 1]).all()


@settings(max_examples=100, deadline=None)
@given(geometry=geometries, config=mask_configs, batch=st.integers(1, 6), seed=st.integers(0, 2**40))
def test_what_is_seen_and_predicted_was_drawn_as_such(geometry, config, batch, seed):
    """Context within what the union of blocks leaves, targets within the union; `pad` sees all of it, and no
    policy drops from a clip more than brings it to the size of the smallest."""
    for masked, group in build_masks(config, geometry).split(batch, seed):
        contexts = [np.flatnonzero(~row) for row in masked]
        for seen, predicted, drawn, row in zip(
            real(group), group.target_ids.tolist(), contexts, masked, strict=True
        ):
            assert set(seen) <= set(drawn) and row[predicted].all()
            smallest = min(len(ids) for ids in contexts)
            assert len(seen) == (len(drawn) if config.truncate == "pad" else smallest)
        fewest = int(masked.sum(axis=1).min())
        assert group.target_ids.shape[1] == min(fewest, config.max_targets or fewest)


@settings(max_examples=60, deadline=None)
@given(
    geometry=geometries, config=mask_configs, batch=st.integers(2, 8), cut=st.integers(1, 7), data=st.data()
)
def test_any_part_of_a_batch_is_the_same_rows_of_it(geometry, config, batch, cut, data):
    """A part is as wide as its own longest context, and no wider; what is real in it is the same."""
    cut = min(cut, batch - 1)
    some = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
    for group in build_masks(config, geometry).sample(batch, step=2):
        whole, parts = real(group), [group.rows(0, cut), group.rows(cut, batch)]
        assert [row for part in parts for row in real(part)] == whole
        assert real(group.at(some)) == [whole[place] for place in some]
        assert torch.equal(torch.cat([part.target_ids for part in parts]), group.target_ids)
        for part in (*parts, group.at(some)):
            assert part.context_ids.shape[1] == max(len(row) for row in real(part))
            sizes = tuple(len(row) for row in real(part))
            assert (part.context_valid is None) == (len(set(sizes)) == 1)
            assert part.context_valid is None or part.context_sizes == sizes


@settings(max_examples=60, deadline=None)
@given(geometry=geometries, ratio=st.floats(0.2, 0.8), batch=st.integers(1, 4), step=st.integers(0, 10**9))
def test_ratio_strategies_mask_an_exact_share_of_every_clip(geometry, ratio, batch, step):
    places = round(geometry.tokens_per_step * ratio)
    expected = {
        RandomMasks: round(geometry.num_tokens * ratio),
        TopUpBlockMasks: round(geometry.num_tokens * ratio),
        TubeMasks: places * geometry.token_grid[0],
    }
    for kind, masked in expected.items():
        (group,) = kind(geometry, ratio).sample(batch, step=step)
        assert group.target_ids.shape == (batch, masked)
        assert group.context_ids.shape == (batch, geometry.num_tokens - masked)


@settings(max_examples=60, deadline=None)
@given(
    geometry=geometries,
    blocks=st.lists(block_specs, min_size=1, max_size=2),
    truncate=st.sampled_from(TRUNCATIONS),
    step=st.integers(0, 10**9),
)
def test_one_clip_is_split_without_loss(geometry, blocks, truncate, step):
    """With nothing to be cut to, context and target of every group are the whole clip."""
    for group in MultiBlockMasks(geometry, blocks, truncate).sample(1, step=step):
        assert group.context_valid is None
        assert group.context_ids.shape[1] + group.target_ids.shape[1] == geometry.num_tokens


@pytest.mark.parametrize(
    "config",
    [
        *(MaskConfig(strategy=name) for name in STRATEGIES),
        *(MaskConfig(truncate=policy) for policy in TRUNCATIONS[1:]),
    ],
    ids=lambda config: f"{config.strategy}-{config.truncate}",
)
def test_masks_depend_on_seed_and_step_and_on_nothing_else(config):
    sampler = build_masks(config, FULL)
    first = sampler.sample(4, seed=1, step=2)
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state()
    sampler.sample(9, seed=8, step=0)
    assert_same(first, sampler.sample(4, seed=1, step=2))
    assert_same(first, build_masks(config, FULL).sample(4, seed=1, step=2))
    assert torch.equal(state, torch.get_rng_state())
    for seed, step in ((1, 3), (2, 2), (2, 1)):
        (other, *_), (ours, *_) = sampler.sample(4, seed=seed, step=step), first
        same_shape = other.target_ids.shape == ours.target_ids.shape
        assert not (same_shape and torch.equal(other.target_ids, ours.target_ids))
    clips = first[0].target_ids
    assert not torch.equal(clips[0], clips[1])


def test_another_process_draws_the_same_masks():
    configs = [MaskConfig(strategy=name) for name in STRATEGIES]
    configs += [MaskConfig(truncate=policy) for policy in ("random", "pad", "even")]
    code = (
        "from salt_vla.config import BlockSpec, MaskConfig\n"
        "from salt_vla.geometry import ClipGeometry\n"
        "from salt_vla.masks import build_masks\n"
        "import hashlib\n"
        f"for config in {configs!r}:\n"
        "    told = hashlib.sha256()\n"
        "    for group in build_masks(config, ClipGeometry()).sample(5, seed=3, step=11):\n"
        "        for ids in (group.context_ids, group.target_ids):\n"
        "            told.update(str(tuple(ids.shape)).encode() + ids.numpy().tobytes())\n"
        "    print(told.hexdigest()[:16])\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [digest(build_masks(config, FULL)) for config in configs]


def test_rows_and_devices_carry_the_padding_along():
    ids = torch.arange(12).reshape(3, 4)
    valid = torch.tensor([[True] * 4, [True] * 2 + [False] * 2, [True] * 3 + [False]])
    part = MaskGroup(ids, ids + 12, valid).rows(1, 3).to("cpu")
    assert part.context_valid is not None and torch.equal(part.context_valid, valid[1:])
    assert torch.equal(part.context_ids, ids[1:]) and torch.equal(part.target_ids, ids[1:] + 12)
    trimmed = MaskGroup(ids, ids + 12, valid, (4, 2, 3)).rows(1, 3).to("cpu")
    assert trimmed.context_valid is not None and torch.equal(trimmed.context_valid, valid[1:, :3])
    assert trimmed.context_sizes == (2, 3) and torch.equal(trimmed.context_ids, ids[1:, :3])
    alone = MaskGroup(ids, ids + 12, valid, (4, 2, 3)).at([1])
    assert alone.context_valid is None and torch.equal(alone.context_ids, ids[1:2, :2])


@pytest.mark.parametrize("strategy", ["random", "tube", "topup_block"])
def test_a_clips_exact_mask_does_not_depend_on_the_clips_after_it(strategy):
    sampler = build_masks(MaskConfig(strategy=strategy), FULL)
    assert_same(sampler.sample(3, seed=4), [group.rows(0, 3) for group in sampler.sample(9, seed=4)])


def test_truncating_the_end_keeps_each_clips_first_tokens():
    sampler = MultiBlockMasks(FULL, VJEPA_BLOCKS, truncate="end")
    dropped = 0
    for step in range(5):
        for one, many in zip(sampler.sample(1, step=step), sampler.sample(24, step=step), strict=True):
            for alone, cut in ((one.context_ids, many.context_ids), (one.target_ids, many.target_ids)):
                assert torch.equal(alone[0, : cut.shape[1]], cut[0])
                dropped += alone.shape[1] - cut.shape[1]
    assert dropped > 0


def test_truncating_at_random_keeps_the_last_time_steps():
    """Cutting the end starves the last time steps of context; a random cut treats all steps alike."""
    share = {}
    for policy in ("end", "random"):
        sampler = MultiBlockMasks(FULL, VJEPA_BLOCKS, truncate=policy)
        seen = np.zeros(8)
        for step in range(20):
            for group in sampler.sample(24, step=step):
                seen += bit_masks(group.context_ids, FULL).sum(axis=(0, 2, 3))
        share[policy] = seen / seen.sum()
    assert share["end"][-1] < 0.05
    assert np.abs(share["random"] - 1 / 8).max() < 0.01


def test_one_block_is_one_box_of_the_reference_size_at_all_time_steps():
    """k = ⌊14·14·0.15⌋ = 29; the height is round(√(29·a)), the width round(√(29/a)), one size a batch."""
    sizes, places = set(), set()
    for step in range(200):
        (group,) = MultiBlockMasks(FULL, [BlockSpec(num_blocks=1, spatial_scale=0.15)]).sample(4, step=step)
        in_batch = set()
        for clip in bit_masks(group.target_ids, FULL):
            assert (clip == clip[0]).all()
            rows, columns = np.flatnonzero(clip[0].any(axis=1)), np.flatnonzero(clip[0].any(axis=0))
            height, width = int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1
            assert clip[0].sum() == height * width
            in_batch.add((height, width))
            places.add((int(rows[0]), int(columns[0])))
        assert len(in_batch) == 1
        sizes |= in_batch
    aspects = np.linspace(0.75, 1.5, 10_001)
    allowed = {(round((29 * a) ** 0.5), round((29 / a) ** 0.5)) for a in aspects}
    assert sizes == allowed
    assert {row for row, _ in places} >= {0, 14 - 5} and {column for _, column in places} >= {0, 14 - 5}


def test_a_shorter_temporal_scale_makes_shorter_blocks():
    spec = BlockSpec(num_blocks=1, spatial_scale=0.3, temporal_scale=0.5)
    first_steps = set()
    for step in range(40):
        (group,) = MultiBlockMasks(FULL, [spec]).sample(2, step=step)
        for clip in bit_masks(group.target_ids, FULL):
            steps = np.flatnonzero(clip.any(axis=(1, 2)))
            assert len(steps) == 4 and np.ptp(steps) == 3
            first_steps.add(int(steps[0]))
    assert first_steps == {0, 1, 2, 3, 4}


def test_padding_keeps_the_contexts_that_the_reference_cuts():
    """The same draws: what `end` shows of a clip are the first tokens of what `pad` shows; only the targets'
    cut differs, and is spread over time."""
    seen = np.zeros(8)
    for step in range(10):
        ends = MultiBlockMasks(FULL, VJEPA_BLOCKS).sample(24, step=step)
        pads = MultiBlockMasks(FULL, VJEPA_BLOCKS, "pad").sample(24, step=step)
        for end, pad in zip(ends, pads, strict=True):
            for cut, whole in zip(end.context_ids.tolist(), real(pad), strict=True):
                assert whole[: len(cut)] == cut
            assert pad.target_ids.shape == end.target_ids.shape
            seen += bit_masks(pad.target_ids, FULL).sum(axis=(0, 2, 3))
    assert np.abs(seen / seen.sum() - 1 / 8).max() < 0.01


def test_even_contexts_are_of_nearly_one_size_and_lose_nearly_nothing():
    """A few tokens are trimmed where the reference drops a third and more; over batches sizes are what they
    are over the reference's clips; who is first in the batch has no other masks than who is last."""
    even, reference = (MultiBlockMasks(FULL, VJEPA_BLOCKS, policy) for policy in ("even", "end"))
    sizes, of_reference, lost = np.zeros((250, 2, 24)), np.zeros((250, 2, 24)), np.zeros((250, 2))
    for step in range(250):
        for number, (masked, group) in enumerate(even.split(24, 1, step)):
            sizes[step, number] = (~masked).sum(axis=1)
            assert group.context_valid is None and group.context_ids.shape[1] == sizes[step, number].min()
            lost[step, number] = 1 - sizes[step, number].min() / sizes[step, number].mean()
        for number, (masked, _) in enumerate(reference.split(24, 1, step)):
            of_reference[step, number] = (~masked).sum(axis=1)
    assert lost.mean() < 0.06
    assert sizes.mean(axis=(0, 2)) == pytest.approx(of_reference.mean(axis=(0, 2)), rel=0.06)
    assert sizes.std(axis=(0, 2)) == pytest.approx(of_reference.std(axis=(0, 2)), rel=0.15)
    assert sizes.std(axis=2).mean() < 0.1 * of_reference.std(axis=2).mean()
    assert sizes[..., :12].mean(axis=(0, 2)) == pytest.approx(sizes[..., 12:].mean(axis=(0, 2)), rel=0.01)


@given(ratio=st.floats(0.1, 0.9), step=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_tubes_span_all_time(ratio, step):
    (group,) = TubeMasks(FULL, ratio).sample(3, step=step)
    bits = bit_masks(group.target_ids, FULL)
    assert (bits == bits[:, :1]).all()


def test_topup_blocks_have_the_earlier_attempts_figures():
    """Blocks alone cover about 19 %; topped up to 75 %, about 85 % of the masked tokens show their place at
    another time step: the two numbers that are known of the masks which the earlier attempt trained with."""
    rng = np.random.default_rng(0)
    covered = [TopUpBlockMasks(FULL).blocks_alone(1, rng).mean() for _ in range(500)]
    assert float(np.mean(covered)) == pytest.approx(0.19, abs=0.01)
    (group,) = TopUpBlockMasks(FULL, ratio=0.75).sample(500)
    masked = bit_masks(group.target_ids, FULL)
    visible_elsewhen = masked & ~masked.all(axis=1, keepdims=True)
    assert masked.mean() == 0.75
    assert visible_elsewhen.sum() / masked.sum() == pytest.approx(0.85, abs=0.01)


def test_random_masks_are_uniform_over_the_grid():
    (group,) = RandomMasks(DEMO, 0.75).sample(4000)
    assert np.abs(bit_masks(group.target_ids, DEMO).mean(axis=0) - 0.75).max() < 0.04


@pytest.mark.parametrize("truncate", TRUNCATIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_capping_targets_never_changes_what_the_encoder_sees(strategy, truncate):
    config = MaskConfig(strategy=strategy, truncate=truncate)
    capped = MaskConfig(strategy=strategy, truncate=truncate, max_targets=48)
    whole = build_masks(config, DEMO).sample(6, seed=2)
    few = build_masks(capped, DEMO).sample(6, seed=2)
    for a, b in zip(whole, few, strict=True):
        assert torch.equal(a.context_ids, b.context_ids) and a.context_sizes == b.context_sizes
        assert b.target_ids.shape == (6, min(48, a.target_ids.shape[1]))
        for kept, all_targets in zip(b.target_ids.tolist(), a.target_ids.tolist(), strict=True):
            assert set(kept) <= set(all_targets)


def test_capped_targets_are_spread_over_time():
    (group,) = RandomMasks(DEMO, 0.75, max_targets=20).sample(2000)
    steps = bit_masks(group.target_ids, DEMO).sum(axis=(0, 2, 3))
    assert np.abs(steps / steps.sum() - 1 / 4).max() < 0.02


def test_masks_that_cannot_be_drawn_are_refused():
    everything = BlockSpec(num_blocks=1, spatial_scale=1.0, aspect_ratio=(1.0, 1.0))
    with pytest.raises(ConfigError, match="leaves no context; use fewer or smaller blocks"):
        MultiBlockMasks(FULL, [everything]).sample(2)
    with pytest.raises(ConfigError, match="at least one BlockSpec"):
        MultiBlockMasks(FULL, [])
    for kind, ratio in itertools.product((RandomMasks, TubeMasks, TopUpBlockMasks), (0.0001, 0.9999)):
        with pytest.raises(ConfigError, match="leaves no context or no target"):
            kind(FULL, ratio)
    for sampler in (MultiBlockMasks(FULL, VJEPA_BLOCKS), RandomMasks(FULL)):
        with pytest.raises(ConfigError, match="at least one clip, not 0"):
            sampler.sample(0)


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_every_recipes_masks_can_be_drawn(name):
    config = all_recipes()[name].config
    groups = build_masks(config.masks, config.geometry).sample(config.batch_size // 32 + 2, seed=config.seed)
    assert len(groups) == config.masks.num_groups
