"""`eval` with suites of video understanding: real films, a real run, tables and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from salt_vla.data.clip_table import ClipTable

SUITES = ("time-arrow", "frame-order", "retrieval", "dense")
TASKS = ["Push the square to the right.", "Push the square down."]
Rows = dict[tuple[str, str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    np.save(folder / "texts.npy", np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32))
    (folder / "texts.json").write_text(json.dumps(TASKS))
    return folder / "texts.npy"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture(scope="module")
def rows(workshop: Any, texts: Path, pictures: Path) -> Rows:
    found = workshop.salt.json(
        *("eval", "teacher", "--suite", *SUITES, "--data", workshop.table, "--poolings", "step"),
        *("--text", texts, "--pictures", pictures),
    )
    return {(row["suite"], row["target"], row["encoder"]): row for row in found}


def test_every_suite_stands_in_the_tables_beside_its_baselines(rows: Rows) -> None:
    suites = {suite for suite, _, _ in rows}
    assert suites == {f"{suite}/{camera}/step" for suite in SUITES for camera in ("front", "side")}
    for suite, target in {(suite, target) for suite, target, _ in rows}:
        encoders = {name for s, t, name in rows if (s, t) == (suite, target)}
        assert encoders == {"teacher", "random", "pixels", "constant"}, (suite, target)
    assert not any(row["causal"] for row in rows.values())


@pytest.mark.parametrize(("suite", "chance"), [("time-arrow", 1 / 2), ("frame-order", 1 / 4)])
def test_the_constant_is_chance_and_items_are_clips_times_orders(
    rows: Rows, suite: str, chance: float
) -> None:
    row = rows[f"{suite}/front/step", "order", "constant"]
    assert row["value"] == pytest.approx(chance) and row["metric"] == "accuracy"
    dense = rows["dense/front/step", "hand", "constant"]
    assert row["clips"] * chance == dense["clips"] / 2, "two time steps a clip"
    assert row["episodes"] == 2


def test_retrieval_names_its_metric_and_its_chance(rows: Rows) -> None:
    targets = {target for suite, target, _ in rows if suite == "retrieval/front/step"}
    assert targets == {
        what + metric
        for what in ("next", "in_side", "label", "text", "clip_of_text")
        for metric in ("@1", "@5", "_map")
    }
    row = rows["retrieval/front/step", "text@1", "constant"]
    assert (row["metric"], row["value"], row["probe"]) == ("recall_at_1", 0.5, "cosine")
    assert "mapped into features" in rows["retrieval/front/step", "text@1", "teacher"]["note"]


def test_the_sheets_are_written_and_can_be_opened(rows: Rows, pictures: Path) -> None:
    names = {path.name for path in pictures.iterdir()}
    assert names == {
        "tokens.png",
        "attention.png",
        *(f"neighbours-{name}.png" for name in ("teacher", "random", "pixels")),
    }
    heights = {}
    for path in pictures.iterdir():
        with Image.open(path) as image:
            assert image.convert("RGB").getextrema() != ((0, 0),) * 3
            heights[path.name] = image.height
    assert heights["attention.png"] > heights["tokens.png"], "two rows an encoder"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--suite", "retrieval", "--text", "nowhere.npy"),
            "there is no file of text embeddings nowhere.npy",
        ),
        (("--suite", "time-arrow", "--min-motion", "300"), "min_motion is a number of grey levels"),
        (("--suite", "time-arrow", "--min-motion", "255"), "lower min_motion"),
        (("--suite", "dense", "--poolings", "mean"), "dense reads each time step apart"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence(
    workshop: Any, rows: Rows, arguments: tuple[str, ...], said: str
) -> None:
    assert said in workshop.salt("eval", "teacher", "--data", workshop.table, *arguments).sentence


def test_other_texts_are_other_figures(workshop: Any, rows: Rows, texts: Path, tmp_path: Path) -> None:
    """Names that change places under the same embeddings are no figures that are kept."""
    swapped = tmp_path / "texts.npy"
    swapped.write_bytes(texts.read_bytes())
    arguments = ("eval", "teacher", "--suite", "retrieval", "--data", workshop.table, "--poolings", "step")
    swapped.with_suffix(".json").write_text(json.dumps([TASKS[0], "another"]))
    said = workshop.salt(*arguments, "--text", swapped).sentence
    assert f"has none for the label {TASKS[1]!r}" in said


def test_pictures_of_film_pairs_are_not_these(workshop: Any, tmp_path: Path) -> None:
    said = workshop.salt("eval", "teacher", "--suite", "intphys2", "--pictures", tmp_path).sentence
    assert "--pictures shows clips of a data set" in said


def test_a_target_that_one_side_lacks_is_said(workshop: Any, tmp_path: Path) -> None:
    """Of two tasks only one is held out: nobody can be asked which."""
    table = ClipTable.read(workshop.table)
    splits = ["validation" if episode in (2, 4) else "train" for episode in table.rows["episode"].to_pylist()]
    place = table.rows.column_names.index("split")
    rows_now = table.rows.set_column(place, table.rows.schema.field("split"), pa.array(splits))
    ClipTable(rows_now, table.roots).write(tmp_path / "clips.parquet")
    answer = workshop.salt.ok("eval", "teacher", "--data", tmp_path / "clips.parquet", "--poolings", "mean")
    assert "target 'task' is left out: only one side of the split has it" in answer.err
