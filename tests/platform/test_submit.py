"""Writes to temporary folders: runs on a Ray cluster of its own, with a token, a head without CPUs and MLflow.

The head and the node are `ray start` in processes of this test; they see the same disk, as nodes with a shared path do.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from pipelines import submit
from pipelines.cluster import connect, follow
from pipelines.recipe import load_recipe
from tests.driver import TINY, Driver, cca, environment, until
from tests.mlflow_server import MlflowServer
from tests.service import free_port

pytestmark = pytest.mark.timeout(1200)
TOKEN = secrets.token_hex(32)
#: Must reach the workers, and no file of the cluster.
PLANTED = f"planted-{secrets.token_hex(16)}"
CPUS = 4


@dataclass(frozen=True)
class Platform:
    """What the tests submit to, and the environment of who submits."""

    address: str
    env: dict[str, str]
    ray_files: Path

    def cca(self, folder: Path, *arguments: str, **env: str) -> Any:
        return cca(folder, *arguments, "--address", self.address, env={**self.env, **env})


def ray_start(*options: str) -> subprocess.Popen[bytes]:
    """A node of the cluster, until its process is ended. It has the packages of these tests, and is told of no code."""
    patient = {"RAY_raylet_start_wait_time_s": "120"}  # a busy machine
    env = environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, **patient})
    env.pop("PYTHONPATH", None)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    agents = ("dashboard-agent-listen", "dashboard-agent-grpc", "runtime-env-agent", "metrics-export")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options, "--disable-usage-stats"]
    command += ["--object-store-memory", str(256 * 1024**2), *(f"--{name}-port={free_port()}" for name in agents)]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    gcs, dashboard = free_port(), free_port()
    folder = tmp_path_factory.mktemp("platform")
    address = f"http://127.0.0.1:{dashboard}"
    mlflow = MlflowServer(folder, free_port(), environment())
    with tempfile.TemporaryDirectory(prefix="ray-") as ray_files:  # short: it holds sockets
        head = [
            "--head",
            "--num-cpus=0",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            f"--temp-dir={ray_files}/head",
        ]
        processes = [ray_start(*head, "--dashboard-host=127.0.0.1", f"--ray-client-server-port={free_port()}")]
        try:
            mlflow.start()
            until(lambda: len(nodes(address)) == 1)
            processes.append(
                ray_start(f"--address=127.0.0.1:{gcs}", f"--num-cpus={CPUS}", f"--temp-dir={ray_files}/node")
            )
            until(lambda: sum(node.get("CPU", 0) for node in nodes(address)) == CPUS)
            env = {"RAY_AUTH_TOKEN": TOKEN, "MLFLOW_TRACKING_URI": mlflow.uri, "AWS_SECRET_ACCESS_KEY": PLANTED}
            yield Platform(address, {**env, "CCA_STORAGE": str(folder / "storage")}, Path(ray_files))
        finally:
            mlflow.kill()
            end(processes)


def nodes(address: str) -> list[dict[str, float]]:
    """The resources of each node; none while the dashboard is not there."""
    try:
        answer = httpx.get(f"{address}/api/v0/nodes", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20)
        return [node["resources_total"] for node in answer.json()["data"]["result"]["result"]]
    except (httpx.HTTPError, KeyError, TypeError, ValueError):
        return []


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End what this module started, and what that started."""
    trees = [psutil.Process(process.pid) for process in processes if process.poll() is None]
    every = [*trees, *(child for tree in trees for child in tree.children(recursive=True))]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in psutil.wait_procs(every, timeout=30)[1]:
        process.kill()
    for process in processes:
        process.wait(30)


@dataclass(frozen=True)
class Story:
    """What the commands printed around one run, in this order."""

    name: str
    submitted: str
    runs: str
    stopped: Any
    status: str
    resumed: Driver
    watcher: Driver
    logs: Any


