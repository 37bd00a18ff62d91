"""How every picture looks: colours for light and dark pages, fonts, and figures as PNG bytes.

The only place that makes Matplotlib figures; nothing here knows what is drawn.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from salt_vla.reports.rows import ENCODERS

CHART_DPI = 200
CHART_WIDTH = 5.2  # inches: readable on a telephone, not lost on a wide screen
# Legible on white and on near-black, for pictures that are made once for both.
NEUTRAL = "#7d8187"


@dataclass(frozen=True)
class Theme:
    """Colours of a chart; `paper` is the page's own card colour, so that the chart sits on it unseen."""

    paper: str
    ink: str
    quiet: str
    grid: str
    series: tuple[str, ...]


# Okabe and Ito's colours, which the colour-blind can tell apart, shifted for either paper.
_ON_LIGHT = ("#0b66a8", "#c2571a", "#7a4fa3", "#0f8262", "#84888f")
_ON_DARK = ("#5cb3ee", "#f0954f", "#b999e0", "#4cc79e", "#9a9fa7")
LIGHT = Theme("#ffffff", "#24272c", "#6b7077", "#e4e6ea", _ON_LIGHT)
DARK = Theme("#1c1e22", "#e6e7e9", "#9a9fa7", "#34373d", _ON_DARK)
MARKERS = ("o", "s", "^", "D", "v")


def theme(dark: bool) -> Theme:
    return DARK if dark else LIGHT


def encoder_style(encoder: str, others: list[str], colours: Theme) -> tuple[str, str]:
    """(colour, marker) of an encoder: fixed for the known ones, then in turn for the `others`."""
    place = ENCODERS.index(encoder) if encoder in ENCODERS else others.index(encoder)
    return colours.series[place % len(colours.series)], MARKERS[place % len(MARKERS)]


def new_figure(width: float, height: float, facecolor: str = "none", dpi: int = CHART_DPI) -> Figure:
    """An empty figure of `width` × `height` inches that draws without a display."""
    figure = Figure(figsize=(width, height), dpi=dpi, facecolor=facecolor)
    FigureCanvasAgg(figure)
    return figure


def quiet_axes(axes: Axes, colours: Theme, grid: str = "y") -> None:
    """No box, no ticks, a faint grid along one axis: the data is the darkest thing on the page."""
    axes.set_facecolor("none")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, colors=colours.quiet, labelsize=9)
    axes.grid(axis="y" if grid == "y" else "x", color=colours.grid, linewidth=0.8)
    axes.set_axisbelow(True)


def legend(axes: Axes, colours: Theme, columns: int = 3) -> None:
    """A frameless legend above the axes, out of the data's way."""
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False, fontsize=9,
        labelcolor=colours.ink, handlelength=1.6, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def to_png(figure: Figure) -> bytes:
    """The figure as PNG bytes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=figure.dpi, metadata={"Software": None})
    return buffer.getvalue()
