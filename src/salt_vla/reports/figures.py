"""Charts of a run and of its results, from metrics rows and result rows to PNG bytes.

Film strips are drawn in `sheets.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes

from salt_vla.errors import DataError
from salt_vla.reports.canvas import (
    CHART_WIDTH,
    Theme,
    encoder_style,
    legend,
    new_figure,
    quiet_axes,
    theme,
    to_png,
)
from salt_vla.reports.rows import (
    ENCODERS,
    Row,
    Score,
    encoder_label,
    in_report_order,
    metric_label,
    number,
    pool_scores,
    target_label,
)

R2_NAMES = {
    "r2_channel_mean": "channel mean",
    "r2_position_mean": "per-position mean",
    "r2_copy_nearest": "copy nearest visible",
}
ZERO_LINE = "as good as the mean"
# What falls below is said in words: one early, hopeless point must not flatten the rest of the curve.
LOWEST_R2_SHOWN = -1.5
LOWEST_SCORE_SHOWN = -0.25

CURVES_CAPTION = (
    "Loss and R² by step: thin lines on training batches, thick lines on held-out clips. "
    "R² = 1 − squared error ÷ squared error of a baseline; at zero the predictions are as good as that "
    "baseline, below it they are worse."
)
PROBES_CAPTION = "Probes on held-out episodes: the dot is the value, the line its 95 % interval."


def curves(rows: Sequence[Row], title: str = "", dark: bool = False) -> bytes:
    """Loss above, R² below (where the run has one), training and held-out, over a shared step axis.

    `rows` are a run's metrics as read from metrics.jsonl; rows of another kind are passed over. Raises
    `DataError` when no row has a loss.
    """
    colours = theme(dark)
    if not _points(rows, "train", "loss") and not _points(rows, "val", "loss"):
        whose = f" for {title}" if title else ""
        raise DataError(f"no loss to draw{whose}: the metrics hold no train or val row")
    with_r2 = [name for name in R2_NAMES if _points(rows, "val", name) or _points(rows, "train", name)]
    figure = new_figure(CHART_WIDTH, 4.6 if with_r2 else 2.6, colours.paper)
    axes = figure.subplots(2 if with_r2 else 1, 1, sharex=True, squeeze=False)[:, 0]
    _loss_panel(axes[0], rows, colours, title)
    if with_r2:
        _r2_panel(axes[1], rows, with_r2, colours)
    axes[-1].set_xlabel("step", color=colours.quiet, fontsize=9)
    figure.tight_layout(h_pad=1.8)
    return to_png(figure)


def probe_bars(rows: Iterable[Row], suite: str = "", dark: bool = False) -> bytes:
    """A dot and its interval an encoder, targets down; `suite` empty takes all rows.

    Values below −0.25 are drawn at the edge with their figure beside them. Raises `DataError` when the suite
    has no rows.
    """
    scores = [score for score in pool_scores(rows) if suite in ("", score.suite)]
    if not scores:
        raise DataError(f"no result rows to draw{f' for suite {suite}' if suite else ''}")
    colours = theme(dark)
    encoders = in_report_order(score.encoder for score in scores)
    targets = list(dict.fromkeys((score.target, score.metric) for score in scores))
    spread = 0.13
    height = 1.1 + len(targets) * max(0.42, len(encoders) * spread + 0.12)
    figure = new_figure(CHART_WIDTH, height, colours.paper)
    axes = figure.subplots()
    quiet_axes(axes, colours, grid="x")
    others = [name for name in encoders if name not in ENCODERS]
    pitch = 0.72 / max(1, len(encoders) - 1) if len(encoders) > 1 else 0.0
    for place, encoder in enumerate(encoders):
        own = [score for score in scores if score.encoder == encoder]
        heights = [targets.index((s.target, s.metric)) - 0.36 + place * pitch for s in own]
        _dots(axes, own, heights, encoder_style(encoder, others, colours), encoder_label(encoder))
    _frame_of_targets(axes, targets, scores, colours)
    legend(axes, colours)
    figure.tight_layout()
    return to_png(figure)


def _points(rows: Sequence[Row], kind: str, name: str) -> list[tuple[int, float]]:
    """(step, value) of the finite entries `name` in the rows of one kind, in step order."""
    found = [(int(row["step"]), row[name]) for row in rows if row.get("kind") == kind and name in row]
    return sorted((step, float(value)) for step, value in found if value is not None and math.isfinite(value))


def _line(axes: Axes, points: list[tuple[int, float]], colour: str, held_out: bool, label: str) -> None:
    if not points:
        return
    steps, values = zip(*points, strict=True)
    marker = "o" if held_out and len(points) <= 30 else ""
    axes.plot(
        steps, values, color=colour, linewidth=1.8 if held_out else 0.9, alpha=1.0 if held_out else 0.75,
        marker=marker, markersize=3.5, label=label, zorder=3 if held_out else 2,
    )  # fmt: skip


def _loss_panel(axes: Axes, rows: Sequence[Row], colours: Theme, title: str) -> None:
    quiet_axes(axes, colours)
    _line(axes, _points(rows, "train", "loss"), colours.quiet, False, "train")
    _line(axes, _points(rows, "val", "loss"), colours.series[0], True, "held out")
    axes.set_ylabel("loss", color=colours.quiet, fontsize=9)
    legend(axes, colours)
    if title:
        axes.set_title(title, loc="right", color=colours.ink, fontsize=10, pad=8)


def _r2_panel(axes: Axes, rows: Sequence[Row], names: Sequence[str], colours: Theme) -> None:
    quiet_axes(axes, colours)
    lowest = 0.0
    for name, colour in zip(names, colours.series, strict=False):
        held_out, train = _points(rows, "val", name), _points(rows, "train", name)
        _line(axes, train, colour, False, "" if held_out else R2_NAMES[name])
        _line(axes, held_out, colour, True, R2_NAMES[name])
        lowest = min([lowest, *(value for _, value in held_out + train)])
    axes.axhline(0, color=colours.ink, linewidth=1.0, zorder=1)
    bottom = max(lowest, LOWEST_R2_SHOWN) - 0.12
    axes.set_ylim(bottom, 1.04)
    axes.text(
        1.01, 0, ZERO_LINE.replace(" the", "\nthe"), transform=axes.get_yaxis_transform(),
        va="center", color=colours.ink, fontsize=8,
    )  # fmt: skip
    if lowest < LOWEST_R2_SHOWN:
        note = f"not shown: down to {number(lowest)}"
        axes.text(
            0.99, 0.03, note, transform=axes.transAxes, color=colours.quiet, fontsize=8, ha="right",
            bbox={"facecolor": colours.paper, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip
    axes.set_ylabel("R² against", color=colours.quiet, fontsize=9)
    legend(axes, colours)


def _dots(
    axes: Axes, scores: Sequence[Score], heights: Sequence[float], style: tuple[str, str], label: str
) -> None:
    colour, marker = style
    axes.scatter(
        [max(score.value, LOWEST_SCORE_SHOWN) for score in scores], heights,
        color=colour, marker=marker, s=26, label=label, zorder=3, linewidths=1.2,
    )  # fmt: skip
    for score, height in zip(scores, heights, strict=True):
        if math.isfinite(score.low) and math.isfinite(score.high) and score.high > LOWEST_SCORE_SHOWN:
            left = max(score.low, LOWEST_SCORE_SHOWN)
            axes.plot([left, score.high], [height, height], color=colour, linewidth=1.6, zorder=2)
        if score.value < LOWEST_SCORE_SHOWN:
            text = f"◂ {number(score.value)}"
            axes.text(LOWEST_SCORE_SHOWN + 0.025, height, text, color=colour, fontsize=7.5, va="center")


def _frame_of_targets(
    axes: Axes, targets: Sequence[tuple[str, str]], scores: Sequence[Score], colours: Theme
) -> None:
    names = [f"{target_label(target)}\n{metric_label(metric)}" for target, metric in targets]
    axes.set_yticks(range(len(targets)), names, color=colours.ink)
    axes.set_ylim(len(targets) - 0.42, -0.58)
    for edge in range(1, len(targets)):
        axes.axhline(edge - 0.5, color=colours.grid, linewidth=0.8)
    finite = [x for score in scores for x in (score.value, score.low, score.high) if math.isfinite(x)]
    left = max(min([0.0, *finite]), LOWEST_SCORE_SHOWN)
    axes.set_xlim(left - 0.03, max([1.0, *finite]) + 0.02)
    axes.axvline(0, color=colours.quiet, linewidth=1.0, zorder=1)
