"""Writes to temporary folders: kill -9 of the driver in every stage and of a training worker, then the same command."""

from __future__ import annotations

import json
import os
import signal

import psutil
import pytest

from tests.driver import TINY, Driver, cca, manifests, until, written

#: One folder goes through all of them: each kill happens in the run that continues the one before.
STAGES = ["tokenizer", "tokens", "features", "base", "baseline", "reference", "align", "evaluate", "safety"]


def metrics(folder) -> dict:
    """Measured quality by stage and sampler, costs left out: seconds differ from run to run."""
    found = {}
    for stage in ("baseline", "evaluate"):
        (path,) = (folder / ".cca" / "storage" / stage).glob("*/results.json")
        for row in json.loads(path.read_text())["rows"]:
            found[stage, row["label"]] = row["per_seed"]
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    result = cca(folder, "run", str(TINY))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def shards(folder, stage) -> list:
    return list((folder / ".cca" / "storage" / stage).glob("**/rows-*.arrow"))


def train_states(folder) -> list:
    return list((folder / ".cca" / "storage" / "train_state").glob("*/step-*/.metadata"))


def in_the_middle(folder, stage) -> bool:
    """Whether a stage has done part of its work: only then is a kill worth something."""
    if stage in ("tokens", "baseline", "reference", "evaluate"):
        return bool(shards(folder, stage))
    if stage in ("base", "align"):
        return bool(train_states(folder))
    return True


# Seventeen drivers, each of which starts Ray.
@pytest.mark.timeout(1800)
def test_driver_killed_in_every_stage_continues(tmp_path, undisturbed):
    for stage in STAGES:
        driver = Driver(tmp_path)
        driver.wait_stage(stage)
        until(lambda stage=stage: in_the_middle(tmp_path, stage))
        driver.kill()
        assert stage not in manifests(tmp_path), f"{stage} had ended before the kill: nothing was tested"
        finished = {path: time for path, time in written(tmp_path).items() if path.split("/")[0] in manifests(tmp_path)}
        part = {str(path) for path in shards(tmp_path, stage)}
        times = {path: os.stat(path).st_mtime_ns for path in part}
        again = Driver(tmp_path)
        again.wait_stage(stage)
        until(lambda stage=stage: stage in manifests(tmp_path), 240)
        again.kill()
        if stage in ("base", "align"):
            assert f"{stage:<10} goes on from step" in again.output
        now = written(tmp_path)
        assert {path: now[path] for path in finished} == finished, "a finished stage was redone"
        assert {path: os.stat(path).st_mtime_ns for path in part} == times, "a finished shard was redone"
    last = cca(tmp_path, "run", str(TINY))
    assert last.returncode == 0, last.stdout + last.stderr
    assert "continuing run" in last.stdout
    assert metrics(tmp_path) == metrics(undisturbed)


def test_training_worker_killed_resumes_from_its_state(tmp_path, undisturbed):
    driver = Driver(tmp_path, "--set", "base.epochs=3")
    driver.wait_stage("base")
    until(lambda: train_states(tmp_path))
    tree = psutil.Process(driver.process.pid).children(recursive=True)
    workers = [p for p in tree if "TrainWorker" in " ".join(p.cmdline())]
    assert workers, [p.cmdline()[:1] for p in tree]
    os.kill(workers[0].pid, signal.SIGKILL)
    assert driver.finish() == 0, driver.output
    assert metrics(tmp_path) == metrics(undisturbed)


def test_second_driver_on_the_same_run_is_refused(tmp_path):
    driver = Driver(tmp_path)
    driver.wait_stage("tokenizer")
    second = cca(tmp_path, "run", str(TINY))
    assert second.returncode == 2, second.stdout
    assert "already driven by process" in second.stderr
    driver.kill()
