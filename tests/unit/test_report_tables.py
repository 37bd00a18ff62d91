"""Tables: what is marked and what is not, and the three forms they are written in."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console

from salt_vla.reports.latex import escape, to_latex
from salt_vla.reports.tables import Cell, Table, difference_table, score_table, to_html, to_markdown, to_rich

VALUES = {"constant": 0.0, "pixels": 0.79, "student": 0.69, "teacher": 0.72, "random": 0.63}


def scores(target: str = "hand_velocity", suite: str = "held_out", **values: float) -> list[dict[str, Any]]:
    return [
        {
            "encoder": encoder,
            "suite": suite,
            "target": target,
            "metric": "r2",
            "value": value,
            "low": value - 0.03,
            "high": value + 0.02,
            "seed": 0,
        }
        for encoder, value in (VALUES | values).items()
    ]


def pair(encoder: str, against: str, value: float, **more: Any) -> dict[str, Any]:
    row = {
        "encoder": encoder,
        "against": against,
        "suite": "held_out",
        "target": "hand_velocity",
        "metric": "r2",
    }
    row |= {
        "difference": value,
        "low": value - 0.02,
        "high": value + 0.02,
        "seed": 0,
        "apart": abs(value) > 0.02,
    }
    return row | more


def marks(table: Table, row: int = 0) -> dict[str, str]:
    return {column: cell.mark for column, cell in zip(table.columns, table.cells[row], strict=True)}


def test_targets_run_down_and_encoders_across_in_report_order() -> None:
    table = score_table(scores() + scores("task"))
    assert table.columns == ("student", "teacher", "random init", "pixels", "constant")
    assert table.names == (("hand velocity", "R²"), ("task", "R²"))
    assert table.cells[0][0] == Cell("0.690", "[0.660, 0.710]")
    assert table.cells[0][0].text == "0.690 [0.660, 0.710]"


def test_the_best_value_is_not_marked_without_a_paired_comparison() -> None:
    table = score_table(scores())
    assert set(marks(table).values()) == {""}
    assert "None is bold" in table.note


def test_the_best_is_marked_where_it_is_apart_from_the_runner_up_and_all_it_met() -> None:
    table = score_table(scores(), [pair("pixels", "teacher", 0.07), pair("student", "pixels", -0.1)])
    assert marks(table)["pixels"] == "best"
    assert [mark for mark in marks(table).values() if mark] == ["best"]
    assert "Bold: best" in table.note


@pytest.mark.parametrize(
    "comparisons",
    [
        [pair("student", "pixels", -0.1)],
        [pair("pixels", "teacher", 0.01)],
        [pair("pixels", "teacher", 0.07), pair("pixels", "student", 0.01)],
        [pair("pixels", "teacher", 0.07, suite="new_cameras")],
        [pair("pixels", "teacher", 0.07, target="task")],
    ],
    ids=["runner-up not met", "not apart", "not apart from another", "other suite", "other target"],
)
def test_the_leader_stays_unmarked_while_anything_is_in_doubt(comparisons: list[dict[str, Any]]) -> None:
    assert "best" not in marks(score_table(scores(), comparisons)).values()


def test_a_comparison_is_read_from_either_side() -> None:
    assert marks(score_table(scores(), [pair("teacher", "pixels", -0.07)]))["pixels"] == "best"


def test_an_encoder_alone_is_not_the_best_of_anything() -> None:
    table = score_table(scores()[:1])
    assert table.columns == ("constant",) and marks(table) == {"constant": ""}


def test_a_suite_is_chosen_and_the_others_left_out() -> None:
    rows = scores() + scores(suite="new_cameras", student=0.1)
    table = score_table(rows, suite="new_cameras", title="New cameras")
    assert table.title == "New cameras" and table.cells[0][0].figure == "0.100" and len(table.cells) == 1


def test_a_missing_figure_is_a_dash() -> None:
    table = score_table(scores() + [row for row in scores("task") if row["encoder"] == "student"])
    assert [cell.figure for cell in table.cells[1]] == ["0.690", "–", "–", "–", "–"]


def test_what_a_reader_must_know_of_a_figure_stands_below_the_table() -> None:
    rows = scores()
    rows[2]["note"] = "not converged"
    table = score_table(rows)
    assert table.cells[0][0].figure == "0.690*"
    assert "* not converged (student, hand velocity)." in table.note


def test_several_seeds_are_said_in_the_note() -> None:
    rows = [row | {"seed": seed} for seed in (1, 2, 3) for row in scores()]
    assert score_table(rows).note.startswith("Means over 3 seeds. Intervals: from the lowest")
    assert "seeds" not in score_table(scores()).note


def test_differences_are_told_from_one_encoder_and_marked_where_apart() -> None:
    table = difference_table(
        [
            pair("student", "random", 0.06),
            pair("teacher", "student", 0.03),
            pair("student", "pixels", 0.01),
            pair("teacher", "random", 0.09),
        ]
    )
    assert table.columns == ("teacher", "random init", "pixels")
    assert marks(table) == {"teacher": "behind", "random init": "ahead", "pixels": "level"}
    assert [cell.text for cell in table.cells[0]] == [
        "▼ −0.030 [−0.050, −0.010]",
        "▲ +0.060 [+0.040, +0.080]",
        "+0.010 [−0.010, +0.030]",
    ]
    assert "student minus" in table.title


def test_what_holds_for_all_targets_together_has_its_arrow_doubled_in_every_form() -> None:
    table = difference_table(
        [
            pair("student", "random", 0.06, p=0.001, p_holm=0.004),
            pair("student", "teacher", -0.06, p=0.02, p_holm=0.08),
            pair("pixels", "student", 0.05, p=0.0001, p_holm=0.001),
        ]
    )
    assert [cell.figure for cell in table.cells[0]] == ["−0.060", "+0.060", "−0.050"]
    assert [cell.text.split()[0] for cell in table.cells[0]] == ["▼", "▲▲", "▼▼"]
    assert "p < 0.05, corrected (Holm) for the suite's targets" in table.note
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(to_rich(table))
    shown = (console.export_text(), to_markdown(table), to_html(table))
    assert all(text.count("▲▲ +0.060") == 1 for text in shown)
    assert r"\textbf{$\uparrow$$\uparrow$ +0.060" in to_latex(table)


def test_no_arrow_is_doubled_where_the_interval_holds_zero_or_a_seed_has_no_p() -> None:
    unsure = pair("student", "random", 0.01, p=0.001, p_holm=0.004)
    seeds = [pair("student", "pixels", 0.06, seed=0, p_holm=0.001), pair("student", "pixels", 0.06, seed=1)]
    cells = difference_table([unsure, *seeds]).cells[0]
    assert [cell.arrow for cell in cells] == ["", "▲ "]


def test_a_comparison_that_was_not_made_is_a_dash() -> None:
    table = difference_table([pair("student", "random", 0.06), pair("student", "pixels", 0.1, target="task")])
    assert [[cell.figure for cell in row] for row in table.cells] == [["+0.060", "–"], ["–", "+0.100"]]


def test_no_comparisons_give_an_empty_table_that_can_still_be_written() -> None:
    table = difference_table([])
    assert table.columns == () and table.cells == ()
    assert "<table>" in to_html(table) and to_markdown(table).startswith("| target |")


class Cells(HTMLParser):
    """Texts of a table's cells, row by row, and the classes of its data cells."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.classes: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True
        if tag == "td":
            self.classes.append(dict(attrs).get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1][-1] += data


