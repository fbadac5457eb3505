"""Reads nothing, writes nothing: how the report of a run is written, as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cca_core.data_config import STRICT


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The report that the run ends with. It changes nothing that is computed."""

    __pydantic_config__: ClassVar = STRICT
    #: Of report.html and report.md: English or Japanese. The terminal and the names of samplers stay English.
    language: Literal["en", "ja"] = "en"
