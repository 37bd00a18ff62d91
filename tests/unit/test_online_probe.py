"""The online probe sees what it should: the last steps before a validation, of each clip the view shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import EncoderConfig, PredictorConfig, TrainConfig
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import RandomMasks
from salt_vla.models.pixels import normalise_pixels
from salt_vla.targets import FrozenTargets, PixelTargets, TargetSpace, Task
from salt_vla.training.distributed import World
from salt_vla.training.flops import look_flops, mean_step_flops
from salt_vla.training.learner import Learner, build_learner
from salt_vla.training.online_probe import OnlineProbe, Truths, pooled, tokens_and_cells
from salt_vla.training.probe_plan import SHARE, Plan, ends, plan_probe
from salt_vla.training.step import train_step

GRID = ClipGeometry(num_frames=6, image_size=32, tubelet_size=2, patch_size=8)  # 3 × 4 × 4 tokens
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=1, drop_path=0.5),
    predictor=PredictorConfig(dim=16, depth=1, num_heads=2),
    steps=100,
    batch_size=8,
)
CONFIG = replace(CONFIG, runtime=replace(CONFIG.runtime, device="cpu", precision="float32"))
CLIPS, VIEWS, WORLD = 48, 2, World()
MASKS = RandomMasks(GRID, ratio=0.5)


def truths(clips: int = CLIPS, views: int = VIEWS) -> Truths:
    """Of clip n's view v: brightness 5 n + v; the class is whether it is among the darker half."""
    brightness = 5.0 * np.arange(clips)[:, None] + np.arange(views)
    return Truths(
        {f"c{number}": number for number in range(clips)},
        np.arange(clips) // 2,
        {"brightness": brightness[..., None].astype(np.float32)},
        {"label": (np.arange(clips) < clips // 2).astype(np.int64)},
    )


def batch_of(keys: list[tuple[str, int]], first_row: int = 0, whole: int = 0) -> Batch:
    """A grey film of the brightness that `truths` says."""
    grey = torch.tensor([5 * int(clip[1:]) + view for clip, view in keys]).byte()
    frames = grey.view(-1, 1, 1, 1, 1).expand(-1, GRID.num_frames, 32, 32, 3).contiguous()
    return Batch(keys, frames, None, MASKS.sample(len(keys)), first_row=first_row, global_size=whole)


def step_keys(step: int, size: int = 8) -> list[tuple[str, int]]:
    return [(f"c{(7 * (size * step + place)) % CLIPS}", step % VIEWS) for place in range(size)]


def learner_of() -> Learner:
    return build_learner(CONFIG, target_dim=8, device="cpu")


def probe_of(plan: Plan, config: TrainConfig = CONFIG) -> OnlineProbe:
    return OnlineProbe(truths(), truths(CLIPS, 1), plan, config)


def seen_places(probe: OnlineProbe, step: int) -> list[tuple[int, int]]:
    state = probe.state(step, WORLD)
    return [(row, view) for row, view in state["places"].tolist()] if state else []


def test_it_is_due_at_multiples_and_at_the_end_and_looks_at_the_steps_before() -> None:
    probe, learner = probe_of(Plan(every=10, clips=24, steps=17)), learner_of()
    assert [step for step in range(1, 18) if probe.is_due(step)] == [10, 17]
    assert probe.burst == 3
    looked = []
    for step in range(17):
        before = len(probe._window)
        last = probe._window[-1] if before else None
        probe.learn(learner, batch_of(step_keys(step)), step)
        looked += [step] if probe._window and probe._window[-1] is not last else []
    assert looked == [7, 8, 9, 14, 15, 16]
    assert learner.networks.training
    expected = [(int(clip[1:]), view) for step in (14, 15, 16) for clip, view in step_keys(step)]
    assert [tuple(place) for each in probe._of_burst(17) for place in each.places] == expected


def test_a_checkpoint_holds_clips_only_in_the_steps_before_a_validation() -> None:
    probe, learner = probe_of(Plan(every=10, clips=16, steps=100)), learner_of()
    sizes = {}
    for step in range(20):
        probe.learn(learner, batch_of(step_keys(step)), step)
        sizes[step + 1] = len(seen_places(probe, step + 1))
    assert {step for step, size in sizes.items() if size} == {9, 19}
    assert sizes[9] == 8


def test_restored_it_says_the_same_bits() -> None:
    learner, plan = learner_of(), Plan(every=10, clips=32, steps=100)
    whole, first = probe_of(plan), probe_of(plan)
    rows = []
    for step in range(6, 10):
        whole.learn(learner, batch_of(step_keys(step)), step)
        if step < 8:
            first.learn(learner, batch_of(step_keys(step)), step)
    second = probe_of(plan)
    second.restore(first.state(8, WORLD), WORLD)
    for step in (8, 9):
        second.learn(learner, batch_of(step_keys(step)), step)
    for probe in (whole, second):
        for start in (0, 24):
            probe.hold(learner, batch_of([(f"c{n}", 0) for n in range(start, start + 24)]))
        rows.append(probe.row(10, WORLD))
    assert rows[0] == rows[1] and rows[0]["fit_clips"] == 32 and rows[0]["clips"] == CLIPS
    second.restore({}, WORLD)
    assert not seen_places(second, 9)


@pytest.mark.parametrize("damage", ["another file", "a clip too many", "a view too many"])
def test_what_is_not_its_own_is_left_aside(damage: str) -> None:
    probe, learner = probe_of(Plan(every=10, clips=32, steps=100)), learner_of()
    probe.learn(learner, batch_of(step_keys(9)), 9)
    probe._window[0] = replace(probe._window[0], step=8)
    state = probe.state(9, WORLD)
    assert len(state["places"]) == 8
    if damage == "another file":
        state = {"position_mean": torch.zeros(3)}
    else:
        state["places"][0, int("view" in damage)] = CLIPS
    probe.restore(state, WORLD)
    assert not probe._window


def test_what_the_pixels_say_is_read_out_and_stands_beside_the_first_weights() -> None:
    """Brightness of the very view that was shown; of fresh weights, as every figure here."""
    probe, learner = probe_of(Plan(every=10, clips=64, steps=100)), learner_of()
    held = batch_of([(f"c{number}", 0) for number in range(CLIPS)])
    rows: list[dict[str, Any]] = []
    for due in (10, 20):
        for step in range(due - 8, due):
            probe.learn(learner, batch_of(step_keys(step)), step)
        probe.hold(learner, held)
        rows.append(probe.row(due, WORLD, rows[0] if rows else None))
    assert rows[0]["r2_brightness"] > 0.95 and rows[0]["accuracy_label"] > 0.9
    assert rows[0]["accuracy_label_constant"] == pytest.approx(0.5, abs=0.2)
    assert (rows[0]["fit_clips"], rows[0]["clips"], rows[0]["episodes"]) == (64, CLIPS, CLIPS // 2)
    assert 1 <= rows[0]["rankme"] <= rows[0]["clips"] and 1 <= rows[0]["rankme_centred"] <= CLIPS
    assert not any(name.endswith("_initial") for name in rows[0])
    assert rows[1]["r2_brightness_initial"] == rows[0]["r2_brightness"]
    assert rows[1]["accuracy_label_initial"] == rows[0]["accuracy_label"]
    assert "accuracy_label_constant_initial" not in rows[1]


def test_too_few_clips_say_nothing() -> None:
    probe, learner = probe_of(Plan(every=10, clips=32, steps=100)), learner_of()
    assert probe.row(10, WORLD) == {}
    probe.learn(learner, batch_of(step_keys(9)), 9)
    probe.hold(learner, batch_of([(f"c{number}", 0) for number in range(7)]))
    assert probe.row(10, WORLD) == {}


@torch.no_grad()
def test_features_are_means_of_the_first_and_last_time_step_by_hand() -> None:
    """As the encoder gives them when it is asked by itself, not learning, for these tokens."""
    probe, learner = probe_of(Plan(every=10, clips=8, steps=100)), learner_of()
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (8, 6, 32, 32, 3), generator=generator).byte()
    batch = replace(batch_of(step_keys(9)), frames=frames)
    probe.learn(learner, batch, 9)
    learner.train(False)
    ids = torch.cat([torch.arange(16), torch.arange(32, 48)])
    tokens = learner.encoder(normalise_pixels(frames), ids.expand(8, -1)).view(8, 2, 4, 4, -1)
    mean = tokens.mean((1, 2, 3))
    cells = [
        tokens[:, step, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2)) - mean
        for step in range(2)
        for row in range(2)
        for column in range(2)
    ]
    (step,) = probe._window
    torch.testing.assert_close(step.features, torch.cat([mean, *cells], dim=1), atol=1e-5, rtol=1e-5)


def test_a_grid_of_one_time_step_or_one_row_has_cells_too() -> None:
    image = ClipGeometry(num_frames=2, image_size=8, tubelet_size=2, patch_size=8)  # a single token
    ids, cells = tokens_and_cells(image)
    assert ids.tolist() == [[0]] and cells.shape == (1, 4)
    assert pooled(torch.ones(3, 1, 5), cells).isfinite().all()
    assert ends(GRID) == [0, 2] and ends(image) == [0]


def test_micro_batches_and_batches_larger_than_there_is_room_for_are_the_same_clips() -> None:
    parts = replace(CONFIG, grad_accum_steps=4)
    one, four = probe_of(Plan(10, 3, 100)), probe_of(Plan(10, 3, 100), parts)
    learner, batch = learner_of(), batch_of(step_keys(9))
    for probe in (one, four):
        probe.learn(learner, batch, 9)
    assert one._window[0].places.tolist() == four._window[0].places.tolist()
    assert len(one._window[0].places) == 3 and one.burst == 1
    torch.testing.assert_close(one._window[0].features, four._window[0].features, atol=1e-5, rtol=1e-5)


class InfiniteTargets(FrozenTargets):
    dim = 8
    needs_records = False

    def targets(self, frames: Tensor, records: Tensor | None) -> Tensor:
        return torch.full((len(frames), GRID.num_tokens, 8), torch.inf)


def test_clips_of_a_step_that_was_left_out_count_for_nothing() -> None:
    probe, learner, batch = probe_of(Plan(10, 16, 100)), learner_of(), batch_of(step_keys(8))
    space = TargetSpace("raw", torch.zeros(GRID.num_tokens, 8))
    bad = train_step(learner, batch, Task(InfiniteTargets(), space), CONFIG, 8, probe=probe)
    assert "bad" in bad and not probe._window
    good = Task(PixelTargets(GRID), TargetSpace("raw", torch.zeros(GRID.num_tokens, GRID.patch_dim)))
    wide = build_learner(CONFIG, target_dim=GRID.patch_dim, device="cpu")
    assert "bad" not in train_step(wide, batch, good, CONFIG, 8, probe=probe)
    assert [each.step for each in probe._window] == [8]


def together(work: Callable[[World], Any], size: int) -> list[Any]:
    """What `work` returns in each of that many threads, which stand for processes and talk by gloo."""
    store, answers = dist.HashStore(), [None] * size

    def run(rank: int) -> None:
        group = dist.ProcessGroupGloo(dist.PrefixStore("group", store), rank, size, timedelta(seconds=30))
        answers[rank] = work(World(rank, size, rank, size, store, group))

    threads = [Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("clips", [16, 3], ids=["all clips of a step", "some of them"])
def test_several_processes_say_together_what_one_says(clips: int) -> None:
    """Also where one has held-out clips and the other none, and where one has no clip of a step."""
    plan, held = Plan(every=2, clips=clips, steps=100), [(f"c{number}", 0) for number in range(17)]
    steps = range(10 - probe_of(plan).burst, 10)
    learners = [learner_of() for _ in range(4)]  # Made one by one: threads share a generator.

    def work(world: World) -> tuple[dict[str, Any], dict[str, Tensor]]:
        probe, learner = probe_of(replace(plan, every=10)), learners[world.rank]
        part = 8 // world.size
        for step in steps:
            keys = step_keys(step)[world.rank * part : (world.rank + 1) * part]
            probe.learn(learner, batch_of(keys, world.rank * part, 8), step)
        state = probe.state(9, world)
        again = probe_of(replace(plan, every=10))
        again.restore(state, world)
        rows = []
        for each in (probe, again):
            each.hold(learner, batch_of(held) if world.is_first else None)
            rows.append(each.row(10, world))
        assert rows[0] == rows[1]
        return rows[0], state

    (alone, alone_state), several = work(WORLD), together(work, 4)
    if clips == 3:
        assert alone == {} == several[0][0]  # Three clips are too few to say anything, for all alike.
        return
    assert alone and all(row == {} for row, _ in several[1:])
    row, state = several[0]
    assert row.keys() == alone.keys()
    figures = [{name: value for name, value in each.items() if name != "kind"} for each in (alone, row)]
    assert figures[1] == pytest.approx(figures[0], rel=1e-4, abs=1e-5)
    assert all(torch.equal(state[name], alone_state[name]) for name in ("places", "step"))
    torch.testing.assert_close(state["features"], alone_state["features"], atol=1e-5, rtol=1e-5)


def planned(steps: int, **runtime: int) -> Plan | None:
    config = replace(CONFIG, steps=steps, runtime=replace(CONFIG.runtime, **runtime))  # type: ignore[arg-type]
    return plan_probe(config, 64, mean_step_flops(config, 8, MASKS, draws=1).total)


def test_what_it_looks_at_costs_no_more_than_its_share_of_the_run() -> None:
    tokens = 32
    for steps in (300, 3000, 20_000, 200_000):
        plan = planned(steps, validate_every=50)
        if plan is None:
            assert steps == 300
            continue
        looks = sum(plan.is_due(step) for step in range(steps + 1)) * (plan.clips + 64)
        of_run = steps * CONFIG.batch_size * mean_step_flops(CONFIG, 8, MASKS, draws=1).total
        share = looks * look_flops(CONFIG, tokens) / of_run
        assert 0 < share <= SHARE
        assert plan.every % 50 == 0
        assert plan.clips == 1024 or plan.every >= steps  # Few looks before few clips.
    assert planned(200_000) is not None


def test_asked_for_it_looks_as_often_as_it_is_told() -> None:
    assert planned(20, probe_every=5, probe_clips=32) == Plan(5, 32, 20)
    assert planned(20) is None


@torch.no_grad()
def test_look_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    learner, ids = learner_of(), torch.arange(32).expand(1, -1)
    learner.train(False)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        learner.look(torch.zeros(1, GRID.num_tokens, GRID.patch_dim), ids)
    assert counter.get_total_flops() == look_flops(CONFIG, 32)
