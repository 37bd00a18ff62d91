"""A page of which some parts are written by a program and all else by people: generated sections lie between
marks and are replaced, every other byte stays. Knows nothing of what the sections say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash

from salt_vla.errors import UserError

MARK = "<!-- generated:"
_LINE = re.compile(r"<!-- generated:(begin|end) ([a-z]+)(?: ([0-9a-f]{16}))? -->[ \t]*\r?\n?\Z")
_HAND = re.compile(r"<!-- goal:begin -->(.*?)<!-- goal:end -->", re.DOTALL)


class MarkError(UserError):
    """A page whose marks do not say which parts may be written anew; it is left as it is."""


@dataclass(frozen=True)
class Part:
    """A piece of the page: of a person (`name` is empty), or a generated section without its marks. `edited`:
    it is not what was written there, as the seal in its first mark tells; without a seal nobody knows."""

    text: str
    name: str = ""
    edited: bool = False


def parts_of(page: str, where: str) -> list[Part]:
    """The page's pieces in order; theirs, put together with marks, are the page. Raises `MarkError`."""
    parts: list[Part] = []
    lines, name, seal = [""], "", ""
    for number, line in enumerate(page.splitlines(keepends=True), start=1):
        found = _LINE.match(line)
        if found is None:
            if line.lstrip().startswith(MARK):
                raise _damaged(where, number, line)
            lines.append(line)
            continue
        kind, of, sealed = found.groups()
        is_begin = kind == "begin"
        if is_begin == bool(name) or (not is_begin and of != name):
            raise _damaged(where, number, line)
        if is_begin and any(part.name == of for part in parts):
            raise _damaged(where, number, line)
        text = "".join(lines)
        parts.append(Part(text, name, bool(seal) and _seal(text) != seal))
        lines, name, seal = [""], of if is_begin else "", sealed or ""
    if name:
        raise MarkError(
            f"{where} has the mark `{MARK}begin {name} …` and none that ends it; put "
            f"`{MARK}end {name} -->` below what was generated, or remove the first"
        )
    parts.append(Part("".join(lines)))
    return parts


def _damaged(where: str, number: int, line: str) -> MarkError:
    return MarkError(
        f"{where}, line {number}: the mark {line.strip()!r} is damaged or has no partner; mend or remove it, "
        "nothing has been written"
    )


def _seal(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.replace("\r\n", "\n").encode(errors="surrogateescape"))


def between_marks(name: str, text: str) -> str:
    text = text.replace(MARK, "<!- - generated:")  # No name or reason can end a section.
    text = text if text.endswith("\n") else f"{text}\n"
    return f"{MARK}begin {name} {_seal(text)} -->\n{text}{MARK}end {name} -->\n"


def merged(page: str, sections: Mapping[str, str], where: str) -> str:
    """The page with its sections written anew, in the places where they are. One that is missing comes behind
    the last. What somebody has written into a generated section is kept below it, as theirs. Raises
    `MarkError`."""
    parts = parts_of(page, where)
    unknown = [part.name for part in parts if part.name and part.name not in sections]
    if unknown:
        raise MarkError(
            f"{where} has a generated section {unknown[0]!r} that this version does not write; remove it "
            "with both of its marks"
        )
    missing = [name for name in sections if all(part.name != name for part in parts)]
    last = max((place for place, part in enumerate(parts) if part.name), default=-1)
    written = []
    for place, part in enumerate(parts):
        written.append(between_marks(part.name, sections[part.name]) if part.name else part.text)
        if part.edited:
            written.append(_kept(part))
        if place == max(last, 0):
            if place == 0 and missing and not part.text.endswith("\n"):
                written.append("\n")
            written += [f"\n{between_marks(name, sections[name])}" for name in missing]
    return "".join(written)


def _kept(part: Part) -> str:
    text = part.text if part.text.endswith("\n") else f"{part.text}\n"
    said = "The section above had been changed by hand; it was:"
    return f"<!-- notes:begin -->\n{said}\n\n{text}<!-- notes:end -->\n"


def by_hand(page: str, where: str) -> tuple[str, str]:
    """(goal, the rest) of what people wrote: the goal is what lies between its marks."""
    text = "".join(part.text for part in parts_of(page, where) if not part.name)
    found = _HAND.search(text)
    rest = _HAND.sub("", text)
    rest = re.sub(r"<!-- notes:(begin|end) -->", "", rest)
    return (found[1].strip() if found else ""), re.sub(r"\n{3,}", "\n\n", rest).strip()
