"""A contact sheet: clips as strips of film with their ids, masks below them, and gaps that say why.

Drawn on white with Pillow, whose letters can be measured; knows clips as pictures and words, not where they
come from.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from salt_vla.geometry import ClipGeometry
from salt_vla.reports.canvas import LIGHT
from salt_vla.reports.patches import FramesArray, token_map
from salt_vla.reports.sheets import darkened, striped

WIDTH = 1280
MARGIN = 20
GAP = 3  # between the pictures of a strip
GUTTER = 22  # between strips side by side
EMPTY, EDGE, ALARM = "#f4f1ee", "#d9d3cd", "#a8400d"
# Most clips → (strips side by side, pictures a strip): few clips are shown large, many small.
ARRANGEMENTS = ((4, (1, 8)), (12, (2, 5)), (10**9, (3, 4)))
LARGEST = 190  # pixels of a picture, where there is another clip to put beside it
Font = ImageFont.FreeTypeFont


@dataclass(frozen=True)
class ShownClip:
    """One clip: its id, a line about it, and its frames (T, H, W, 3), or the reason why there are none.

    `groups`: (context ids, target ids) of each mask group.
    """

    clip_id: str
    note: str
    frames: FramesArray | None
    reason: str = ""
    groups: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]] = field(default_factory=tuple)


@dataclass(frozen=True)
class _Sheet:
    """Where things lie, in pixels."""

    side_by_side: int
    pictures: int
    groups: int

    @property
    def strip_width(self) -> int:
        return (WIDTH - 2 * MARGIN - (self.side_by_side - 1) * GUTTER) // self.side_by_side

    @property
    def tile(self) -> int:
        return (self.strip_width - (self.pictures - 1) * GAP) // self.pictures

    @property
    def text(self) -> int:
        return 15 if self.side_by_side == 1 else 13

    @property
    def line(self) -> int:
        return round(1.45 * self.text)

    @property
    def cell_height(self) -> int:
        """Two lines of text, the film, a line and a strip for each mask group, and air."""
        return 2 * self.line + self.tile + self.groups * (self.line + self.tile) + self.text

    def steps(self, geometry: ClipGeometry) -> list[int]:
        """The token time steps that are shown, spread over the clip."""
        count = min(self.pictures, geometry.token_grid[0])
        return [int(step) for step in np.linspace(0, geometry.token_grid[0] - 1, count).round()]


def contact_sheet(
    clips: Sequence[ShownClip], geometry: ClipGeometry, title: str, caption: Sequence[str] = ()
) -> bytes:
    """The clips, row by row, as a PNG; `caption` has lines below the title. Raises `ValueError` for none."""
    if not clips:
        raise ValueError("a contact sheet needs at least one clip")
    most = max(len(clip.groups) for clip in clips)
    sheet = _arranged(len(clips), geometry.token_grid[0], most)
    rows = -(-len(clips) // sheet.side_by_side)
    head = (2 + len(caption)) * sheet.line + MARGIN
    foot = sheet.line + MARGIN if most else MARGIN // 2
    page = Image.new("RGB", (WIDTH, head + rows * sheet.cell_height + foot), LIGHT.paper)
    draw = ImageDraw.Draw(page)
    _line(draw, MARGIN, MARGIN // 2, title, _font(sheet.text + 2), WIDTH - 2 * MARGIN, LIGHT.ink)
    steps = sheet.steps(geometry)
    shown = ", ".join(str(step * geometry.tubelet_size) for step in steps)
    about = f"pictures: frames {shown} of each clip's {geometry.num_frames}"
    for number, line in enumerate((about, *caption), 1):
        top = MARGIN // 2 + number * sheet.line + 4
        _line(draw, MARGIN, top, line, _font(sheet.text), WIDTH - 2 * MARGIN, LIGHT.quiet)
    for number, clip in enumerate(clips):
        row, column = divmod(number, sheet.side_by_side)
        left = MARGIN + column * (sheet.strip_width + GUTTER)
        _cell(page, draw, sheet, (left, head + row * sheet.cell_height), clip, geometry)
    if most:
        _legend(page, draw, sheet, page.height - foot)
    file = io.BytesIO()
    page.save(file, "PNG")
    return file.getvalue()


def _arranged(clips: int, steps: int, groups: int) -> _Sheet:
    """Strips below masks are not made small; short ones go side by side."""
    side_by_side, pictures = next(a for limit, a in ARRANGEMENTS if clips <= limit or groups)
    sheet = _Sheet(min(side_by_side, clips), min(pictures, steps), groups)
    while sheet.tile > LARGEST and sheet.side_by_side < min(clips, 3):
        sheet = replace(sheet, side_by_side=sheet.side_by_side + 1)
    return sheet


def _cell(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    sheet: _Sheet,
    corner: tuple[int, int],
    clip: ShownClip,
    geometry: ClipGeometry,
) -> None:
    left, top = corner
    _line(draw, left, top, clip.clip_id, _font(sheet.text, bold=True), sheet.strip_width, LIGHT.ink)
    _line(draw, left, top + sheet.line, clip.note, _font(sheet.text - 1), sheet.strip_width, LIGHT.quiet)
    top += 2 * sheet.line
    if clip.frames is None:
        _empty(draw, sheet, (left, top), clip.reason)
        return
    steps = sheet.steps(geometry)
    film = clip.frames[:: geometry.tubelet_size]
    _film(page, sheet, (left, top), film[steps])
    top += sheet.tile
    for number, (context_ids, target_ids) in enumerate(clip.groups, 1):
        hidden, seen = token_map(target_ids, geometry), token_map(context_ids, geometry)
        counts = f"{len(context_ids)} tokens seen, {len(target_ids)} hidden and predicted"
        rest = geometry.num_tokens - len(context_ids) - len(target_ids)
        label = f"group {number}: {counts}, {rest} dropped, of {geometry.num_tokens}"
        _line(draw, left, top + 2, label, _font(sheet.text - 1), sheet.strip_width, LIGHT.quiet)
        top += sheet.line
        painted = striped(darkened(film, hidden), ~(hidden | seen))
        _film(page, sheet, (left, top), painted[steps])
        top += sheet.tile


def _film(page: Image.Image, sheet: _Sheet, corner: tuple[int, int], pictures: FramesArray) -> None:
    left, top = corner
    for number, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        grows = image.width < sheet.tile
        how = (
            Image.Resampling.NEAREST if grows and sheet.tile % image.width == 0 else Image.Resampling.LANCZOS
        )
        tile = image.resize((sheet.tile, sheet.tile), how)
        page.paste(tile, (left + number * (sheet.tile + GAP), top))


def _empty(draw: ImageDraw.ImageDraw, sheet: _Sheet, corner: tuple[int, int], reason: str) -> None:
    """A strip of bare paper with the reason on it, in as many lines as there is room for."""
    left, top = corner
    right = left + sheet.pictures * (sheet.tile + GAP) - GAP
    draw.rectangle((left, top, right - 1, top + sheet.tile - 1), fill=EMPTY, outline=EDGE)
    font = _font(sheet.text)
    lines = wrapped(f"cannot be read: {reason}", font, right - left - 2 * MARGIN)
    room = max(1, (sheet.tile - sheet.text) // sheet.line)
    if len(lines) > room:
        lines = [*lines[: room - 1], " ".join(lines[room - 1 :])]
    for number, line in enumerate(lines):
        place = top + sheet.text // 2 + number * sheet.line
        _line(draw, left + MARGIN, place, line, font, right - left - 2 * MARGIN, ALARM)


def _legend(page: Image.Image, draw: ImageDraw.ImageDraw, sheet: _Sheet, top: int) -> None:
    size = sheet.text + 3
    film = np.full((1, size, size, 3), 165, np.uint8)
    everywhere = np.ones((1, size, size), bool)
    left = MARGIN
    for swatch, word in (
        (film, "seen"),
        (darkened(film, everywhere), "hidden: to be predicted"),
        (
            striped(film, everywhere),
            "dropped: neither seen nor predicted (masks.truncate, masks.max_targets)",
        ),
    ):
        page.paste(Image.fromarray(swatch[0]), (left, top))
        font = _font(sheet.text)
        _line(draw, left + size + 8, top, word, font, WIDTH, LIGHT.ink)
        left += size + 8 + round(font.getlength(word)) + 28


def _line(
    draw: ImageDraw.ImageDraw, left: int, top: int, text: str, font: Font, width: int, colour: str
) -> None:
    draw.text((left, top), shortened(text, font, width), font=font, fill=colour)


def shortened(text: str, font: Font, width: int) -> str:
    """`text` in one line of at most `width` pixels, its middle left out: ids differ at both ends."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        head = kept // 2
        cut = f"{text[:head]}…{text[len(text) - (kept - head) :]}"
        if font.getlength(cut) <= width:
            return cut
    return "…"


def wrapped(text: str, font: Font, width: int) -> list[str]:
    """Lines of whole words no wider than `width` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _font(size: int, bold: bool = False) -> Font:
    """The letters that come with Matplotlib, so that a sheet looks the same on every machine."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
