"""The suite `probes`: quantities computed from a data set's recorded signals, every camera × pooling apart.

Knows how they are split and read, not what is predicted (`targets.py`) nor how a probe is fitted.
"""

from __future__ import annotations

from dataclasses import replace

from salt_vla.evaluation.bench import Bench, short_name
from salt_vla.evaluation.features import TOKENS, Reading
from salt_vla.evaluation.probing import ProbeSet, common_targets, load_probe, probe_suite
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.targets import CAUSAL, build_targets

VERSION = 3
READS: tuple[str, ...] = ()


def score(bench: Bench) -> list[Scored]:
    """Probes fit on training episodes, read once on held-out ones, a suite `camera/pooling` each. Features
    see a clip to its end and no further: targets at its end are causal, means over it are not."""
    settings = bench.settings
    reads_tokens = load_probe(settings.probe).reads == "tokens"
    poolings = (TOKENS,) if reads_tokens else settings.poolings
    readings = [Reading(pooling) for pooling in poolings]
    scored: list[Scored] = []
    for camera in bench.cameras:
        sides = [side.of_camera(camera) for side in (bench.train, bench.test)]
        features = [bench.features(side, readings) for side in sides]
        signals = [bench.signals(side) for side in sides]
        targets = [build_targets(each) for each in signals]
        for reading in readings:
            train, test = (ProbeSet(features[i][reading], targets[i], signals[i].episodes) for i in range(2))
            suite = f"{short_name(camera)}/{reading.pooling}"
            found = probe_suite(
                suite, train, test, settings.seed, settings.probe, settings.protocol, device=settings.device
            )
            bench.notes.extend(common_targets(train, test)[1])
            scored += [replace(one, causal=one.target in CAUSAL) for one in found]
    return scored
