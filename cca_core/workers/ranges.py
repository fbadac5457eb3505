"""Reads and writes nothing: units of work as (start, stop) ranges, and who does them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from cca_core.manifest import FileEntry


def split_range(size: int, rows: int) -> list[tuple[int, int]]:
    """Consecutive ranges of ``rows`` that cover ``size``."""
    return [(start, min(start + rows, size)) for start in range(0, size, rows)]


class RangeWorker(ABC):
    """Does one unit of work at a time, somewhere: made once per process, from picklable arguments and ``num_threads``.

    A unit is a dict of plain values (numbers, strings, bytes), and so is what ``run`` makes of it: the next worker's
    unit, or a report.
    """

    #: Whether it runs a network, and so wants the accelerator.
    runs_model = True

    @abstractmethod
    def run(self, **unit: Any) -> dict[str, Any]:
        """Do one unit; write its files, if any."""


def report(name: str, entry: FileEntry, **more: Any) -> dict[str, Any]:
    """What a worker says of the file it wrote."""
    return {"file": name, "size_bytes": entry.size_bytes, "sha256": entry.sha256, "rows": entry.rows, **more}


def entry_of(found: dict[str, Any]) -> FileEntry:
    """The manifest entry in a worker's report."""
    return FileEntry(size_bytes=int(found["size_bytes"]), sha256=str(found["sha256"]), rows=int(found["rows"]))
