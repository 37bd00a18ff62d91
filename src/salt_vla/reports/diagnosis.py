"""What encoders' features are like, whatever they are good for: tables, spectra, and a matrix of likeness.

Knows plain objects; not how they were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from salt_vla.reports.canvas import (
    CHART_WIDTH,
    encoder_style,
    legend,
    new_figure,
    quiet_axes,
    theme,
    to_png,
)
from salt_vla.reports.forms import Objects, TableSection, facts_of, to_csv, write_forms
from salt_vla.reports.html import Facts, Figure, ReportContent, Section
from salt_vla.reports.rows import ENCODERS, encoder_label, in_report_order, number
from salt_vla.reports.tables import Cell, Table

SMALLEST_SHARE = 1e-7  # of the variance that is drawn: rounding lies below
MOST_WRITTEN = 16  # lines of a matrix that has its figures written into it
SPECTRUM_CAPTION = (
    "Spectrum of the clips' mean tokens about their mean: the share of the variance on each principal axis, "
    "on a logarithmic scale. A line that falls at once says that few directions hold everything."
)
CKA_CAPTION = (
    "Likeness (CKA, unbiased) of the clips' mean tokens between blocks: 1, the same but for a rotation and a "
    "scale; 0, unrelated. NAME@k is behind block k, an encoder's last line its output. Random weights are "
    "alike too: compare with their line."
)


@dataclass(frozen=True)
class Diagnosis:
    """`encoders`: an object each with `spectrum`, shares of the variance, largest first. `cka` of them,
    `layer_cka` of `layers`: objects {encoder, other, cka}, each pair once. `clips` of `of_clips` held-out
    ones were looked at."""

    clips: int
    of_clips: int
    encoders: Objects
    cka: Objects
    layers: Sequence[str] = ()
    layer_cka: Objects = ()
    notes: Sequence[str] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def diagnosis_tables(found: Diagnosis) -> list[TableSection]:
    """What encoders are like and cost, and how alike they are."""
    names = in_report_order(str(row["encoder"]) for row in found.encoders)
    rows = {str(row["encoder"]): row for row in found.encoders}
    looked_at = f"{found.clips:,} held-out clips" + (
        f" of {found.of_clips:,}, evenly spread" if found.clips < found.of_clips else ""
    )
    speed = Table(
        "What features are like, and what they cost",
        "encoder",
        ("effective rank", "of", "M parameters", "GFLOP a clip", "ms a clip", "frames/s", "GB peak"),
        tuple((encoder_label(name), "") for name in names),
        tuple(_line(rows[name]) for name in names),
        f"Mean tokens of {looked_at}; effective rank (RankMe) at most clips − 1. Milliseconds: one clip at a "
        "time on this machine, the median and the 95th percentile of twenty; a stream asks once a tubelet "
        "for its last whole clip. Peak: of the whole process, up to then.",
    )
    alike = _matrix(f"Likeness of encoders (CKA) on {looked_at}", "encoder", names, found.cka)
    sections = [TableSection("Encoders", [speed, alike])]
    if found.layers:
        layers = _matrix("Likeness of blocks (CKA)", "block", found.layers, found.layer_cka)
        sections.append(TableSection("Blocks", [layers]))
    return sections


def _line(row: Mapping[str, Any]) -> tuple[Cell, ...]:
    return (
        Cell(f"{row['effective_rank']:.1f}"),
        Cell(f"{row['dims']}"),
        Cell(f"{row['parameters'] / 1e6:.2f}" if row["parameters"] else "–"),
        Cell(f"{row['flops_a_clip'] / 1e9:.2f}" if row["flops_a_clip"] else "–"),
        Cell(f"{1e3 * row['p50']:.1f}", f"(p95 {1e3 * row['p95']:.1f})"),
        Cell(f"{row['frames_per_second']:.0f}"),
        Cell(number(row["peak_memory_gb"])),
    )


def _matrix(title: str, corner: str, names: Sequence[str], pairs: Objects) -> Table:
    values = _values(names, pairs)
    labels = [encoder_label(name) for name in names]
    cells = tuple(tuple(Cell(_two(value)) for value in line) for line in values.tolist())
    return Table(title, corner, tuple(labels), tuple((label, "") for label in labels), cells)


def _two(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}".replace("-", "−")


def _values(names: Sequence[str], pairs: Objects) -> np.ndarray:
    places = {name: place for place, name in enumerate(names)}
    values = np.full((len(names), len(names)), np.nan)
    np.fill_diagonal(values, 1.0)
    for pair in pairs:
        one, other = places[pair["encoder"]], places[pair["other"]]
        values[one, other] = values[other, one] = pair["cka"]
    return values


def spectrum_figure(encoders: Objects, dark: bool = False) -> bytes:
    """Shares of the variance by principal axis, a line an encoder."""
    colours = theme(dark)
    figure = new_figure(CHART_WIDTH, 3.4, colours.paper)
    axes = figure.subplots()
    quiet_axes(axes, colours)
    rows = {str(row["encoder"]): row for row in encoders}
    names = in_report_order(rows)
    others = [name for name in names if name not in ENCODERS]
    for name in names:
        shares = np.array(rows[name]["spectrum"], np.float64)
        shares = shares[shares > SMALLEST_SHARE]
        colour, marker = encoder_style(name, others, colours)
        axes.plot(
            np.arange(1, len(shares) + 1), shares, color=colour, linewidth=1.4, marker=marker,
            markersize=3.5, markevery=[0], label=encoder_label(name),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    longest = max(len(row["spectrum"]) for row in rows.values())
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200) if tick <= longest]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("principal axis", color=colours.quiet, fontsize=9)
    axes.set_ylabel("share of the variance", color=colours.quiet, fontsize=9)
    legend(axes, colours, columns=3 if max(map(len, names)) < 16 else 1)
    figure.tight_layout()
    return to_png(figure)


def likeness_figure(names: Sequence[str], pairs: Objects, dark: bool = False) -> bytes:
    """The matrix of CKA, lines between one encoder's blocks and the next one's."""
    colours = theme(dark)
    count = len(names)
    side = max(CHART_WIDTH, 1.6 + 0.36 * count)
    figure = new_figure(side, side, colours.paper)
    axes = figure.subplots()
    axes.set_facecolor("none")
    values = _values(names, pairs)
    axes.imshow(values, vmin=0, vmax=1, cmap="cividis")
    labels = [encoder_label(name) for name in names]
    axes.set_xticks(range(count), labels, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(count), labels)
    axes.tick_params(length=0, colors=colours.ink, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if count <= MOST_WRITTEN:
        for (row, column), value in np.ndenumerate(values):
            ink = "#ffffff" if value < 0.55 else "#101010"
            axes.text(column, row, _two(value), ha="center", va="center", color=ink, fontsize=7)
    owners = [name.rpartition("@")[0] or name for name in names]
    for place in range(1, count):
        if owners[place] != owners[place - 1]:
            axes.axhline(place - 0.5, color=colours.paper, linewidth=2.5)
            axes.axvline(place - 0.5, color=colours.paper, linewidth=2.5)
    figure.tight_layout()
    return to_png(figure)


def write_diagnosis(found: Diagnosis, folder: Path) -> list[Path]:
    """`diagnosis.json`, `.md`, `.tex`, `.html`, `encoders.csv`, `cka.csv`, `spectrum.png` and `cka.png`;
    their paths."""
    sections = diagnosis_tables(found)
    layers = found.layers or in_report_order(str(row["encoder"]) for row in found.encoders)
    pairs = found.layer_cka if found.layers else found.cka
    spectra = [spectrum_figure(found.encoders, dark) for dark in (False, True)]
    matrices = [likeness_figure(layers, pairs, dark) for dark in (False, True)]
    figures = (
        Figure(spectra[0], SPECTRUM_CAPTION, "Spectrum, a line an encoder.", spectra[1]),
        Figure(matrices[0], CKA_CAPTION, "Matrix of CKA between blocks.", matrices[1], wide=True),
    )
    content = [*zip(sections, figures, strict=False)]
    page = ReportContent(
        title="What the features are like",
        lead="No target and no probe: spectrum, likeness, speed. None of it says what they are good for.",
        conclusions=[],
        answer=list(found.notes),
        sections=[
            *(Section(section.heading, [*section.tables, figure]) for section, figure in content),
            Section("How it was measured", [Facts(facts_of(found.about))]),
        ],
    )
    plain = [{name: value for name, value in row.items() if name != "spectrum"} for row in found.encoders]
    pairs = [{"of": "encoders"} | dict(pair) for pair in found.cka]
    pairs += [{"of": "blocks"} | dict(pair) for pair in found.layer_cka]
    sheets = {"encoders.csv": to_csv(plain), "cka.csv": to_csv(pairs)}
    files = {"spectrum.png": spectra[0], "cka.png": matrices[0]}
    return write_forms(folder, "diagnosis", asdict(found), sheets, sections, page, files)
