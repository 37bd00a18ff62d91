"""The studies' own arithmetic: what is planted, what a cell changes, equal compute, how seeds are joined."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from salt_vla.cache import CacheWriter, Manifest, Record, open_cache
from salt_vla.config import differing_fields
from salt_vla.errors import CacheError
from salt_vla.evaluation.statistics import Estimate, r2_sums
from salt_vla.jobs.cache_fit import require_same_teacher
from salt_vla.masks import build_masks
from salt_vla.objectives import explained_variance
from salt_vla.rundir import RunDirectory

STUDIES = Path(__file__).parents[2] / "studies"
DIM, TOKENS = 128, 144


@pytest.fixture(scope="module")
def study() -> dict[str, ModuleType]:
    """The modules beside the studies' scripts, which find each other by their folder."""
    sys.path.insert(0, str(STUDIES))
    try:
        names = ("teachers", "cells", "joined", "scoring", "plateau", "context")
        return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(STUDIES))


def own_latents(seed: int, tokens: int = TOKENS) -> np.ndarray:
    """Like the demonstration's teacher's: variance 0.67, squares of the channels' means 0.35 on average."""
    means = np.random.default_rng(0).normal(size=DIM) * np.sqrt(0.35)
    noise = np.random.default_rng([1, seed]).normal(size=(tokens, DIM)) * np.sqrt(0.67)
    return (means + noise).astype(np.float32)


@pytest.fixture(scope="module")
def planted(study: dict[str, ModuleType]) -> np.ndarray:
    """(tokens, dim) of 100 clips, outliers planted."""
    module = study["teachers"]
    outliers = module.Outliers()
    scale = module.scale_of(np.concatenate([own_latents(n) for n in range(100)]), outliers)
    return np.concatenate([module.plant(own_latents(n), (f"c{n}", 0), scale, outliers) for n in range(100)])


def test_planted_channels_make_the_earlier_attempts_losses(
    study: dict[str, ModuleType], planted: np.ndarray
) -> None:
    """Predicting zero costs 15.6, each channel's mean 12.5; eight channels own more than 90 %."""
    facts = study["teachers"].facts_of(planted)
    assert facts.mse_of_zero == pytest.approx(15.6, abs=0.4)
    assert facts.mse_of_channel_mean == pytest.approx(12.5, abs=0.4)
    assert facts.share_of_top_8 > 0.9


def test_only_the_planted_channels_are_replaced(study: dict[str, ModuleType], planted: np.ndarray) -> None:
    places = study["teachers"].Outliers().places(DIM)
    assert len(set(places)) == 8
    others = np.setdiff1d(np.arange(DIM), places)
    before = np.concatenate([own_latents(n) for n in range(100)])
    assert np.array_equal(planted[:, others], before[:, others])
    assert (planted[:, places].std(0) > 10 * before[:, places].std(0)).all()


def test_a_quarter_of_a_planted_channel_is_content(study: dict[str, ModuleType], planted: np.ndarray) -> None:
    """A linear reading of the token's other channels explains its share and no more."""
    outliers = study["teachers"].Outliers()
    places = outliers.places(DIM)
    others = np.setdiff1d(np.arange(DIM), places)
    half = len(planted) // 2
    inputs = np.c_[planted[:, others], np.ones(len(planted))]
    weights, *_ = np.linalg.lstsq(inputs[:half], planted[:half, places], rcond=None)
    wrong = ((planted[half:, places] - inputs[half:] @ weights) ** 2).sum()
    spread = ((planted[half:, places] - planted[:half, places].mean(0)) ** 2).sum()
    assert 1 - wrong / spread == pytest.approx(outliers.share, abs=0.03)


def test_planting_is_a_function_of_clip_and_view(study: dict[str, ModuleType]) -> None:
    module = study["teachers"]
    outliers = module.Outliers()
    scale = module.scale_of(own_latents(0), outliers)
    first = module.plant(own_latents(0), ("clip", 0), scale, outliers)
    assert np.array_equal(first, module.plant(own_latents(0), ("clip", 0), scale, outliers))
    for other in (("clip", 1), ("another", 0)):
        assert not np.array_equal(first, module.plant(own_latents(0), other, scale, outliers))


