"""From figures about a teacher to sentences: what is wrong with it, what to mind, and the verdict.

Pure judgement: opens no file and runs no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from salt_vla.evaluation.latent_statistics import TOP_CHANNELS, LatentStatistics
from salt_vla.evaluation.teacher_inspection import PositionOrder, QueryValueBiases, TokenOrder
from salt_vla.teachers.names import TOLERANCE

Severity = Literal["ok", "warn", "bad"]
SPOILT = ("finite", "variance")  # Latents with such a finding have no other figures.
SEVERITIES: tuple[Severity, ...] = ("bad", "warn", "ok")

DEAD_VARIANCE = 1e-8
OWNED_SHARE = 0.5  # of the variance: the other channels are then no more than half of a squared error
OWNED_AFTER = 0.8  # … of the normalised variance: then normalising is no cure
OWNED_TIMES = 3  # … and so many times what 8 channels of this width would hold by right
BACKGROUND_SHARE = 0.5
LOW_RANK_SHARE = 0.05
WIDTHS = {"small": 384, "base": 768, "large": 1024, "huge": 1280}
_FAMILY = re.compile(r"mae|jepa|dino|siglip|vit", re.IGNORECASE)
_LETTER = re.compile(r"vit-?([sblh])(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `topic` is stable, for scripts; `text` is for people."""

    severity: Severity
    topic: str
    text: str


@dataclass(frozen=True)
class Claim:
    """What a name promises. 0: it says nothing of them."""

    name: str
    dim: int
    parameters: int = 0
    depth: int = 0
    heads: int = 0


@dataclass(frozen=True)
class TeacherFacts:
    """All that findings are drawn from."""

    dim: int
    depth: int
    parameters: int
    is_raw: bool
    is_random: bool
    biases: QueryValueBiases
    statistics: LatentStatistics
    token_order: TokenOrder
    positions: PositionOrder
    claim: Claim | None = None
    unreadable: int = 0
    heads: int = 0
    dtype: str = "float32"


def claim_in(name: str) -> Claim | None:
    """What the words of a published model's name say of its width: `videomae-huge`, `dinov2_vitb14`.

    Names of no known family say nothing, so that a run called `larger_batch` claims no size.
    """
    last = name.rstrip("/").rsplit("/", 1)[-1]
    if not _FAMILY.search(last):
        return None
    words = re.split(r"[^a-z]+", last.lower())
    sizes = [size for size in WIDTHS if size in words]
    if letter := _LETTER.search(last):
        sizes += [size for size in WIDTHS if size.startswith(letter[1].lower())]
    return Claim(last, WIDTHS[sizes[0]]) if len(set(sizes)) == 1 else None


def findings_of(facts: TeacherFacts) -> list[Finding]:
    """Everything that was looked at, the worst first."""
    found = [
        *_size(facts),
        *_biases(facts),
        *_numbers(facts),
    ]
    if not any(finding.topic in SPOILT for finding in found):  # Else figures of nothing would be judged.
        found += [*_places(facts), *_outliers(facts), *_background(facts)]
    found += _clips(facts)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def verdict_of(findings: Sequence[Finding]) -> str:
    """The findings that are not ok, in one line."""
    worst = min((SEVERITIES.index(finding.severity) for finding in findings), default=2)
    opening = ("do not use it", "usable, with care", "usable: nothing wrong was found")[worst]
    rest = "; ".join(finding.text for finding in findings if finding.severity != "ok")
    return f"{opening}: {rest}" if rest else opening


def _size(facts: TeacherFacts) -> Iterator[Finding]:
    claim = facts.claim
    own = _words(facts.dim, facts.depth, facts.parameters, facts.heads)
    if claim is None:
        yield Finding("ok", "size", f"{own}; its name claims no size")
        return
    apart = abs(facts.parameters - claim.parameters) > TOLERANCE * claim.parameters
    differs = claim.dim != facts.dim or claim.depth not in (0, facts.depth)
    differs |= 0 not in (claim.heads, facts.heads) and claim.heads != facts.heads
    if differs or (claim.parameters and apart):
        wanted = _words(claim.dim, claim.depth, claim.parameters, claim.heads)
        yield Finding(
            "bad", "size", f"another model than its name says: {own}, but {claim.name!r} means {wanted}"
        )
    else:
        yield Finding("ok", "size", f"{own}, as {claim.name!r} claims")


def _words(dim: int, depth: int, parameters: int, heads: int) -> str:
    """A size in words; zeros are left out."""
    millions = f"{parameters / 1e6:.{1 if parameters > 1e7 else 3}f} M parameters"
    parts = (
        f"{dim} wide",
        f"{depth} block{'s' if depth > 1 else ''}" if depth else "",
        f"{heads} head{'s' if heads > 1 else ''}" if heads else "",
        millions if parameters else "",
    )
    return ", ".join(part for part in parts if part)


