"""The online probe's regression: scikit-learn's ridge in both forms, scores, penalties from training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from salt_vla.training.ridge import PENALTIES, Known, read_out, ridge

RNG = np.random.default_rng(0)


def clips(count: int, dims: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Features of very unlike sizes, and the episode of each clip, four clips an episode."""
    features = np.random.default_rng(seed).normal(size=(count, dims)) * np.linspace(1, 30, dims) + 5
    return torch.from_numpy(features.astype(np.float32)), np.arange(count) // 4


def scaled(fit: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    x = fit.double().numpy()
    deviation = x.std(0)
    floor = max(0.1 * float(torch.from_numpy(deviation).median()), 0.01 * deviation.max())
    return np.asarray((other.double().numpy() - x.mean(0)) / np.maximum(deviation, floor))


@pytest.mark.parametrize("dims", [6, 300], ids=["more clips than features", "more features than clips"])
def test_predictions_are_those_of_scikit_learn_with_the_penalty_that_wins_on_left_out_episodes(
    dims: int,
) -> None:
    fit, episodes = clips(200, dims, 1)
    test, _ = clips(50, dims, 2)
    weights = RNG.normal(size=(dims, 3)) / dims
    noise = {"clear": 0.01, "noisy": 30.0}
    x, x_test = scaled(fit, fit), scaled(fit, test)
    targets = {name: x @ weights + size * RNG.normal(size=(200, 3)) for name, size in noise.items()}
    predicted = ridge(fit, {k: torch.from_numpy(v) for k, v in targets.items()}, test, episodes)
    apart = episodes % 5 == 0
    chosen = {}
    for name, y in targets.items():
        errors = []
        for penalty in PENALTIES:
            model = Ridge(penalty * dims).fit(x[~apart], y[~apart])
            errors.append((((model.predict(x[apart]) - y[apart]) ** 2).mean(0) / y.var(0)).sum())
        chosen[name] = PENALTIES[int(np.argmin(errors))]
        expected = Ridge(chosen[name] * dims).fit(x, y).predict(x_test)
        np.testing.assert_allclose(predicted[name].numpy(), expected, rtol=1e-6, atol=1e-8)
    assert chosen["noisy"] > chosen["clear"]


def test_what_a_feature_says_is_found_and_what_none_says_is_worth_nothing() -> None:
    fit, episodes = clips(800, 20, 3)
    test, test_episodes = clips(300, 20, 4)

    def known(features: torch.Tensor, episodes: np.ndarray, seed: int) -> Known:
        x = features.numpy().astype(np.float64)
        rng = np.random.default_rng(seed)
        numbers = {
            "there": x[:, :2] @ [[1.0, 2.0], [3.0, 4.0]],
            "not there": rng.normal(size=(len(x), 2)),
            "half there": np.stack([x[:, 3], 30 * rng.normal(size=len(x))], axis=1),
        }
        classes = {"sign": (x[:, 0] > 5).astype(np.int64) * 7}
        return Known(episodes, {k: v.astype(np.float32) for k, v in numbers.items()}, classes)

    figures = read_out(fit, known(fit, episodes, 5), test, known(test, test_episodes, 6))
    assert figures["r2_there"] > 0.999
    assert abs(figures["r2_not there"]) < 0.03
    assert figures["r2_half there"] == pytest.approx(0.5, abs=0.03)
    assert figures["accuracy_sign"] > 0.9
    assert 0.4 < figures["accuracy_sign_constant"] < 0.6


def test_r2_is_zero_for_the_mean_of_the_clips_fitted_on_and_counts_dimensions_that_vary() -> None:
    """Features without any variance predict that mean, wherever the held-out clips' own mean lies."""
    fit, test, episodes = torch.ones(40, 5), torch.ones(20, 5), np.arange(40) // 4
    values = RNG.normal(size=(40, 2)).astype(np.float32)
    others = 3 + RNG.normal(size=(20, 2)).astype(np.float32)
    still, half = np.full((40, 1), 2.0, np.float32), np.array([[1.0], [0.0]] * 20, np.float32)
    known = Known(
        episodes, {"moves": values, "still": still, "both": np.concatenate([values[:, :1], still], 1)}
    )
    truth = Known(
        np.arange(20),
        {"moves": others, "still": half[:20], "both": np.concatenate([others[:, :1], half[:20]], 1)},
    )
    figures = read_out(fit, known, test, truth)
    assert figures["r2_moves"] == pytest.approx(0, abs=1e-9)
    assert figures["r2_both"] == pytest.approx(0, abs=1e-9)
    assert np.isnan(figures["r2_still"])


def test_a_feature_that_hardly_varied_does_not_throw_off_a_clip_that_departs_from_it() -> None:
    fit, episodes = clips(200, 10, 7)
    y = fit[:, :1].double()
    fit[:, 9] = 1e-6 * torch.arange(200)
    test, _ = clips(50, 10, 8)
    predicted = ridge(fit, {"y": y}, test, episodes)["y"]
    assert float(((predicted - test[:, :1]) ** 2).mean()) < 0.05 * float(test[:, 0].var())


def test_clips_of_one_episode_are_fitted_with_the_middle_penalty() -> None:
    fit, _ = clips(50, 4, 9)
    y = torch.from_numpy(RNG.normal(size=(50, 1)))
    middle = PENALTIES[len(PENALTIES) // 2]
    expected = Ridge(middle * 4).fit(scaled(fit, fit), y.numpy()).predict(scaled(fit, fit))
    predicted = ridge(fit, {"y": y}, fit, np.zeros(50, np.int64))["y"]
    np.testing.assert_allclose(predicted.numpy(), expected.reshape(50, 1), rtol=1e-6)


def test_a_class_that_only_held_out_clips_have_is_always_wrong() -> None:
    fit, episodes = clips(60, 4, 10)
    codes = (np.arange(60) % 3).astype(np.int64)
    known, truth = Known(episodes, {}, {"name": codes}), Known(np.arange(20), {}, {"name": np.full(20, 9)})
    figures = read_out(fit, known, fit[:20], truth)
    assert figures == {"accuracy_name": 0.0, "accuracy_name_constant": 0.0}
    assert read_out(fit, Known(episodes), fit, Known(episodes)) == {}
