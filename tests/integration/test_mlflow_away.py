"""Writes to a temporary folder: an MLflow server goes away and comes back, and nothing of a run is lost."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pipelines.settings import Settings, quiet_libraries
from pipelines.tracking import CHAMPION, Registry, Tracker
from tests.driver import environment
from tests.mlflow_server import MlflowServer
from tests.service import free_port

STEPS = 5


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    made = MlflowServer(tmp_path, free_port(), environment())
    made.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    quiet_libraries()
    yield made
    made.kill()


def test_what_was_written_meanwhile_is_there_when_the_run_ends(server, caplog):
    tracker = Tracker(Settings())
    run_id = tracker.start("curve", {})
    tracker.metrics(run_id, {"loss": 0.0}, 0)
    server.kill()
    with caplog.at_level(logging.WARNING):
        for step in range(1, STEPS):
            tracker.metrics(run_id, {"loss": float(step)}, step)  # does not wait for it
        tracker.artifact(run_id, "notes/hello.txt", b"hello")
    assert caplog.text.count("is away") == 1

    back = threading.Thread(target=server.start)
    back.start()
    tracker.end(run_id, "FINISHED")  # waits
    back.join()
    assert tracker.client.get_run(run_id).info.status == "FINISHED"
    assert [point.value for point in tracker.client.get_metric_history(run_id, "loss")] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert tracker.text(run_id, "notes/hello.txt") == "hello"


def test_a_server_that_is_away_is_not_one_without_a_champion_and_who_stops_does_not_wait(server):
    stopped = threading.Event()
    tracker = Tracker(Settings(), stopped)
    registry = Registry(tracker, "model")
    assert registry.alias(CHAMPION) is None
    server.kill()
    threading.Timer(1.0, stopped.set).start()
    began = time.monotonic()
    with pytest.raises(MlflowException, match="API request"):
        registry.alias(CHAMPION)
    assert time.monotonic() - began < 30  # not the minutes that it has


def test_what_a_server_refuses_is_a_warning_and_holds_up_nothing(server, caplog):
    tracker = Tracker(Settings())
    run_id = tracker.start("refused", {})
    tracker.params(run_id, {"lr": 1})
    tracker.params(run_id, {"lr": 2})  # a parameter never changes
    tracker.metrics(run_id, {"loss": 1.0}, 0)
    assert "did not take a write" in caplog.text
    assert tracker.client.get_run(run_id).data.metrics == {"loss": 1.0}
