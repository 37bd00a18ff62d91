"""A teacher's check as blocks of a page: verdict, findings, figures, and the picture of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from salt_vla.evaluation.teacher_findings import Finding
from salt_vla.reports.html import Block, Checks, Facts, Figure

CAPTION = (
    "A held-out clip, and below it the teacher's patch tokens of it: their first three principal components "
    "as red, green and blue. Places of one colour are alike to the teacher; noise, stripes or one flat "
    "colour would mean that it sees nothing there."
)
# Figures of a check that a reader of the page wants, and what they are called there.
LABELS = {
    "stored_name": "stored in caches as",
    "dim": "width",
    "depth": "blocks",
    "parameters": "parameters",
    "geometry": "clips",
    "fingerprint": "fingerprint",
    "clips": "clips looked at",
    "mean_square": "mean square of a latent",
    "token_std": "standard deviation within a token",
    "top_share": "share of variance in the top 8 channels",
    "top_share_normalised": "share in the top 8, normalised",
    "mean_mse": "MSE of predicting the channel means",
    "mean_mse_normalised": "MSE of that, normalised",
    "mean_l1_normalised": "L1 of that, normalised",
    "position_share": "share of variance explained by place alone",
    "effective_rank": "effective rank (RankMe, centred)",
    "effective_rank_normalised": "effective rank, normalised",
}
TOPICS = {
    "size": "size",
    "biases": "query and value biases",
    "token_order": "order of tokens",
    "positions": "position table",
    "finite": "numbers",
    "variance": "variance",
    "outlier_channels": "outlier channels",
    "position_share": "background",
    "rank": "effective rank",
    "clips": "clips",
}


def check_blocks(
    verdict: str, findings: Sequence[Finding], figures: Mapping[str, object], picture: bytes
) -> list[Block]:
    """`figures` holds every name of `LABELS`; `picture` is a PNG."""
    return [
        f"Verdict: {verdict}.",
        Checks([(f.severity, TOPICS[f.topic], f.text) for f in findings], title="What was looked at"),
        Facts(
            [(label, plain(figures[name])) for name, label in LABELS.items()], title="The teacher in figures"
        ),
        Figure(picture, CAPTION, "A film strip, and the principal components of its tokens", wide=True),
    ]


def plain(value: object) -> str:
    """A value for people: figures to four places."""
    if isinstance(value, bool | str) or value is None:
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
