"""A step computes what it says: R² as defined, micro-batches that add up, float32 kept under bfloat16."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from salt_vla.batches import Batch
from salt_vla.cache import Encoding
from salt_vla.config import (
    EncoderConfig,
    GuardConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PredictorConfig,
    TrainConfig,
)
from salt_vla.errors import RunError
from salt_vla.geometry import ClipGeometry
from salt_vla.masks import BlockSpec, MaskGroup, MultiBlockMasks
from salt_vla.models.pixels import normalise_pixels
from salt_vla.objectives import explained_variance
from salt_vla.targets import (
    CachedTargets,
    FrozenTargets,
    RunningSpace,
    TargetProvider,
    TargetSpace,
    Task,
    mean_per_position,
    nearest_context,
)
from salt_vla.training.learner import Learner, build_learner
from salt_vla.training.metrics import BASELINES, ExplainedVariance, Scores
from salt_vla.training.runtime import resolve_precision
from salt_vla.training.state import RunState
from salt_vla.training.step import forward, train_step, validate

GRID = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=8)  # 2 × 4 × 4 tokens
LATENTS = Encoding("float16", (GRID.num_tokens, 8))
MASKS = MultiBlockMasks(GRID, [BlockSpec(2, 0.2), BlockSpec(1, 0.4)])
CONFIG = TrainConfig(
    encoder=EncoderConfig(name="vit_micro", geometry=GRID, depth=1),
    predictor=PredictorConfig(dim=16, depth=1, num_heads=2),
    optimizer=OptimizerConfig(lr_start=1e-3, lr=1e-3, warmup_steps=0, grad_clip=1e9),
    steps=100,
    batch_size=8,
)
CONFIG = replace(CONFIG, runtime=replace(CONFIG.runtime, device="cpu", precision="float32", threads=1))
STOP = GuardConfig(on_bad_step="stop")


def raw_latents(size: int, seed: int) -> Tensor:
    """Every place has a mean of its own, so that the three baselines differ."""
    places = torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(size, *LATENTS.shape, generator=torch.Generator().manual_seed(seed))
    return places + 0.5 * noise


def batch_of(size: int = 8, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (size, 4, 32, 32, 3), generator=generator).byte()
    blobs = [np.frombuffer(LATENTS.encode(a), dtype=np.uint8) for a in raw_latents(size, seed).numpy()]
    keys = [(f"clip{seed}-{number}", 0) for number in range(size)]
    return Batch(keys, frames, torch.from_numpy(np.stack(blobs)), MASKS.sample(size, seed=seed, step=seed))


def task_of(mode: str = "normalised") -> Task:
    return Task(CachedTargets(LATENTS), TargetSpace(mode, mean_per_position([raw_latents(64, 1)], mode)))  # type: ignore[arg-type]


def learner_of(config: TrainConfig = CONFIG) -> Learner:
    return build_learner(config, target_dim=8, device="cpu")


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}


def gradients(learner: Learner) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}


class ConstantTargets(FrozenTargets):
    """The same value everywhere."""

    dim = 8
    needs_records = False

    def __init__(self, value: float) -> None:
        self.value = value

    def targets(self, frames: Tensor, records: Tensor | None) -> Tensor:
        return torch.full((len(frames), *LATENTS.shape), self.value)


def constant_task(value: float) -> Task:
    provider: TargetProvider = ConstantTargets(value)
    return Task(provider, TargetSpace("raw", torch.zeros(LATENTS.shape)))


@pytest.mark.parametrize("mode", ["normalised", "centred", "raw"])
@torch.no_grad()
def test_r2_in_sums_is_the_explained_variance_of_all_batches_together(mode: str) -> None:
    """Two batches, two mask groups: gathered by hand, put end to end, scored in float64."""
    learner, task, batches = learner_of(), task_of(mode), [batch_of(8, seed=2), batch_of(3, seed=3)]
    score = Scores()
    gathered: dict[str, list[Tensor]] = {name: [] for name in ("predicted", "targets", *BASELINES)}
    for batch in batches:
        forward(learner, batch, task, CONFIG, 0, score)
        scored = task.space.scored(task.provider.targets(batch.frames, batch.records))
        for number, group in enumerate(batch.masks):
            context = learner.encoder(normalise_pixels(batch.frames), group.context_ids)
            predicted = learner.predictor(context, group.context_ids, group.target_ids, number)
            copied = nearest_context(group.context_ids, group.target_ids, GRID)
            rows = torch.arange(len(scored)).unsqueeze(1)
            pieces = {
                "predicted": task.space.to_scored(predicted, group.target_ids),
                "targets": scored[rows, group.target_ids],
                "channel_mean": task.space.position_mean.mean(dim=0).expand_as(predicted),
                "position_mean": task.space.position_mean[group.target_ids],
                "copy_nearest": scored[rows, copied],
            }
            for name, piece in pieces.items():
                gathered[name].append(piece.reshape(-1, 8))
    whole = {name: torch.cat(pieces) for name, pieces in gathered.items()}
    row = score.as_row()
    assert len({round(row[f"r2_{name}"], 3) for name in BASELINES}) == 3
    for name in BASELINES:
        expected = explained_variance(whole["predicted"], whole["targets"], whole[name]).item()
        assert row[f"r2_{name}"] == pytest.approx(expected, rel=1e-5), name


def test_r2_against_a_perfect_baseline_is_not_a_number() -> None:
    score = ExplainedVariance()
    score.add(torch.zeros(2, 3), torch.ones(2, 3), dict.fromkeys(BASELINES, torch.ones(3)))
    assert all(math.isnan(value) for value in score.as_row().values())


@pytest.mark.parametrize("mode", ["normalised", "centred"])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_add_up_to_the_whole_step(mode: str, parts: int) -> None:
    whole, split = learner_of(), learner_of()
    row = train_step(whole, batch_of(), task_of(mode), CONFIG, step=0)
    other = train_step(split, batch_of(), task_of(mode), replace(CONFIG, grad_accum_steps=parts), step=0)
    assert other.keys() == row.keys()
    for name in ("loss", "grad_norm", "r2_channel_mean", "r2_position_mean", "r2_copy_nearest"):
        assert other[name] == pytest.approx(row[name], rel=1e-5), name
    for (name, a), b in zip(gradients(whole).items(), gradients(split).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=name)
        assert a.any(), name


def test_padded_contexts_change_neither_loss_nor_score() -> None:
    batch = batch_of()
    padded = [
        MaskGroup(
            context_ids=torch.cat([group.context_ids, group.target_ids[:, :3]], dim=1),
            target_ids=group.target_ids,
            context_valid=torch.arange(group.context_ids.shape[1] + 3).expand(8, -1)
            < group.context_ids.shape[1],
        )
        for group in batch.masks
    ]
    row = train_step(learner_of(), batch, task_of(), CONFIG, step=0)
    other = train_step(learner_of(), replace(batch, masks=padded), task_of(), CONFIG, step=0)
    assert other.pop("kind") == row.pop("kind")
    assert other == pytest.approx(row, rel=1e-5)


def test_row_says_what_was_done() -> None:
    row = train_step(learner_of(), batch_of(), task_of(), CONFIG, step=6)
    assert (row["kind"], row["step"]) == ("train", 7)
    assert set(row) >= {
        *("kind", "step", "loss", "lr", "weight_decay", "grad_norm", "clipped_share", "changed_share"),
        *(f"r2_{name}" for name in BASELINES),
    }


def test_step_without_its_score_is_the_same_step() -> None:
    scored, unscored = learner_of(), learner_of()
    row = train_step(scored, batch_of(), task_of(), CONFIG, step=0)
    other = train_step(unscored, batch_of(), task_of(), CONFIG, step=0, scored=False)
    assert other == {name: row[name] for name in other}
    assert {"r2_position_mean", "changed_share", "clipped_share"} <= row.keys() - other.keys()
    for a, b in zip(weights(scored).values(), weights(unscored).values(), strict=True):
        assert torch.equal(a, b)


def test_vicreg_terms_enter_the_row_and_the_loss() -> None:
    vicreg = ObjectiveConfig(variance_weight=0.5, covariance_weight=0.25)
    row = train_step(learner_of(), batch_of(), task_of(), replace(CONFIG, objective=vicreg), step=0)
    assert row["loss"] == pytest.approx(
        row["regression"] + 0.5 * row["variance"] + 0.25 * row["covariance"], rel=1e-6
    )
    plain = train_step(learner_of(), batch_of(), task_of(), CONFIG, step=0)
    assert row["regression"] == pytest.approx(plain["loss"]) and row["variance"] > 0


def test_step_depends_on_its_number_and_nothing_drawn_before() -> None:
    config = replace(CONFIG, encoder=replace(CONFIG.encoder, drop_path=0.5, depth=2))
    learners = [learner_of(config) for _ in range(3)]
    first = train_step(learners[0], batch_of(), task_of(), config, step=5)
    torch.rand(13)
    again = train_step(learners[1], batch_of(), task_of(), config, step=5)
    other = train_step(learners[2], batch_of(), task_of(), config, step=6)
    assert again == first and other["loss"] != first["loss"]
    for a, b in zip(weights(learners[0]).values(), weights(learners[1]).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("seed", [2**31, 2**40])
def test_any_seed_that_the_configuration_takes_can_be_stepped(seed: int) -> None:
    row = train_step(learner_of(), batch_of(), task_of(), replace(CONFIG, seed=seed), step=0)
    assert math.isfinite(row["loss"])


def test_gradients_are_clipped_and_the_row_tells_the_norm_before() -> None:
    clipped = replace(CONFIG, optimizer=replace(CONFIG.optimizer, grad_clip=0.02))
    learner, free = learner_of(), learner_of()
    row = train_step(learner, batch_of(), task_of(), clipped, step=0)
    unclipped = train_step(free, batch_of(), task_of(), CONFIG, step=0)
    assert row["grad_norm"] == unclipped["grad_norm"] > 0.02
    norm = torch.stack([g.norm() for g in gradients(learner).values()]).norm().item()
    assert norm == pytest.approx(0.02, rel=1e-3)


def test_bfloat16_computes_nearly_the_same() -> None:
    lower = replace(CONFIG, runtime=replace(CONFIG.runtime, precision="bfloat16"))
    exact = train_step(learner_of(), batch_of(), task_of(), CONFIG, step=0)["loss"]
    rounded = train_step(learner_of(), batch_of(), task_of(), lower, step=0)["loss"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=1e-2)


def test_bfloat16_keeps_parameters_and_optimizer_state_in_float32() -> None:
    """Where parameters themselves are bfloat16, most of them do not move at a small rate; here all do."""
    tiny = replace(CONFIG.optimizer, lr_start=1e-6, lr=1e-6, weight_decay=0.0, weight_decay_final=0.0)
    config = replace(CONFIG, optimizer=tiny, runtime=replace(CONFIG.runtime, precision="bfloat16"))
    learner = learner_of(config)
    before = weights(learner)
    train_step(learner, batch_of(), task_of(), config, step=0)
    after = weights(learner)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    state = [value for entry in learner.optimizer.state.values() for value in entry.values()]
    assert state and {value.dtype for value in state} == {torch.float32}
    assert {gradient.dtype for gradient in gradients(learner).values()} == {torch.float32}

    def moved(dtype: torch.dtype) -> Tensor:
        return torch.cat([(after[n].to(dtype) != before[n].to(dtype)).flatten() for n in before]).float()

    assert moved(torch.float32).mean() > 0.99 and all(not torch.equal(after[n], before[n]) for n in before)
    assert moved(torch.bfloat16).mean() < 0.2  # The trap that float32 avoids.


def test_loss_that_is_not_finite_stops_and_leaves_the_parameters() -> None:
    learner, config = learner_of(), replace(CONFIG, guards=STOP)
    before = weights(learner)
    with pytest.raises(
        RunError, match=r"the loss is nan at step 8; lower optimizer\.lr or look at the targets"
    ):
        train_step(learner, batch_of(), constant_task(math.nan), config, step=7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(learner).items())


def test_gradient_that_is_not_finite_stops_and_leaves_the_parameters() -> None:
    """The root of an exact prediction's error has a loss of zero and no slope."""
    objective = ObjectiveConfig(power=0.5, targets="raw")
    learner, config = learner_of(), replace(CONFIG, objective=objective, guards=STOP)
    torch.nn.init.zeros_(learner.predictor.proj.weight)
    before = weights(learner)
    with pytest.raises(RunError, match="the gradient's norm is nan at step 1"):
        train_step(learner, batch_of(), constant_task(0.0), config, step=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(learner).items())


