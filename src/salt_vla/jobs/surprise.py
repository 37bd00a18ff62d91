"""`eval --suite intphys2`: how often an impossible film surprises a predictor more than its possible twin."""

from __future__ import annotations

from collections.abc import Mapping

from salt_vla.errors import UserError
from salt_vla.evaluation.bench import EvalSettings
from salt_vla.evaluation.results import Scored


def score(encoders: Mapping[str, str], data: str, settings: EvalSettings) -> list[Scored]:
    """Relative accuracy of every predictor over the pairs of films in the folder `data`, beside random
    weights, copy-last-frame and pixel differences: one a part of the pairs (all, a condition, …).

    `encoders`: runs, checkpoints or V-JEPA 2 folders by the name that tables give them.
    """
    raise UserError(f"surprise on {data} is not there yet for {', '.join(encoders)} ({settings.seed})")
