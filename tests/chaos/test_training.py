"""Writes to temporary folders: kill -9 of training's workers, driver and cluster; nodes that come and go."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DRAIN_NODE_REASON_PREEMPTION
from ray.train import ScalingConfig

from cca_core.stages import run_stage
from cca_core.train.distributed import World
from cca_core.train.fit import Hooks
from pipelines import ray_executor
from pipelines.ray_executor import RayExecutor
from tests.chaos.alignment import (
    Aligned,
    aligned,
    arguments,
    context,
    copy_of,
    every_row_once,
    newest_state,
    prepare,
    same_bits,
    same_but_for_rounding,
    train_states,
)
from tests.driver import ENVIRONMENT, TINY, Driver, cca, manifests, until

log = logging.getLogger(__name__)

pytestmark = pytest.mark.timeout(1800)

ROUNDS = 10
#: A kill comes this many saved steps after training went on, at most.
MOST_STEPS = 6
#: Starting Ray on a busy machine takes minutes; what never comes is waited for as long.
PATIENCE_S = 600
#: Ray takes a raylet for dead after a second instead of a quarter of a minute.
QUICK = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared"))


def align(folder: Path, **execution: str) -> Aligned:
    """Run alignment below ``folder`` to its end; Ray and two workers on this machine."""
    result = cca(folder, "run", str(TINY), *arguments(**execution), timeout_s=1800)
    assert result.returncode == 0, result.stdout + result.stderr
    return aligned(folder)


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Aligned:
    return align(copy_of(prepared, tmp_path_factory.mktemp("undisturbed")))


def processes(driver: Driver, name: str) -> list[psutil.Process]:
    """The processes of the driver's own cluster whose command line tells that they are ``name``."""
    found = []
    for process in psutil.Process(driver.process.pid).children(recursive=True):
        try:
            if name in " ".join(process.cmdline()[:1]) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:  # it ended while it was looked at
            continue
    return found


def training_workers(driver: Driver, before: list[psutil.Process]) -> list[psutil.Process]:
    """Both workers, once none of them is one of those ``before``; none where the driver has ended."""

    def found() -> list[psutil.Process] | None:
        if driver.process.poll() is not None:
            return []
        workers = [worker for worker in processes(driver, "TrainWorker") if worker not in before]
        return workers if len(workers) == 2 else None

    def answer() -> list[list[psutil.Process]]:
        workers = found()
        return [] if workers is None else [workers]

    return until(answer, PATIENCE_S)[0]


def test_undisturbed(prepared: Path, undisturbed: Aligned) -> None:
    every_row_once(undisturbed, prepared)


# Ten to twenty drivers, each of which starts Ray.
@pytest.mark.timeout(5400)
def test_ten_kills_each_of_worker_driver_and_cluster_leave_no_trace(
    prepared: Path, undisturbed: Aligned, tmp_path: Path
) -> None:
    folder, total = copy_of(prepared, tmp_path), int(undisturbed.curve[-1]["step"])
    rng = random.Random(0)
    steps: dict[str, list[int]] = {"worker": [], "cluster": [], "driver": []}

    def started() -> tuple[Driver, list[psutil.Process]]:
        driver = Driver(folder, *arguments(), env=QUICK)
        workers = training_workers(driver, [])
        assert workers, driver.output
        if any(steps.values()):
            assert re.search(r"align +goes on from step [1-9]", driver.output)
        return driver, workers

    def kill_at_a_random_step(what: str, victim: psutil.Process) -> None:
        """kill -9, once the training that goes on has saved some more steps."""
        first, more = newest_state(folder), rng.randint(1, MOST_STEPS)
        until(lambda: newest_state(folder) >= first + more, PATIENCE_S)
        assert victim.status() != psutil.STATUS_ZOMBIE
        victim.kill()
        steps[what].append(newest_state(folder))
        assert "align" not in manifests(folder), f"all was done: {steps}"
        assert steps[what][-1] < total, f"all was done: {steps}"

    survived = 0
    for _ in range(ROUNDS):
        driver, workers = started()
        kill_at_a_random_step("worker", rng.choice(workers))
        psutil.wait_procs(workers)
        workers = training_workers(driver, workers)
        assert workers, driver.output
        (raylet,) = processes(driver, "raylet/raylet")
        kill_at_a_random_step("cluster", raylet)
        # The driver starts another cluster, unless Ray ended the driver together with its raylet.
        workers = training_workers(driver, workers)
        survived += bool(workers)
        if not workers:
            assert driver.finish() != 0
            driver, workers = started()
        kill_at_a_random_step("driver", psutil.Process(driver.process.pid))
        driver.finish()
    log.info("killed at the steps %s; %d drivers outlived their cluster", steps, survived)
    run = align(folder)
    every_row_once(run, folder)
    same_bits(run, undisturbed)


