"""Reads nothing on import: source.kind -> class. A new input format is one file and one line here."""

from __future__ import annotations

from importlib import import_module

from cca_core.config import SourceConfig
from cca_core.sources.base import LISTING, RawImage, Source, listing_digest

__all__ = ["LISTING", "RawImage", "Source", "listing_digest", "open_source"]

SOURCES = {
    "codes": ("cca_core.sources.codes", "CodesSource"),
    "digits": ("cca_core.sources.digits", "DigitsSource"),
    "folder": ("cca_core.sources.folder", "FolderSource"),
    "list": ("cca_core.sources.list_file", "ListSource"),
    "parquet": ("cca_core.sources.parquet", "ParquetSource"),
    "tar": ("cca_core.sources.tar", "TarSource"),
}


def open_source(config: SourceConfig) -> Source:
    """The source of that kind; nothing is read before it is listed."""
    module, name = SOURCES[config.kind]
    return getattr(import_module(module), name)(config)