def test_a_planted_cache_says_that_it_is_none_of_its_teachers(
    study: dict[str, ModuleType], tmp_path: Path
) -> None:
    module = study["teachers"]
    provenance = {"teacher": "t", "fingerprint": "f", "split": "train", "layer": 1, "dtype": "float32"}
    manifest = Manifest("latents", "float16", (TOKENS, DIM), 2, 4, provenance, 3)
    source = tmp_path / "source"
    with CacheWriter(source, manifest, ["a", "b", "c"]) as writer:
        for shard in writer.pending():
            writer.write_shard(shard, (Record(key, own_latents(key[1])) for key in shard.keys))
        writer.finish()
    outliers = module.Outliers()
    scale = module.scale_of(module.sample_of(source), outliers)
    for _ in range(2):  # The second time there is nothing left to do.
        module.plant_cache(source, tmp_path / "planted", scale, outliers)
    made, original = open_cache(tmp_path / "planted"), open_cache(source)
    assert list(made.keys()) == list(original.keys())
    wanted = module.plant(original.read("b", view=1), ("b", 1), scale, outliers)
    assert np.allclose(made.read("b", view=1), wanted, rtol=1e-3)
    assert made.manifest.provenance["planted"]["channels"] == 8
    with pytest.raises(CacheError, match="different teachers"):
        require_same_teacher(made, original)


def test_every_cell_differs_from_its_recipe_in_one_setting(study: dict[str, ModuleType]) -> None:
    plateau = study["plateau"]
    names = plateau.cell_names()
    assert len(set(names)) == len(names) == 2 + 2 * len(plateau.FACTORS)

    def changed(a: str, b: str) -> set[str]:
        configs = (plateau.config_of(name, "plain", 20, 0) for name in (a, b))
        return {row.field for row in differing_fields(*configs)}

    fields = {
        "targets": {"objective.targets"},
        "loss": {"objective.power"},
        "parameters": {"optimizer.parameters"},
        "masks": {"masks.strategy", "masks.max_targets"},
        "decay": {"optimizer.decay_all"},
    }
    assert changed("good", "bad") == set.union(*fields.values())
    for name, factor in plateau.FACTORS.items():
        assert changed("good", f"good-{factor.bad}") == fields[name]
        assert changed("bad", f"bad-{factor.good}") == fields[name]
        assert len(changed("good", f"bad-{factor.good}")) == len(changed("good", "bad")) - len(fields[name])


@pytest.mark.parametrize("name", ["fair", "good-normalised", "bad-raw", "good-"])
def test_a_cell_that_is_none_is_refused(study: dict[str, ModuleType], name: str) -> None:
    with pytest.raises(ValueError, match="there is no cell"):
        study["plateau"].fields_of(name)


def test_a_step_predicts_as_many_tokens_under_both_masks(study: dict[str, ModuleType]) -> None:
    counts = []
    for name in ("good", "good-topup"):
        config = study["plateau"].config_of(name, "plain", 20, 0)
        groups = build_masks(config.masks, config.geometry).sample(4)
        counts.append(sum(group.target_ids.shape[1] for group in groups))
    assert counts == [48, 48]


