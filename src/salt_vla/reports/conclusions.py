"""What the figures allow to be said, as sentences: a pure function of rows, comparisons and R².

It claims a difference only where a paired interval excludes zero, and says plainly what was not reached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from salt_vla.reports.rows import (
    Difference,
    Row,
    Score,
    interval,
    number,
    pool_differences,
    pool_scores,
    suites_of,
    target_label,
    told_from,
)

# The targets a video encoder for robots is for; the first sentence speaks of these.
HEADLINE_WORDS = ("action", "velocity")
# An R² within this of zero counts as level with its baseline: it has no interval of its own.
R2_MARGIN = 0.01
# More targets than this are summed up instead of listed.
MOST_LISTED = 3
_RIVALS = {
    "random": "the same encoder at random initialisation",
    "teacher": "its teacher",
    "pixels": "downsampled pixels",
}


def conclusions(
    rows: Sequence[Row],
    comparisons: Sequence[Row],
    validation_r2: Mapping[str, float | None],
    num_seeds: int,
    suite: str = "",
    student: str = "student",
    suite_names: Mapping[str, str] | None = None,
) -> list[str]:
    """One paragraph, a sentence an entry, the main finding first.

    `suite` is the one to speak of (default: that of the first row); other suites get one sentence each, under
    their `suite_names` where there are any.
    `validation_r2` holds `r2_channel_mean`, `r2_position_mean` and `r2_copy_nearest` on held-out clips.
    """
    suites = suites_of([*rows, *comparisons])
    main = suite or (suites[0] if suites else "")
    scores = pool_scores(rows)
    duels = told_from(student, pool_differences(comparisons))
    here = [duel for duel in duels if duel.suite == main]
    sentences = _against_random([duel for duel in here if duel.against == "random"])
    sentences += [_against(here, rival) for rival in ("teacher", "pixels")]
    sentences += _unread([score for score in scores if score.suite == main], student)
    sentences += _prediction(validation_r2)
    for other in suites:
        if other != main:
            name = (suite_names or {}).get(other, target_label(other))
            sentences += _other_suite(name, [duel for duel in duels if duel.suite == other])
    return [*sentences, _seeds(num_seeds, here)]


def _against_random(duels: Sequence[Difference]) -> list[str]:
    if not duels:
        return ["Nothing is claimed about what training added: no comparison with random init was made."]
    headline = [duel for duel in duels if any(word in duel.target for word in HEADLINE_WORDS)]
    rest = [duel for duel in duels if duel not in headline]
    if not headline:
        return [_verdict(duels, _RIVALS["random"], detailed=True)]
    first = _verdict(headline, _RIVALS["random"], detailed=True)
    return [first, _elsewhere(rest)] if rest else [first]


def _verdict(duels: Sequence[Difference], rival: str, detailed: bool = False) -> str:
    """Beats, does not beat or is beaten by: one sentence, from paired intervals alone."""
    ahead, behind, level = _split(duels)
    if ahead and not (behind or level):
        return f"The student beats {rival} on {_listed(ahead, detailed)}, paired intervals apart from zero."
    undecided = f"; on {_names(level)} no difference can be shown" if level else ""
    if ahead:
        lost = f", but is worse on {_listed(behind, detailed)}" if behind else ""
        return f"The student beats {rival} on {_listed(ahead, detailed)}{lost}{undecided}."
    if behind:
        return f"The student does not beat {rival}: it is worse on {_listed(behind, detailed)}{undecided}."
    return f"The student does not beat {rival}: no difference can be shown on {_names(level)}."


def _elsewhere(duels: Sequence[Difference]) -> str:
    ahead, behind, level = _split(duels)
    parts = []
    if ahead:
        parts.append(f"training helped on {_listed(ahead)}")
    if behind:
        parts.append(f"training hurt on {_listed(behind)}")
    if level:
        parts.append(f"on {_names(level)} no effect of training can be shown")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _against(duels: Sequence[Difference], rival: str) -> str:
    met = [duel for duel in duels if duel.against == rival]
    if not met:
        return f"The student was not compared with {_RIVALS[rival]}."
    return _verdict(met, _RIVALS[rival])


def _unread(scores: Sequence[Score], student: str) -> list[str]:
    """Targets where the student's own interval does not clear the constant predictor."""
    constant = {(score.target, score.metric): score.value for score in scores if score.encoder == "constant"}
    missed = [
        target_label(score.target)
        for score in scores
        if score.encoder == student
        and math.isfinite(score.low)
        and (score.target, score.metric) in constant
        and score.low <= constant[score.target, score.metric]
    ]
    if not missed:
        return []
    where = _join(missed)
    return [f"Nothing is read out on {where}: the student's interval does not clear the constant predictor."]