def test_steps_on_one_batch_learn_it() -> None:
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, lr_start=3e-3, lr=3e-3))
    learner, batch, task = learner_of(config), batch_of(), task_of()
    rows = [train_step(learner, batch, task, config, step) for step in range(50)]
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    assert rows[0]["r2_channel_mean"] < 0 < 0.05 < rows[-1]["r2_channel_mean"]


def test_validation_changes_nothing() -> None:
    learner = learner_of()
    train_step(learner, batch_of(), task_of(), CONFIG, step=0)
    before, slopes = weights(learner), gradients(learner)
    validate(learner, [batch_of(seed=4)], task_of(), CONFIG, step=1, device="cpu")
    assert learner.encoder.training and learner.predictor.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(learner).items())
    assert all(torch.equal(tensor, slopes[name]) for name, tensor in gradients(learner).items())


def test_validation_weighs_batches_by_their_clips() -> None:
    learner, batches = learner_of(), [batch_of(8, seed=5), batch_of(2, seed=6)]
    row = validate(learner, iter(batches), task_of(), CONFIG, step=9, device="cpu")
    single = [forward(learner, batch, task_of(), CONFIG, 0, None)[0].item() for batch in batches]
    assert row["loss"] == pytest.approx((8 * single[0] + 2 * single[1]) / 10)
    assert (row["kind"], row["step"], row["clips"]) == ("val", 9, 10)
    assert {f"r2_{name}" for name in BASELINES} <= row.keys()


