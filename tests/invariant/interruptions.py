"""Runs the shards of a stage in any order, stops in the middle; reads what the stage left on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cca_core.stages import LocalExecutor


class Killed(Exception):
    """The process is gone."""


class InOrder(LocalExecutor):
    """Runs the units in an order of its own, and is killed after some of them."""

    def __init__(self, order: Callable[[list[Any]], list[Any]] = list, killed_after: int | None = None) -> None:
        super().__init__(lambda record: None, lambda done, total: None, "cpu")
        self.order, self.killed_after = order, killed_after

    def map(
        self, workers: Sequence[Any], arguments: dict[str, Any], units: Sequence[dict[str, Any]], unit_bytes: int = 0
    ) -> Iterator[dict[str, Any]]:
        made = [worker(num_threads=1, **arguments) for worker in workers]
        for done, unit in enumerate(self.order(list(units))):
            if done == self.killed_after:
                raise Killed
            for worker in made:
                unit = worker.run(**unit)
            yield unit


def back(units: list[Any]) -> list[Any]:
    return units[::-1]


def turn(units: list[Any]) -> list[Any]:
    return units[2:] + units[:2]


def files(root: Path, *stages: str) -> dict[str, bytes]:
    return {
        f"{stage}/{path.relative_to(root / stage)}": path.read_bytes()
        for stage in stages
        for path in sorted((root / stage).rglob("*"))
        if path.is_file()
    }


def stamps(root: Path, stage: str = "tokens") -> dict[str, int]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in (root / stage).rglob("rows-*")}
