"""What a run's probe is asked for: each view's own frames, labels that both sides share, or why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from salt_vla.config import TrainConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.data.view_lock import draw_view
from salt_vla.errors import DataError
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs import probe_truths
from salt_vla.jobs.data import split_table
from salt_vla.jobs.data_index import index_data
from salt_vla.jobs.probe_truths import Offer, online_probe

GRID = ClipGeometry(num_frames=8, image_size=32, tubelet_size=2, patch_size=8)


def config_of(view: ViewConfig, **runtime: Any) -> TrainConfig:
    config = TrainConfig(steps=100, batch_size=4)
    return replace(
        config,
        encoder=replace(config.encoder, name="vit_micro", geometry=GRID),
        data=replace(config.data, view=view),
        runtime=replace(config.runtime, **({"probe_every": 10} | runtime)),
    )


def offer_of(table: ClipTable, view: ViewConfig, **runtime: Any) -> Offer:
    splits = split_table(table)
    return online_probe(config_of(view, **runtime), splits.train, splits.validation, 8)


@pytest.mark.parametrize("max_shift", [0, 6])
def test_numbers_are_those_of_the_frames_that_each_view_shows(tiny_table: ClipTable, max_shift: int) -> None:
    """The data set's actions hold their own frame's number; in small portions they are the same."""
    view = ViewConfig(frame_stride=2, num_views=3, max_shift=max_shift)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_truths, "AT_ONCE", 5)
        probe = offer_of(tiny_table, view).probe
    assert probe is not None
    shifts = set()
    for table, truths, views in ((split_table(tiny_table).train, probe.learned, 3),
                                 (split_table(tiny_table).validation, probe.held_out, 1)):  # fmt: skip
        for clip in table.clips():
            for number in range(views):
                frames = draw_view(clip, number, view, GRID, (64, 64)).frames
                last = frames[-1] - clip.episode_first_frame
                known = truths.at(truths.places([(clip.clip_id, number)]))
                assert known.numbers["action_end"][0, 2:].tolist() == [clip.episode, last]
                assert known.episodes[0] == truths.episodes[truths.row_of[clip.clip_id]]
                shifts.add(frames[0] - clip.first_frame)
    assert (len(shifts) > 1) == bool(max_shift)
    shared = {clip.episode for clip in split_table(tiny_table).train.clips()}
    assert len(np.unique(probe.learned.episodes)) == len(shared)


def test_labels_are_the_same_numbers_on_both_sides(tiny_table: ClipTable) -> None:
    probe = offer_of(tiny_table, ViewConfig(frame_stride=2)).probe
    assert probe is not None
    splits, names = split_table(tiny_table), dict[int, str]()
    for table, truths in ((splits.train, probe.learned), (splits.validation, probe.held_out)):
        for clip in table.clips():
            code = int(truths.at(truths.places([(clip.clip_id, 0)])).classes["label"][0])
            assert names.setdefault(code, clip.label) == clip.label
    assert len(names) == 2


def labelled(table: ClipTable, label: Callable[[int], str]) -> ClipTable:
    """The table as one of a source without signals."""
    rows = table.rows
    columns = {"label": [label(n) for n in range(len(table))], "source": ["folder"] * len(table)}
    for name, values in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values))
    return table.filtered(rows)


def test_a_source_without_signals_has_its_labels_and_one_without_labels_nothing(
    tiny_table: ClipTable,
) -> None:
    view = ViewConfig(frame_stride=2)
    some = offer_of(labelled(tiny_table, lambda row: "ab"[row % 2]), view)
    assert some.probe is not None and not some.probe.learned.numbers
    assert some.note == "the online probe reads labels alone: signals come from one data set of: lerobot, sim"
    for label in (lambda row: "", lambda row: f"clip {row}"):  # none; names of clips
        none = offer_of(labelled(tiny_table, label), view)
        assert none.probe is None
        assert none.note == (
            "no online probe: signals come from one data set of: lerobot, sim; and no labels"
        )


def test_signals_that_cannot_be_read_end_no_training(tmp_path: Path, write_layout: Any) -> None:
    folder = write_layout("lerobot", tmp_path / "data")
    table = index_data(folder, Cutting(ViewConfig(frame_stride=2), 8))[0]
    for file in (folder / "data").rglob("*.parquet"):
        file.write_bytes(b"no table")
    offer = offer_of(table, ViewConfig(frame_stride=2))
    assert offer.probe is not None and not offer.probe.learned.numbers
    assert "cannot be read" in offer.note


def test_more_than_there_is_room_for_is_left_aside(
    tiny_table: ClipTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_truths, "MOST_BYTES", 2**10)
    offer = offer_of(tiny_table, ViewConfig(frame_stride=2))
    assert offer.probe is not None and not offer.probe.learned.numbers
    assert "takes" in offer.note and "MiB" in offer.note
    with pytest.raises(DataError, match="MiB"):
        probe_truths._require_size(2**11)


def test_not_asked_for_or_not_affordable_there_is_none_and_a_word_on_why(tiny_table: ClipTable) -> None:
    view = ViewConfig(frame_stride=2)
    assert offer_of(tiny_table, view, probe_clips=0) == Offer(None)
    assert offer_of(tiny_table, view, validation_clips=0) == Offer(None)
    splits, short_run = split_table(tiny_table), replace(config_of(view, probe_every=0), steps=10)
    short = online_probe(short_run, splits.train, splits.validation, 8)
    assert short.probe is None and "runtime.probe_every" in short.note