def test_validation_gives_the_regression_without_the_other_terms() -> None:
    """They depend on who shares a batch, here on a clip that is alone in its own."""
    terms = ObjectiveConfig(variance_weight=0.5, regularised="both", contrastive_weight=0.5)
    held_out = [batch_of(8, seed=5), batch_of(1, seed=6)]
    plain = validate(learner_of(), held_out, task_of(), CONFIG, step=1, device="cpu")
    row = validate(learner_of(), held_out, task_of(), replace(CONFIG, objective=terms), step=1, device="cpu")
    assert row == plain


def test_validation_is_without_stochastic_depth() -> None:
    config = replace(CONFIG, encoder=replace(CONFIG.encoder, drop_path=0.9, depth=2))
    learner = learner_of(config)
    rows = [validate(learner, [batch_of()], task_of(), config, step=1, device="cpu") for _ in range(2)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_that_was_asked_for_is_kept(precision: str) -> None:
    config = replace(CONFIG, runtime=replace(CONFIG.runtime, precision=precision))  # type: ignore[arg-type]
    assert resolve_precision(config, batch_of(), task_of()) == config


def test_precision_left_open_is_chosen_by_trying() -> None:
    config = replace(CONFIG, runtime=replace(CONFIG.runtime, precision="auto"))
    chosen = resolve_precision(config, batch_of(), task_of())
    assert chosen.runtime.precision in {"float32", "bfloat16"}
    assert replace(chosen, runtime=config.runtime) == config


def test_a_bad_step_leaves_parameters_moments_and_statistics_as_they_were() -> None:
    """The next good step is the one that would have come without it, but for its number."""
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, weight_decay=0.1, weight_decay_final=0.1))
    poisoned = batch_of(seed=3)
    assert poisoned.records is not None
    poisoned.records.view(torch.float16)[2] = math.inf
    learners, tasks, state = [learner_of(), learner_of()], [running_task(), running_task()], RunState()
    for learner, task in zip(learners, tasks, strict=True):
        train_step(learner, batch_of(seed=1), task, config, 0, state=RunState())
    before = {name: tensor.clone() for name, tensor in tasks[0].state().items()}
    row = train_step(learners[0], poisoned, tasks[0], config, 0, state=state)
    assert row["bad"] == "the loss is nan" and math.isnan(row["loss"])
    assert (row["changed_share"], row["bad_steps"], state.missed_updates) == (0, 1, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tasks[0].state().items())
    for learner, task in zip(learners, tasks, strict=True):
        assert "bad" not in train_step(learner, batch_of(seed=4), task, config, 0, state=RunState())
    ours, theirs = (weights(learner) for learner in learners)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    moments = [learner.optimizer.state_dict()["state"] for learner in learners]
    assert all(
        torch.equal(a[k], b[k]) for a, b in zip(*(m.values() for m in moments), strict=True) for k in a
    )


def running_task() -> Task:
    space = RunningSpace("centred", (GRID.num_tokens, 8), 0.9, "cpu")
    return Task(CachedTargets(LATENTS), space)


def test_clipped_steps_are_counted_until_a_line_begins_anew() -> None:
    clipped = replace(CONFIG, optimizer=replace(CONFIG.optimizer, grad_clip=1e-3))
    state, learner, task = RunState(), learner_of(), task_of()
    for step, config in enumerate((CONFIG, clipped, CONFIG)):
        train_step(learner, batch_of(), task, config, step, scored=False, state=state)
    row = train_step(learner, batch_of(), task, clipped, 3, state=state)
    assert row["clipped_share"] == 0.5
