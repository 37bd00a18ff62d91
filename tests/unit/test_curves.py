"""Metrics are read as far as they can be, from the end where that is enough, and never twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salt_vla.operations.curves import BLOCK, Follower, last_rows, points, read_rows
from salt_vla.operations.words import sentence
from salt_vla.rundir import RunDirectory

Rows = list[dict[str, Any]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def _write(file: Path, rows: Rows, more: str = "") -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + more)


NO_ROWS = (
    *(b"", b"{", b"[]", b"3", b"[" * 100_000, b"\xff\xfe", b'{"kind": "train"}', b'{"kind": 3, "step": 1}'),
    *(b'{"kind": "val", "step": "1"}', b'{"kind": "val", "step": true}'),
    *(b'{"kind": "val", "step": -1}', b'{"kind": "val", "step": 1' + b"0" * 400 + b"}"),
)


@pytest.mark.parametrize("line", NO_ROWS)
def test_a_line_that_is_no_row_is_counted_and_passed_over(line: bytes) -> None:
    good = b'{"kind": "val", "step": 3}'
    assert read_rows([good, line, good]) == ([{"kind": "val", "step": 3}] * 2, 1)


def test_a_figure_that_is_no_number_is_none() -> None:
    """Whoever shows a row may take its figures for what they should be."""
    line = b'{"kind": "val", "step": 3, "loss": "low", "a": [1], "b": NaN, "c": 1%s, "d": true}'
    (row,), damaged = read_rows([line % (b"0" * 400)])
    assert (damaged, list(row.values())) == (0, ["val", 3, None, None, None, None, True])
    assert sentence(row) == "step 3: held out: loss no number"


def test_a_run_that_is_resumed_is_read_as_it_is_now(tmp_path: Path, rows_of: Callable[..., Rows]) -> None:
    run = RunDirectory(tmp_path / "run")
    for row in rows_of(100):
        (run.path).mkdir(exist_ok=True)
        run.log_metrics(row)
    seen = Follower(run.metrics_file)
    assert seen.poll() == seen.rows == rows_of(100)
    run.trim_metrics(50)
    run.log_metrics({"kind": "train", "step": 60, "loss": 9.0})
    kept = [row for row in rows_of(100) if row["step"] <= 50]
    assert seen.poll() == seen.rows == [*kept, {"kind": "train", "step": 60, "loss": 9.0}]
    assert seen.poll() == []


def test_the_last_rows_of_each_kind_are_found_from_the_end(file: Path, rows_of: Callable[..., Rows]) -> None:
    rows = rows_of(20_000)
    _write(file, rows, more='{"kind": "train", "step": 99')
    train, val = last_rows(file, train=20)
    assert train == [row for row in rows if row["kind"] == "train"][-20:]
    assert val == [row for row in rows if row["kind"] == "val"][-1:]


def test_damage_and_other_kinds_at_the_end_hide_no_row(file: Path) -> None:
    rows: Rows = [{"kind": "val", "step": 5}, {"kind": "train", "step": 5}]
    _write(file, rows, more='rubbish\n{"kind": "probe", "step": 5, "why": "' + "x" * (2 * BLOCK) + '"}\n')
    assert last_rows(file) == ([rows[1]], [rows[0]])


@pytest.mark.parametrize("text", ["", "\n", "\n\n\n", "no row", '{"kind": "train", "step": 1}'])
def test_a_file_without_a_whole_row_has_none(file: Path, text: str) -> None:
    assert last_rows(file) == ([], [])
    file.write_text(text)
    assert last_rows(file) == ([], [])
    assert last_rows(file / "below") == ([], [])


def test_what_lies_far_from_the_end_is_not_looked_for(file: Path) -> None:
    train = [{"kind": "train", "step": step, "loss": 0.25} for step in range(20_000)]
    _write(file, [{"kind": "val", "step": 0}, *train])
    assert last_rows(file) == ([train[-1]], [])
    assert last_rows(file, most_bytes=file.stat().st_size + 1)[1] == [{"kind": "val", "step": 0}]


def test_a_curve_leaves_out_what_is_no_number() -> None:
    values = [1.5, None, "2", True, float("nan"), 10**400, 3]
    rows = [{"kind": "val", "step": step, "loss": value} for step, value in enumerate(values)]
    rows += [{"kind": "train", "step": 9, "loss": 4.0}, {"kind": "val", "step": 9}]
    assert points(rows, "val", "loss") == ([0, 6], [1.5, 3.0])