def test_html_holds_the_same_figures_and_marks_them_by_class() -> None:
    parser = Cells()
    parser.feed(to_html(score_table(scores(), [pair("pixels", "teacher", 0.07)])))
    assert parser.rows[0] == ["target", "student", "teacher", "random init", "pixels", "constant"]
    assert parser.rows[1][:2] == ["hand velocity R²", "0.690 [0.660, 0.710]"]
    assert parser.classes == ["", "", "", "best", ""]


def test_html_escapes_what_comes_from_outside() -> None:
    rows = [row | {"target": '<script>alert("x")</script>', "encoder": "a&b"} for row in scores()[:1]]
    written = to_html(score_table(rows, title="</caption><img src=x>"))
    assert "<script" not in written and "<img" not in written
    assert "a&amp;b" in written and "&lt;script&gt;" in written


def test_markdown_is_a_table_with_bold_marks_and_escaped_bars() -> None:
    rows = [row | {"target": "left|right"} for row in scores()]
    text = to_markdown(score_table(rows, [pair("pixels", "teacher", 0.07, target="left|right")]))
    head, rule, line = text.splitlines()
    assert head == "| target | student | teacher | random init | pixels | constant |"
    assert rule.count("---:") == 5
    assert (
        line.startswith("| left\\|right (R²) | 0.690 [0.660, 0.710] |") and "**0.790 [0.760, 0.810]**" in line
    )


def test_markdown_holds_no_tag_of_anybodys_name() -> None:
    rows = [row | {"target": "<b>x</b>\ny", "encoder": "<script>a"} for row in scores()[:1]]
    text = to_markdown(score_table(rows))
    assert "| \\<b>x\\</b> y (R²) |" in text and "| \\<script>a |" in text
    assert len(text.splitlines()) == 3


def test_the_terminal_table_fits_five_encoders_in_a_hundred_columns() -> None:
    table = score_table(scores(), [pair("pixels", "teacher", 0.07)], title="[bold]Probes[/bold]")
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(to_rich(table))
    printed = console.export_text()
    assert "[bold]Probes[/bold]" in printed, "markup in a title is text"
    lines = printed.splitlines()
    figures = next(line for line in lines if "hand velocity" in line)
    assert figures.split() == ["hand", "velocity", "0.690", "0.720", "0.630", "0.790", "0.000"]
    assert sum("[0.660, 0.710]" in line for line in lines) == 1
    assert max(map(len, lines)) <= 100


def test_latex_prints_every_sign_that_is_an_order_to_it() -> None:
    orders = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    orders |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    for sign, written in orders.items():
        assert escape(f"a{sign}b") == f"a{written}b"
    everything = "".join(orders)
    rows = [row | {"target": everything, "encoder": f"run_1{everything}"} for row in scores()[:1]]
    text = to_latex(score_table(rows, title=f"50 % of {everything}\nnext line"))
    said = "".join(orders.values())
    assert rf"\caption{{50 \% of {said} next line}}" in text and rf"run\_1{said} \\" in text


def test_a_cell_that_begins_with_a_bracket_is_no_option_of_the_line_before() -> None:
    table = Table("t", "c", ("x",), (("n", ""),), ((Cell("[1, 2]"),),))
    assert "& {}[1, 2]" in to_latex(table)
