"""Reads and writes what its jobs do: runs the trials of a sweep on Ray Tune, as many at once as the cluster has room
for.

Which trials there are, and which go on, the sweep decides: Tune's own schedulers stop whatever is behind at the moment
it reports, so that the winner would depend on the size of the cluster.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune
from ray.util.queue import Queue

from cca_core.store import Store
from pipelines.ray_errors import INFRASTRUCTURE_ERRORS

#: Tune writes no logs of its own, leaves the working directory alone, and says nothing (its new output greets even at
#: verbosity 0).
SETTINGS = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_AIR_NEW_OUTPUT": "0"}


def run_trials(
    job: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
    units: Sequence[dict[str, Any]],
    queue: Queue,
    store: Store,
    *,
    gpus: float,
    max_concurrent: int | None,
    max_retries: int,
) -> None:
    """Run ``job(**arguments, **unit)`` for each unit in a process with one CPU and ``gpus`` GPUs; reports, and what a
    job itself raised, go to ``queue``.

    Raises what lost the last attempt of a trial, if an infrastructure error did.
    """
    os.environ |= SETTINGS
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what fails in the end is raised
    worker = tune.with_parameters(trial_worker, job=job, arguments=arguments, units=list(units), queue=queue)
    path, name = f"{store.root}/ray_train", f"trials-{uuid.uuid4().hex[:12]}"
    tuner = tune.Tuner(
        tune.with_resources(worker, {"cpu": 1, "gpu": gpus}),
        param_space={"unit": tune.grid_search(list(range(len(units))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=max_concurrent, reuse_actors=True),
        run_config=tune.RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=PyFileSystem(FSSpecHandler(store.fs)),
            failure_config=tune.FailureConfig(max_failures=max_retries),
            verbose=0,
        ),
    )
    results = tuner.fit()
    store.fs.rm(f"{path}/{name}", recursive=True)
    if results.errors:
        raise results.errors[0]


def trial_worker(
    config: dict[str, int],
    *,
    job: Callable[..., dict[str, Any]],
    arguments: dict[str, Any],
    units: list[dict[str, Any]],
    queue: Queue,
) -> None:
    """What the process of a trial runs; Tune starts it again after infrastructure errors alone."""
    torch.set_num_threads(1)  # its one CPU; more would change how sums are rounded
    try:
        queue.put(job(**arguments, **units[config["unit"]]))
    except INFRASTRUCTURE_ERRORS:
        raise
    except Exception as error:
        queue.put(error)
    tune.report({"ended": config["unit"]})  # Tune prints a line about a trial that reports nothing
