"""Attentive probes find what averaging loses, choose within training, and never see a held-out answer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from salt_vla.errors import DataError
from salt_vla.evaluation import attentive_training
from salt_vla.evaluation.attentive import (
    HELD_OUT,
    REFERENCE,
    AttentiveProbe,
    _Coded,
    attentive,
    attentive_small,
)
from salt_vla.evaluation.attentive_head import AttentiveHead
from salt_vla.evaluation.attentive_training import ROUNDS, Goal, Recipe, Tokens, Trained, predict, train
from salt_vla.evaluation.linear import LinearProbe
from salt_vla.evaluation.probes import Problem

TOKENS, DIM = 9, 12
QUICK = Recipe((1e-2, 3e-3), (0.01,), batch=32, min_steps=160)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def hidden(clips: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of noise of which one, anywhere, bears a mark and says two numbers; the numbers; episodes of 3.
    Averaged, the marked token drowns in the others."""
    random = np.random.default_rng(seed)
    tokens = random.normal(size=(clips, TOKENS, DIM))
    place = random.integers(0, TOKENS, clips)
    tokens[np.arange(clips), place, 0] = 8
    return tokens.astype(np.float16), tokens[np.arange(clips), place, 1:3], np.arange(clips) // 3


def problem(clips: int, seed: int = 0, share: float = 2 / 3, is_random: bool = False) -> tuple[Problem, Any]:
    """A number to regress and its sign to name, and the truths of held-out clips."""
    tokens, values, episodes = hidden(clips, seed)
    if is_random:
        values = np.random.default_rng([seed, 1]).normal(size=values.shape)
    names = np.where(values[:, 0] > 0, "up", "down")
    cut = int(clips * share) // 3 * 3
    train = {"value": values[:cut], "sign": names[:cut]}
    held_out = {"value": values[cut:], "sign": names[cut:]}
    return Problem("e", tokens[:cut], tokens[cut:], train, episodes[:cut], seed), held_out


