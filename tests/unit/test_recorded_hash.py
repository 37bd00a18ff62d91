"""Figures are kept by what was recorded, not by its file's name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from salt_vla.config import ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.data.sources.lerobot_signals import recorded_hash
from salt_vla.jobs.data_index import index_data


def test_other_numbers_in_the_data_tables_are_another_recording(
    tiny_dataset: Path, tiny_table: ClipTable, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_dataset, copy)
    table = index_data(copy, Cutting(ViewConfig(frame_stride=2), 8))[0]
    before = recorded_hash(table)
    assert before == recorded_hash(tiny_table), "where it lies is not what it holds"
    file = next((copy / "data").rglob("*.parquet"))
    rows = pq.read_table(file)
    at = rows.schema.get_field_index("action")
    action = rows["action"].combine_chunks()
    noise = np.random.default_rng(0).normal(size=len(action.flatten())).astype(np.float32)
    offsets = pa.array(np.arange(0, len(noise) + 1, len(noise) // len(action)), pa.int32())
    changed = (
        pa.FixedSizeListArray.from_arrays(pa.array(noise), len(noise) // len(action))
        if pa.types.is_fixed_size_list(action.type)
        else pa.ListArray.from_arrays(offsets, pa.array(noise))
    )
    pq.write_table(rows.set_column(at, rows.schema.field(at), changed.cast(action.type)), file)
    assert recorded_hash(table) != before
