"""Writes to temporary folders: fifty changes of version under load, while generators and the registry are killed."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from deploy.release import APPLICATION, deploy, deployment, details, present
from tests.driver import Driver, cca, environment, until
from tests.mlflow_server import MlflowServer
from tests.service import NAME, SAMPLING, Service, bundle, filtered_bundle, free_port, start

pytestmark = pytest.mark.timeout(2400)
CHANGES, KILL_EVERY_S, CLIENTS = 50, 20.0, 4
#: The canary is version 3, whose content filter blocks about half of the images.
BROKEN = "3"


@dataclass
class Load:
    """Clients that ask again and again, without retries, and note what was answered when."""

    service: Service
    #: (began, ended, version) of each answer.
    answers: list[tuple[float, float, str]] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[Load]:
        threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            until(lambda: self.answers)
            yield self
        finally:
            self.ended.set()
            for thread in threads:
                thread.join()

    def _ask(self, number: int) -> None:
        client, seed = self.service.client, number
        while not self.ended.is_set():
            began, seed = time.monotonic(), (seed + CLIENTS) % 1000
            try:
                answer = client.images.generate(prompt="ant", n=1 + seed % 3, extra_body={"seed": seed})
                self.answers.append((began, time.monotonic(), answer.model))
            except openai.OpenAIError as error:
                self.failures.append((began, repr(error)))
                self.ended.wait(0.1)


@contextmanager
def killing(service: Service) -> Iterator[list[int]]:
    """Kill a generator every so often, the one that has lived longest first."""
    ended, killed = threading.Event(), []

    def work() -> None:
        while not ended.wait(KILL_EVERY_S):
            alive = service.generators()
            if len(alive) > 1:  # a service of one has nobody to take over
                os.kill(alive[0], signal.SIGKILL)
                killed.append(alive[0])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def registry_server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path, free_port(), environment())
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def service(tmp_path: Path, registry_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """Versions 1 and 2 are good, version 3 has a filter; at least two generators."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry_server.uri)
    from pipelines.settings import Settings
    from pipelines.tracking import Registry, Tracker

    tracker = Tracker(Settings())
    registry = Registry(tracker, NAME)
    run_id = tracker.start("seed", {})
    for files in (bundle(0), bundle(1), filtered_bundle()):
        with tempfile.TemporaryDirectory() as parts:
            for name, data in files.items():
                (Path(parts) / name).write_bytes(data)
            registry.add(run_id, parts, "tiny", SAMPLING, {})
    registry.crown("1")
    driver, port = start(
        tmp_path, "--model", f"models:/{NAME}@champion", env={"MLFLOW_TRACKING_URI": registry_server.uri}
    )
    try:
        dashboard = driver.wait_line(r"starting .*Ray dashboard (\S+)\)")[1]
        driver.wait_line("ready: ")
        config = present(dashboard)
        deployment(config, "Generator")["autoscaling_config"]["min_replicas"] = 2
        deploy(dashboard, config)
        made = Service(driver, f"http://127.0.0.1:{port}", dashboard)
        until(lambda: len(made.generators()) == 2)
        yield made
    finally:
        _end(driver)


def _end(driver: Driver) -> None:
    driver.process.send_signal(signal.SIGTERM)
    driver.finish(90)


def tell(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """Show a number that was measured, whether the test passes or not."""
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")


def test_no_request_fails_whatever_is_changed_or_killed(tmp_path, registry_server, service, capsys):
    env = {
        "CCA_SERVE_ADDRESS": service.dashboard,
        "CCA_MODEL_NAME": NAME,
        "MLFLOW_TRACKING_URI": registry_server.uri,
    }

    def run(*arguments: str) -> Any:
        return cca(tmp_path, *arguments, env=env)

    #: When a version began to be one that may answer, and when it ended.
    lives: list[tuple[float, float, str]] = []
    began, version = 0.0, "1"
    with Load(service).running() as load, killing(service) as killed:
        for change in range(CHANGES):
            if change == CHANGES // 2:
                registry_server.kill()
                before = len(killed)
                until(lambda before=before: len(killed) > before)  # a generator is lost meanwhile
                registry_server.start()
            if change == CHANGES * 3 // 4:
                started = time.monotonic()
                trial = run("promote", BROKEN, "--canary", "20%")
                assert trial.returncode == 2, trial.stdout + trial.stderr
                assert "its content filter blocked" in trial.stderr
                lives.append((started, time.monotonic(), BROKEN))
            started = time.monotonic()
            arguments = ("promote", "2") if version == "1" else ("rollback",)
            result = run(*arguments)
            assert result.returncode == 0, (change, result.stdout + result.stderr)
            ended = time.monotonic()
            lives.append((began, ended, version))
            began, version = started, "2" if version == "1" else "1"
        lives.append((began, float("inf"), version))
        assert set(details(service.dashboard)["applications"]) == {APPLICATION}
    tell(capsys, f"{len(load.answers)} answers, {CHANGES} changes, {len(killed)} generators killed")
    assert not load.failures
    assert len(killed) >= 5, "too few were killed to say anything"
    drawn = {name for _, _, name in load.answers}
    assert {f"{NAME}/1", f"{NAME}/2"} <= drawn, "one version drew everything: nothing was changed"
    for start_s, end_s, name in load.answers:
        live = [life for life in lives if f"{NAME}/{life[2]}" == name and life[0] <= end_s and start_s <= life[1]]
        assert live, f"{name} drew an image when it was not live"


def test_a_killed_ingress_comes_back(service, capsys):
    """It is one process: what it has in hand is lost, and requests fail until another stands."""
    with Load(service).running() as load:
        deployments = details(service.dashboard)["applications"][APPLICATION]["deployments"]
        (ingress,) = [replica["pid"] for replica in deployments["Ingress"]["replicas"]]
        killed_at, count = time.monotonic(), len(load.answers)
        os.kill(ingress, signal.SIGKILL)
        until(lambda: [a for a in load.answers[count:] if a[0] > killed_at + 0.5], 60)
        back = next(ended for began, ended, _ in load.answers[count:] if began > killed_at + 0.5)
    tell(capsys, f"{len(load.failures)} requests failed, answers again {back - killed_at:.1f} s after the kill")
    assert back - killed_at < 30
    assert all(began < back for began, _ in load.failures), "requests fail after it came back"
