"""Probes on both sides of a split: every encoder on every target, scored on held-out clips.

Joins features, a probe of the table `PROBES`, and scores; knows neither videos nor how tables look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from salt_vla.errors import ConfigError, DataError
from salt_vla.evaluation.probes import Problem, check_classes, check_split
from salt_vla.evaluation.results import CONSTANT, Scored, SuiteResult, tabulate
from salt_vla.evaluation.statistics import EpisodeSums, accuracy_sums, r2_sums, varying_dims
from salt_vla.registry import PROBES, resolve

if TYPE_CHECKING:
    from jaxtyping import Float, Int64, Shaped

    from salt_vla.evaluation.probes import Probe, ProbeFit


@dataclass(frozen=True)
class ProbeSet:
    """One side of a split: features by encoder, (clips, dims) or (clips, tokens, dims) as the probe reads
    them, targets by name, and each clip's episode.

    A target of text (clips,) is classified, one of numbers (clips, dims) regressed. Features may be mapped
    from a file: rows are read when they are asked for.
    """

    features: Mapping[str, Float[np.ndarray, " clips *dims"]]
    targets: Mapping[str, Shaped[np.ndarray, " clips *dims"]]
    episodes: Int64[np.ndarray, " clips"]

    def __post_init__(self) -> None:
        clips = len(self.episodes)
        if not clips:
            raise DataError("a probe needs clips on both sides of the split, and one side has none")
        for kind, arrays in (("features of encoder", self.features), ("target", self.targets)):
            for name, array in arrays.items():
                if len(array) != clips:
                    raise DataError(f"{kind} {name!r} has {len(array)} rows for {clips} clips")


def load_probe(name: str, protocol: str = "held-out") -> Probe:
    """A probe of the table. Raises `UserError` naming those there are, or those that know the protocol."""
    found: Probe = resolve(PROBES, name)()
    if protocol not in found.protocols:
        able = [other for other in PROBES if protocol in resolve(PROBES, other)().protocols]
        raise ConfigError(
            f"probe {name!r} knows no protocol {protocol!r}; with it use one of: {', '.join(able) or 'none'}"
        )
    return found


def probe_suite(
    suite: str,
    train: ProbeSet,
    test: ProbeSet,
    seed: int,
    probe: str = "linear",
    protocol: str = "held-out",
    causal: bool = False,
    device: str = "auto",
) -> list[Scored]:
    """Every encoder on every target that both sides offer; the `constant` predictor is always there."""
    fits = fit_probes(train, test, seed, probe, protocol, device)
    return [
        Scored(
            encoder,
            suite,
            target,
            _sums(test.targets[target], fit, test.episodes),
            fit.alpha,
            fit.note,
            probe,
            protocol,
            causal,
        )
        for encoder, by_target in fits.items()
        for target, fit in by_target.items()
    ]


def fit_probes(
    train: ProbeSet,
    test: ProbeSet,
    seed: int,
    probe: str = "linear",
    protocol: str = "held-out",
    device: str = "auto",
) -> dict[str, dict[str, ProbeFit]]:
    """Predictions for the held-out clips by encoder (`constant` last) and target. Raises `ConfigError` for a
    probe that does not know the protocol."""
    check_split(train.episodes, test.episodes)
    targets, _ = common_targets(train, test)
    absent = sorted(set(train.features) ^ set(test.features))
    if absent:
        raise DataError(f"encoder {absent[0]!r} has features on one side of the split only")
    chosen = load_probe(probe, protocol)
    truth = {name: test.targets[name] for name in targets}
    nothing = np.zeros((len(train.episodes), 0)), np.zeros((len(test.episodes), 0))
    fits = {}
    for encoder in [*(name for name in train.features if name != CONSTANT), CONSTANT]:
        is_constant = encoder == CONSTANT
        features = nothing if is_constant else (train.features[encoder], test.features[encoder])
        problem = Problem(
            encoder,
            features[0],
            features[1],
            {name: train.targets[name] for name in targets},
            train.episodes,
            seed,
            truth if protocol != "held-out" and not is_constant else None,
            device,
        )
        fits[encoder] = (load_probe("linear") if is_constant else chosen).fit(problem)
    return fits


def run_probe_suite(
    suite: str, train: ProbeSet, test: ProbeSet, seed: int, reference: str = "random"
) -> SuiteResult:
    """Linear probes and their table, in one call; `notes` say which targets were left out."""
    (result,) = tabulate(probe_suite(suite, train, test, seed), seed, reference)
    result.notes.extend(common_targets(train, test)[1])
    return result


def common_targets(train: ProbeSet, test: ProbeSet) -> tuple[list[str], list[str]]:
    """Targets that both sides offer and that can be scored, and a sentence on each that is left out."""
    targets, notes = [], []
    for name in [*train.targets, *(n for n in test.targets if n not in train.targets)]:
        if name not in train.targets or name not in test.targets:
            notes.append(f"target {name!r} is left out: only one side of the split has it")
        elif is_class(test.targets[name]):
            check_classes(name, train.targets[name], test.targets[name])
            targets.append(name)
        elif not varying_dims(test.targets[name]).any():
            notes.append(f"target {name!r} is left out: it is the same on every held-out clip")
        else:
            targets.append(name)
    if not targets:
        raise DataError(f"nothing to probe: {'; '.join(notes) or 'no target was given'}")
    return targets, notes


def is_class(target: Shaped[np.ndarray, " clips *dims"]) -> bool:
    return target.dtype.kind in "UO"


def _sums(truth: Shaped[np.ndarray, " clips *dims"], fit: ProbeFit, episodes: np.ndarray) -> EpisodeSums:
    make = accuracy_sums if is_class(truth) else r2_sums
    return make(truth, fit.predicted, episodes)
