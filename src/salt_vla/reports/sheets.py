"""Film strips with something painted on them: masks, reconstructions, the colours of latents.

Pictures are put together pixel by pixel and written with a transparent ground, for light and dark pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.reports.canvas import NEUTRAL, new_figure, to_png
from salt_vla.reports.patches import (
    FloatArray,
    FramesArray,
    check_frames,
    enlarge,
    paste_predictions,
    token_map,
)
from salt_vla.reports.rows import encoder_label, in_report_order

MASKS_CAPTION = (
    "What the encoder may look at, one row a mask group. Dark: hidden, to be predicted. Striped: neither "
    "seen nor predicted, because every clip of a batch is cut to the shortest context and the shortest "
    "target (and the number of targets may be capped)."
)
RECONSTRUCTION_CAPTION = (
    "The model predicts each hidden tubelet shifted and scaled to mean 0 and variance 1. To draw it, the "
    "true tubelet's mean and contrast are put back: the brightness and contrast of a patch are given, only "
    "its pattern is predicted."
)
PCA_CAPTION = (
    "Patch tokens of one clip, their first three principal components as red, green and blue. The components "
    "are fitted for each row alone: compare which places share a colour, not the colours between rows."
)

MOST_COLUMNS = 8
SHEET_WIDTH = 1200  # pixels, about
DPI = 100
INDIGO = np.array([38, 40, 92], np.float32)
AMBER = np.array([232, 163, 61], np.float32)


@dataclass(frozen=True)
class Layout:
    """Where everything lies on a sheet, in pixels from the upper left corner."""

    rows: int
    columns: int
    tile: int
    legend: bool = False

    @property
    def gap(self) -> int:
        return max(4, self.tile // 32)

    @property
    def text_height(self) -> int:
        """Pixels of a letter: a fixed share of the sheet's width, so that it reads the same on all."""
        return max(11, round(self.width * 0.0185))

    @property
    def width(self) -> int:
        return self.columns * self.tile + (self.columns - 1) * self.gap

    @property
    def line_height(self) -> int:
        return round(self.text_height * 2.0)

    @property
    def height(self) -> int:
        return self.rows * (self.line_height + self.tile) + self.line_height * (2 if self.legend else 1)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(top, left) of a tile."""
        return (row + 1) * self.line_height + row * self.tile, column * (self.tile + self.gap)


@dataclass(frozen=True)
class Strip:
    """One row of a sheet: a label above it and a tile (H, W, 3) for each time step shown."""

    label: str
    tiles: NDArray[np.uint8]


def mask_sheet(
    frames: FramesArray,
    groups: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    geometry: ClipGeometry,
) -> bytes:
    """The clip, then a row for each (context ids, target ids) of that clip.

    Hidden tokens are darkened, tokens in neither set striped.
    """
    check_frames(frames, geometry)
    strips = [Strip("the clip", tubelet_starts(frames, geometry))]
    for number, (context_ids, target_ids) in enumerate(groups, 1):
        target = token_map(target_ids, geometry)
        dropped = ~(target | token_map(context_ids, geometry))
        painted = striped(darkened(tubelet_starts(frames, geometry), target), dropped)
        total, seen, hidden = geometry.num_tokens, len(context_ids), len(target_ids)
        rest = total - seen - hidden
        label = f"group {number}: {seen} tokens seen, {hidden} hidden, {rest} dropped, of {total}"
        strips.append(Strip(label, painted))
    return film_sheet(strips, geometry, legend=True)


def reconstruction_sheet(
    frames: FramesArray,
    predicted_patches: FloatArray,
    target_ids: NDArray[np.int64],
    geometry: ClipGeometry,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    context_ids: NDArray[np.int64] | None = None,
) -> bytes:
    """Original, what was hidden, and the predictions pasted where it was; see `paste_predictions`.

    With `context_ids`, tokens that were neither seen nor predicted are striped in the second row.
    """
    pasted = paste_predictions(frames, predicted_patches, target_ids, geometry, pixel_mean, pixel_std)
    original = tubelet_starts(frames, geometry)
    hidden = token_map(target_ids, geometry)
    masked = darkened(original, hidden)
    if context_ids is not None:
        masked = striped(masked, ~(hidden | token_map(context_ids, geometry)))
    share = round(100 * len(target_ids) / geometry.num_tokens)
    strips = [
        Strip("original", original),
        Strip(f"masked: {share} % of the tokens to be predicted", masked),
        Strip("reconstruction: predictions pasted at the masked tokens", tubelet_starts(pasted, geometry)),
    ]
    return film_sheet(strips, geometry)


def pca_strip(frames: FramesArray, latents: Mapping[str, FloatArray], geometry: ClipGeometry) -> bytes:
    """The clip, then a row for each encoder: its patch tokens (N, D) of the clip as colours."""
    check_frames(frames, geometry)
    strips = [Strip("the clip", tubelet_starts(frames, geometry))]
    for encoder in in_report_order(latents):
        tokens = latents[encoder]
        if tokens.ndim != 2 or len(tokens) != geometry.num_tokens:
            raise DataError(f"{encoder}: expected ({geometry.num_tokens}, dim) tokens, not {tokens.shape}")
        colours = principal_colours(tokens).reshape(*geometry.token_grid, 3)
        strips.append(Strip(encoder_label(encoder), enlarge(colours, geometry.patch_size)))
    return film_sheet(strips, geometry)


@dataclass(frozen=True)
class ShownTokens:
    """A clip on a sheet: its tokens (N, D), its film (T, H, W, 3) in uint8, or both."""

    clip_id: str
    tokens: FloatArray | None
    film: FramesArray | None = None


def pca_sheet(clips: Sequence[ShownTokens], geometry: ClipGeometry) -> bytes:
    """Film and tokens of several clips, below each other. The components are fitted for all of them together,
    so that a colour means the same on the whole sheet."""
    encoded = [clip.tokens for clip in clips if clip.tokens is not None]
    if any(len(tokens) != geometry.num_tokens for tokens in encoded):
        raise DataError(f"expected ({geometry.num_tokens}, dim) tokens, not {encoded[0].shape}")
    colours = iter(())
    if encoded:
        together = principal_colours(np.concatenate(encoded))
        colours = iter(together.reshape(len(encoded), *geometry.token_grid, 3))
    strips = []
    for clip in clips:
        if clip.film is not None:
            check_frames(clip.film, geometry)
            strips.append(Strip(clip.clip_id, tubelet_starts(clip.film, geometry)))
        if clip.tokens is not None:
            label = clip.clip_id if clip.film is None else "its tokens"
            strips.append(Strip(label, enlarge(next(colours), geometry.patch_size)))
    return film_sheet(strips, geometry)


def principal_colours(tokens: FloatArray) -> NDArray[np.uint8]:
    """(N, D) → (N, 3) colours: the first three principal components, 2nd to 98th percentile each.

    A component's sign is fixed by its largest loading, so that equal tokens give equal colours.
    """
    centred = np.asarray(tokens, np.float64) - np.mean(tokens, axis=0, dtype=np.float64)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:3][sizes[:3] > 1e-9 * max(float(sizes[0]), 1e-12)]
    colours = np.full((len(tokens), 3), 128, np.uint8)
    for place, axis in enumerate(axes):
        values = centred @ (axis * np.sign(axis[np.abs(axis).argmax()]))
        low, high = np.percentile(values, (2, 98))
        scaled = (values - low) / max(high - low, 1e-12)
        colours[:, place] = np.clip(np.rint(255 * scaled), 0, 255).astype(np.uint8)
    return colours


def layout_of(geometry: ClipGeometry, rows: int, legend: bool = False) -> Layout:
    """The layout of a sheet of `rows` strips of clips of this geometry."""
    columns = len(_shown_steps(geometry))
    up, down = _scale(geometry, columns)
    return Layout(rows, columns, geometry.image_size * up // down, legend)


def _shown_steps(geometry: ClipGeometry) -> list[int]:
    """The time steps with a column of their own: all of them, or every second, third, … of many."""
    steps = geometry.token_grid[0]
    return list(range(0, steps, -(-steps // MOST_COLUMNS)))


def _scale(geometry: ClipGeometry, columns: int) -> tuple[int, int]:
    """(enlarge by, shrink by): whole numbers that bring the sheet near `SHEET_WIDTH`."""
    size = geometry.image_size
    natural = columns * size
    if natural < SHEET_WIDTH:
        return max(1, round(SHEET_WIDTH / natural)), 1
    shrinks = [by for by in range(1, size + 1) if size % by == 0 and natural / by >= 0.6 * SHEET_WIDTH]
    return 1, shrinks[-1]


def tubelet_starts(frames: FramesArray, geometry: ClipGeometry) -> FramesArray:
    """The first frame of every time step of tokens."""
    return frames[:: geometry.tubelet_size]


def darkened(frames: FramesArray, where: NDArray[np.bool_]) -> FramesArray:
    """A fifth of the light left, tinted indigo, and a thin edge so that it shows on dark film too."""
    light = frames.astype(np.float32)
    painted = np.where(where[..., None], 0.2 * light + 0.35 * INDIGO, light)
    painted = np.where(_edges(where)[..., None], 1.6 * INDIGO, painted)
    return np.clip(painted, 0, 255).astype(np.uint8)


def striped(frames: FramesArray, where: NDArray[np.bool_]) -> FramesArray:
    """Grey film under amber diagonals."""
    light = frames.astype(np.float32)
    grey = 0.55 * light.mean(axis=-1, keepdims=True) + 40
    rows, columns = np.indices(frames.shape[1:3])
    pitch = max(6, frames.shape[1] // 16)
    stripes = ((rows + columns) % pitch) < max(2, pitch // 4)
    painted = np.where(stripes[None, ..., None], 0.25 * grey + 0.75 * AMBER, grey * np.ones(3))
    return np.clip(np.where(where[..., None], painted, light), 0, 255).astype(np.uint8)


def _edges(where: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The pixels of each region that touch a pixel outside it (or the frame's border)."""
    padded = np.pad(where, ((0, 0), (1, 1), (1, 1)))
    inner = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1] & padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:]
    return where & ~inner


