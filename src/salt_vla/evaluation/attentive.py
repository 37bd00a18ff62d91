"""Probes `attentive` and `attentive-small`: V-JEPA 2's head on all tokens, its rates chosen within training.

Joins targets, heads and their training; the reference's way to choose is the protocol `vjepa2-max`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit

from salt_vla.errors import DataError
from salt_vla.evaluation.attentive_head import MAX_HEADS, AttentiveHead, count_heads
from salt_vla.evaluation.attentive_training import (
    ROUNDS,
    Goal,
    Recipe,
    Tokens,
    Trained,
    device_named,
    predict,
    train,
)
from salt_vla.evaluation.probes import ProbeFit, Problem
from salt_vla.evaluation.statistics import varying_dims

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, Shaped

# facebookresearch/vjepa2, configs/eval/vitl (ssv2, k400): 20 heads, 20 epochs, 64 GPUs with 4 clips each.
REFERENCE = Recipe((5e-3, 3e-3, 1e-3, 3e-4, 1e-4), (0.01, 0.1, 0.4, 0.8), batch=256, standardised=False)
# Fewer, since one refit is worth more than many near ones; small sets take enough steps all the same.
HELD_OUT = Recipe((3e-3, 1e-3, 3e-4), (0.01, 0.4), batch=64, min_steps=400)
CHECKED_PARTS = 5  # a fifth of the training episodes is held out to choose by


@dataclass(frozen=True)
class AttentiveProbe:
    """A head of `depth` self-attention blocks and one cross-attention, a grid of them for every target.

    `held-out`: rate, decay and number of rounds are those that did best on a fifth of the training episodes;
    one head is then trained so on all of them, and reads the held-out clips once. `vjepa2-max`: the best
    figure of all heads and epochs *on the held-out clips themselves*, as the reference reports it.
    """

    depth: int
    recipe: Recipe = HELD_OUT
    reference: Recipe = REFERENCE
    reads: Literal["vector", "tokens"] = "tokens"
    protocols: tuple[str, ...] = ("held-out", "vjepa2-max")

    def fit(self, problem: Problem) -> dict[str, ProbeFit]:
        coded = {name: _Coded.of(target) for name, target in problem.targets.items()}
        if problem.held_out is not None:
            return self._fit_as_reference(problem, coded, problem.held_out)
        fit_rows, checked = _inner_split(problem)
        best = self._choose(problem, coded, fit_rows, checked)
        rows = np.arange(len(problem.train))
        tokens, test = self._tokens(problem, rows, self.recipe)
        heads = {
            name: self._head(problem, one, choice.rate, choice.decay, choice.rounds)
            for (name, one), choice in zip(coded.items(), best.values(), strict=True)
        }
        said: dict[str, np.ndarray] = {}

        def after_round(done: int, live: Sequence[Trained]) -> None:
            ended = [name for name, one in heads.items() if one.rounds == done]
            if ended:
                read = predict([heads[name] for name in ended], test, np.arange(len(problem.test)))
                said.update(zip(ended, read, strict=True))

        title = f"Probing {problem.encoder}"
        train(title, list(heads.values()), tokens, rows, self.recipe, problem.seed, after_round)
        return {
            name: coded[name].fit(said[name], self._note(problem, best[name], self.recipe)) for name in coded
        }

    def _choose(
        self, problem: Problem, coded: Mapping[str, _Coded], rows: np.ndarray, checked: np.ndarray
    ) -> dict[str, _Choice]:
        """For each target the grid's best on `checked`, trained on `rows`."""
        tokens, _ = self._tokens(problem, rows, self.recipe)
        grid = {
            name: [self._head(problem, one, *point) for point in self.recipe.grid]
            for name, one in coded.items()
        }
        best = {name: _Choice(-np.inf, 0, 0, 0) for name in coded}
        everyone = [one for heads in grid.values() for one in heads]

        def after_round(done: int, live: Sequence[Trained]) -> None:
            said = iter(predict(everyone, tokens, checked))
            for name, heads in grid.items():
                truth = coded[name].truth[checked]
                for one in heads:
                    score = coded[name].score(next(said), truth)
                    best[name] = max(best[name], _Choice(score, one.rate, one.decay, done), key=_by_score)

        title = f"Choosing for {problem.encoder}"
        train(title, everyone, tokens, rows, self.recipe, problem.seed, after_round)
        return {name: _usable(choice, problem.encoder, name) for name, choice in best.items()}

    def _fit_as_reference(
        self, problem: Problem, coded: Mapping[str, _Coded], truths: Mapping[str, np.ndarray]
    ) -> dict[str, ProbeFit]:
        rows = np.arange(len(problem.train))
        tokens, test = self._tokens(problem, rows, self.reference)
        grid = {
            name: [
                self._head(problem, one, *point, number=number)
                for number, point in enumerate(self.reference.grid)
            ]
            for name, one in coded.items()
        }
        best = {name: (_Choice(-np.inf, 0, 0, 0), np.zeros(0)) for name in coded}
        everyone = [one for heads in grid.values() for one in heads]

        def after_round(done: int, live: Sequence[Trained]) -> None:
            said = iter(predict(everyone, test, np.arange(len(problem.test))))
            for name, heads in grid.items():
                for one in heads:
                    values = next(said)
                    choice = _Choice(coded[name].score(values, truths[name]), one.rate, one.decay, done)
                    if choice.score > best[name][0].score:
                        best[name] = choice, values

        title = f"Probing {problem.encoder}"
        train(title, everyone, tokens, rows, self.reference, problem.seed, after_round)
        found = {}
        for name, (choice, values) in best.items():
            note = self._note(problem, _usable(choice, problem.encoder, name), self.reference)
            heads = f"best of {len(self.reference.grid)} heads × {ROUNDS} epochs on the held-out clips"
            found[name] = coded[name].fit(values, f"{heads}; {note}")
        return found

    def _tokens(self, problem: Problem, rows: np.ndarray, recipe: Recipe) -> tuple[Tokens, Tokens]:
        tokens = Tokens(problem.encoder, problem.train, device=problem.device)
        if recipe.standardised:
            tokens.standardise(rows)
        return tokens, Tokens(problem.encoder, problem.test, like=tokens, device=problem.device)

    def _head(
        self, problem: Problem, one: _Coded, rate: float, decay: float, rounds: int = ROUNDS, number: int = 0
    ) -> Trained:
        """A head at its start: the same for every rate and decay, unless a `number` says otherwise."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([problem.seed, number]).generate_state(1)[0]))
            head = AttentiveHead(problem.train.shape[2], one.goal.outputs, self.depth)
        return Trained(head.to(device_named(problem.device)), one.goal, rate, decay, rounds)

    def _note(self, problem: Problem, choice: _Choice, recipe: Recipe) -> str:
        heads = count_heads(problem.train.shape[2])
        said = [f"rate {choice.rate:g}, decay {choice.decay:g}, {choice.rounds} of {ROUNDS} rounds"]
        if choice.rate in (max(recipe.rates), min(recipe.rates)):
            said.append("rate at the grid's edge")
        if heads != MAX_HEADS:
            said.append(f"{heads} attention heads: {MAX_HEADS} do not divide {problem.train.shape[2]}")
        return "; ".join(said)


def attentive() -> AttentiveProbe:
    """Three self-attention blocks and a cross-attention: V-JEPA 2's."""
    return AttentiveProbe(3)


