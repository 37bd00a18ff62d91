"""Curves of several runs over one another, as PNG bytes. Knows points and names alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from salt_vla.errors import DataError
from salt_vla.reports.canvas import CHART_WIDTH, legend, new_figure, quiet_axes, theme, to_png

DASHES = ("-", "--", ":", "-.")  # More runs than colours differ in these.
LONGEST_NAME = 28
NAMES_A_LINE = 2


def overlay(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    across: str,
    up: str,
    dark: bool = False,
    lowest: float | None = None,
) -> bytes:
    """`curves`: (x, values) by run. What falls below `lowest` is left to the imagination where anything lies
    above it: an early, hopeless point must not flatten the rest. Raises `DataError` where no run has a point.
    """
    drawn = {name: points for name, points in curves.items() if points[0]}
    if not drawn:
        raise DataError(f"no run has a curve of {up} to draw")
    colours = theme(dark)
    lines = -(-len(drawn) // NAMES_A_LINE)
    figure = new_figure(CHART_WIDTH, 2.7 + 0.2 * lines, colours.paper)
    axes = figure.subplots()
    quiet_axes(axes, colours)
    for place, (name, (x, values)) in enumerate(drawn.items()):
        colour = colours.series[place % len(colours.series)]
        dash = DASHES[place // len(colours.series) % len(DASHES)]
        shown = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
        marker = "o" if len(x) <= 30 else ""
        axes.plot(x, values, dash, color=colour, linewidth=1.5, marker=marker, markersize=3, label=shown)
    heights = [value for _, values in drawn.values() for value in values]
    if lowest is not None and min(heights) < lowest < max(heights):
        axes.set_ylim(bottom=lowest)
    axes.set_xlabel(across, color=colours.quiet, fontsize=9)
    axes.set_ylabel(up, color=colours.quiet, fontsize=9)
    legend(axes, colours, columns=NAMES_A_LINE)
    figure.tight_layout()
    return to_png(figure)
