"""The page: well formed, self-contained, escaped; its pictures decode and its anchors lead somewhere."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from salt_vla.reports.canvas import DARK, LIGHT
from salt_vla.reports.html import Facts, Figure, Figures, Folded, ReportContent, Section, render
from salt_vla.reports.page import CONTENT_POLICY, STYLE
from salt_vla.reports.tables import Cell, Table

VOID = {"meta", "img", "source", "br", "hr", "link"}


class Page(HTMLParser):
    """Collects what the tests ask for; fails on a tag closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> says {names} twice"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def png(colour: str, size: tuple[int, int] = (6, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def content(**changes: object) -> ReportContent:
    table = Table("Probes", "target", ("student",), (("task", "accuracy"),), ((Cell("0.9", "[0.8, 1.0]"),),))
    figure = Figure(png("red"), "A red square.", "red square", dark_png=png("blue"))
    fields: dict[str, object] = {
        "title": "What was learned",
        "lead": "A lead.",
        "conclusions": ["First.", "Second.", "Third."],
        "answer": [table],
        "sections": [
            Section("Training", ["A paragraph.", Figures([figure, figure])]),
            Section("Masks", [Figure(png("green", (60, 40)), "Masks.", "film strip", wide=True)]),
            Section(
                "What was run", [Facts([("seed", "1")], "Seeds"), Folded("Configuration", '{"seed": 1}')]
            ),
        ],
        "footer": "The end.",
    }
    return ReportContent(**(fields | changes))  # type: ignore[arg-type]


def test_every_tag_is_closed_and_the_document_has_its_parts() -> None:
    html = render(content())
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>\n<html lang=")
    assert [len(page.all(tag)) for tag in ("title", "h1", "main", "nav", "footer", "table")] == [1] * 6
    assert {"charset": "utf-8"} in page.all("meta")


def test_conclusions_and_main_table_come_before_everything_else() -> None:
    html = render(content())
    places = [html.index(part) for part in ("First.", "Second.", "Third.", "<table>", "<nav", "A paragraph.")]
    assert places == sorted(places)
    assert '<p class="verdict">First.</p>' in html and "<li>Second.</li><li>Third.</li>" in html


def test_the_table_of_contents_leads_to_every_section() -> None:
    page = Page(render(content()))
    targets = [link["href"] for link in page.all("a")]
    assert targets == ["#top", "#training", "#masks", "#what-was-run"]
    anchors = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert {target[1:] for target in targets} <= set(anchors)


def test_headings_that_look_alike_get_anchors_of_their_own() -> None:
    sections = [Section(heading, []) for heading in ("Masks", "masks!", "Top", "***", "…")]
    page = Page(render(content(sections=sections)))
    anchors = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(anchors) == len(set(anchors)) == 6


def test_nothing_is_fetched_from_anywhere_and_nothing_runs() -> None:
    html = render(content())
    page = Page(html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import|javascript:", html)
    assert not {"script", "link", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    for source in [image["src"] for image in page.all("img")] + [s["srcset"] for s in page.all("source")]:
        assert source.startswith("data:image/png;base64,")
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == CONTENT_POLICY and "default-src 'none'" in CONTENT_POLICY


def test_pictures_are_embedded_whole_with_size_caption_and_words_for_the_blind() -> None:
    page = Page(render(content()))
    images = page.all("img")
    assert [(image["alt"], image["width"], image["height"]) for image in images] == [
        ("red square", "6", "4"),
        ("red square", "6", "4"),
        ("film strip", "60", "40"),
    ]
    decoded = Image.open(io.BytesIO(base64.b64decode(images[2]["src"].partition(",")[2])))
    assert decoded.size == (60, 40) and decoded.getpixel((0, 0)) == (0, 128, 0)
    assert len(page.all("figcaption")) == 3 and "A red square." in page.text


def test_a_dark_picture_is_offered_to_dark_pages_only() -> None:
    page = Page(render(content()))
    (first, second) = page.all("source")
    assert first == second and first["media"] == "(prefers-color-scheme: dark)"
    dark = Image.open(io.BytesIO(base64.b64decode(first["srcset"].partition(",")[2])))
    assert dark.getpixel((0, 0)) == (0, 0, 255)


def test_wide_pictures_and_tables_scroll_in_boxes_that_the_keyboard_reaches() -> None:
    page = Page(render(content()))
    boxes = [attributes for attributes in page.all("div") if "tabindex" in attributes]
    assert [box["class"] for box in boxes] == ["table", "picture"]
    assert boxes[0]["aria-label"] == "Probes"


EVIL = "</title><script>alert(\"x\")</script><b onclick='y'>&"


@pytest.mark.parametrize(
    "changed",
    [
        {"title": EVIL},
        {"lead": EVIL},
        {"conclusions": [EVIL, EVIL]},
        {"footer": EVIL},
        {"answer": [EVIL, Table(EVIL, EVIL, (EVIL,), ((EVIL, EVIL),), ((Cell(EVIL, EVIL),),), EVIL)]},
        {"sections": [Section(EVIL, [Facts([(EVIL, EVIL)], EVIL), Folded(EVIL, EVIL)])]},
        {"sections": [Section("x", [Figure(png("red"), EVIL, EVIL, wide=True)])]},
    ],
    ids=["title", "lead", "conclusions", "footer", "table", "facts", "figure"],
)
def test_whatever_comes_from_outside_is_text(changed: dict[str, object]) -> None:
    page = Page(render(content(**changed)))
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "b"} & tags
    shown = "".join(page.text) + "".join(image["alt"] for image in page.all("img"))
    assert EVIL in shown
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_an_empty_report_is_still_a_page() -> None:
    page = Page(render(content(conclusions=[], answer=[], sections=[], footer="")))
    assert not page.all("nav") and not page.all("footer") and page.all("h1")


def test_long_texts_are_folded_until_asked_for() -> None:
    html = render(content())
    assert "<details><summary>Configuration</summary><pre>{&quot;seed&quot;: 1}</pre></details>" in html


def test_facts_are_names_and_values() -> None:
    html = render(content())
    assert "<h3>Seeds</h3><dl><div><dt>seed</dt><dd>1</dd></div></dl>" in html


def test_the_style_knows_dark_pages_narrow_screens_and_paper() -> None:
    for media in ("prefers-color-scheme: dark", "max-width: 48rem", "min-width: 90rem", "print"):
        assert f"@media ({media})" in STYLE or f"@media {media}" in STYLE
    assert STYLE.count("{") == STYLE.count("}")


def test_cards_have_the_colour_of_the_charts_paper() -> None:
    light, dark = re.findall(r"--card: (#\w+);", STYLE)
    assert (light, dark) == (LIGHT.paper, DARK.paper)


def test_every_class_in_use_has_a_style_or_a_job() -> None:
    page = Page(render(content()))
    used = {name for _, attributes in page.tags for name in attributes.get("class", "").split()}
    styled = set(re.findall(r"\.([a-z]+)", STYLE))
    assert used - styled <= {"answer", "figure"}
