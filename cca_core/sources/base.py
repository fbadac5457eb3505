"""Reads nothing itself: what a source of images is. A source lists its images once, then yields their bytes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cca_core.config import SourceConfig
from cca_core.sources.listing import LISTING, FoundRows, make_listing

__all__ = ["LISTING", "FoundRows", "RawImage", "Source", "listing_digest"]


@dataclass(frozen=True)
class RawImage:
    """One image as found: encoded bytes (PNG, JPEG, ..., or recorded codes as .npy), not yet decoded. ``data`` may be
    unreadable.

    ``error`` is set, and ``data`` empty, where the bytes could not be read or the listing says that the row is bad.
    """

    id: str
    uri: str
    data: bytes
    label: int
    error: str = ""


class Source(ABC):
    """An input format. Construction touches nothing; ``list`` and ``read`` do the work."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config

    @abstractmethod
    def find(self) -> FoundRows:
        """All rows as the data has them.

        Raises ConfigError, with the remedy, where there is nothing to read.
        """

    @abstractmethod
    def read_rows(self, listing: pa.Table) -> Iterator[RawImage]:
        """The images of rows without error, in order, each exactly once; never raises for a single image."""

    def list(self) -> tuple[pa.Table, tuple[str, ...]]:
        """The listing (schema ``LISTING``, sorted by image_id) and the class names by label.

        Ids are unique among the rows without error. Raises ConfigError, with the remedy, where there is nothing to
        read.
        """
        return make_listing(self.config, self.find())

    def read(self, listing: pa.Table) -> Iterator[RawImage]:
        """The images of (a slice of) the listing, in its order, each exactly once; never raises for a single image."""
        images = self.read_rows(listing.filter(pc.equal(listing.column("error"), "")))
        for row in listing.to_pylist():
            if row["error"]:
                yield RawImage(row["image_id"], row["uri"], b"", row["label"], row["error"])
            else:
                yield next(images)


def listing_digest(listing: pa.Table, class_names: tuple[str, ...]) -> str:
    """sha256 of the listing without absolute addresses: equal for a copy with equal ids, labels and stamps."""
    sha = hashlib.sha256()
    for name in ("image_id", "label", "stamp"):
        for value in listing.column(name).to_pylist():
            sha.update(f"{value}\0".encode())
    sha.update("\0".join(class_names).encode())
    return sha.hexdigest()