@pytest.fixture(scope="module")
def story(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A run is submitted, its terminal is lost, it is found, stopped, resumed from elsewhere, followed to its end."""
    here, elsewhere = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("elsewhere")
    where = ("--address", platform.address)
    client = Driver(here, *where, verb=("submit", str(TINY)), env=platform.env)
    name = client.wait_line(r"(cca-tiny-\w+): submitted to")[1]
    client.wait_stage("tokens")
    client.kill()
    runs = cca(elsewhere, "runs", env=platform.env).stdout
    stopped = platform.cca(elsewhere, "stop", name)
    status = cca(elsewhere, "status", str(TINY), env=platform.env).stdout
    resumed = Driver(elsewhere, *where, verb=("submit", "--resume", name), env=platform.env)
    resumed.wait_line(r"cca-tiny-\w+: submitted to")
    watcher = Driver(here, *where, verb=("logs",), env=platform.env)
    watcher.wait_stage("base")
    watcher.process.send_signal(signal.SIGINT)
    watcher.finish()
    logs = platform.cca(here, "logs")
    resumed.finish()
    return Story(name, client.output, runs, stopped, status, resumed, watcher, logs)


def test_a_run_outlives_the_terminal_that_submitted_it(story):
    assert "Ctrl-C stops following, not the run" in story.submitted
    assert PLANTED not in story.submitted
    assert f"running as {story.name}" in story.runs


def test_a_run_is_stopped_where_nothing_is_half_written(story):
    assert story.stopped.returncode == 0, story.stopped.stderr
    assert f"{story.name}: stopped; what finished is kept" in story.stopped.stdout
    assert f"cca submit --resume {story.name} --address" in story.stopped.stdout
    assert "KILLED" in story.status, "by its own hand: whoever is killed leaves the run open"


def test_a_resumed_run_goes_on_and_ends_with_its_page_in_mlflow(story, platform):
    output = story.resumed.output
    assert story.resumed.process.returncode == 0, output
    assert re.search(r"continuing run \w{32}", output)
    assert re.search(r"done tokenizer +reused", output)
    server = platform.env["MLFLOW_TRACKING_URI"]
    run_id = re.search(rf"has ended. In MLflow: {server}/#/experiments/\d+/runs/(\w{{32}})", output)[1]
    found = httpx.get(f"{server}/api/2.0/mlflow/runs/get", params={"run_id": run_id}, timeout=60).json()["run"]
    assert found["info"]["status"] == "FINISHED"


def test_ctrl_c_ends_the_following_and_says_how_to_go_on(story, platform):
    name = re.search(r"(cca-tiny-\w+): submitted to", story.resumed.output)[1]
    assert story.watcher.process.returncode == 130
    assert "No longer followed; the run goes on." in story.watcher.output
    for verb in ("logs", "stop"):
        assert f"cca {verb} {name} --address {platform.address}" in story.watcher.output
    assert "Traceback" not in story.watcher.output


def test_logs_follow_the_newest_run_from_its_first_line_to_its_end(story):
    said = [line for line in story.resumed.output.splitlines() if line.startswith("done ")]
    assert len(said) > 5
    assert [line for line in story.logs.stdout.splitlines() if line.startswith("done ")] == said
    assert story.logs.returncode == 0


def test_workers_get_the_secrets_that_no_file_of_the_cluster_holds(platform, tmp_path, monkeypatch):
    for name, value in platform.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", platform.address)  # which connect() sets, and others must not find
    cluster = connect(platform.address)
    submit.pack(load_recipe("digits", []), "digits", tmp_path)
    program = "import os, ray; ray.init(); print(ray.get(ray.remote(os.getenv).remote('AWS_SECRET_ACCESS_KEY'))[::-1])"
    (tmp_path / "look.py").write_text(program)  # backwards, so that the log that it prints to does not hold the secret
    env = submit.runtime_env(str(tmp_path), {"AWS_SECRET_ACCESS_KEY": PLANTED}, TOKEN)
    lines: list[str] = []
    follow(cluster, cluster.client.submit_job(entrypoint="python look.py", runtime_env=env), lines.append)
    assert PLANTED[::-1] in "".join(lines)
    files = [file for file in platform.ray_files.rglob("*") if file.is_file() and not file.is_symlink()]
    logs = [file for file in files if file.suffix == ".log"]
    assert any(submit.SEALED.encode() in file.read_bytes() for file in logs), "Ray logs no environment any more"
    assert [str(file) for file in files if PLANTED.encode() in file.read_bytes()] == []


@pytest.mark.parametrize(
    ("token", "says"),
    [("", "asks for a token: put it into RAY_AUTH_TOKEN"), ("wrong" * 8, "has another token: correct RAY_AUTH_TOKEN")],
)
def test_a_missing_and_a_wrong_token_are_one_sentence(platform, tmp_path, token, says):
    result = platform.cca(tmp_path, "submit", "digits", RAY_AUTH_TOKEN=token, HOME=str(tmp_path))
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_no_server_at_the_address_is_one_sentence(platform, tmp_path):
    env = {**platform.env}
    result = cca(tmp_path, "submit", "digits", "--address", f"http://127.0.0.1:{free_port()}", env=env)
    assert result.returncode == 2
    assert "no Ray dashboard answers at http://127.0.0.1" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("execution.num_workers=64", f"execution.num_workers=64 asks for a CPU each, and the cluster has {CPUS}"),
        ("execution.device=cuda", "execution.device=cuda, and it has no GPU"),
    ],
)
def test_a_cluster_that_is_too_small_is_named_before_anything_starts(platform, tmp_path, change, says):
    result = platform.cca(tmp_path, "submit", "digits", "--set", change)
    assert result.returncode == 2
    assert says in result.stderr
    assert "submitted" not in result.stdout
