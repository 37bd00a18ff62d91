"""A report's content as one self-contained HTML page: pictures embedded, styles inline, no script.

Knows how a page is laid out, not what it says; every string from outside is escaped.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from salt_vla.reports.page import CONTENT_POLICY, STYLE
from salt_vla.reports.tables import Table, to_html


@dataclass(frozen=True)
class Figure:
    """A picture with what it shows (`caption`) and what a person who cannot see it should know (`alt`).

    `dark_png` is shown on dark pages instead. `wide`: takes the whole column and, on a narrow screen,
    scrolls sideways rather than shrinking its letters.
    """

    png: bytes
    caption: str
    alt: str
    dark_png: bytes | None = None
    wide: bool = False


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room, below each other where there is not."""

    items: Sequence[Figure]


@dataclass(frozen=True)
class Facts:
    """Names and values: what was run, with what, how long it took."""

    items: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True)
class Checks:
    """What was looked at, a line each: (ok | warn | bad, what it is about, what was found)."""

    items: Sequence[tuple[str, str, str]]
    title: str = ""


@dataclass(frozen=True)
class Folded:
    """Long text, such as a whole configuration, that opens on request."""

    summary: str
    text: str


@dataclass(frozen=True)
class Code:
    """Commands, one a line, to be taken as they are."""

    text: str


# A plain string is a paragraph.
Block = str | Figure | Figures | Table | Facts | Checks | Folded | Code


@dataclass(frozen=True)
class Section:
    """A heading with its anchor in the contents, and what stands below it."""

    heading: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class ReportContent:
    """What a page says: the first of `conclusions` is set large, `answer` follows on the first screen."""

    title: str
    lead: str
    conclusions: Sequence[str]
    answer: Sequence[Block]
    sections: Sequence[Section]
    footer: str = ""


def render(content: ReportContent) -> str:
    """The whole page."""
    anchors = _anchors([section.heading for section in content.sections])
    sections = "\n".join(
        f'<section id="{anchor}"><h2>{escape(section.heading)}</h2>\n{_blocks(section.blocks)}</section>'
        for anchor, section in zip(anchors, content.sections, strict=True)
    )
    footer = f"<footer><p>{escape(content.footer)}</p></footer>" if content.footer else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{escape(CONTENT_POLICY, quote=True)}">
<title>{escape(content.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header id="top"><h1>{escape(content.title)}</h1>
<p class="lead">{escape(content.lead)}</p></header>
{_answer(content)}
{_contents(content.sections, anchors)}
{sections}
{footer}
</main>
</body>
</html>
"""


def _answer(content: ReportContent) -> str:
    verdict, rest = "", ""
    if content.conclusions:
        verdict = f'<p class="verdict">{escape(content.conclusions[0])}</p>'
    if content.conclusions[1:]:
        sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in content.conclusions[1:])
        rest = f'<ul class="findings">{sentences}</ul>'
    answer = f"{verdict}{rest}\n{_blocks(content.answer)}"
    return f'<section class="answer" aria-label="Conclusions">{answer}</section>'


def _contents(sections: Sequence[Section], anchors: Sequence[str]) -> str:
    if not sections:
        return ""
    items = "".join(
        f'<li><a href="#{anchor}">{escape(section.heading)}</a></li>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    first = '<li><a href="#top">Conclusions</a></li>'
    return f'<nav aria-label="Contents"><h2>Contents</h2><ol>{first}{items}</ol></nav>'


def _anchors(headings: Sequence[str]) -> list[str]:
    """A different, readable anchor for each heading."""
    anchors: list[str] = []
    for heading in headings:
        slug = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        taken = {"top", *anchors}
        anchor = next(a for a in (slug, *(f"{slug}-{n}" for n in range(2, len(taken) + 3))) if a not in taken)
        anchors.append(anchor)
    return anchors


def _blocks(blocks: Sequence[Block]) -> str:
    return "\n".join(_block(block) for block in blocks)


def _block(block: Block) -> str:
    match block:
        case str():
            return f"<p>{escape(block)}</p>"
        case Figure():
            return _figure(block)
        case Figures():
            return f'<div class="figures">{"".join(map(_figure, block.items))}</div>'
        case Table():
            return to_html(block)
        case Facts():
            return _facts(block)
        case Checks():
            return _checks(block)
        case Code():
            return f'<pre class="code">{escape(block.text)}</pre>'
        case Folded():
            summary = f"<summary>{escape(block.summary)}</summary>"
            return f"<details>{summary}<pre>{escape(block.text)}</pre></details>"


def _figure(figure: Figure) -> str:
    dark = ""
    if figure.dark_png is not None:
        dark = f'<source media="(prefers-color-scheme: dark)" srcset="{_data_uri(figure.dark_png)}">'
    width, height = _png_size(figure.png)
    image = (
        f'<img src="{_data_uri(figure.png)}" alt="{escape(figure.alt, quote=True)}" '
        f'width="{width}" height="{height}">'
    )
    kind = ' class="wide"' if figure.wide else ""
    # A box that scrolls must be reachable by keyboard.
    scroll = ' tabindex="0"' if figure.wide else ""
    return (
        f'<figure{kind}><div class="picture"{scroll}><picture>{dark}{image}</picture></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _facts(facts: Facts) -> str:
    title = f"<h3>{escape(facts.title)}</h3>" if facts.title else ""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items
    )
    return f'<div class="facts">{title}<dl>{items}</dl></div>'


def _checks(checks: Checks) -> str:
    title = f"<caption><span>{escape(checks.title)}</span></caption>" if checks.title else ""
    rows = "".join(
        f'<tr><th scope="row">{escape(topic)}</th><td class="{escape(mark, quote=True)}">{escape(mark)}</td>'
        f"<td>{escape(text)}</td></tr>"
        for mark, topic, text in checks.items
    )
    label = escape(checks.title or "Checks", quote=True)
    return (
        f'<div class="table checks" role="region" aria-label="{label}" tabindex="0"><table>{title}'
        f'<thead><tr><th scope="col">check</th><th scope="col"></th><th scope="col">found</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _png_size(png: bytes) -> tuple[int, int]:
    """(width, height) from the PNG's header, so that the page does not jump while it loads."""
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")
