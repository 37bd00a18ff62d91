"""Classification reads the labels of every layout of films, averages a film's clips, and refuses leaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from salt_vla.config import DataConfig, ViewConfig
from salt_vla.data.clip_table import ClipTable
from salt_vla.data.segments import Cutting
from salt_vla.data.view_lock import ViewReader
from salt_vla.errors import DataError
from salt_vla.evaluation.bench import Bench, EvalSettings, Side
from salt_vla.evaluation.feature_store import ClipViews, FeatureStore
from salt_vla.evaluation.features import Pixels
from salt_vla.evaluation.probes import ProbeFit
from salt_vla.evaluation.results import Scored
from salt_vla.evaluation.suites.classification import _right, score
from salt_vla.geometry import ClipGeometry
from salt_vla.jobs.data import split_table
from salt_vla.jobs.data_index import index_data

GEOMETRY = ClipGeometry(num_frames=4, image_size=32, tubelet_size=2, patch_size=16)
VIEW = ViewConfig(frame_stride=2)
CUTTING = Cutting(VIEW, num_frames=4, clips_per_video=2)
SETTINGS = EvalSettings(poolings=("mean",))


class InThisProcess(ViewReader):
    """Real films, decoded here: for so few, processes of their own are only a start that takes long."""


def bench_on(
    table: ClipTable, folder: Path, settings: EvalSettings = SETTINGS, test: ClipTable | None = None
) -> Bench:
    """A bench over a table of real films, split as `eval` splits it."""
    data = DataConfig(view=VIEW)
    splits = split_table(table)
    train, held_out = (
        Side(part, ClipViews(part.clip_ids, InThisProcess(part, VIEW, GEOMETRY), part.hash))
        for part in (splits.train, splits.validation if test is None else test)
    )
    store = FeatureStore(folder / "features", num_workers=1)
    return Bench({"pixels": Pixels(GEOMETRY)}, train, held_out, data, GEOMETRY, settings, store)


def renamed(table: ClipTable, column: str, values: list[Any]) -> ClipTable:
    place = table.rows.column_names.index(column)
    rows = table.rows.set_column(place, table.rows.schema.field(column), pa.array(values))
    return ClipTable(rows, table.roots)


@pytest.fixture(scope="module")
def ucf101(
    write_layout: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ClipTable]:
    folder = write_layout("ucf101", tmp_path_factory.mktemp("ucf") / "data")
    return folder, index_data(folder, CUTTING)[0]


def named(scored: list[Scored], encoder: str, target: str) -> Scored:
    (found,) = [one for one in scored if (one.encoder, one.target) == (encoder, target)]
    return found


def test_ucf101_by_its_lists(ucf101: tuple[Path, ClipTable], tmp_path: Path) -> None:
    _, table = ucf101
    scored = score(bench_on(table, tmp_path))
    assert {(one.suite, one.encoder, one.target) for one in scored} == {
        ("classification/mean", encoder, "label") for encoder in ("pixels", "constant")
    }
    sums = named(scored, "pixels", "label").sums
    # 2 classes × 2 tested groups × 2 films of 2 clips: films count, groups are resampled.
    assert sums.metric == "accuracy" and sums.clips.sum() == 8 and len(sums.episodes) == 4
    assert sums.value > 0.5 and not any(one.causal for one in scored)
    assert named(scored, "constant", "label").sums.value == 0.5  # equally many films: half a credit each


@pytest.mark.parametrize("layout", ["ssv2", "table"])
def test_other_layouts_give_labels_and_splits(
    layout: str, write_layout: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"lists": {"train": range(1, 10), "validation": range(10, 16)}} if layout == "ssv2" else {}
    table, _ = index_data(write_layout(layout, tmp_path / "data", **sizes), CUTTING, max_bad_share=0.5)
    scored = score(bench_on(table, tmp_path))
    films = {"ssv2": 6, "table": 1}[layout]
    assert named(scored, "pixels", "label").sums.clips.sum() == films


@pytest.mark.parametrize("probe", ["knn", "linear"])
def test_class_folders_of_films_and_every_probe(
    probe: str, write_video: Callable[..., Path], tmp_path: Path
) -> None:
    """Kinetics' layout: train/<class>/…, val/<class>/…; a class' films look alike."""
    for split, count in (("train", 3), ("val", 1)):
        for number in range(7):
            for film in range(count):
                write_video(
                    tmp_path / "k400" / split / f"class {number}" / f"{split}{film}.mp4", seed=4 * number
                )
    table, _ = index_data(tmp_path / "k400", CUTTING)
    scored = score(bench_on(table, tmp_path, replace(SETTINGS, probe=probe)))
    first, top5 = named(scored, "pixels", "label"), named(scored, "pixels", "label_top5")
    assert first.sums.value == 1 and top5.sums.value == 1 and top5.sums.metric == "accuracy_at_5"
    constant = named(scored, "constant", "label_top5").sums
    assert constant.value == pytest.approx(5 / 7) and first.probe == probe


def test_a_films_clips_are_averaged_and_ties_share_their_places() -> None:
    classes = np.array(["a", "b", "c", "d", "e", "f"])
    shares = np.array(
        [
            [0.6, 0.4, 0, 0, 0, 0],  # film 0, truth b: wrong alone,
            [0.1, 0.9, 0, 0, 0, 0],  # right with its second clip
            [0, 0, 0.5, 0.5, 0, 0],  # film 1, truth d: half a place
            [0.3, 0.2, 0.2, 0.2, 0.1, 0],  # film 2, truth f: sixth
            [0.7, 0.3, 0, 0, 0, 0],  # film 3, truth c: four share places 3 to 6, of which 3 are in the top 5
        ]
    )
    fit = ProbeFit(classes[shares.argmax(1)], None, "", classes, shares)
    labels, films = np.array(["b", "b", "d", "f", "c"]), np.array([0, 0, 1, 2, 3])
    right = _right(fit, labels, films)
    assert right[1].tolist() == [1, 0.5, 0, 0] and right[5].tolist() == [1, 1, 0, 0.75]
    few = ProbeFit(classes[:2], None, "", classes[:2], shares[:, :2])
    assert set(_right(few, np.array(["a"] * 5), films)) == {1}


def test_labels_that_are_missing_are_named(ucf101: tuple[Path, ClipTable], tmp_path: Path) -> None:
    _, table = ucf101
    train, held_out = split_table(table).train, split_table(table).validation
    none = renamed(held_out, "label", [""] * len(held_out))
    with pytest.raises(DataError, match=r"no held-out clip of .* has a label"):
        score(bench_on(train, tmp_path, test=none))
    labels = held_out.rows["label"].to_pylist()
    some = renamed(held_out, "label", ["", *labels[1:]])
    with pytest.raises(DataError, match=r"1 held-out clip\(s\) of .* have no label, such as 'ucf101/v_"):
        score(bench_on(train, tmp_path, test=some))


def test_a_class_that_was_never_trained_on_is_named(ucf101: tuple[Path, ClipTable], tmp_path: Path) -> None:
    _, table = ucf101
    train, held_out = split_table(table).train, split_table(table).validation
    other = renamed(held_out, "label", ["Knitting"] * len(held_out))
    with pytest.raises(DataError, match="class 'Knitting' occurs in held-out clips but in no training clip"):
        score(bench_on(train, tmp_path, test=other))


def test_a_film_on_both_sides_is_refused(ucf101: tuple[Path, ClipTable], tmp_path: Path) -> None:
    """Also where a list calls its stretches different groups."""
    _, table = ucf101
    train, held_out = split_table(table).train, split_table(table).validation
    shared = renamed(
        held_out, "file", [train.rows["file"][0].as_py(), *held_out.rows["file"].to_pylist()[1:]]
    )
    with pytest.raises(DataError, match=r"film UCF-101/.*avi of ucf101 has clips in both training and held"):
        score(bench_on(train, tmp_path, test=shared))


def test_another_split_of_ucf101_is_not_read_and_odd_lines_are_named(
    write_layout: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_layout("ucf101", tmp_path / "data", groups=2, films=1)
    lists = folder / "ucfTrainTestlist"
    (lists / "trainlist02.txt").write_text("nonsense")
    table, problems = index_data(folder, CUTTING)
    assert not problems and set(table.rows["split"].to_pylist()) == {"train", "validation"}
    assert len(set(table.rows["episode"].to_pylist())) == 4  # 2 classes × 2 groups
    (lists / "testlist01.txt").write_text("\n\nv_Archery_g02_c01.avi\n")
    with pytest.raises(DataError, match=r"testlist01\.txt, line 3, is not class/film\.avi"):
        index_data(folder, CUTTING)
