"""Writes below a temporary folder: a user's way on a platform whose nodes share nothing local, and what kills do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest
from mlflow.tracking import MlflowClient

from tests.driver import TINY, until
from tests.platform.local_platform import NODES, Platform, s3_variables
from tests.platform.user import User
from tests.service import free_port

ANSWER_S = 120
AWAY_S = 120.0


@pytest.fixture(scope="module")
def undisturbed(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> User:
    user = User(platform, tmp_path_factory.mktemp("undisturbed"), "undisturbed")
    driver = user.start("submit", str(TINY))
    assert driver.finish() == 0, driver.output
    assert f"In MLflow: {platform.mlflow.uri}" in driver.output
    return user


def busy_node(platform: Platform) -> str:
    """A node with a worker that is at work; None is busy for a moment between two tasks."""

    def find() -> str | None:
        for name, process in platform.nodes.items():
            if name == "head":
                continue
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    title = " ".join(child.cmdline())
                except psutil.Error:
                    continue
                if title.startswith("ray::") and "IDLE" not in title:
                    return name
        return None

    return until(find)


def test_a_submitted_run_ends_with_a_champion_that_serves(platform, undisturbed):
    assert undisturbed.champion()
    port = free_port()
    model = f"models:/{undisturbed.name}@champion"
    served = undisturbed.cca("serve", "--address", platform.address, "--model", model, "--port", str(port))
    assert served.returncode == 0, served.stdout + served.stderr
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=ANSWER_S)
    before = client.images.generate(prompt="0", extra_body={"seed": 1})
    assert before.model == f"{undisturbed.name}/{undisturbed.champion()}"
    # A node with a generator is lost: another node has its like after a while, and the same seed the same image.
    holder = next(
        name
        for name, process in platform.nodes.items()
        if any("Generator" in " ".join(c.cmdline()) for c in psutil.Process(process.pid).children(recursive=True))
    )
    platform.kill(holder)

    def again() -> Any:
        try:
            return client.images.generate(prompt="0", extra_body={"seed": 1})
        except openai.InternalServerError:  # 503: no generator yet
            return None

    assert until(again).data[0].b64_json == before.data[0].b64_json
    platform.start_node(holder)
    delete = httpx.delete(
        f"{platform.address}/api/serve/applications/", headers={"Authorization": f"Bearer {platform.token}"}, timeout=60
    )
    assert delete.status_code == 200, delete.text


#: Stage, and what of it is in the storage when it is under way.
UNDER_WAY = {"tokens": "tokens/*/rows-*", "align": "train_state/*/step-*"}


def test_lost_nodes_change_nothing(platform, undisturbed, tmp_path):
    user = User(platform, tmp_path, "lost-nodes")
    driver = user.start("submit", str(TINY))
    for stage, written in UNDER_WAY.items():
        driver.wait_stage(stage)
        until(lambda written=written: user.has(written))
        lost = busy_node(platform)
        platform.kill(lost)
        platform.start_node(lost)
    assert driver.finish() == 0, driver.output
    assert user.metrics() == undisturbed.metrics()


def test_full_disks_and_a_lost_head_end_a_run_which_goes_on_where_it_was(platform, undisturbed, tmp_path):
    user = User(platform, tmp_path, "ended-twice")
    full = user.start("submit", str(TINY))
    submission = full.wait_line(r"(cca-\S+): submitted")[1]
    until(lambda: user.has(UNDER_WAY["tokens"]))
    with full_disks(platform):
        assert full.finish() == 1, full.output
    (said,) = (line for line in full.output.splitlines() if line.startswith("error: "))
    assert "disk space" in said or "No space left on device" in said
    assert "what finished is kept" in said
    assert f"cca submit --resume {submission}" in full.output
    assert "Traceback" not in full.output
    headless = user.start("submit", "--resume", submission)
    submission = headless.wait_line(r"(cca-\S+): submitted")[1]
    headless.wait_stage("align")
    until(lambda: user.has(UNDER_WAY["align"]))
    for name in list(platform.nodes):  # the others lose their head, and end
        platform.kill(name)
    assert headless.finish() != 0
    platform.start_head()
    for number in range(NODES):
        platform.start_node(f"node-{number}")
    until(lambda: platform.alive() == 1 + NODES)
    resumed = user.start("submit", "--resume", submission)
    assert resumed.finish() == 0, resumed.output
    assert "continuing run" in resumed.output
    assert user.metrics() == undisturbed.metrics()


@contextlib.contextmanager
def full_disks(platform: Platform) -> Iterator[None]:
    """The nodes that work have no room left on their disks."""
    ballast = [platform.files(node) / "ballast" for node in platform.nodes if node != "head"]
    for path in ballast:
        with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 20))
    try:
        yield
    finally:
        for path in ballast:
            path.unlink()


def logged_steps(platform: Platform, user: User) -> list[int]:
    """Of the alignment's curve in MLflow."""
    client = MlflowClient(platform.mlflow.uri, platform.mlflow.uri)
    (experiment,) = client.search_experiments(filter_string=f"name = '{user.name}'")
    (align,) = client.search_runs([experiment.experiment_id], "tags.`cca.stage` = 'align'")
    return sorted({point.step for point in client.get_metric_history(align.info.run_id, "loss")})


def test_mlflow_away_for_two_minutes_changes_nothing(platform, undisturbed, tmp_path):
    """Of a run that is not submitted, but driven by somebody on a node of the cluster."""
    user = User(platform, tmp_path, "mlflow-away")
    driver = user.start("run", str(TINY), node="node-0")
    driver.wait_stage("align")
    until(lambda: user.has("train_state/*/step-*"))
    platform.mlflow.kill()
    time.sleep(AWAY_S)  # that is what it is about
    platform.mlflow.start()
    assert driver.finish() == 0, driver.output
    assert user.metrics() == undisturbed.metrics()
    assert logged_steps(platform, user) == logged_steps(platform, undisturbed), "points of the curve are missing"


def test_who_may_not_is_told_so_in_a_sentence(platform, tmp_path):
    user = User(platform, tmp_path, "refused")
    for wrong in ({"RAY_AUTH_TOKEN": "0" * 32}, {"RAY_AUTH_TOKEN": ""}, {"AWS_SECRET_ACCESS_KEY": "expired"}):
        refused = user.cca("submit", str(TINY), **wrong)
        assert refused.returncode != 0, wrong
        said = refused.stderr.strip() or refused.stdout.strip().splitlines()[-1]
        assert "Traceback" not in refused.stdout + refused.stderr, wrong
        assert len(said.splitlines()) == 1, said


def test_nodes_share_no_storage_keys_of_artifacts(platform, undisturbed, tmp_path):
    """MLflow hands artifacts on: a client without any S3 variable reads them."""
    client = MlflowClient(platform.mlflow.uri, platform.mlflow.uri)
    (experiment,) = client.search_experiments(filter_string=f"name = '{undisturbed.name}'")
    run = client.search_runs([experiment.experiment_id], filter_string="attributes.status = 'FINISHED'")[-1]
    assert experiment.artifact_location.startswith("mlflow-artifacts:")
    assert not set(s3_variables(platform.s3)) & set(platform.environment)
    assert client.list_artifacts(run.info.run_id) is not None
