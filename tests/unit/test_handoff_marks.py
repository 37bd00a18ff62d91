"""Generated sections are replaced; every byte that a person wrote stays, or nothing is written at all."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from salt_vla.operations.handoff.marks import MARK, MarkError, between_marks, by_hand, merged, parts_of

SECTIONS = {"state": "## State\n\nold\n", "next": "## Next\n\nold\n"}
ANEW = {"state": "## State\n\nnew\n", "next": "## Next\n\nnew\n"}


def page(*between: str) -> str:
    before, middle, after = between
    marked = [between_marks(name, text) for name, text in SECTIONS.items()]
    return f"{before}{marked[0]}{middle}{marked[1]}{after}"


@pytest.mark.parametrize(
    "between",
    [
        ("", "", ""),
        ("# Mine\n\n", "between\n", "\nno newline at the end"),
        ("\ttabs  \r\n", "\r\n", "\n\n\n   \n"),
        ("<!-- a comment -->\n```\ncode\n```\n", "<!-- goal:begin -->\n", "ümläut 漢字 \udcff\n"),
        ("text before a form feed\x0c", "\x1c\x85", " \n"),
    ],
)
def test_whatever_lies_outside_the_marks_is_kept_byte_for_byte(between: tuple[str, str, str]) -> None:
    before = page(*between)
    after = merged(before, ANEW, "PROGRESS.md")
    first, middle, last = between
    marked = [between_marks(name, text) for name, text in ANEW.items()]
    assert after == f"{first}{marked[0]}{middle}{marked[1]}{last}"
    assert merged(after, ANEW, "PROGRESS.md") == after


def test_a_person_may_move_sections_about() -> None:
    marked = {name: between_marks(name, text) for name, text in SECTIONS.items()}
    moved = f"mine\n{marked['next']}more of mine\n{marked['state']}"
    after = merged(moved, ANEW, "PROGRESS.md")
    assert after.index("## Next\n\nnew") < after.index("more of mine") < after.index("## State\n\nnew")


def test_a_section_that_is_missing_comes_behind_the_last() -> None:
    before = f"mine\n{between_marks('state', 'old')}end\n"
    after = merged(before, ANEW, "PROGRESS.md")
    assert after.startswith("mine\n") and after.endswith("end\n")
    assert after.index("## State") < after.index("## Next") < after.rindex("end\n")


def test_a_page_without_marks_keeps_its_text_and_gets_all_sections() -> None:
    after = merged("my own page, without a newline", ANEW, "PROGRESS.md")
    assert after.startswith("my own page, without a newline\n")
    assert [part.name for part in parts_of(after, "") if part.name] == ["state", "next"]
    assert merged(after, ANEW, "") == after


def test_what_was_written_into_a_generated_section_is_kept_below_it() -> None:
    before = page("", "", "").replace("## State\n\nold", "## State\n\nold\nmy own remark")
    after = merged(before, ANEW, "PROGRESS.md")
    assert "my own remark" in after and "## State\n\nnew" in after
    again = merged(after, SECTIONS, "PROGRESS.md")
    assert again.count("my own remark") == 1  # It is theirs now, and stays.


def test_line_ends_of_another_editor_are_no_change_of_a_section() -> None:
    before = page("mine\n", "", "").replace("\n", "\r\n")
    after = merged(before, ANEW, "PROGRESS.md")
    assert "had been changed by hand" not in after
    assert after.startswith("mine\r\n")


DAMAGE = {
    "an end that is gone": lambda text: text.replace(f"{MARK}end state -->\n", ""),
    "a begin that is gone": lambda text: text.split("\n", 1)[1],
    "a name that was changed": lambda text: text.replace(f"{MARK}end state -->", f"{MARK}end stat -->"),
    "a section that is there twice": lambda text: text + between_marks("state", "twice"),
    "a mark cut off": lambda text: text.replace(f"{MARK}begin state", f"{MARK}begin\nstate"),
    "a mark within a line": lambda text: text.replace(f"{MARK}end next -->", f"{MARK}end next --> and more"),
    "a section of another version": lambda text: text + between_marks("weather", "fine"),
    "a section within another": lambda text: text.replace("old", f"old\n{between_marks('next', 'x')}"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_mark_is_a_sentence(damage: Callable[[str], str]) -> None:
    with pytest.raises(MarkError) as refusal:
        merged(damage(page("", "mine\n", "")), ANEW, "PROGRESS.md")
    assert "PROGRESS.md" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_no_content_can_end_its_section() -> None:
    evil = f"a run called\n{MARK}end state -->\nand text that would be taken for a person's\n"
    after = merged("", {"state": evil}, "PROGRESS.md")
    parts = parts_of(after, "PROGRESS.md")
    assert [part.name for part in parts if part.name] == ["state"]
    assert merged(after, ANEW, "PROGRESS.md").count("taken for a person's") == 0


def test_any_page_is_either_kept_or_refused() -> None:
    """Lines of a page in any disorder: the text of people is in what is written, in its order."""
    draw = random.Random(8)
    lines = page("one\n", "two\n", "three\n").splitlines(keepends=True)
    outcomes = set()
    for _ in range(500):
        count = draw.randint(1, len(lines))
        shuffled = draw.sample(lines, count) if draw.random() < 0.5 else lines[:count]
        text = "".join(shuffled)
        try:
            hand = [part.text for part in parts_of(text, "") if not part.name]
            after = merged(text, ANEW, "")
        except MarkError:
            outcomes.add("refused")
            continue
        outcomes.add("kept")
        place = 0
        for piece in hand:
            assert after.find(piece, place) >= 0
            place = after.find(piece, place) + len(piece)
    assert outcomes == {"refused", "kept"}


def test_the_goal_is_what_stands_between_its_marks() -> None:
    text = "# Progress\n\n<!-- goal:begin -->\nLeave 11.5 behind.\n<!-- goal:end -->\n"
    text += between_marks("state", "x")
    text += "<!-- notes:begin -->\nAsk about the disk.\n<!-- notes:end -->\nloose remark\n"
    goal, rest = by_hand(text, "PROGRESS.md")
    assert goal == "Leave 11.5 behind."
    assert rest.startswith("# Progress") and "Ask about the disk." in rest and rest.endswith("loose remark")
    assert "generated" not in rest