def test_cells_are_runs_of_their_own(study: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALT_VLA_ROOT", "/nowhere")
    cells = study["plateau"].all_cells(20, 3) + study["context"].all_cells(20, 2)
    assert len(cells) == 2 * 12 * 3 + 4 * 2
    assert Counter(RunDirectory.named(cell.run.name).path for cell in cells).most_common(1)[0][1] == 1
    seeds = [cell.config.seed for cell in cells[:72]]
    assert seeds == sorted(seeds)


def test_policies_have_the_steps_that_the_same_operations_pay_for(study: dict[str, ModuleType]) -> None:
    context = study["context"]
    steps = 400
    spent = {
        policy: context.steps_of(policy, steps) * context.flops_of(context.config_of(policy, steps, 0))
        for policy in context.POLICIES
    }
    assert context.steps_of("end", steps) == steps > context.steps_of("pad", steps)
    assert max(spent.values()) / min(spent.values()) < 1 + 2 / steps


def test_padding_is_counted_as_work_and_not_as_context(study: dict[str, ModuleType]) -> None:
    context = study["context"]
    config = context.config_of("pad", 20, 0)
    groups = build_masks(config.masks, config.geometry).sample(config.batch_size, 0, 0)
    shown = context.mean_context(config)
    assert all(tokens > 0 for tokens in shown)
    cut = context.mean_context(context.config_of("end", 20, 0))
    assert all(whole > rest for whole, rest in zip(shown, cut, strict=True))
    assert any(group.context_valid is not None for group in groups)
    assert context.flops_of(config) > context.flops_of(context.config_of("end", 20, 0))


def test_errors_are_explained_variance(study: dict[str, ModuleType]) -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 5, 8, generator=draw) for _ in range(3)]
    guesses = [targets + 0.5 * torch.randn(2, 5, 8, generator=draw) for targets in batches]
    mean = torch.linspace(-1, 1, 8)
    errors = study["scoring"].Errors(power=1.0)
    for targets, guess in zip(batches, guesses, strict=True):
        errors.add({"student": guess, "channel_mean": mean}, targets)
    truth, predicted = torch.cat(batches), torch.cat(guesses)
    assert errors.r2("channel_mean") == pytest.approx(explained_variance(predicted, truth, mean).item())
    some = [1, 5]
    wanted = explained_variance(predicted[..., some], truth[..., some], mean[some]).item()
    assert errors.r2("channel_mean", some) == pytest.approx(wanted)
    mine, theirs = (predicted - truth).abs().mean().item(), (mean - truth).abs().mean().item()
    assert errors.mean() == pytest.approx(mine, rel=1e-5)
    assert errors.of_mean_predictor() == pytest.approx(mine / theirs, rel=1e-5)


def test_an_interval_over_seeds_is_students_t(study: dict[str, ModuleType]) -> None:
    estimate = study["joined"].over_seeds([0.1, 0.2, 0.3])
    assert estimate.value == pytest.approx(0.2)
    assert estimate.high - 0.2 == pytest.approx(4.302653 * 0.1 / np.sqrt(3))
    assert study["joined"].over_seeds([0.1]).high == np.inf
    assert study["joined"].spread(estimate) == "+0.200 ± 0.248"
    assert study["joined"].spread(study["joined"].over_seeds([0.1])) == "+0.100"


def test_probes_are_paired_by_seed_and_episode(study: dict[str, ModuleType]) -> None:
    """What both lack on the same episodes cancels; other episodes are refused."""
    draw = np.random.default_rng(0)
    episodes = np.repeat(np.arange(40), 5)
    truth = draw.normal(size=(200, 2))
    hard = np.where(episodes[:, None] % 2, 1.0, 0.1) * draw.normal(size=(200, 2))
    worse = [r2_sums(truth, truth + 1.1 * hard, episodes) for _ in range(3)]
    better = [r2_sums(truth, truth + hard, episodes) for _ in range(3)]
    estimate = study["joined"].paired_probes(better, worse)
    assert 0 < estimate.low < estimate.value < estimate.high < 0.25
    assert study["joined"].with_interval(estimate).startswith("**+0.")
    with pytest.raises(ValueError, match="the same held-out clips"):
        study["joined"].paired_probes(better, [r2_sums(truth[5:], truth[5:] + 1, episodes[5:])] * 3)


def test_differences_are_of_the_seeds_that_both_have(study: dict[str, ModuleType]) -> None:
    joined = study["joined"]

    def cell(name: str, values: dict[int, float]) -> object:
        records = tuple({"seed": seed, "own": {"r2": value}} for seed, value in values.items())
        return joined.Joined(name, records, tuple({} for _ in records))

    one, other = cell("one", {0: 0.5, 1: 0.7, 2: 9.0}), cell("other", {1: 0.6, 0: 0.3})
    assert joined.difference(one, other, "own", "r2").value == pytest.approx(0.15)
    with pytest.raises(ValueError, match="share no seed"):
        joined.difference(one, cell("third", {7: 1.0}), "own", "r2")


def test_tables_are_markdown(study: dict[str, ModuleType]) -> None:
    text = study["joined"].markdown(["a", "b"], [["1", study["joined"].signed(-0.5)]])
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| 1 | −0.500 |"]
    assert study["joined"].with_interval(Estimate(0.1, -0.1, 0.3)) == "+0.100 [−0.100, +0.300]"
