"""`recipes ls`, `show` and `diff`: a recipe whole, what it changes, and a person's own beside ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salt_vla.cli import main
from salt_vla.config import TrainConfig, from_json, leaves
from salt_vla.errors import ConfigError, RunError, UserError
from salt_vla.recipes import all_recipes, get_recipe, recipe_names
from salt_vla.recipes.stored import read_stored, recipe_file, store, stored_names


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SALT_VLA_ROOT", str(tmp_path))
    return tmp_path


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    def say(*args: str) -> str:
        assert main(["recipes", *args]) == 0
        return capsys.readouterr().out

    return say


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    def say(*args: str) -> str:
        assert main(["recipes", *args]) == 2
        return capsys.readouterr().err

    return say


MINE = replace(get_recipe("demo_student"), name="mine", parent="demo_student", summary="my own")


@pytest.mark.parametrize("name", all_recipes())
def test_show_gives_the_whole_recipe_as_json(name: str, said: Any) -> None:
    shown = json.loads(said("show", name, "--json"))
    assert from_json(TrainConfig, json.dumps(shown.pop("config"))) == get_recipe(name).config
    assert {key: shown[key] for key in ("name", "parent", "hypothesis", "target", "notes")} == {
        key: getattr(get_recipe(name), key) for key in ("name", "parent", "hypothesis", "target", "notes")
    }


@pytest.mark.parametrize("name", ["demo_teacher", "exp1_vicreg10"])
def test_show_names_every_field_once_for_people(name: str, said: Any) -> None:
    first = [line.split()[0] for line in said("show", name).splitlines() if line.strip()]
    for field, _ in leaves(get_recipe(name).config):
        assert first.count(field) == 1


def test_show_puts_the_parents_value_beside_its_own(said: Any) -> None:
    lines = {
        line.split()[0]: line.split()[1:] for line in said("show", "exp2_high_mask").splitlines() if line
    }
    assert lines["masks.ratio"] == ["0.9", "0.75"]
    assert lines["masks.strategy"] == ["topup_block"]
    assert lines["steps"] == ["15834", "26390"]


@pytest.mark.parametrize(
    ("arguments", "sum_of_it"),
    [
        (["vitb_5epoch"], "26,390 steps: 5 epochs of ⌊168,903 clips ÷ 32⌋ = 5,278 steps"),
        (["vitl_extreme"], "35,185 steps: 5 epochs of ⌊168,903 clips ÷ 24⌋ = 7,037 steps"),
        (["salt_vitb"], "200,000 steps × 3,072 clips = 614,400,000 clips"),
        (["vitb_5epoch", "steps=10"], "10 steps × 32 clips = 320 clips"),
    ],
)
def test_show_does_the_sum_of_the_steps(arguments: list[str], sum_of_it: str, said: Any) -> None:
    assert json.loads(said("show", *arguments, "--json"))["length"] == sum_of_it


def test_show_takes_overrides(said: Any) -> None:
    shown = json.loads(said("show", "demo_student", "optimizer.lr=0.5", "--json"))
    assert shown["config"]["optimizer"]["lr"] == 0.5


def test_diff_of_two_and_of_one_with_its_parent(said: Any) -> None:
    both = json.loads(said("diff", "vitb_5epoch", "exp2_high_mask", "--json"))
    alone = json.loads(said("diff", "exp2_high_mask", "--json"))
    assert both == alone
    assert both["recipes"] == ["vitb_5epoch", "exp2_high_mask"]
    assert {row["field"]: (row["vitb_5epoch"], row["exp2_high_mask"]) for row in both["fields"]} == {
        "masks.ratio": (0.75, 0.9),
        "optimizer.warmup_steps": (1000, 500),
        "steps": (26390, 15834),
    }
    assert "masks.ratio" in said("diff", "exp2_high_mask")


def test_diff_of_the_same_under_two_names(said: Any) -> None:
    assert "differ in nothing" in said("diff", "vitb_5epoch", "fast_throughput")


def test_diff_without_a_parent_asks_for_a_second(refused: Any) -> None:
    assert "'demo_teacher' has no parent; name a second recipe" in refused("diff", "demo_teacher")


@pytest.mark.parametrize("arguments", [("show", "demo_studnt"), ("diff", "demo_student", "demo_studnt")])
def test_a_typo_lists_near_names(arguments: tuple[str, ...], refused: Any) -> None:
    assert "did you mean demo_student" in refused(*arguments)


def test_a_stored_recipe_is_one_like_ours(root: Path, said: Any) -> None:
    assert store(MINE) == root / "recipes" / "mine.json"
    assert get_recipe("mine") == read_stored("mine") == MINE
    assert recipe_names() == [*all_recipes(), "mine"]
    row = json.loads(said("ls", "--json"))[-1]
    assert (row["name"], row["summary"], row["origin"]) == ("mine", "my own", str(recipe_file("mine")))
    assert "differ in nothing" in said("diff", "mine")
    with pytest.raises(UserError, match="no recipe 'mien'; did you mean mine"):
        get_recipe("mien")


def test_storing_it_again_changes_nothing_and_another_one_is_refused() -> None:
    store(MINE)
    store(MINE)
    with pytest.raises(ConfigError, match="there is another recipe 'mine'"):
        store(replace(MINE, summary="other"))
    assert read_stored("mine") == MINE
    store(replace(MINE, summary="other"), replace=True)
    assert read_stored("mine").summary == "other"


@pytest.mark.parametrize("name", ["../mine", "a/b", "", ".hidden", "x" * 101])
def test_a_name_that_leads_elsewhere_is_refused(name: str, root: Path) -> None:
    with pytest.raises(RunError, match="recipe name"):
        store(replace(MINE, name=name))
    assert not list(root.rglob("*.json"))


def test_ours_win_over_a_file_of_the_same_name(root: Path) -> None:
    recipe_file("demo_student").parent.mkdir()
    recipe_file("demo_student").write_text("{}")
    assert get_recipe("demo_student").summary
    assert recipe_names() == list(all_recipes())
    assert stored_names() == ["demo_student"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("{}", "lacks field"),
        ('{"name": 1}', "lacks field"),
        ("[]", "must be an obj"),
    ],
)
def test_a_damaged_file_is_named_and_hides_no_other(
    text: str, sentence: str, said: Any, refused: Any
) -> None:
    store(MINE)
    recipe_file("bad").write_text(text)
    rows = {row["name"]: row["summary"] for row in json.loads(said("ls", "--json"))}
    assert rows["mine"] == "my own" and "bad.json" in rows["bad"] and sentence in rows["bad"]
    assert sentence in refused("show", "bad")


def test_what_is_no_file_hides_no_other(root: Path, said: Any, refused: Any) -> None:
    store(MINE)
    recipe_file("gone").symlink_to(root / "nowhere")
    recipe_file("folder").mkdir()
    rows = {row["name"]: row["summary"] for row in json.loads(said("ls", "--json"))}
    assert rows["mine"] == "my own"
    assert "cannot be read: No such file" in rows["gone"] and "Is a directory" in rows["folder"]
    assert "gone.json cannot be read" in refused("diff", "gone")


def test_a_recipe_gives_the_terminal_no_orders(said: Any) -> None:
    store(replace(MINE, summary="red \x1b[31mand\rover, \x9b1m"))
    for arguments in (("ls",), ("show", "mine")):
        assert not set("\x1b\r\x9b") & set(said(*arguments))
    assert r"red \x1b[31mand\rover, \x9b1m" in " ".join(said("show", "mine").split())


def test_a_recipe_called_as_a_column_hides_none(said: Any) -> None:
    store(replace(MINE, name="field", config=replace(MINE.config, steps=7)))
    rows = json.loads(said("diff", "demo_student", "field", "--json"))["fields"]
    assert rows == [{"field": "steps", "demo_student": 1000, "recipe field": 7}]
    store(replace(MINE, name="child", parent="field"))
    lines = {line.split()[0]: line.split()[1:] for line in said("show", "child").splitlines() if line}
    assert lines["steps"] == ["1000", "7"]


def test_epochs_are_no_fewer_than_none() -> None:
    with pytest.raises(ConfigError, match="epochs must be at least 0, not -3"):
        replace(MINE, epochs=-3)


@pytest.mark.parametrize(
    ("words", "is_told"),
    [
        (["show", "mine", "seed=1", "--json", "steps=7"], True),
        (["show", "mine", "steps=7", "--jsno"], False),
        (["show", "mine", "--jsno", "more"], False),
    ],
)
def test_fields_behind_an_option_are_told_their_place(
    words: list[str], is_told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    store(MINE)
    with pytest.raises(SystemExit, match="2"):
        main(["recipes", *words])
    assert ("put all field=value together" in capsys.readouterr().err) == is_told


def test_a_file_that_holds_another_name_is_refused(refused: Any) -> None:
    store(MINE)
    recipe_file("mine").rename(recipe_file("yours"))
    assert "holds a recipe called 'mine'" in refused("show", "yours")
