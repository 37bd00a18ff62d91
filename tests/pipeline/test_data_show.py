"""`data show` on real tables: the clips asked for, as they were cut, and the broken ones named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from salt_vla.config import MaskConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.errors import DataError
from salt_vla.jobs.data_show import Choice, choose, look_at, show
from salt_vla.recipes import get_recipe
from salt_vla.registry import SOURCES


def size_of(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        assert image.format == "PNG"
        return image.size


def test_eight_clips_spread_over_the_table_are_shown_by_default(
    salt: Any, workshop: Any, tmp_path: Path
) -> None:
    out = tmp_path / "sheet.png"
    said = salt.ok("data", "show", workshop.table, "--out", out)
    assert said.out == f"{out}: 8 clips, 0 of them unreadable\n"
    assert size_of(out)[0] == 1280


def test_the_same_seed_draws_the_same_sheet(salt: Any, workshop: Any, tmp_path: Path) -> None:
    sheets = []
    for seed in (3, 3, 4):
        salt.ok("data", "show", workshop.table, "--random", 5, "--seed", seed, "--out", tmp_path / "s.png")
        sheets.append((tmp_path / "s.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_chosen_clips_come_first_in_the_order_given(workshop: Any) -> None:
    table = ClipTable.read(workshop.table)
    ids = table.clip_ids
    assert choose(table, Choice([ids[7], ids[2], ids[7]])) == [ids[7], ids[2]]
    drawn = choose(table, Choice([ids[7]], random=4, seed=1))
    assert drawn[0] == ids[7] and len(set(drawn)) == 5
    assert drawn[1:] == sorted(drawn[1:], key=ids.index)
    assert len(choose(table, Choice(random=10_000))) == len(ids) <= 96
    with pytest.raises(DataError, match="'nobody' is not in the clip table"):
        choose(table, Choice(["nobody"]))
    with pytest.raises(DataError, match="there are no clips"):
        choose(table.only([]), Choice())


def test_a_table_is_looked_at_as_it_was_cut_and_a_recipe_adds_size_crops_and_masks(workshop: Any) -> None:
    spec = str(workshop.table)
    plain = look_at(spec)
    assert (plain.geometry.num_frames, plain.view.frame_stride, plain.masks) == (4, 2, None)
    assert plain.geometry.image_size == 224
    demo = get_recipe("demo_teacher").config
    masked = look_at(spec, "demo_teacher", masked=True, number=2)
    assert masked.geometry.num_frames == 4 and masked.geometry.image_size == demo.geometry.image_size
    assert (masked.view.crop_scale, masked.masks, masked.number) == (demo.data.view.crop_scale, demo.masks, 2)
    assert look_at(spec, masked=True).masks == MaskConfig()
    asked = look_at(spec, "demo_teacher", num_frames=2, frame_stride=3, image_size=40)
    assert (asked.geometry.num_frames, asked.view.frame_stride, asked.geometry.image_size) == (2, 3, 40)
    folder = look_at(str(workshop.dataset), "demo_teacher")
    assert (folder.geometry, folder.view) == (demo.geometry, demo.data.view)


def test_odd_clips_need_no_tubelets_unless_masks_do(salt: Any, workshop: Any, tmp_path: Path) -> None:
    command = ("data", "show", workshop.table, "--num-frames", 3, "--out", tmp_path / "s.png")
    salt.ok(*command, "--image-size", 50)
    assert "not a multiple" in salt(*command, "--masks").sentence


def test_masks_of_a_recipe_make_the_sheet_longer(salt: Any, workshop: Any, tmp_path: Path) -> None:
    command = ("data", "show", workshop.table, "--random", 2, "--out", tmp_path / "s.png")
    heights = []
    for masks in ((), ("--masks",), ("--masks", "demo_teacher"), ("--masks", "baseline_tiny")):
        salt.ok(
            *command, *masks, "--image-size", 64 if not masks[1:] else {"demo_teacher": 96}.get(masks[1], 224)
        )
        heights.append(size_of(tmp_path / "s.png")[1])
    assert heights[1] == heights[2] > heights[3] > heights[0]  # Two groups, two, one (random masks), none.


@pytest.mark.parametrize(
    "strategy", ["multiblock", "random masks.ratio=0.9", "tube masks.ratio=0.75", "topup_block"]
)
@pytest.mark.parametrize("truncate", ["end", "random", "pad", "even"])
def test_any_masks_can_be_looked_at_with_their_figures(
    salt: Any, workshop: Any, tmp_path: Path, strategy: str, truncate: str
) -> None:
    out = tmp_path / "s.png"
    changes = (f"masks.truncate={truncate}", *f"masks.strategy={strategy}".split(), "batch_size=8")
    said = salt.ok(
        *("data", "show", workshop.table, "--random", 3, "--image-size", 96, "--out", out),
        *("--masks", "demo_teacher", *changes),
    ).out
    lines = said.splitlines()[1:]
    groups = 2 if strategy == "multiblock" else 1
    assert [line.split(":")[0] for line in lines] == [
        f"  masks over 64 batches of 8 clips, group {number}" for number in range(1, groups + 1)
    ]
    assert ("padding" in said) == (strategy == "multiblock" and truncate == "pad")
    assert ("dropped" in said) == (strategy == "multiblock" and truncate in ("end", "random", "even"))
    assert size_of(out)[0] == 1280


def test_padded_clips_are_drawn_with_their_own_whole_context(workshop: Any) -> None:
    """What the sheet says of a clip is what it sees, not how wide the batch is; fields need no recipe."""
    look = look_at(str(workshop.table), masked=True, image_size=96, assignments=["masks.truncate=pad"])
    assert look.masks == MaskConfig(truncate="pad") and look.batch_size == 32
    shown = show(str(workshop.table), Choice(random=4), look)
    assert (
        len(shown.masks) == 2
        and shown.png
        != show(
            str(workshop.table), Choice(random=4), look_at(str(workshop.table), masked=True, image_size=96)
        ).png
    )


def test_clips_that_cannot_be_read_are_named_with_their_reason(
    salt: Any, tiny_dataset: Path, tmp_path: Path
) -> None:
    dataset = shutil.copytree(tiny_dataset, tmp_path / "films")
    table = tmp_path / "clips.parquet"
    salt.ok("data", "index", dataset, "--out", table, "--num-frames", 4, "--frame-stride", 2)
    film = sorted(dataset.rglob("*.mp4"))[0]
    film.write_bytes(film.read_bytes()[:200])
    clips = ClipTable.read(table)
    broken = [clip.clip_id for clip in clips.clips() if str(dataset / clip.file) == str(film)]
    whole = [clip_id for clip_id in clips.clip_ids if clip_id not in broken]
    assert broken and whole
    shown = show(str(table), Choice([broken[0], whole[0], broken[1]]), look_at(str(table)))
    assert shown.clips == 3 and [clip_id for clip_id, _ in shown.unreadable] == broken[:2]
    for _, reason in shown.unreadable:
        assert film.name in reason and not reason.startswith("clip ")
    said = salt.ok("data", "show", table, "--clip", broken[0], whole[0], "--out", tmp_path / "s.png").out
    assert "2 clips, 1 of them unreadable" in said and broken[0] in said


def test_views_beyond_the_first_look_elsewhere(workshop: Any) -> None:
    spec = str(workshop.table)
    choice = Choice(random=2, seed=0)
    pictures = [show(spec, choice, look_at(spec, "demo_teacher", number=n)).png for n in (0, 1)]
    assert pictures[0] != pictures[1]
    assert len({np.frombuffer(png, np.uint8).tobytes() for png in pictures}) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--clip", "nobody"), "'nobody' is not in the clip table"),
        (("--random", "-1"), "--random must be 0 or more"),
        (("--seed", "-5", "--masks"), "--seed must be 0 or more, not -5"),
        (("--view", "-1"), "--view must be 0 or more"),
        (("--masks", "demo_techer"), "did you mean demo_teacher"),
        (("--masks", "demo_teacher", "demo_student"), "--masks takes one recipe, not 2"),
        (("--image-size", "-4"), "geometry.image_size must be a positive integer"),
    ],
)
def test_what_cannot_be_shown_is_a_sentence_and_no_file(
    salt: Any, workshop: Any, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    out = tmp_path / "s.png"
    assert named in salt("data", "show", workshop.table, *arguments, "--out", out).sentence
    assert not out.exists()


@pytest.mark.parametrize("layout", [*SOURCES, "lerobot-v2.1"])
def test_clips_of_every_source_can_be_shown_indexed_or_not(
    salt: Any, write_layout: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    dataset = write_layout(layout, tmp_path / "data")
    table = tmp_path / "clips.parquet"
    cut = ("--num-frames", 4, "--frame-stride", 2)
    salt.ok("data", "index", dataset, "--out", table, *cut, "--hop", 8)
    said = salt.ok("data", "show", table, "--random", 4, "--out", tmp_path / "a.png").out
    assert "4 clips, 0 of them unreadable" in said
    said = salt.ok("data", "show", dataset, *cut, "--random", 4, "--out", tmp_path / "b.png").out
    assert "4 clips, 0 of them unreadable" in said
    assert size_of(tmp_path / "a.png")[0] == size_of(tmp_path / "b.png")[0] == 1280
