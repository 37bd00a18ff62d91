"""docs/hyperparameters.md says only what is on record: fields that exist, words that mean something, entries
of LOG.md that hold the very figures.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from salt_vla.config import TrainConfig, leaves

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hyperparameters.md").read_text()
LOG = (ROOT / "LOG.md").read_text()
ROW = re.compile(r"^\| (`[a-z].*?) \| (.*?) \| \*\*([\w ]+)\*\* \| (.*?) ?\|$", re.MULTILINE)
ROWS = ROW.findall(PAGE)
WORDS = set(re.findall(r"^\| \*\*([\w ]+)\*\* \|", PAGE, re.MULTILINE))
RUN_HERE = {"validated", "no difference", "one seed", "measured"}
FIGURE = re.compile(r"[+−-]?(?:\d*\.\d+)")


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def entries() -> dict[str, str]:
    """Anchor → text of LOG.md's entries."""
    parts = re.split(r"^## ", LOG, flags=re.MULTILINE)[1:]
    return {anchor(part.split("\n", 1)[0]): part for part in parts}


def linked(row: tuple[str, ...]) -> list[str]:
    return re.findall(r"\(\.\./LOG\.md#([\w-]+)\)", row[3])


def test_the_page_has_rows_of_every_word() -> None:
    assert RUN_HERE < WORDS
    assert {row[2] for row in ROWS} == WORDS
    assert PAGE.count("\n| `") == len(ROWS), "a row that this test does not read"


def test_every_field_of_a_row_exists() -> None:
    known = {name for name, _ in leaves(TrainConfig())}
    named = [field for row in ROWS for field in re.findall(r"`([\w.]+)`", row[0])]
    assert [field for field in named if field not in known] == []


def test_the_knobs_that_matter_are_all_there() -> None:
    """All that decides what is learned; how it is read, computed or guarded need not be listed whole."""
    named = {field for row in ROWS for field in re.findall(r"`([\w.]+)`", row[0])}
    parts = ("objective.", "optimizer.", "masks.", "target.momentum", "target.provider")
    wanted = {name for name, _ in leaves(TrainConfig()) if name.startswith(parts)}
    assert wanted <= named, sorted(wanted - named)


@pytest.mark.parametrize("row", [row for row in ROWS if row[2] in RUN_HERE], ids=lambda row: row[0])
def test_what_was_run_here_names_its_entry_and_has_its_figures(row: tuple[str, ...]) -> None:
    found = entries()
    assert linked(row), "no entry of LOG.md"
    text = "".join(found[each] for each in linked(row))
    said = re.sub(r"\[[^\]]*\]\([^)]*\)", "", row[3])
    for figure in FIGURE.findall(said):
        assert figure.lstrip("+-−").lstrip("0") in text, f"{figure} is not in the entry"
    for study in re.findall(r"studies/\w+\.py", row[3]):
        assert (ROOT / study).is_file() and f"python {study}" in text


@pytest.mark.parametrize("row", [row for row in ROWS if row[2] == "validated"], ids=lambda row: row[0])
def test_what_is_validated_has_an_interval_that_excludes_zero(row: tuple[str, ...]) -> None:
    intervals = re.findall(r"\[([+−]?[\d.]+), ([+−]?[\d.]+)\]", row[3])
    assert intervals
    bounds = [tuple(float(bound.replace("−", "-")) for bound in pair) for pair in intervals]
    assert all(low > 0 or high < 0 for low, high in bounds)


@pytest.mark.parametrize("row", [row for row in ROWS if row[2] not in RUN_HERE], ids=lambda row: row[0])
def test_what_was_not_run_here_claims_no_entry_of_the_log(row: tuple[str, ...]) -> None:
    assert linked(row) == []
