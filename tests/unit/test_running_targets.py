"""Targets and statistics that change with a run: by their formulas, once a step, and back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.config import EncoderConfig, ObjectiveConfig, OptimizerConfig, PredictorConfig, TrainConfig
from salt_vla.errors import RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import BlockSpec, MultiBlockMasks
from salt_vla.models import VideoEncoder, build_encoder
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives import normalise
from salt_vla.targets import (
    EmaTargets,
    FrozenTargets,
    PixelTargets,
    RunningSpace,
    TargetSpace,
    Task,
    has_running_statistics,
)
from salt_vla.training.learner import Learner, build_learner
from salt_vla.training.step import train_step, validate

GRID = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)  # 2 × 4 × 4 tokens
MASKS = MultiBlockMasks(GRID, [BlockSpec(2, 0.2), BlockSpec(1, 0.4)])
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=1),
    predictor=PredictorConfig(dim=16, depth=1, num_heads=2),
    objective=ObjectiveConfig(targets="centred", statistics="running"),
    optimizer=OptimizerConfig(lr_start=1e-3, lr=1e-3, warmup_steps=0, grad_clip=1.0),
    steps=20,
    batch_size=32,
)
CONFIG = replace(CONFIG, runtime=replace(CONFIG.runtime, device="cpu", precision="float32", threads=1))
SHAPE = (GRID.num_tokens, GRID.patch_dim)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As a run has it: the order of sums is part of the bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch_of(step: int = 0, size: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(step)
    frames = torch.randint(0, 256, (size, 4, 32, 32, 3), generator=generator).byte()
    return Batch([("clip", n) for n in range(size)], frames, None, MASKS.sample(size, seed=0, step=step))


def running(mode: str = "centred", momentum: float = 0.9) -> RunningSpace:
    return RunningSpace(mode, SHAPE, momentum, "cpu")  # type: ignore[arg-type]


def pixel_task() -> Task:
    return Task(PixelTargets(GRID), running())


def ema_task(config: TrainConfig = CONFIG, momentum: tuple[float, float] = (0.9, 1.0)) -> Task:
    provider = EmaTargets(config.encoder, momentum, config.steps, "cpu")
    return Task(provider, RunningSpace("normalised", (GRID.num_tokens, provider.dim), 0.9, "cpu"))


def learner_of(task: Task, config: TrainConfig = CONFIG) -> Learner:
    learner = build_learner(config, task.provider.dim, "cpu")
    task.begin(learner.encoder)
    return learner


def parameters(encoder: VideoEncoder) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in encoder.parameters()]


def same(encoder: VideoEncoder, tensors: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(encoder.parameters(), tensors, strict=True))


# Statistics


def test_before_anything_is_seen_centring_changes_nothing() -> None:
    space, scored, ids = running(), torch.randn(3, *SHAPE), torch.tensor([[0, 5], [1, 2], [3, 4]])
    assert not space.position_mean.any() and space.position_mean.shape == SHAPE
    assert torch.equal(space.trained(scored, ids), running("normalised").trained(scored, ids))


def test_after_one_step_the_mean_is_that_batchs() -> None:
    """Without correction it would be (1 − momentum) of it."""
    space, scored = running(momentum=0.99), torch.randn(6, *SHAPE) + 3
    space.gather(scored)
    assert not space.position_mean.any()  # All parts of a step see the same statistics.
    space.after_step(lambda value: value)
    torch.testing.assert_close(space.position_mean, scored.mean(dim=0))


def test_running_mean_is_its_formula_over_many_steps() -> None:
    """Batch number i of n weighs m^(n − i) ÷ Σ m^k: as 0.81, 0.9 and 1."""
    space, means = running(momentum=0.9), []
    for size in (4, 2, 8):
        scored = torch.randn(size, *SHAPE) + size
        means.append(scored.double().mean(dim=0))
        space.gather(scored)
        space.after_step(lambda value: value)
    expected = (0.81 * means[0] + 0.9 * means[1] + means[2]) / 2.71
    torch.testing.assert_close(space.position_mean, expected.float())
    torch.testing.assert_close(space.channel_mean, expected.float().mean(dim=0))


def test_momentum_zero_keeps_the_last_batch_alone() -> None:
    space = running(momentum=0.0)
    for _ in range(3):
        scored = torch.randn(2, *SHAPE)
        space.gather(scored)
        space.after_step(lambda value: value)
    torch.testing.assert_close(space.position_mean, scored.mean(dim=0))


def test_processes_learn_the_mean_of_all_their_clips() -> None:
    """Of 3 clips here and 5 there, what each adds up is the sum of both."""
    ours, theirs = torch.randn(3, *SHAPE), torch.randn(5, *SHAPE)
    other, space = running(), running()
    sent: list[Tensor] = []
    other.gather(theirs)
    other.after_step(lambda value: sent.append(value) or value)  # type: ignore[func-returns-value]
    space.gather(ours)
    space.after_step(lambda value: value + sent[0])
    torch.testing.assert_close(space.position_mean, torch.cat([ours, theirs]).mean(dim=0))


def test_a_step_that_does_not_count_leaves_no_trace() -> None:
    space, good = running(), torch.randn(2, *SHAPE)
    space.gather(torch.full((4, *SHAPE), torch.nan))
    space.forget()
    space.gather(good)
    space.after_step(lambda value: value)
    torch.testing.assert_close(space.position_mean, good.mean(dim=0))


def test_running_statistics_come_back_bit_for_bit() -> None:
    space, again = running(), running()
    for seed in range(3):
        space.gather(torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(seed)))
        space.after_step(lambda value: value)
    again.restore({name: tensor.clone() for name, tensor in space.state().items()})
    for one in (space, again):
        one.gather(torch.ones(2, *SHAPE))
        one.after_step(lambda value: value)
    assert torch.equal(space.position_mean, again.position_mean)
    again.begin()
    assert not again.position_mean.any() and not any(tensor.any() for tensor in again.state().values())


def test_state_of_something_else_is_refused() -> None:
    for state in ({}, {"sum": torch.zeros(3, 3), "weight": torch.zeros(())}):
        with pytest.raises(RunError, match="does not hold the running statistics"):
            running().restore(state)
    with pytest.raises(RunError, match="measured at the start have no state"):
        TargetSpace("raw", torch.zeros(SHAPE)).restore(running().state())
    with pytest.raises(RunError, match="never change have no state"):
        FrozenTargets().restore({"x": torch.zeros(1)})


def test_statistics_run_where_they_are_told_to_or_the_targets_move() -> None:
    measured = replace(CONFIG, objective=ObjectiveConfig())
    assert has_running_statistics(CONFIG) and not has_running_statistics(measured)
    assert has_running_statistics(replace(measured, target=replace(measured.target, provider="ema")))


def test_accumulation_of_four_times_eight_is_thirty_two() -> None:
    """Loss, scores and statistics, over steps in which the statistics of the one before decide the next."""
    rows, means = {}, {}
    for parts in (1, 4):
        config, task = replace(CONFIG, grad_accum_steps=parts), pixel_task()
        learner = learner_of(task, config)
        rows[parts] = [train_step(learner, batch_of(step), task, config, step) for step in range(3)]
        means[parts] = task.space.position_mean
    for whole, split in zip(rows[1], rows[4], strict=True):
        for name in ("loss", "r2_position_mean", "target_std", "prediction_std", "prediction_rank"):
            assert split[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name
    torch.testing.assert_close(means[4], means[1], atol=1e-7, rtol=1e-6)


def test_validation_learns_no_statistics() -> None:
    task = pixel_task()
    learner = learner_of(task)
    train_step(learner, batch_of(), task, CONFIG, step=0)
    before = {name: tensor.clone() for name, tensor in task.state().items()}
    validate(learner, [batch_of(7)], task, CONFIG, step=1, device="cpu")
    task.space.after_step(lambda value: value + 1)  # Of nothing but the one that the "sum" adds.
    assert before.keys() == task.state().keys()
    torch.testing.assert_close(task.state()["space.sum"], 0.9 * before["space.sum"] + 0.1)


# The moving average


def test_it_begins_as_the_student_and_follows_by_its_momentum() -> None:
    provider = EmaTargets(CONFIG.encoder, (0.8, 1.0), 10, "cpu")
    student = build_encoder(CONFIG.encoder)
    torch.nn.init.normal_(student.patch_embed.weight)
    assert not same(provider.encoder, parameters(student))
    provider.begin(student)
    first = parameters(student)
    assert same(provider.encoder, first)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    provider.after_step(student, step=5)  # Momentum 0.9: a tenth of the way.
    for mine, start in zip(provider.encoder.parameters(), first, strict=True):
        torch.testing.assert_close(mine, start + 0.1)
    provider.after_step(student, step=10)  # Momentum 1: not at all.
    for mine, start in zip(provider.encoder.parameters(), first, strict=True):
        torch.testing.assert_close(mine, start + 0.1)


def test_momentum_goes_linearly_over_the_steps() -> None:
    provider = EmaTargets(CONFIG.encoder, (0.998, 1.0), 200, "cpu")
    assert [provider.momentum_at(step) for step in (0, 100, 200)] == pytest.approx([0.998, 0.999, 1.0])
    constant = EmaTargets(CONFIG.encoder, (0.99925, 0.99925), 200, "cpu")
    assert constant.momentum_at(77) == 0.99925


def test_targets_are_what_the_copy_sees_in_the_whole_clip_without_noise_or_gradient() -> None:
    noisy = replace(CONFIG.encoder, drop_path=0.9, depth=2)
    provider = EmaTargets(noisy, (0.9, 0.9), 10, "cpu")
    frames = batch_of(size=2).frames
    targets = provider.targets(frames, None)
    assert targets.shape == (2, GRID.num_tokens, provider.dim) and not targets.requires_grad
    assert torch.equal(targets, provider.targets(frames, None))
    assert torch.equal(targets, provider.encoder(normalise_pixels(frames)))
    assert not provider.encoder.training and not provider.needs_records


def test_making_it_moves_no_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    EmaTargets(CONFIG.encoder, (0.9, 0.9), 10, "cpu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_step_is_v_jepas_in_this_order() -> None:
    """Targets from the average as it was, an update of the student, then the average follows it."""
    task = ema_task(momentum=(0.9, 0.9))
    learner = learner_of(task)
    provider = task.provider
    assert isinstance(provider, EmaTargets)
    before, batch = parameters(provider.encoder), batch_of(size=8)
    config = replace(CONFIG, batch_size=8, objective=ObjectiveConfig())
    with torch.no_grad():
        held = normalise(provider.encoder(normalise_pixels(batch.frames)))
        tubelets = normalise_pixels(batch.frames)
        losses = []
        for number, group in enumerate(batch.masks):
            context = learner.encoder(tubelets, group.context_ids)
            z = learner.predictor(context, group.context_ids, group.target_ids, number)
            rows = torch.arange(8).unsqueeze(1)
            losses.append((z - held[rows, group.target_ids]).abs().mean())
    row = train_step(learner, batch, task, config, step=0)
    assert row["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    for average, start, now in zip(
        provider.encoder.parameters(), before, parameters(learner.encoder), strict=True
    ):
        torch.testing.assert_close(average, 0.9 * start + 0.1 * now)
    assert not same(provider.encoder, before)


def test_resume_with_a_moving_average_is_bitwise_equal() -> None:
    """Two steps, everything put aside, two more: against four steps in one go."""

    def steps(learner: Learner, task: Task, numbers: range) -> list[dict[str, float]]:
        return [train_step(learner, batch_of(n, 8), task, config, n) for n in numbers]

    config, tasks = replace(CONFIG, batch_size=8), [ema_task() for _ in range(2)]
    whole, begun = (learner_of(task) for task in tasks)
    curve = steps(whole, tasks[0], range(4))
    first = steps(begun, tasks[1], range(2))
    saved = {name: tensor.clone() for name, tensor in tasks[1].state().items()}
    task = ema_task()
    resumed = learner_of(task)
    resumed.networks.load_state_dict(begun.networks.state_dict())
    resumed.optimizer.load_state_dict(begun.optimizer.state_dict())
    task.restore(saved)
    assert first + steps(resumed, task, range(2, 4)) == curve
    assert all(torch.equal(task.state()[name], tensor) for name, tensor in tasks[0].state().items())


def test_an_average_of_another_encoder_is_refused() -> None:
    other = ema_task(replace(CONFIG, encoder=replace(CONFIG.encoder, depth=2)))
    with pytest.raises(RunError, match=r"does not fit target\.provider 'ema'"):
        ema_task().restore(other.state())


def test_the_average_is_computed_in_the_students_precision() -> None:
    """Under bfloat16 autocast its targets are those of bfloat16, its weights stay float32."""
    lower = replace(CONFIG, batch_size=8, runtime=replace(CONFIG.runtime, precision="bfloat16"))
    task, seen = ema_task(), []
    learner = learner_of(task, lower)
    assert isinstance(task.provider, EmaTargets)
    task.provider.encoder.blocks[0].attn.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    train_step(learner, batch_of(size=8), task, lower, step=0)
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in task.provider.encoder.parameters()} == {torch.float32}
