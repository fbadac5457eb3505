"""Writes to temporary folders: a submitted run from its first line to its last, and who may read its secrets."""

from __future__ import annotations

import re
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from pipelines import submit
from pipelines.cluster import connect, follow
from pipelines.recipe import load_recipe
from pipelines.sealed import SEALED, runtime_env
from tests.driver import TINY, Driver, environment
from tests.platform.local_platform import NODE_CPUS, NODES, Platform
from tests.platform.user import User
from tests.service import free_port

CPUS = NODES * NODE_CPUS
#: Of whoever submits: must reach the workers, and no terminal.
PLANTED = f"planted-{secrets.token_hex(16)}"


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
    here, elsewhere = (User(platform, tmp_path_factory.mktemp(place), "story") for place in ("here", "elsewhere"))
    for user in (here, elsewhere):
        user.environment["MLFLOW_TRACKING_TOKEN"] = PLANTED
    client = here.start("submit", str(TINY))
    name = client.wait_line(r"(cca-tiny-\w+): submitted to")[1]
    client.wait_stage("tokens")
    client.kill()
    runs = elsewhere.cca("runs").stdout
    stopped = elsewhere.cca("stop", name)
    status = elsewhere.cca("status", str(TINY)).stdout
    resumed = elsewhere.start("submit", "--resume", name)
    resumed.wait_line(r"cca-tiny-\w+: submitted to")
    watcher = here.start("logs")
    watcher.wait_stage("base")
    watcher.process.send_signal(signal.SIGINT)
    watcher.finish()
    logs = here.cca("logs")
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
    server = platform.mlflow.uri
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


#: Backwards, so that the log that it prints to does not hold the secret.
LOOK = "print(ray.get(ray.remote(os.getenv).remote('MLFLOW_TRACKING_TOKEN'))[::-1])"


def test_workers_get_the_secrets_that_no_file_of_the_cluster_holds(platform, tmp_path, monkeypatch):
    planted = [f"planted-{secrets.token_hex(16)}" for _ in range(2)]
    # Of a submitted run.
    user = User(platform, tmp_path, "planted")
    for name, value in user.environment.items():
        monkeypatch.setenv(name, value)
    cluster = connect(platform.address)
    submit.pack(load_recipe("digits", []), "digits", tmp_path)
    (tmp_path / "look.py").write_text(f"import os, ray; ray.init(); {LOOK}")
    env = runtime_env({"MLFLOW_TRACKING_TOKEN": planted[0]}, platform.token) | {"working_dir": str(tmp_path)}
    lines: list[str] = []
    follow(cluster, cluster.client.submit_job(entrypoint="python look.py", runtime_env=env), lines.append)
    assert planted[0][::-1] in "".join(lines)
    # Of a run that is driven from a node of the cluster.
    driven = "import os, ray; from pipelines.ray_executor import RayExecutor; "
    driven += f"RayExecutor(None, None, os.environ['RAY_ADDRESS'], print, print).start(); {LOOK}"
    looked = subprocess.run(
        [*platform.inside("node-0"), sys.executable, "-c", driven],
        env=environment({**user.environment, "RAY_ADDRESS": platform.gcs, "MLFLOW_TRACKING_TOKEN": planted[1]}),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert planted[1][::-1] in looked.stdout
    files = [file for node in platform.nodes for file in (platform.files(node) / "ray").rglob("*") if is_plain(file)]
    assert any(SEALED.encode() in file.read_bytes() for file in files if file.suffix == ".log"), "nothing was looked at"
    assert [str(file) for file in files for secret in planted if secret.encode() in file.read_bytes()] == []


def is_plain(file: Path) -> bool:
    return file.is_file() and not file.is_symlink()


@pytest.mark.parametrize(
    ("token", "says"),
    [("", "asks for a token: put it into RAY_AUTH_TOKEN"), ("wrong" * 8, "has another token: correct RAY_AUTH_TOKEN")],
)
def test_a_missing_and_a_wrong_token_are_one_sentence(platform, tmp_path, token, says):
    result = User(platform, tmp_path, "refused").cca("submit", "digits", RAY_AUTH_TOKEN=token, HOME=str(tmp_path))
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_no_server_at_the_address_is_one_sentence(platform, tmp_path):
    nowhere = f"http://127.0.0.1:{free_port()}"
    result = User(platform, tmp_path, "refused").cca("submit", "digits", "--address", nowhere)
    assert result.returncode == 2
    assert "no Ray dashboard answers at http://127.0.0.1" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            "execution.num_workers=64",
            f"execution.num_workers=64 asks for a CPU each, and the cluster has {CPUS}",
        ),
        ("execution.device=cuda", "execution.device=cuda, and it has no GPU"),
    ],
)
def test_a_cluster_that_is_too_small_is_named_before_anything_starts(platform, tmp_path, change, says):
    result = User(platform, tmp_path, "refused").cca("submit", "digits", "--set", change)
    assert result.returncode == 2
    assert says in result.stderr
    assert "submitted" not in result.stdout
