"""What is said of robots without any encoder stays what training could teach."""

from __future__ import annotations

import numpy as np
import pytest

from salt_vla.errors import ConfigError
from salt_vla.evaluation.probing import load_probe
from salt_vla.evaluation.robots import _explained, _without


def gripper(seed: int, windows: int, open_share: float) -> np.ndarray:
    """(windows, 4): three places, and a gripper's opening as float32 keeps it: 1, but for its rounding."""
    rng = np.random.default_rng(seed)
    opening = np.where(rng.random(windows) < open_share, 1 + 1e-7 * rng.normal(size=windows), 0.0)
    return np.column_stack([rng.normal(size=(windows, 3)), opening])


def test_a_number_that_training_saw_still_gets_no_weight() -> None:
    train, test = gripper(0, 400, 1.0), gripper(1, 100, 0.8)
    rng = np.random.default_rng(2)
    weights = rng.normal(size=(3, 2))
    target = train[:, :3] @ weights + 0.1 * rng.normal(size=(400, 2))
    inside, outside = _explained(train, test, {"y": target})
    assert np.abs(outside["y"] - test[:, :3] @ weights).max() < 0.1
    assert np.abs(inside["y"] - train[:, :3] @ weights).max() < 0.1
    features = rng.normal(size=(500, 5))
    _, left = _without(train, test, features[:400], features[400:])
    assert np.abs(left - features[400:]).max() < 1


def test_numbers_of_other_sizes_are_all_used() -> None:
    """Places in metres beside their changes over a few frames."""
    rng = np.random.default_rng(0)
    known = rng.normal(size=(400, 6)) * [1.0, 0.3, 0.2, 3e-3, 1e-3, 5e-4] + 7
    target = known @ (rng.normal(size=(6, 2)) / known.std(0)[:, None])
    _, said = _explained(known[:300], known[300:], {"y": target[:300]})
    assert np.allclose(said["y"], target[300:], atol=1e-6)


def test_a_probe_without_the_protocol_is_refused_whoever_asks_for_it() -> None:
    assert load_probe("attentive", "vjepa2-max").reads == "tokens"
    with pytest.raises(ConfigError, match="'linear' knows no protocol 'vjepa2-max'; with it use one of"):
        load_probe("linear", "vjepa2-max")
