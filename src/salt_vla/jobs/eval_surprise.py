"""Suites of film pairs within `eval`: what they cannot read is refused, and each seed has a table of its own.

Knows encoders by what was asked for; neither predictors nor films.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from salt_vla.errors import UserError
from salt_vla.evaluation.results import SuiteResult, tabulate
from salt_vla.evaluation.settings import HOW_COMPUTED, OF_FILM_PAIRS, EvalSettings
from salt_vla.evaluation.surprise_models import COPY_LAST, PIXEL_DIFFERENCE
from salt_vla.jobs.eval_encoders import Spec, is_of, require_seeds, seed_of, seeds_of
from salt_vla.registry import SURPRISE, resolve

WITHOUT_SEED = (COPY_LAST, PIXEL_DIFFERENCE)  # The same at every seed.
READ = ("seed", *OF_FILM_PAIRS, *HOW_COMPUTED)
OF_FILMS = "intphys2"  # Whose --data is a folder of films, and no data set.


@dataclass(frozen=True)
class _Asked:
    label: str
    what: str
    seed: int | None


def require_surprise(
    specs: Sequence[Spec], suites: Sequence[str], settings: EvalSettings, frame_stride: int | None
) -> None:
    """Raise `UserError` for what the call's suites of film pairs, if there are any, would pass over."""
    films = [suite for suite in suites if suite in SURPRISE]
    if not films:
        return
    is_mixed = len(films) < len(suites)
    if is_mixed and OF_FILMS in films:
        others = ", ".join(suite for suite in suites if suite not in SURPRISE)
        raise UserError(
            f"--data is a folder of films for {OF_FILMS} and a data set for {others}; give {OF_FILMS} a call "
            "of its own"
        )
    for spec in specs:
        if spec.layer is not None:
            raise UserError(
                f"{', '.join(films)} ask a predictor, which reads its encoder whole: leave @{spec.layer} of "
                f"{spec.label} off"
            )
    usual = EvalSettings()
    unread = [
        f"--{each.name.replace('_', '-')}"
        for each in fields(settings)
        if each.name not in READ and getattr(settings, each.name) != getattr(usual, each.name)
    ]
    unread += ["--frame-stride"] * (frame_stride is not None)
    if is_mixed:  # The other suites read the rest.
        unread = [name for name in unread if name == "--fraction"]
    if unread:
        raise UserError(f"{', '.join(films)} learn nothing and do not read {', '.join(unread)}; leave it off")


def surprise_results(
    specs: Sequence[Spec], suites: Sequence[str], data: str, settings: EvalSettings, against: Sequence[str]
) -> list[SuiteResult]:
    """The tables of every seed that labels stand for. Raises `UserError`."""
    asked = [_Asked(spec.label, spec.what, seed_of(spec.what)) for spec in specs]
    require_seeds(asked)
    seeds = seeds_of(asked, settings.seed)
    results = []
    for seed in seeds:
        encoders = {each.label: each.what for each in asked if is_of(seed, each, asked)}
        tag = f"-seed{seed}" if len(seeds) > 1 else ""
        own = replace(settings, seed=seed)
        scored = [one for suite in suites for one in resolve(SURPRISE, suite)(encoders, data, own, tag)]
        results += tabulate(scored, seed, against=against)
    return results
