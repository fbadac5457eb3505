"""Reads nothing itself, writes nothing itself: runs the work of a stage on Ray (Data actors, Train workers, tasks)."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import ray
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, get_preemption_info
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cca_core.config import ConfigError, ExecutionConfig
from cca_core.stages.run import OnLog, OnProgress
from cca_core.store import Store
from cca_core.train.distributed import GPU_BACKEND, pick_device, world
from cca_core.train.fit import Hooks
from cca_core.workers.ranges import RangeWorker
from deploy.cluster_token import cluster_token
from pipelines.ray_errors import FINAL_ERRORS, Guarded, final_cause, report_of, training_error
from pipelines.sealed import environment, is_sealed, runtime_env
from pipelines.tune import run_trials

#: What may lie between the pools of a stage, in units for each actor: enough that none waits, however many there are.
UNITS_IN_FLIGHT = 8
#: Never less, in bytes: reports are small, and a pool should not wait for room for one.
MIN_IN_FLIGHT = 1 << 26

#: So often a training asks for its workers in vain: an hour where the cluster has no room, some minutes where they die
#: at their start. Ray Train alone would never end.
MAX_STARTS = 60

#: Name of Ray Data's threads that fetch rows. They end by themselves soon after nobody wants rows any more.
FETCHER = "iter_threaded"
FETCHER_TIMEOUT_S = 30.0

LIBRARIES = ("ray", "ray.data", "ray.train")


class RayExecutor:
    """Work on Ray, once ``start`` was called; a run that reuses everything never calls it."""

    def __init__(
        self, store: Store, execution: ExecutionConfig, address: str, on_log: OnLog, on_progress: OnProgress
    ) -> None:
        self.store, self.execution, self.address = store, execution, address
        self.on_log, self.on_progress = on_log, on_progress
        self._queue: Queue | None = None
        self._up = False
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def start(self) -> None:
        self._up = True
        if ray.is_initialized():
            return
        # Two logical CPUs are too few for a pipeline of operators; threads per worker follow the real cores.
        local = {} if self.address else {"num_cpus": max(4, self.cores), "include_dashboard": False}
        # Ray's C++ core warns about its own actors on the terminal; Python raises what matters.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        stopped = signal.getsignal(signal.SIGTERM)
        with _silent_stderr():
            ray.init(
                address=self.address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                # The workers of a submitted run have the submission's environment already.
                runtime_env=runtime_env(environment(), cluster_token()) if self.address and not is_sealed() else None,
                **local,
            )
        signal.signal(signal.SIGTERM, stopped)  # Ray's own ends this process with a crash report
        for name in LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the run shows its own
        context.print_on_execution_start = False

    def stop(self) -> None:
        self._up = False
        if ray.is_initialized():
            for name in LIBRARIES:  # whose threads complain that the cluster they work on is gone
                logging.getLogger(name).setLevel(logging.CRITICAL)
            ray.shutdown()
        self._queue = None

    def map(
        self,
        workers: Sequence[type[RangeWorker]],
        arguments: dict[str, Any],
        units: Sequence[dict[str, Any]],
        unit_bytes: int = 0,
    ) -> Generator[dict[str, Any], None, None]:
        if not units:
            return
        self._check_up()
        self._bound(unit_bytes * (self.execution.num_actors + self.execution.num_readers))
        # One block per unit: Ray Data hands on whole blocks, and loses whole blocks.
        data = ray.data.from_items(list(units), override_num_blocks=len(units))
        # A pool that waits for actors which the cluster has no room for would wait forever.
        room = max(1, int(ray.cluster_resources().get("CPU", 1)) // len(workers))
        for worker in workers:
            actors = min(self.execution.num_actors if worker.runs_model else self.execution.num_readers, len(units))
            gpus = self._gpus(actors) if worker.runs_model else 0
            data = data.map_batches(
                Guarded,
                fn_constructor_args=(worker, {**arguments, "num_threads": self._threads(actors)}),
                batch_size=1,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(min_size=min(actors, room), max_size=actors),
                num_cpus=1,
                num_gpus=gpus,
            )
        rows = iter(data.iter_rows())
        try:
            for row in rows:
                yield report_of(row)
        except RayError as error:
            raise final_cause(error) from error
        finally:
            # Ray Data ends its work when nobody holds the data any more: that has to be while Ray is up.
            rows.close()
            del rows, data
            _join_fetchers()

    def train(self, job: Callable[..., None], arguments: dict[str, Any]) -> None:
        workers = self.execution.max_workers
        queue = self._records()
        name = f"{job.__name__}-{uuid.uuid4().hex[:12]}"
        path = f"{self.store.root}/ray_train"
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={
                "job": job,
                "arguments": arguments,
                "queue": queue,
                "threads": self._threads(workers),
                "device": self.execution.device,
            },
            scaling_config=ScalingConfig(
                num_workers=self.execution.num_workers,
                use_gpu=self._gpus(workers) > 0,
                resources_per_worker={"CPU": 1},
            ),
            torch_config=TorchConfig(backend=GPU_BACKEND if self._gpus(workers) else "gloo"),
            run_config=RunConfig(
                name=name,
                storage_path=path,
                storage_filesystem=PyFileSystem(FSSpecHandler(self.store.fs)),
                failure_config=FailureConfig(self.execution.max_retries, controller_failure_limit=MAX_STARTS),
            ),
        )
        errors: list[BaseException] = []
        with _Drain(queue, self.on_log, errors):
            try:
                trainer.fit()
            except RayError as error:
                errors.append(final_cause(error))
            except TrainingFailedError as error:
                errors.append(training_error(error))
        with suppress(Exception) if errors else nullcontext():  # a storage that is away must not hide what happened
            if self.store.fs.exists(f"{path}/{name}"):  # not where training never began
                self.store.fs.rm(f"{path}/{name}", recursive=True)
        if errors:
            raise errors[0]

    def call(self, job: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        queue = self._records()
        remote = ray.remote(num_cpus=1, num_gpus=self._gpus(1), max_retries=self.execution.max_retries)(call_worker)
        with _Drain(queue, self.on_log, []):
            try:
                return ray.get(remote.remote(job, arguments, queue, self._threads(1)))
            except RayError as error:
                raise final_cause(error) from error

    def trials(
        self,
        job: Callable[..., dict[str, Any]],
        arguments: dict[str, Any],
        units: Sequence[dict[str, Any]],
        on_end: Callable[[dict[str, Any]], None],
    ) -> None:
        if not units:
            return
        queue = self._records()
        errors: list[BaseException] = []
        with _Drain(queue, on_end, errors):
            try:
                run_trials(
                    job,
                    arguments,
                    units,
                    queue,
                    self.store,
                    gpus=self._gpus(1),
                    # Ray on this machine has more logical CPUs than there are cores.
                    max_concurrent=None if self.address else self.cores,
                    max_retries=self.execution.max_retries,
                )
            except RayError as error:
                errors.append(final_cause(error))
        if errors:
            raise errors[0]

    def _records(self) -> Queue:
        """From workers to the driver, one for all stages, since it is a process. On the driver's own node: Ray puts it
        on any, and those of the workers may be lost or taken away."""
        self._check_up()
        if self._queue is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        return self._queue

    def _check_up(self) -> None:
        """A stage that was stopped goes on in its thread; Ray's C++ core ends the process, without a word and with exit
        code 1, where it is asked for anything after its end."""
        if not self._up:
            raise RuntimeError("Ray is not started, or was stopped meanwhile")

    def _bound(self, bytes_per_round: int) -> None:
        """Limit what lies between the pools of the next data set, of which all actors make ``bytes_per_round`` at a
        time."""
        room = ray.cluster_resources().get("object_store_memory", 0) / 2
        ray.data.DataContext.get_current().execution_options.resource_limits = ray.data.ExecutionResources(
            object_store_memory=min(max(MIN_IN_FLIGHT, UNITS_IN_FLIGHT * bytes_per_round), room)
        )

    def _threads(self, workers: int) -> int:
        return max(1, self.cores // workers)

    def _gpus(self, workers: int) -> float:
        """GPUs of one worker: a whole one each, or a share where there are fewer."""
        if self.execution.device == "cpu":
            return 0
        available = ray.cluster_resources().get("GPU", 0)
        if self.execution.device == "cuda" and not available:
            raise ConfigError(
                "execution.device=cuda, but the Ray cluster has no GPU: use auto or cpu, or add a GPU node"
            )
        return min(1.0, available / workers)


def _join_fetchers() -> None:
    """Wait for Ray Data's threads that fetch rows: one that still speaks to Ray after its end takes the process along,
    without a word and with exit code 1."""
    for thread in threading.enumerate():
        if thread.name == FETCHER:
            thread.join(FETCHER_TIMEOUT_S)


class _Drain:
    """Hands records from workers to ``on_log`` in the driver, until the block ends and the queue is empty."""

    def __init__(self, queue: Queue, on_log: OnLog, errors: list[BaseException]) -> None:
        self.queue, self.on_log, self.errors = queue, on_log, errors
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _run(self) -> None:
        while True:
            try:
                record = self.queue.get(timeout=0.3)
            except Empty:
                if self.ended.is_set():
                    return
                continue
            except RayError:
                return
            if isinstance(record, BaseException):
                self.errors.append(record)
            else:
                self.on_log(record)


def train_worker(config: dict[str, Any]) -> None:
    """What every Ray Train worker runs; rank 0 speaks to the driver."""
    torch.set_num_threads(config["threads"])
    with world(pick_device(config["device"])) as group:

        def on_log(record: dict[str, float]) -> None:
            if group.rank == 0:
                config["queue"].put(record)

        # A node that will be taken away: the train state is saved, and Ray Train goes on elsewhere.
        hooks = Hooks(on_log=on_log, preempted=lambda: get_preemption_info() is not None)
        try:
            config["job"](world=group, hooks=hooks, **config["arguments"])
        except FINAL_ERRORS as error:
            # Reported rather than raised: Ray Train would try again what cannot succeed.
            if group.rank == 0:
                config["queue"].put(error)


def call_worker(job: Callable[..., Any], arguments: dict[str, Any], queue: Queue, threads: int) -> Any:
    torch.set_num_threads(threads)
    return job(on_log=queue.put, **arguments)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Ray's C++ core greets the terminal with its log level, past Python; errors come as exceptions."""
    sys.stderr.flush()
    kept = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