def r2(truth: np.ndarray, said: np.ndarray) -> float:
    return float(1 - ((truth - said) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum())


@pytest.mark.parametrize("depth", [0, 1])
def test_it_finds_one_tokens_content_that_averaging_loses(depth: int) -> None:
    given, truth = problem(360)
    recipe = replace(QUICK, rates=(1e-2,)) if depth else QUICK  # Several rates are tried in the other.
    fits = AttentiveProbe(depth, recipe).fit(given)
    averaged = replace(given, train=given.train.mean(1), test=given.test.mean(1))
    linear = LinearProbe().fit(averaged)
    assert r2(truth["value"], fits["value"].predicted) > 0.7
    assert r2(truth["value"], linear["value"].predicted) < 0.4
    assert (fits["sign"].predicted == truth["sign"]).mean() > 0.8
    assert fits["sign"].classes is not None and fits["sign"].shares is not None
    assert np.allclose(fits["sign"].shares.sum(1), 1, atol=1e-5)
    assert "rate" in fits["value"].note and "attention heads" in fits["value"].note


def test_on_noise_held_out_stays_at_chance_and_the_reference_is_optimistic() -> None:
    """Best of heads × epochs on the clips that are scored: selection on the test data, in numbers."""
    held_out, best = [], []
    reference = replace(REFERENCE, rates=(5e-3, 1e-3), decays=(0.01, 0.8), batch=45)
    for seed in range(4):
        given, truth = problem(120, seed, share=3 / 4, is_random=True)
        given = replace(given, targets={"sign": given.targets["sign"]})
        quick = replace(QUICK, min_steps=40, batch=45)
        held_out.append((AttentiveProbe(0, quick).fit(given)["sign"].predicted == truth["sign"]).mean())
        told = replace(given, held_out={"sign": truth["sign"]})
        fit = AttentiveProbe(0, reference=reference).fit(told)["sign"]
        best.append((fit.predicted == truth["sign"]).mean())
        assert fit.note.startswith("best of 4 heads × 20 epochs on the held-out clips")
    # 30 clips a seed, 120 in all: a standard error of 4.6 points.
    assert abs(np.mean(held_out) - 0.5) < 0.14
    assert np.mean(best) > 0.58 and min(best) > 0.5


def test_a_clips_answer_does_not_depend_on_other_held_out_clips() -> None:
    given, _ = problem(90)
    other = given.test.copy()
    other[1:] = np.roll(other[1:], 1, axis=2) * 3
    quick = AttentiveProbe(0, replace(QUICK, min_steps=20))
    mine, theirs = (quick.fit(replace(given, test=test)) for test in (given.test, other))
    assert np.array_equal(mine["value"].predicted[0], theirs["value"].predicted[0])
    assert mine["value"].note == theirs["value"].note
    assert not np.allclose(mine["value"].predicted[1:], theirs["value"].predicted[1:])


def test_the_same_seed_gives_the_same_bits_and_targets_do_not_mix() -> None:
    given, _ = problem(60)
    quick = AttentiveProbe(1, replace(QUICK, min_steps=20))
    first, second = quick.fit(given), quick.fit(given)
    alone = quick.fit(replace(given, targets={"value": given.targets["value"]}))
    for name in ("value", "sign"):
        assert np.array_equal(first[name].predicted, second[name].predicted)
    assert np.array_equal(first["value"].predicted, alone["value"].predicted)
    other = quick.fit(replace(given, seed=1))
    assert not np.array_equal(first["value"].predicted, other["value"].predicted)


def test_tokens_are_read_a_batch_at_a_time_from_their_file(tmp_path: Path) -> None:
    """The same bits as from memory, and never more rows than predictions take at once."""
    given, _ = problem(120)
    file = tmp_path / "tokens.rows"
    given.train.tofile(file)
    most = 0

    class Watched(np.memmap):
        def __getitem__(self, rows: Any) -> Any:
            nonlocal most
            most = max(most, len(rows))
            return np.asarray(super().__getitem__(rows))

    mapped = Watched(file, np.float16, "r", shape=given.train.shape)
    quick = AttentiveProbe(0, replace(QUICK, min_steps=20))
    from_file = quick.fit(replace(given, train=mapped))
    assert np.array_equal(from_file["value"].predicted, quick.fit(given)["value"].predicted)
    assert 0 < most <= attentive_training.PREDICTED_AT_ONCE < len(given.train)


def one_head(rate: float, decay: float, given: Problem, depth: int = 0) -> Trained:
    torch.manual_seed(3)
    values = torch.from_numpy(given.targets["value"].astype(np.float32))
    return Trained(AttentiveHead(DIM, 2, depth), Goal(values, 2), rate, decay)


def nothing(done: int, live: Any) -> None:
    pass


def test_training_equals_a_plain_loop_over_the_same_batches() -> None:
    given, _ = problem(90)
    recipe = Recipe((1e-3,), (0.1,), batch=16, epochs=5, standardised=False)
    rows = np.arange(len(given.train))
    heads = [one_head(1e-3, 0.1, given), one_head(3e-3, 0.4, given)]
    tokens = Tokens("e", given.train)
    train("t", heads, tokens, rows, recipe, 0, nothing)
    steps = 5 * 4
    assert recipe.steps(len(rows)) == steps
    for mine in heads:
        plain = one_head(mine.rate, mine.decay, given).head
        optimizer = torch.optim.AdamW(plain.parameters(), lr=mine.rate, weight_decay=mine.decay)
        batches = attentive_training._batches(rows, 16, steps, 0)
        assert sorted(np.concatenate(batches[:4])) == list(rows)
        for step, chosen in enumerate(batches, 1):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = mine.rate * (1 + math.cos(math.pi * step / steps)) / 2
            said = plain(torch.from_numpy(given.train[chosen].astype(np.float32)))
            F.mse_loss(said, mine.goal.values[torch.from_numpy(chosen)]).backward()
            optimizer.step()
        expected = plain(torch.from_numpy(given.train.astype(np.float32))).detach().numpy()
        assert np.allclose(predict([mine], tokens, rows)[0], expected, atol=2e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_batches_passed_in_parts_give_the_same_gradient(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given, _ = problem(90)
    inputs, rows = torch.from_numpy(given.train.astype(np.float32))[:33], torch.arange(33)
    found: list[Any] = []
    for allowed in (attentive_training.ACTIVATION_BYTES, 40_000 * (1 + 9 * depth)):
        monkeypatch.setattr(attentive_training, "ACTIVATION_BYTES", allowed)
        one = one_head(1e-3, 0.1, given, depth)
        assert (attentive_training._clips_at_once([one], inputs.shape[1:], 33) < 33) == (len(found) == 1)
        attentive_training._gradients([one], inputs, rows)
        found.append(one.head.readout.weight.grad)
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_a_head_that_overflows_is_not_chosen() -> None:
    given, _ = problem(60)
    wild = AttentiveProbe(0, replace(QUICK, rates=(1e30, 1e-2), min_steps=20))
    fit = wild.fit(given)["value"]
    assert "rate 0.01" in fit.note and np.isfinite(fit.predicted).all()
    with pytest.raises(DataError, match="every attentive head of encoder 'e' on 'value' overflowed"):
        AttentiveProbe(0, replace(QUICK, rates=(1e38,), min_steps=20)).fit(given)


def test_channels_that_differ_in_scale_are_levelled() -> None:
    given, _ = problem(90)
    scaled = given.train.astype(np.float32) * np.logspace(-2, 2, DIM, dtype=np.float32) + 5
    tokens = Tokens("e", scaled)
    tokens.standardise(np.arange(len(scaled)))
    batch = tokens.batch(np.arange(len(scaled)))
    assert torch.allclose(batch.mean((0, 1)), torch.zeros(DIM), atol=1e-2)
    assert batch.std((0, 1)).max().item() == pytest.approx(1, abs=1e-3)


def test_what_cannot_be_probed_is_said() -> None:
    given, _ = problem(90)
    quick = AttentiveProbe(0, replace(QUICK, min_steps=20))
    broken = given.train.copy()
    broken[4, 2, 1] = np.nan
    with pytest.raises(DataError, match="encoder 'e' hold NaN or infinite"):
        quick.fit(replace(given, train=broken))
    with pytest.raises(DataError, match=r"reads \(clips, tokens, dim\), not \(\d+, 9\)"):
        quick.fit(replace(given, train=given.train.mean(2)))
    with pytest.raises(DataError, match="at least 2 training episodes"):
        quick.fit(replace(given, episodes=np.zeros(len(given.train), np.int64)))


def test_the_probes_are_those_of_the_papers() -> None:
    assert (attentive().depth, attentive_small().depth) == (3, 0)
    assert len(REFERENCE.grid) == 20 and REFERENCE.epochs == ROUNDS == 20
    assert set(REFERENCE.grid) > {(5e-3, 0.01), (1e-4, 0.8)} and not REFERENCE.standardised
    assert REFERENCE.steps(168_913) == 20 * 660 and HELD_OUT.steps(100) == 400


def test_heads_and_tokens_go_where_the_problem_says() -> None:
    elsewhere, _ = problem(60)
    fitted, held_out = attentive_small()._tokens(replace(elsewhere, device="meta"), np.arange(30), QUICK)
    assert fitted.batch(np.arange(4)).device.type == held_out.batch(np.arange(4)).device.type == "meta"
    goal = _Coded.of(elsewhere.targets["value"])
    head = attentive_small()._head(replace(elsewhere, device="meta"), goal, 1e-3, 0.0)
    assert {parameter.device.type for parameter in head.head.parameters()} == {"meta"}
