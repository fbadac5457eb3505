"""Reads nothing itself: what a source of images is. A source lists its images once, then yields their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

#: The listing, sorted by image_id. ``location`` is the source's own way back to the bytes; ``stamp`` is size, etag or
#: mtime, so that data changed in place is seen; ``error`` is what is already known to be wrong with the row.
LISTING = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("location", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("stamp", pa.string(), nullable=False),
    ]
)

#: A label beyond this is taken for something else (a time stamp, an identifier).
MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class RawImage:
    """One image as found: encoded bytes (PNG, JPEG, ..., or recorded codes as .npy), not yet decoded. ``data`` may be
    unreadable.

    ``error`` is set, and ``data`` empty, where the bytes themselves could not be read.
    """

    id: str
    uri: str
    data: bytes
    label: int
    error: str = ""


class Source(Protocol):
    """An input format. Construction touches nothing; ``list`` and ``read`` do the work."""

    def list(self) -> tuple[pa.Table, tuple[str, ...]]:
        """The listing (schema ``LISTING``, sorted by image_id, ids unique) and the class names by label.

        Raises ConfigError, with the remedy, where there is nothing to read.
        """
        ...

    def read(self, listing: pa.Table) -> Iterator[RawImage]:
        """The images of (a slice of) the listing, in its order, each exactly once; never raises for a single image."""
        ...


def listing_digest(listing: pa.Table, class_names: tuple[str, ...]) -> str:
    """sha256 of the listing without absolute addresses: equal for a copy with equal ids, labels and stamps."""
    sha = hashlib.sha256()
    for name in ("image_id", "label", "stamp"):
        for value in listing.column(name).to_pylist():
            sha.update(f"{value}\0".encode())
    sha.update("\0".join(class_names).encode())
    return sha.hexdigest()
