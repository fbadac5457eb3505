"""Reads another source, writes nothing: a part of its images, for a first try on a large data set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from cca_core import pairs
from cca_core.sources.base import RawImage, Source


class LimitedSource:
    """The ``limit`` images whose ids have the smallest hashes: the same ones on any machine, classes mixed as before.

    A larger limit adds images and removes none.
    """

    def __init__(self, source: Source, limit: int) -> None:
        self._source, self._limit = source, limit

    def list(self) -> tuple[pa.Table, tuple[str, ...]]:
        listing, class_names = self._source.list()
        hashes = pairs.id_hashes(listing.column("image_id").to_pylist())
        taken = np.sort(np.argsort(hashes, kind="stable")[: self._limit])
        return listing.take(taken), class_names

    def read(self, listing: pa.Table) -> Iterator[RawImage]:
        return self._source.read(listing)
