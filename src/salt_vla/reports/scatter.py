"""One figure of runs against another, with the line through them, as PNG bytes. Knows points and names."""

from __future__ import annotations

from collections.abc import Sequence

from salt_vla.reports.canvas import CHART_WIDTH, new_figure, quiet_axes, theme, to_png


def scatter(
    points: Sequence[tuple[str, float, float]],
    line: tuple[float, float],
    across: str,
    up: str,
    title: str = "",
    dark: bool = False,
) -> bytes:
    """`points`: (name, x, y); `line`: its slope and where it crosses x = 0."""
    colours = theme(dark)
    figure = new_figure(CHART_WIDTH, 3.6, colours.paper)
    axes = figure.subplots()
    quiet_axes(axes, colours)
    xs = [x for _, x, _ in points]
    ends = [min(xs), max(xs)]
    axes.plot(ends, [line[1] + line[0] * end for end in ends], color=colours.quiet, linewidth=1.2)
    axes.scatter(xs, [y for _, _, y in points], color=colours.series[0], s=26, zorder=3)
    for name, x, y in points:
        axes.annotate(
            name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7.5, color=colours.ink
        )
    axes.set_xlabel(across, color=colours.quiet, fontsize=9)
    axes.set_ylabel(up, color=colours.quiet, fontsize=9)
    if title:
        axes.set_title(title, loc="left", color=colours.ink, fontsize=10, pad=8)
    figure.tight_layout()
    return to_png(figure)
