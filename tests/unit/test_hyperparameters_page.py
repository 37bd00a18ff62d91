"""docs/hyperparameters.md says only what is on record: fields that exist, words that mean something, entries
of LOG.md that hold the very figures.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from salt_vla.config import TrainConfig, leaves
from salt_vla.recipes import get_recipe, recipe_names

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hyperparameters.md").read_text()
LOG = (ROOT / "LOG.md").read_text()
ROW = re.compile(r"^\| (`[a-z].*?) \| (.*?) \| \*\*([\w ]+)\*\* \| (.*?) ?\|$", re.MULTILINE)
ROWS = ROW.findall(PAGE)
WORDS = set(re.findall(r"^\| \*\*([\w ]+)\*\* \|", PAGE, re.MULTILINE))
RUN_HERE = {"validated", "one of four", "no difference", "one seed", "measured"}
FIGURE = re.compile(r"[+−-]?(?:\d*\.\d+)")
RECKONED = re.compile(r"p = (0\.\d+)")  # Not LOG.md's: made of its intervals.
INTERVAL = r"([+−]\d\.\d+) \[([+−]\d\.\d+), ([+−]\d\.\d+)\]"
OF_TWO_DEGREES = 4.302653  # Student's t, 97.5 %
STUDIED = {  # (field, values) as they begin → the comparisons of that setting in its study
    ("objective.targets", "`normalised`"): r"targets: normalised − raw \| \w+",
    ("objective.power", ""): r"loss: absolute − squared \| \w+",
    ("masks.strategy", ""): r"masks: multiblock − topup \| \w+",
    ("masks.truncate", "`end`"): r"(?:pad|random|even) − end",
    ("masks.truncate", "`random`"): r"(?:random|even) − end",
    ("optimizer.decay_all", ""): r"decay: spared − all \| \w+",
    ("optimizer.parameters", ""): r"parameters: float32 − bfloat16 \| \w+",
}


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def entries() -> dict[str, str]:
    """Anchor → text of LOG.md's entries."""
    parts = re.split(r"^## ", LOG, flags=re.MULTILINE)[1:]
    return {anchor(part.split("\n", 1)[0]): part for part in parts}


def linked(row: tuple[str, ...]) -> list[str]:
    return re.findall(r"\(\.\./LOG\.md#([\w-]+)\)", row[3])


def p_of(effect: float, low: float, high: float) -> float:
    """Two-sided, of Student's t over three seeds."""
    t = abs(effect) / ((high - low) / 2 / OF_TWO_DEGREES)
    return float(1 - t / (2 + t * t) ** 0.5)


def comparisons(pattern: str) -> list[tuple[float, float, float]]:
    """R² and its interval, of the tables in LOG.md."""
    rows = re.findall(rf"^\| {pattern} \| \**{INTERVAL}\** \|", LOG, re.MULTILINE)
    return [tuple(float(bound.replace("−", "-")) for bound in row) for row in rows]  # type: ignore[misc]


def holm(each: list[float]) -> list[float]:
    """Corrected p, the smallest first."""
    found: list[float] = []
    for place, p in enumerate(sorted(each)):
        found.append(min(1.0, max([*found, p * (len(each) - place)])))
    return found


def studied(row: tuple[str, ...]) -> list[tuple[float, float, float]]:
    (pattern,) = (said for (field, values), said in STUDIED.items()
                  if row[0] == f"`{field}`" and row[1].startswith(values))  # fmt: skip
    return comparisons(pattern)


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
    said = RECKONED.sub("", re.sub(r"\[[^\]]*\]\([^)]*\)", "", row[3]))
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


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if row[2] in ("validated", "one of four", "no difference")],
    ids=lambda row: f"{row[0]} {row[1][:12]}",
)
def test_a_word_is_earned_among_all_comparisons_of_its_setting(row: tuple[str, ...]) -> None:
    found = studied(row)
    assert len(found) == (4 if row[0] != "`masks.truncate`" else 3 if row[2] == "validated" else 2)
    corrected = holm([p_of(*each) for each in found])
    apart = sum(low > 0 or high < 0 for _, low, high in found)
    if row[2] == "validated":
        assert corrected[0] < 0.05
    elif row[2] == "one of four":
        assert apart == 1 and len(found) == 4 and corrected[0] >= 0.05
    else:
        assert apart == 0
    for p, said in zip(corrected, RECKONED.findall(row[3]), strict=False):
        assert float(said) == round(p, len(said) - 2)
    assert RECKONED.findall(row[3]) or row[2] == "no difference"


def test_over_a_whole_study_nothing_stands_and_the_page_says_so() -> None:
    smallest = [p_of(*each) for each in comparisons(r"\w+: \w+ − \w+ \| \w+")]
    assert len(smallest) == 20 and holm(smallest)[0] > 0.05
    assert f"none would stand (the smallest p is {min(smallest):.3f})" in PAGE


def recipes_rows(field: str) -> str:
    return " ".join(row[1] for row in ROWS if f"`{field}`" in row[0] and row[2] == "paper")


def test_figures_that_are_a_recipes_are_that_recipes() -> None:
    said = recipes_rows("target.momentum")
    for name, shown in (("vjepa2_vitl", "0.99925"), ("vjepa_vitb", "0.998 → 1")):
        assert f"{shown} in `{name}`" in said
        low, high = get_recipe(name).config.target.momentum
        assert shown == (f"{low:g}" if low == high else f"{low:g} → {high:g}")
    decay = get_recipe("vjepa2_vitl").config.optimizer
    shown = f"`vjepa2_vitl`: {decay.weight_decay:g} → {decay.weight_decay_final:g}"
    assert shown in recipes_rows("optimizer.weight_decay")
    assert "15,834" not in recipes_rows("optimizer.warmup_steps")
    users = {name for name in recipe_names() if get_recipe(name).config.target.provider == "ema"}
    assert users == set(re.findall(r"`(v?\w*jepa\w*)`", recipes_rows("target.provider")))


@pytest.mark.parametrize("row", [row for row in ROWS if row[2] not in RUN_HERE], ids=lambda row: row[0])
def test_what_was_not_run_here_claims_no_entry_of_the_log(row: tuple[str, ...]) -> None:
    assert linked(row) == []
