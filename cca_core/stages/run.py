"""Reads a recipe and the storage root, writes stage directories: runs one stage, in this process or on an executor."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch

from cca_core.config import Recipe
from cca_core.manifest import FileEntry, Manifest
from cca_core.stages.graph import StageSpec, active, folder_of, upstream_of
from cca_core.stages.inputs import keep_source
from cca_core.store import StageDirectory, Store
from cca_core.train.distributed import pick_device, world
from cca_core.train.fit import Hooks
from cca_core.workers.ranges import RangeWorker

OnLog = Callable[[dict[str, float]], None]
#: Called with (units done, units in all).
OnProgress = Callable[[int, int], None]


class Executor(Protocol):
    """Where work runs. Stages hand over work, and say how far it is."""

    on_log: OnLog
    on_progress: OnProgress

    def map(
        self,
        workers: Sequence[type[RangeWorker]],
        arguments: dict[str, Any],
        units: Sequence[dict[str, Any]],
        unit_bytes: int = 0,
    ) -> Generator[dict[str, Any], None, None]:
        """Run units through pools of workers, one pool per kind; yield the reports of the last as they end.

        What one kind makes of a unit is the next kind's unit. Workers are made once each from ``arguments`` (and
        num_threads); a pool waits where the next one does not keep up, ``unit_bytes`` being the size of what it hands
        on. Who stops before the end closes the generator.
        """
        ...

    def train(self, job: Callable[..., None], arguments: dict[str, Any]) -> None:
        """Run ``job(world=..., hooks=..., **arguments)`` on all ranks of a process group."""
        ...

    def call(self, job: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Run ``job(on_log=..., **arguments)`` once and return its result."""
        ...

    def trials(
        self,
        job: Callable[..., dict[str, Any]],
        arguments: dict[str, Any],
        units: Sequence[dict[str, Any]],
        on_end: Callable[[dict[str, Any]], None],
    ) -> None:
        """Run ``job(**arguments, **unit)`` for each unit, each in one process with an accelerator of its own where
        there are some; ``on_end`` is given its report. As many at once as there is room for."""
        ...


class LocalExecutor:
    """Everything in this process, one unit after the other."""

    def __init__(self, on_log: OnLog, on_progress: OnProgress, device: str = "auto") -> None:
        self.on_log, self.on_progress, self.device = on_log, on_progress, device
        self.num_threads = torch.get_num_threads()

    def map(
        self,
        workers: Sequence[type[RangeWorker]],
        arguments: dict[str, Any],
        units: Sequence[dict[str, Any]],
        unit_bytes: int = 0,
    ) -> Generator[dict[str, Any], None, None]:
        if not units:
            return
        made = [worker(num_threads=self.num_threads, **arguments) for worker in workers]
        for unit in units:
            for worker in made:
                unit = worker.run(**unit)
            yield unit

    def train(self, job: Callable[..., None], arguments: dict[str, Any]) -> None:
        torch.set_num_threads(self.num_threads)
        with world(pick_device(self.device)) as group:
            job(world=group, hooks=Hooks(on_log=self.on_log), **arguments)

    def call(self, job: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        torch.set_num_threads(self.num_threads)
        return job(on_log=self.on_log, **arguments)

    def trials(
        self,
        job: Callable[..., dict[str, Any]],
        arguments: dict[str, Any],
        units: Sequence[dict[str, Any]],
        on_end: Callable[[dict[str, Any]], None],
    ) -> None:
        torch.set_num_threads(self.num_threads)
        for unit in units:
            on_end(job(**arguments, **unit))


@dataclass(frozen=True)
class Context:
    """What a stage is given: the recipe, the storage, every digest of the plan, and where to run."""

    recipe: Recipe
    store: Store
    digests: dict[str, str]
    executor: Executor

    def directory(self, stage: str) -> StageDirectory:
        return self.store.directory(folder_of(stage), self.digests[stage])

    def source(self) -> StageDirectory:
        """source/ with the listing that was planned, kept for the stages by the first that asks."""
        directory = self.directory("source")
        keep_source(self.recipe, directory)
        return directory

    def commit(
        self,
        stage: str,
        files: dict[str, FileEntry],
        *,
        rows: int = 0,
        facts: dict[str, Any] | None = None,
        schema: str = "",
    ) -> Manifest:
        """Write the manifest of a stage from its spec, its files and its facts."""
        spec = spec_of(stage, self.recipe)
        manifest = Manifest(
            stage=spec.folder,
            code_version=spec.code_version,
            digest=self.digests[stage],
            config=spec.section(self.recipe),
            upstream=upstream_of(spec, self.digests),
            files=files,
            rows=rows,
            facts=facts or {},
            schema=schema,
        )
        self.directory(stage).commit(manifest)
        return manifest

    def entries(self, stage: str, names: Sequence[str]) -> dict[str, FileEntry]:
        """Manifest entries of files already written, read again and hashed."""
        directory = self.directory(stage)
        return {name: directory.entry(name) for name in names}


def counted(executor: Executor, reports: Iterator[dict[str, Any]], total: int) -> Iterator[dict[str, Any]]:
    """Hand on the reports of ``total`` units, and say how many there were."""
    for done, report in enumerate(reports, start=1):
        executor.on_progress(done, total)
        yield report


def spec_of(stage: str, recipe: Recipe) -> StageSpec:
    return next(spec for spec in active(recipe) if spec.name == stage)


def run_stage(stage: str, context: Context) -> Manifest:
    """Run one stage unless its directory is already valid; return its manifest."""
    done = context.directory(stage).manifest()
    if done is not None:
        return done
    module = "evaluate" if stage == "baseline" else folder_of(stage)
    return import_module(f"cca_core.stages.{module}").run(stage, context)