def test_sharded_training_is_copied_training(prepared: Path, undisturbed: Aligned, tmp_path: Path) -> None:
    run = align(copy_of(prepared, tmp_path), sharding="fsdp2")
    every_row_once(run, tmp_path)
    same_but_for_rounding(run, undisturbed)


def attempts(folder: Path) -> list[dict[str, Any]]:
    """Where training was started, and on how many ranks, in order."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("attempt-*.json"))]


def observed(
    *, world: World, hooks: Hooks, job: Callable[..., None], folder: Path, waits: list[dict[int, str]], given: dict
) -> None:
    """The job, on every rank. It notes where it runs, and in steps of ``waits`` (by attempt) waits for a file."""
    mine: dict[int, str] = {}
    if world.rank == 0:
        number = len(attempts(folder))
        mine = waits[number]
        found = {"size": world.size, "node": ray.get_runtime_context().get_node_id()}
        (folder / f"attempt-{number}.json").write_text(json.dumps(found))

    def on_log(record: dict[str, float]) -> None:
        hooks.on_log(record)
        if int(record["step"]) in mine:
            until((folder / mine[int(record["step"])]).exists, PATIENCE_S)

    job(world=world, hooks=replace(hooks, on_log=on_log), **given)


class Observed(RayExecutor):
    """Ray, on which a training job is ``observed``; the alignment of ``folder``, in a thread of its own."""

    def __init__(self, cluster: Cluster, folder: Path, waits: list[dict[int, str]], **execution: str) -> None:
        self.folder, self.waits, self.steps = folder, waits, list[int]()
        made = context(folder, **execution)
        super().__init__(made.store, made.recipe.execution, cluster.address, self._note, lambda done, total: None)
        self.start()
        self.made = replace(made, executor=self)
        self.failed: BaseException | None = None
        self.thread = threading.Thread(target=self._align, daemon=True)
        self.thread.start()

    def _note(self, record: dict[str, float]) -> None:
        if "loss" in record:  # not one of an evaluation between two steps
            self.steps.append(int(record["step"]))

    def _align(self) -> None:
        try:
            run_stage("align", self.made)
        except BaseException as error:
            self.failed = error

    def train(self, job: Callable[..., None], arguments: dict[str, Any]) -> None:
        super().train(observed, {"job": job, "folder": self.folder, "waits": self.waits, "given": arguments})

    def wait_for(self, condition: Callable[[], Any]) -> None:
        until(lambda: self.failed or condition(), PATIENCE_S)
        assert self.failed is None, (self.failed, attempts(self.folder))

    def finish(self) -> Aligned:
        self.wait_for(lambda: not self.thread.is_alive())
        return aligned(self.folder)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster whose head has room for the driver only; it has files, ports and settings of its own."""
    before = dict(os.environ)
    place = tempfile.mkdtemp(prefix="cca-", dir="/tmp")  # sockets have short names
    root = str(Path(__file__).parents[2])  # workers import this module
    os.environ |= {**ENVIRONMENT, **QUICK, "RAY_TMPDIR": place, "PYTHONPATH": root}
    os.environ |= {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5", "RAY_ENABLE_AUTO_CONNECT": "0"}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(place, ignore_errors=True)


def nodes_of(actor_class: str) -> set[str]:
    """Where actors of that class live."""
    actors = ray._private.state.actors().values()
    return {actor["Address"]["NodeID"] for actor in actors if actor["ActorClassName"] == actor_class}


def alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def kill_raylet(node: Any) -> None:
    """kill -9 of the process that is the node, and wait until Ray knows."""
    (raylet,) = node.all_processes["raylet"]
    assert raylet.process.poll() is None
    raylet.process.kill()
    until(lambda: not alive(node.node_id))


def test_elastic_training_follows_the_nodes(
    prepared: Path, undisturbed: Aligned, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray Train looks for room once a minute.
    monkeypatch.setattr(ray_executor, "ScalingConfig", partial(ScalingConfig, elastic_resize_monitor_interval_s=1))
    first = cluster.add_node(num_cpus=1)
    waits = [{10: "never"}, {20: "never"}, {}]
    training = Observed(cluster, copy_of(prepared, tmp_path), waits, num_workers="[1, 2]")
    training.wait_for(lambda: 10 in training.steps and newest_state(tmp_path) == 9)
    assert attempts(tmp_path) == [{"size": 1, "node": first.node_id}]
    assert nodes_of("_QueueActor") == {cluster.head_node.node_id}, "it would be lost with a node of the workers"

    second = cluster.add_node(num_cpus=1)
    training.wait_for(lambda: 20 in training.steps and newest_state(tmp_path) == 19)
    assert [attempt["size"] for attempt in attempts(tmp_path)] == [1, 2]

    kill_raylet(second)
    run = training.finish()
    assert attempts(tmp_path)[2:] == [{"size": 1, "node": first.node_id}]
    # Each attempt went on after the state of the one before.
    last = int(undisturbed.curve[-1]["step"])
    assert training.steps == [*range(1, 11), *range(10, 21), *range(20, last + 1)]
    every_row_once(run, tmp_path)
    same_but_for_rounding(run, undisturbed)


def test_a_node_that_will_be_taken_away_is_left_in_time(
    prepared: Path, undisturbed: Aligned, tmp_path: Path, cluster: Cluster
) -> None:
    nodes = {cluster.add_node(num_cpus=2).node_id, cluster.add_node(num_cpus=2).node_id}
    waits = [{5: "drained", 400: "never"}, {450: "gone"}]
    training = Observed(cluster, copy_of(prepared, tmp_path), waits, checkpoint_every_steps="1000000")
    training.wait_for(lambda: 5 in training.steps)
    (first,) = attempts(tmp_path)
    assert first["size"] == 2
    assert train_states(tmp_path) == []

    deadline_ms = time.time_ns() // 1_000_000 + 15_000
    accepted, why = GcsClient(address=cluster.address).drain_node(
        first["node"], DRAIN_NODE_REASON_PREEMPTION, "taken away soon", deadline_ms
    )
    assert accepted, why
    (tmp_path / "drained").touch()
    training.wait_for(lambda: train_states(tmp_path))
    (saved,) = train_states(tmp_path)
    assert 5 <= saved < 400
    assert len(attempts(tmp_path)) == 1, "it was saved before training moved"

    training.wait_for(lambda: 450 in training.steps)
    until(lambda: not alive(first["node"]))  # a drained node ends by itself
    (tmp_path / "gone").touch()
    run = training.finish()
    (other,) = nodes - {first["node"]}
    assert attempts(tmp_path) == [first, {"size": 2, "node": other}]
    moved = training.steps.index(saved + 1, training.steps.index(saved + 1) + 1)
    assert training.steps[moved:] == list(range(saved + 1, int(undisturbed.curve[-1]["step"]) + 1))
    every_row_once(run, tmp_path)
    same_bits(run, undisturbed)