def attentive_small() -> AttentiveProbe:
    """The cross-attention alone: V-JEPA's."""
    return AttentiveProbe(0)


@dataclass(frozen=True)
class _Choice:
    score: float
    rate: float
    decay: float
    rounds: int


def _by_score(choice: _Choice) -> float:
    return choice.score


def _usable(choice: _Choice, encoder: str, target: str) -> _Choice:
    if not np.isfinite(choice.score):
        raise DataError(
            f"every attentive head of encoder {encoder!r} on {target!r} overflowed; check its scale"
        )
    return choice


@dataclass(frozen=True)
class _Coded:
    """A target as heads learn it, and the way back: class names, or mean and deviation of quantities."""

    truth: Shaped[np.ndarray, " clips *dims"]
    goal: Goal
    names: Shaped[np.ndarray, " classes"] | None
    mean: Float[np.ndarray, " dims"]
    scale: Float[np.ndarray, " dims"]

    @staticmethod
    def of(truth: Shaped[np.ndarray, " clips *dims"]) -> _Coded:
        nothing = np.zeros(0)
        if truth.dtype.kind in "UO":
            names, numbers = np.unique(truth, return_inverse=True)
            return _Coded(truth, Goal(torch.from_numpy(numbers), len(names)), names, nothing, nothing)
        mean = truth.mean(0, dtype=np.float64)
        scale = np.where(varying_dims(truth), truth.std(0, dtype=np.float64), 1.0)
        values = torch.from_numpy(((truth - mean) / scale).astype(np.float32))
        return _Coded(truth, Goal(values, truth.shape[1]), None, mean, scale)

    def score(self, said: np.ndarray, truth: np.ndarray) -> float:
        """Accuracy, or the mean R² of dimensions that vary here; −∞ where a number overflowed."""
        if not np.isfinite(said).all():
            return -np.inf
        if self.names is not None:
            return float((self.names[said.argmax(1)] == truth).mean())
        varying = varying_dims(truth)
        if not varying.any():
            return -float(((said * self.scale + self.mean - truth) ** 2).mean())
        errors = (said * self.scale + self.mean - truth)[:, varying]
        return float((1 - (errors**2).mean(0) / truth[:, varying].var(0)).mean())

    def fit(self, said: np.ndarray, note: str) -> ProbeFit:
        if self.names is not None:
            return ProbeFit(self.names[said.argmax(1)], None, note, self.names, said)
        return ProbeFit(said * self.scale + self.mean, None, note)


def _inner_split(problem: Problem) -> tuple[Int64[np.ndarray, " fit"], Int64[np.ndarray, " checked"]]:
    """A fifth of the training episodes apart; the same for every target, so that none changes another's
    figure."""
    count = min(CHECKED_PARTS, len(np.unique(problem.episodes)))
    if count < 2:
        raise DataError("choosing a probe's rates needs at least 2 training episodes; add episodes")
    splitter = GroupShuffleSplit(1, test_size=1 / count, random_state=problem.seed)
    return next(iter(splitter.split(np.zeros(len(problem.episodes)), groups=problem.episodes)))