def _prediction(r2: Mapping[str, float | None]) -> list[str]:
    """What the student's predictions of masked latents are worth, against the three baselines."""
    channel, position, copy = (
        _finite(r2.get(name)) for name in ("r2_channel_mean", "r2_position_mean", "r2_copy_nearest")
    )
    if position is None or channel is None:
        return ["R² on held-out clips was not measured: nothing is claimed about the predictions."]
    if channel <= R2_MARGIN:
        return [
            "The student's predictions do not beat the mean of each channel "
            f"(held-out R² {_signed(channel)}): it has learned nothing of its targets."
        ]
    copying = "" if copy is None else f"copying the nearest visible token (R² {_signed(copy)})"
    if position <= R2_MARGIN:
        also = f" It does beat {copying}." if copy is not None and copy > R2_MARGIN else ""
        return [
            f"The student does not beat the per-position mean (held-out R² {_signed(position)}; "
            f"{_signed(channel)} against the channel mean): it has learned the static background.{also}"
        ]
    start = f"The student's predictions beat the per-position mean (held-out R² {_signed(position)})"
    if copy is None:
        return [f"{start}: it has learned more than the static background."]
    if copy <= R2_MARGIN:
        return [f"{start}, but not {copying}: what it predicts could be had from the neighbouring token."]
    return [f"{start} and {copying}: it has learned something of what changes in a clip."]


def _other_suite(name: str, duels: Sequence[Difference]) -> list[str]:
    """Wins and losses of a further suite, as counts; its table holds the figures."""
    parts = []
    for rival, rival_name in _RIVALS.items():
        met = [duel for duel in duels if duel.against == rival]
        ahead, behind, _ = _split(met)
        if met:
            worse = f" (behind on {len(behind)})" if behind else ""
            parts.append(f"{rival_name} on {len(ahead)} of {len(met)} targets{worse}")
    return [f"{name[:1].upper()}{name[1:]}: the student is ahead of {_join(parts)}."] if parts else []


def _seeds(num_seeds: int, duels: Sequence[Difference]) -> str:
    if num_seeds <= 1:
        return (
            "All this is one seed: the intervals cover the choice of held-out episodes, not the luck of the "
            "initial weights and of the order of clips; another seed may move every figure."
        )
    spread = f" ({'; '.join(dict.fromkeys(duel.spread for duel in duels))})" if duels else ""
    return (
        f"Figures are means over {num_seeds} seeds; a difference counts only where its paired interval"
        f"{spread} excludes zero."
    )


def _split(
    duels: Iterable[Difference],
) -> tuple[list[Difference], list[Difference], list[Difference]]:
    duels = list(duels)
    ahead = [duel for duel in duels if duel.ahead]
    behind = [duel for duel in duels if duel.behind]
    return ahead, behind, [duel for duel in duels if not (duel.ahead or duel.behind)]


def _listed(duels: Sequence[Difference], detailed: bool = False) -> str:
    """Targets and differences one by one (`detailed`: with intervals while they are few); where they are
    many and no detail is asked for, how many and from where to where."""
    if len(duels) > MOST_LISTED and not detailed:
        least, *_, most = sorted(duels, key=lambda duel: abs(duel.difference))
        ends = [f"{number(abs(end.difference))} ({target_label(end.target)})" for end in (least, most)]
        return f"{len(duels)} targets by {ends[0]} to {ends[1]}"
    texts = []
    for duel in duels:
        few = detailed and len(duels) <= MOST_LISTED
        spread = " " + interval(duel.low, duel.high, signed=True) if few else ""
        texts.append(f"{target_label(duel.target)} ({_signed(duel.difference)}{spread})")
    return _join(texts)


def _names(duels: Sequence[Difference]) -> str:
    return _join([target_label(duel.target) for duel in duels])


def _join(texts: Sequence[str]) -> str:
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)


def _signed(value: float) -> str:
    return number(value, signed=True)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
