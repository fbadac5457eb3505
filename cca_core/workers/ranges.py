"""Reads and writes nothing: units of work as (start, stop) ranges, and the batch callable over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from cca_core.manifest import FileEntry


def split_range(size: int, rows: int) -> list[tuple[int, int]]:
    """Consecutive ranges of ``rows`` that cover ``size``."""
    return [(start, min(start + rows, size)) for start in range(0, size, rows)]


class RangeWorker(ABC):
    """A picklable callable over a batch of units, as Ray Data's ``map_batches`` calls it.

    A unit is a dict of plain values; ``run`` does it and returns a dict of plain values about what was written.
    """

    @abstractmethod
    def run(self, **unit: Any) -> dict[str, Any]:
        """Do one unit; write its files; report their entries."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        count = len(next(iter(batch.values())))
        units = ({name: np.asarray(values)[i].item() for name, values in batch.items()} for i in range(count))
        reports = [self.run(**unit) for unit in units]
        return {name: [report[name] for report in reports] for name in reports[0]}


def report(name: str, entry: FileEntry, **more: Any) -> dict[str, Any]:
    """What a worker says of the file it wrote."""
    return {"file": name, "size_bytes": entry.size_bytes, "sha256": entry.sha256, "rows": entry.rows, **more}


def entry_of(found: dict[str, Any]) -> FileEntry:
    """The manifest entry in a worker's report."""
    return FileEntry(size_bytes=int(found["size_bytes"]), sha256=str(found["sha256"]), rows=int(found["rows"]))
