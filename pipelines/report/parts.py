"""Reads and writes nothing: what a page of the report is made of, whatever shows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Row:
    """A line of a table; what stands behind a line break in a cell is said in small."""

    cells: list[str]
    kind: Literal["", "good", "bad", "own"] = ""


@dataclass(frozen=True)
class Table:
    """Titles and rows; the columns named in ``words`` are read from the left, the others are numbers."""

    columns: list[str]
    rows: list[Row]
    words: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Picture:
    """A PNG by the name of its file, and what it shows; a wide one is not made smaller than it can be read."""

    name: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Code:
    """Lines to type or to keep; with a title it is folded away."""

    text: str
    title: str = ""


Block = Text | Table | Picture | Code


@dataclass(frozen=True)
class Section:
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Fact:
    """One number that a manager reads."""

    name: str
    value: str
    note: str
    kind: Literal["", "good", "bad"] = ""


@dataclass(frozen=True)
class Page:
    """The report in one language."""

    language: str
    title: str
    verdict: str
    #: What to do, and why.
    headline: str
    why: str
    kind: Literal["good", "bad", "open"]
    facts: list[Fact]
    sections: list[Section]