def _biases(facts: TeacherFacts) -> Iterator[Finding]:
    biases = facts.biases
    if not biases.total:
        yield Finding("ok", "biases", "it has no query and value biases")
    elif facts.is_random and biases.zero:
        yield Finding("ok", "biases", "query and value biases are zero, as in fresh random weights")
    elif biases.zero == biases.total:
        yield Finding(
            "bad",
            "biases",
            "all query and value biases are zero: they were lost in loading or conversion "
            "(transformers 5.0–5.x does so with VideoMAE), so the latents are not the published model's",
        )
    elif biases.zero:
        yield Finding(
            "warn", "biases", f"{biases.zero} of {biases.total} query and value biases are zero throughout"
        )
    else:
        yield Finding("ok", "biases", f"all {biases.total} query and value biases are there")


def _places(facts: TeacherFacts) -> Iterator[Finding]:
    order, positions = facts.token_order, facts.positions
    share = f"{order.found} of {order.tried} repainted places"
    if not order.tried:
        yield Finding("ok", "token_order", "the order of its tokens cannot be judged: its own grid is coarse")
    elif 2 * order.found < order.tried:
        yield Finding(
            "bad",
            "token_order",
            f"tokens are not in the order of their places: only {share} changed their own token most",
        )
    else:
        yield Finding("ok", "token_order", f"{share} changed their own token most")
    match positions.judgement:
        case "shuffled":
            yield Finding(
                "bad",
                "positions",
                "its position table is permuted: on a grey clip tokens have close companions "
                f"({positions.nearest:.2f} of a random pair's distance), but not beside them "
                f"({positions.neighbours:.2f})",
            )
        case "ordered":
            yield Finding(
                "ok",
                "positions",
                f"tokens side by side are alike ({positions.neighbours:.2f} of random pairs)",
            )
        case _:
            yield Finding("ok", "positions", "positions cannot be judged: its tokens show no order in space")


def _numbers(facts: TeacherFacts) -> Iterator[Finding]:
    statistics = facts.statistics
    if statistics.finite_share < 1:
        cure = (
            "its weights or its config.json are damaged: fetch it again"
            if facts.dtype == "float32"
            else f"load it as float32, not {facts.dtype}"
        )
        yield Finding(
            "bad", "finite", f"{1 - statistics.finite_share:.2%} of its numbers are NaN or infinite: {cure}"
        )
        return
    if statistics.mean_mse_normalised < DEAD_VARIANCE or statistics.mean_mse < DEAD_VARIANCE:
        yield Finding("bad", "variance", "its latents do not vary between clips or tokens")


def _outliers(facts: TeacherFacts) -> Iterator[Finding]:
    statistics = facts.statistics
    by_right = TOP_CHANNELS / facts.dim
    limit, after_limit = (
        min(max(share, OWNED_TIMES * by_right), 0.99) for share in (OWNED_SHARE, OWNED_AFTER)
    )
    share, after = statistics.top_share, statistics.top_share_normalised
    what = "raw residual stream: " if facts.is_raw else ""
    if share <= limit:
        text = f"{share:.0%} of the variance lies in {TOP_CHANNELS} of {facts.dim} channels"
        yield Finding("ok", "outlier_channels", text)
        return
    text = f"{what}{share:.0%} of variance in {TOP_CHANNELS} channels; "
    if after <= after_limit:
        yield Finding("warn", "outlier_channels", f"{text}use normalised targets ({after:.0%} after)")
    else:
        cure = (
            "take its final norm (--final-norm model), a teacher that has one, or another layer"
            if facts.is_raw
            else "take its raw stream (--final-norm none), another layer or another teacher"
        )
        yield Finding(
            "bad", "outlier_channels", f"{text}normalised targets leave {after:.0%} there, so {cure}"
        )


def _background(facts: TeacherFacts) -> Iterator[Finding]:
    statistics = facts.statistics
    if statistics.position_share > BACKGROUND_SHARE:
        yield Finding(
            "warn",
            "position_share",
            f"{statistics.position_share:.0%} of the variance is the mean of each token place: "
            "read R² against position means, and consider centred targets",
        )
    rank = statistics.effective_rank_normalised
    if 0 < rank < LOW_RANK_SHARE * facts.dim:
        yield Finding("warn", "rank", f"its latents fill about {rank:.0f} of {facts.dim} dimensions")


def _clips(facts: TeacherFacts) -> Iterator[Finding]:
    if facts.unreadable:
        yield Finding("warn", "clips", f"{facts.unreadable} of the chosen clips could not be read")
