"""Reads the numbers and pictures of a report in memory, writes report.json, report.html (one file) and report.md."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipelines.report.parts import Block, Code, Picture, Text
from pipelines.report.sections import page
from pipelines.report.texts import Texts

JSON, HTML, MARKDOWN = "report.json", "report.html", "report.md"
#: Pictures narrower than this are of tiny images, and are shown enlarged, pixel by pixel.
TINY_BELOW = 400
#: Characters that MLflow keeps of a run's description; it cuts a longer one anywhere.
NOTE_AT_MOST = 8000


def report_json(data: dict[str, Any]) -> bytes:
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()


def report_html(data: dict[str, Any], language: str, pictures: Mapping[str, bytes]) -> bytes:
    """One file: style and pictures (PNG by name) inside, no script, no address to load from."""
    environment = Environment(
        loader=PackageLoader("pipelines.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["of"] = lambda block, name: type(block).__name__ == name
    images = {name: _Image(png) for name, png in pictures.items()}
    return environment.get_template("page.html").render(page=page(data, language), images=images).encode()


def report_markdown(data: dict[str, Any], language: str) -> str:
    """The same for a terminal; pictures are named, and what is folded away stays in the page."""
    shown = page(data, language)
    lines = [f"# {_plain(shown.title)}", "", _plain(f"{shown.headline} {shown.why}"), ""]
    lines += [f"- {_plain(f'{fact.name}: {fact.value}. {fact.note}')}".rstrip() for fact in shown.facts]
    for section in shown.sections:
        lines += ["", f"## {_plain(section.title)}"]
        for block in section.blocks:
            lines += ["", *_markdown(block)]
    return "\n".join([*lines, ""])


def report_note(markdown: str, language: str) -> str:
    """report.md as the run's description in MLflow: of a long one the first whole sections."""
    if len(markdown) <= NOTE_AT_MOST:
        return markdown
    rest = Texts(language)("note_rest")
    end = markdown.rindex("\n## ", 0, NOTE_AT_MOST - len(rest) - 2)
    return f"{markdown[:end]}\n{rest}\n"


class _Image:
    """A PNG as an address that holds it, and its width and height in pixels."""

    def __init__(self, png: bytes) -> None:
        self.address = "data:image/png;base64," + base64.b64encode(png).decode()
        # Bytes 16 to 24 of every PNG.
        self.width, self.height = (int.from_bytes(png[start : start + 4]) for start in (16, 20))
        self.tiny = self.width < TINY_BELOW


def _markdown(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [_plain(block.text)]
    if isinstance(block, Picture):
        return [f"`{block.name}`: {_plain(block.caption)}"]
    if isinstance(block, Code):
        return [_plain(block.title)] if block.title else ["```", *block.text.rstrip().splitlines(), "```"]
    rules = ("---" if i in block.words else "---:" for i in range(len(block.columns)))
    return [_line(block.columns), _line(rules), *(_line(map(_cell, row.cells)) for row in block.rows)]


def _line(cells: Any) -> str:
    return f"| {' | '.join(_plain(cell).replace('|', '&#124;') for cell in cells)} |"


def _cell(text: str) -> str:
    """What is said in small stands in brackets."""
    first, _, small = text.partition("\n")
    return f"{first} ({small})" if small else first


def _plain(text: str) -> str:
    """Names are the user's: they must not become tags."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
