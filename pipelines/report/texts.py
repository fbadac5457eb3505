"""Reads nothing, writes nothing: the texts of the report by language, and quantities in words."""

from __future__ import annotations

from typing import Any

from pipelines.report import en, ja

LANGUAGES = {"en": en.TEXTS, "ja": ja.TEXTS}


class Texts:
    """The texts of one language."""

    def __init__(self, language: str) -> None:
        self.language, self._texts = language, LANGUAGES[language]

    def __call__(self, key: str, /, **values: Any) -> str:
        return self._texts[key].format(**values)

    def saving(self, share: float, short: bool = False) -> str:
        """A share saved, or added where it is negative."""
        key = ("saves" if share >= 0 else "saves_more") + ("_short" if short else "")
        return self(key, share=f"{abs(share):.0%}")


def duration(seconds: float) -> str:
    """Three significant digits of seconds, minutes or hours."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