def film_sheet(strips: Sequence[Strip], geometry: ClipGeometry, legend: bool = False) -> bytes:
    """The strips below each other, labels above each, time below the last."""
    layout = layout_of(geometry, len(strips), legend)
    canvas = np.zeros((layout.height, layout.width, 4), np.uint8)
    for row, strip in enumerate(strips):
        for column, step in enumerate(_shown_steps(geometry)):
            top, left = layout.corner(row, column)
            tile = _fitted(strip.tiles[step], layout.tile)
            canvas[top : top + layout.tile, left : left + layout.tile, :3] = tile
            canvas[top : top + layout.tile, left : left + layout.tile, 3] = 255
    if legend:
        _swatches(canvas, layout)
    return _lettered(canvas, layout, strips, geometry)


def _fitted(tile: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Enlarged by repeating or shrunk by averaging, by a whole number."""
    if size >= len(tile):
        return enlarge(tile[None], size // len(tile))[0]
    by = len(tile) // size
    return tile.reshape(size, by, size, by, 3).mean(axis=(1, 3)).astype(np.uint8)


def _legend_places(layout: Layout) -> tuple[int, list[int]]:
    """(top, lefts) of the legend's swatches: seen, hidden, dropped."""
    top = layout.height - layout.line_height + layout.text_height // 3
    return top, [round(layout.width * share) for share in (0.0, 0.16, 0.40)]


def _swatches(canvas: NDArray[np.uint8], layout: Layout) -> None:
    size = layout.text_height + 4
    film = np.full((1, size, size, 3), 165, np.uint8)
    everywhere = np.ones((1, size, size), bool)
    top, lefts = _legend_places(layout)
    samples = (film, darkened(film, everywhere), striped(film, everywhere))
    for left, swatch in zip(lefts, samples, strict=True):
        canvas[top : top + size, left : left + size, :3] = swatch[0]
        canvas[top : top + size, left : left + size, 3] = 255


def _lettered(
    canvas: NDArray[np.uint8], layout: Layout, strips: Sequence[Strip], geometry: ClipGeometry
) -> bytes:
    height, width = canvas.shape[:2]
    figure = new_figure(width / DPI, height / DPI, dpi=DPI)
    figure.figimage(canvas, 0, 0, origin="upper")
    points = layout.text_height * 72 / DPI

    def write(left: float, top: float, text: str, align: str = "left", size: float = points) -> None:
        figure.text(left / width, 1 - top / height, text, color=NEUTRAL, fontsize=size, ha=align, va="center")

    for row, strip in enumerate(strips):
        write(0, layout.corner(row, 0)[0] - 0.45 * layout.line_height, strip.label)
    bottom = layout.corner(len(strips) - 1, 0)[0] + layout.tile + 0.45 * layout.line_height
    for column, step in enumerate(_shown_steps(geometry)):
        middle = layout.corner(0, column)[1] + layout.tile / 2
        write(middle, bottom, f"frame {step * geometry.tubelet_size}", "center", 0.85 * points)
    if layout.legend:
        top, lefts = _legend_places(layout)
        for left, word in zip(lefts, ("seen", "hidden: predicted", "dropped: neither"), strict=True):
            write(left + 1.6 * layout.text_height, top + layout.text_height / 2 + 2, word)
    return to_png(figure)
