"""Contact sheets: every clip has its place, masks lie below it, letters stay inside their strip."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from salt_vla.geometry import ClipGeometry
from salt_vla.reports.contact import (
    GAP,
    LARGEST,
    MARGIN,
    WIDTH,
    ShownClip,
    _arranged,
    _font,
    contact_sheet,
    shortened,
    wrapped,
)

GEOMETRY = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=8)
RED, BLUE = (220, 30, 30), (30, 30, 220)


def film(colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.tile(np.array(colour, np.uint8), (8, 32, 32, 1))


def clip(number: int, colour: tuple[int, int, int] = RED, **more: object) -> ShownClip:
    return ShownClip(f"data/{number:06d}", "train", film(colour), **more)


def pixels(png: bytes) -> NDArray[np.int64]:
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "RGB"
        return np.asarray(image).astype(np.int64)


def area(sheet: NDArray[np.int64], colour: tuple[int, int, int]) -> int:
    return int((np.abs(sheet - np.array(colour)).max(axis=2) < 6).sum())


@pytest.mark.parametrize("count", [1, 2, 4, 5, 12, 13, 40])
def test_every_clip_has_its_strip_and_all_lie_within_the_sheet(count: int) -> None:
    sheet = pixels(contact_sheet([clip(n) for n in range(count)], GEOMETRY, "all"))
    layout = _arranged(count, 4, 0)
    assert sheet.shape[1] == WIDTH
    assert area(sheet, RED) == count * layout.pictures * layout.tile**2
    assert area(sheet[:, : MARGIN - 1], (255, 255, 255)) == sheet.shape[0] * (MARGIN - 1)
    assert area(sheet[:, -MARGIN + 4 :], (255, 255, 255)) == sheet.shape[0] * (MARGIN - 4)


@pytest.mark.parametrize(("count", "steps"), [(1, 8), (3, 2), (6, 4), (20, 4), (90, 8)])
@pytest.mark.parametrize("groups", [0, 2])
def test_few_clips_are_large_and_none_is_wider_than_its_column(count: int, steps: int, groups: int) -> None:
    layout = _arranged(count, steps, groups)
    assert layout.pictures <= steps and layout.side_by_side <= max(1, min(count, 3))
    assert layout.pictures * (layout.tile + GAP) - GAP <= layout.strip_width
    assert layout.tile <= LARGEST or layout.side_by_side == min(count, 3)


def test_frames_are_those_the_title_names() -> None:
    frames = film(RED)
    frames[4:] = BLUE
    sheet = pixels(contact_sheet([ShownClip("c", "", frames)], GEOMETRY, "t"))
    layout = _arranged(1, 4, 0)
    assert layout.steps(GEOMETRY) == [0, 1, 2, 3]
    assert area(sheet, RED) == area(sheet, BLUE) == 2 * layout.tile**2
    assert area(sheet[:, : WIDTH // 2 - GAP], BLUE) == 0


def test_a_caption_has_a_line_each_above_the_clips() -> None:
    bare, told = (
        pixels(contact_sheet([clip(0)], GEOMETRY, "t", lines)) for lines in ((), ("one line", "another"))
    )
    more = len(told) - len(bare)
    assert more == 2 * _arranged(1, 4, 0).line
    assert (told[-100:] == bare[-100:]).all()  # All that is below is as it was.
    head = int(np.flatnonzero((np.abs(bare - np.array(RED)).max(axis=2) < 6).any(axis=1))[0])
    assert (told[: head + more] < 200).sum() > (bare[:head] < 200).sum()


def test_masks_are_drawn_below_the_film_a_strip_for_each_group() -> None:
    ids = np.arange(GEOMETRY.num_tokens)
    groups = [(ids[:32], ids[32:]), (ids[:0], ids[:16])]  # The second sees nothing and drops the rest.
    plain = pixels(contact_sheet([clip(0)], GEOMETRY, "t"))
    masked = pixels(contact_sheet([clip(0, groups=groups)], GEOMETRY, "t"))
    layout = _arranged(1, 4, 2)
    tile = layout.tile**2
    assert masked.shape[0] >= plain.shape[0] + 2 * layout.tile
    assert area(masked, RED) == area(plain, RED) + 2 * tile  # Of group 1 the first half of the clip is seen.
    dark = (masked.max(axis=2) < 90).sum()
    assert dark > 2.5 * tile
    amber = ((masked[..., 0] - masked[..., 2]) > 60) & (masked[..., 1] > 120)
    assert amber.sum() > 0.3 * tile


def test_a_clip_without_pixels_is_an_empty_strip_that_says_why() -> None:
    broken = ShownClip("data/broken", "train", None, "video /films/a.mp4 cannot be decoded")
    silent = ShownClip("data/broken", "train", None, "")
    sheet, without = (pixels(contact_sheet([c, clip(1)], GEOMETRY, "t")) for c in (broken, silent))
    layout = _arranged(2, 4, 0)
    assert area(sheet, RED) == layout.pictures * layout.tile**2
    assert area(sheet, (244, 241, 238)) > 0.8 * layout.pictures * layout.tile**2
    assert area(sheet, (168, 64, 13)) > area(without, (168, 64, 13)) > 0


def test_a_long_reason_stays_in_its_strip() -> None:
    reason = "a/very/long/path/" * 60 + " and words " * 200
    shown = [ShownClip("c", "", None, reason), *(clip(n) for n in range(12))]
    sheet = pixels(contact_sheet(shown, GEOMETRY, "t"))
    layout = _arranged(13, 4, 0)
    assert area(sheet, RED) == 12 * layout.pictures * layout.tile**2  # It covers none of the others.
    alarm = (np.abs(sheet - np.array((168, 64, 13))).max(axis=2) < 6).nonzero()
    assert alarm[1].max() < MARGIN + layout.strip_width


def test_a_long_id_loses_its_middle_and_keeps_both_ends() -> None:
    font = _font(13)
    name = "dataset/" + "x" * 300 + "/000064"
    cut = shortened(name, font, 200)
    assert font.getlength(cut) <= 200 < font.getlength(name)
    assert cut.startswith("dataset") and cut.endswith("000064") and cut.count("…") == 1
    assert shortened("short", font, 200) == "short"
    assert shortened("two\nlines\tof it", font, 200) == "two lines of it"
    assert shortened("anything", font, 1) == "…"


def test_lines_break_between_words() -> None:
    font = _font(13)
    lines = wrapped("one two three four five six seven eight nine ten", font, 90)
    assert " ".join(lines) == "one two three four five six seven eight nine ten" and len(lines) > 2
    assert all(font.getlength(line) <= 90 for line in lines)
    assert wrapped("unbreakable" * 9, font, 90) == ["unbreakable" * 9]
    assert wrapped("", font, 90) == [""]


def test_no_clips_are_no_sheet() -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], GEOMETRY, "t")
