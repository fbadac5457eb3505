"""Reads and writes nothing: how an error travels from a worker's own code to the driver, and which ones are final."""

from __future__ import annotations

import json
import logging
import traceback
from typing import Any

import pyarrow as pa
from aiohttp import ClientPayloadError
from botocore.exceptions import ConnectionError as StoreConnectionError
from botocore.exceptions import HTTPClientError
from ray.exceptions import (
    NodeDiedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from cca_core.config import ConfigError
from cca_core.train.errors import NonFiniteError
from cca_core.workers.ranges import RangeWorker

#: Errors that another attempt would meet again, and that say all there is to say.
FINAL_ERRORS = (ConfigError, NonFiniteError)
#: What another attempt may cure: lost workers and nodes, dropped connections, storage that was away.
INFRASTRUCTURE_ERRORS = (RayError, OSError, HTTPClientError, StoreConnectionError, ClientPayloadError)
#: A worker, its start or its node was lost: what Ray says of each alone helps nobody once all attempts have failed.
LOST = (NodeDiedError, OutOfDiskError, OutOfMemoryError, RayActorError, RuntimeEnvSetupError, WorkerCrashedError)
LOOK = "look in Ray's dashboard for a node without disk space or memory"
log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """A worker's own code failed: not the infrastructure's fault, so it is not tried again."""


#: Column of a unit that failed; whatever comes after hands it on.
FAILURE = "failure"


class Guarded:
    """A worker for Ray Data, over tables of one unit, that answers with a table of what it made or of what was raised.

    Ray Data makes one error type of whatever a worker raises, in which a wrong configuration and a dropped connection
    look alike.
    """

    def __init__(self, worker: type[RangeWorker], arguments: dict[str, Any]) -> None:
        self.worker, self.failure = None, ""
        try:
            self.worker = worker(**arguments)
        except Exception as error:
            self.failure = describe(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        if FAILURE in batch.column_names:
            return batch
        (unit,) = batch.to_pylist()
        made = {FAILURE: self.failure} if self.failure else self._run(unit)
        return pa.table({name: [value] for name, value in made.items()})

    def _run(self, unit: dict[str, Any]) -> dict[str, Any]:
        assert self.worker is not None
        try:
            return self.worker.run(**unit)
        except Exception as error:
            return {FAILURE: describe(error)}


def describe(error: Exception) -> str:
    """An error as JSON: its type as far as the driver has to tell them apart, its text, where it was raised."""
    log.exception("worker failed", exc_info=error)
    kind = next((kind.__name__ for kind in FINAL_ERRORS if isinstance(error, kind)), "")
    if isinstance(error, INFRASTRUCTURE_ERRORS):
        kind = OSError.__name__
    text = str(error) if kind else f"{type(error).__name__}: {error}"
    return json.dumps({"error": text, "kind": kind, "trace": "".join(traceback.format_exception(error))})


def report_of(row: dict[str, Any]) -> dict[str, Any]:
    """What the last worker made of a unit; raises what a worker raised."""
    if FAILURE not in row:
        return row
    found = json.loads(row[FAILURE])
    kinds = {kind.__name__: kind for kind in (*FINAL_ERRORS, OSError)}
    error = kinds.get(found["kind"], WorkerError)(found["error"])
    error.add_note(found["trace"])
    raise error


def final_cause(error: BaseException) -> BaseException:
    """What a task's own code raised, inside what Ray raised; Ray's error where Ray lost the worker or the node.

    Ray's wrapper is of both types, so only an error that is not Ray's is the worker's own.
    """
    seen: set[int] = set()
    inner: BaseException | None = error
    found = error
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        if isinstance(inner, FINAL_ERRORS) and not isinstance(inner, RayError):
            return inner
        if isinstance(inner, RayTaskError) and isinstance(inner.cause, Exception):
            found = inner.cause
        inner = getattr(inner, "cause", None) or inner.__cause__ or inner.__context__
    return found


def training_error(error: TrainingFailedError) -> WorkerError | TimeoutError:
    """What the first worker raised, in a line, once Ray Train has tried again often enough; the whole as a note.

    TimeoutError, which another attempt may cure, where the cluster had no room for the workers all the while.
    """
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    cause = error.controller_failure if isinstance(error, ControllerError) else None
    said: WorkerError | TimeoutError
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        said = TimeoutError(f"the cluster has had no room for {cause.num_workers} training workers")
    elif isinstance(cause, WorkerGroupStartupFailedError):
        said = WorkerError(f"training never began: its workers were lost at their start, again and again: {LOOK}")
    else:
        first = failures[min(failures)] if failures else error
        said = WorkerError(f"training failed: {type(first).__name__}: {str(first).strip().partition(chr(10))[0]}")
    said.add_note(str(error))
    return said


def lost_for_good(error: RayError) -> WorkerError:
    """After the last attempt, of a worker that was lost: a sentence that says where to look."""
    said = WorkerError(f"workers were lost, again and again ({type(error).__name__}): {LOOK}")
    said.add_note(str(error))
    return said
