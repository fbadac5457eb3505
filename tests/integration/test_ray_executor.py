"""Writes to a temporary folder: what a worker raises on Ray reaches the driver; only a lost worker is Ray's fault."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from ray.exceptions import RayError
from ray.train import ControllerError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

from cca_core.config import ConfigError, ExecutionConfig
from cca_core.store import Store
from cca_core.workers.ranges import RangeWorker
from pipelines.ray_errors import INFRASTRUCTURE_ERRORS, LOST, WorkerError, lost_for_good, training_error
from pipelines.ray_executor import FETCHER, RayExecutor


class Raising(RangeWorker):
    """Raises what it is told to, when it is made or when it runs."""

    def __init__(self, kind: str, num_threads: int) -> None:
        del num_threads
        self.kind = kind
        if kind == "made":
            raise ConfigError("not made: do this")

    def run(self, *, start: int) -> dict:
        raising(on_log=None, kind=self.kind)
        return {"start": start}


def raising(*, on_log, kind: str) -> None:
    del on_log
    if kind == "config":
        raise ConfigError("not this way: do that")
    if kind == "store":
        raise ConnectionResetError("the store went away")
    if kind == "bug":
        raise KeyError("a bug")
    if kind == "slow":
        time.sleep(1)
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)


def training(*, world, hooks, kind: str) -> None:
    hooks.on_log({"step": 1.0})
    raising(on_log=None, kind=kind)
    del world


@pytest.fixture(scope="module")
def executor(tmp_path_factory):
    records = []
    store = Store(str(tmp_path_factory.mktemp("storage")))
    execution = ExecutionConfig(num_actors=1, num_workers=1, max_retries=0)
    made = RayExecutor(store, execution, "", records.append, lambda done, total: None)
    made.records = records
    before = dict(os.environ)
    made.start()
    yield made
    made.stop()
    # Ray leaves the settings of its cluster behind, which later tests would take for their user's.
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("made", ConfigError, "not made: do this"),
        ("config", ConfigError, "not this way: do that"),
        ("store", OSError, "the store went away"),
        ("bug", WorkerError, "KeyError: 'a bug'"),
    ],
)
def test_map_hands_on_what_the_worker_raised(executor, kind, error, says):
    with pytest.raises(error) as caught:
        list(executor.map([Raising], {"kind": kind}, [{"start": 0}]))
    assert type(caught.value) is error
    assert str(caught.value) == says


def test_nobody_fetches_rows_any_more_once_map_was_closed_early(executor):
    """Ray ends the process, with exit code 1 and without a word, when a thread asks for rows after its shutdown."""

    def fetchers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == FETCHER]

    rows = executor.map([Raising], {"kind": "slow"}, [{"start": start} for start in range(50)])
    assert next(rows)["start"] < 50
    assert fetchers(), "these are the threads that fetch rows"
    rows.close()
    assert not fetchers()


def test_a_bug_in_a_job_is_not_taken_for_infrastructure(executor):
    with pytest.raises(KeyError, match="a bug") as caught:
        executor.call(raising, {"kind": "bug"})
    assert not isinstance(caught.value, RayError)


def test_call_hands_on_what_the_job_raised(executor):
    with pytest.raises(ConfigError) as caught:
        executor.call(raising, {"kind": "config"})
    assert str(caught.value) == "not this way: do that"


def test_train_hands_on_what_a_rank_raised_and_its_records(executor):
    executor.records.clear()
    with pytest.raises(ConfigError) as caught:
        executor.train(training, {"kind": "config"})
    assert str(caught.value) == "not this way: do that"
    assert executor.records == [{"step": 1.0}]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("bug", "training failed: KeyError: 'a bug'"),
        ("store", "training failed: ConnectionResetError: the store went away"),
        ("die", "training failed: "),
    ],
)
def test_training_that_failed_says_why_in_a_line(executor, kind, says):
    with pytest.raises(WorkerError) as caught:
        executor.train(training, {"kind": kind})
    assert str(caught.value).startswith(says)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) > len("training failed: ")


def unloadable() -> None:
    raise ImportError("not on this machine")


class Unloadable:
    """What workers cannot load."""

    def __reduce__(self) -> tuple:
        return unloadable, ()


def test_training_that_never_began_says_why(executor):
    with pytest.raises(RayError, match="not on this machine"):
        executor.train(training, {"kind": Unloadable()})


@pytest.mark.parametrize(
    ("cause", "says", "tried_again"),
    [
        (WorkerGroupStartupFailedError("a worker died\nTraceback"), "a node without disk space or memory", False),
        (WorkerGroupStartupTimeoutError(4), "no room for 4 training workers", True),
    ],
)
def test_workers_that_never_start_are_a_sentence(cause, says, tried_again):
    error = training_error(ControllerError(cause))
    assert says in str(error)
    assert len(str(error).splitlines()) == 1
    assert isinstance(error, INFRASTRUCTURE_ERRORS) == tried_again


def test_a_lost_worker_is_infrastructure_and_at_last_a_sentence(executor):
    with pytest.raises(RayError) as lost:
        executor.call(raising, {"kind": "die"})
    assert isinstance(lost.value, LOST)
    said = str(lost_for_good(lost.value))
    assert "WorkerCrashedError" in said
    assert "a node without disk space or memory" in said
    assert len(said.splitlines()) == 1


def trial(*, folder, name: str) -> dict:
    """A trial that does what its name says; the process of `lost` dies once."""
    if name == "lost" and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    raising(on_log=None, kind=name)
    return {"name": name, "metrics": {}, "step": 1}


def test_trials_end_with_reports_a_lost_one_is_tried_again_and_a_bug_is_raised(executor, tmp_path, capsys):
    ended: list[str] = []
    trials = RayExecutor(executor.store, ExecutionConfig(max_retries=1), "", executor.on_log, executor.on_progress)
    trials.start()
    units = [{"name": name} for name in ("good", "lost", "bug", "other")]
    with pytest.raises(KeyError, match="a bug"):
        trials.trials(trial, {"folder": tmp_path}, units, lambda report: ended.append(report["name"]))
    assert sorted(ended) == ["good", "lost", "other"], "a bug in one ends no other"
    assert "Trial" not in capsys.readouterr().out, "Tune says nothing itself"
    assert not executor.store.fs.ls(f"{executor.store.root}/ray_train")
