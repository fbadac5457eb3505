"""Writes locks and whole runs to a storage on the S3 server: what the driver of a run does there."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from cca_core.config import ConfigError
from cca_core.store import Store
from pipelines import lock as lock_module
from pipelines.lock import LockLostError, RunLock
from tests.driver import TINY, cca

RUN = "r" * 64


def in_storage(store: Store, folder: str) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {path.rpartition("/")[2]: store.fs.cat_file(path) for path in store.fs.find(f"{store.root}/{folder}")}


def write_lock(store: Store, generation: int, host: str, silent_s: float) -> str:
    path = f"{store.root}/_locks/{RUN[:16]}/{generation}.json"
    store.write_bytes(path, json.dumps({"host": host, "pid": 1, "time": time.time() - silent_s}).encode())
    return path


def test_a_second_driver_is_refused_until_the_first_has_left(store):
    with RunLock(store, RUN):
        with pytest.raises(ConfigError, match=rf"driven by process {os.getpid()} on {socket.gethostname()}"):
            RunLock(store, RUN).__enter__()
        with RunLock(store, "o" * 64):
            assert len(store.fs.find(f"{store.root}/_locks")) == 2, "another run is another lock"
    assert in_storage(store, "_locks") == {}
    with RunLock(store, RUN) as again:
        again.check()


def test_a_stale_lock_of_another_host_is_taken_over(store):
    write_lock(store, 3, "elsewhere", silent_s=1)
    with pytest.raises(ConfigError, match="driven by process 1 on elsewhere"):
        RunLock(store, RUN).__enter__()
    write_lock(store, 3, "elsewhere", silent_s=lock_module.STALE_S + 1)
    with RunLock(store, RUN) as lock:
        assert lock.generation == 4
        ((name, content),) = in_storage(store, "_locks").items()
        assert name == "4.json"
        assert json.loads(content)["host"] == socket.gethostname()
    assert in_storage(store, "_locks") == {}


@pytest.mark.parametrize("generation", [1, 2], ids=["created in the same instant", "taken over"])
def test_a_driver_whose_lock_is_gone_notices(store, monkeypatch, generation):
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.05)
    with RunLock(store, RUN) as lock:
        lock.check()
        for _ in range(50):  # a beat that has just looked still writes
            path = write_lock(store, generation, "elsewhere", silent_s=0)
            lock._thread.join(0.3)
            if not lock._thread.is_alive():
                break
        with pytest.raises(LockLostError, match="another driver took over"):
            lock.check()
    assert json.loads(store.fs.cat_file(path))["host"] == "elsewhere", "it is not ours to remove"


def test_a_run_with_its_storage_on_s3(store, tmp_path):
    env = {"CCA_STORAGE": store.uri, "CCA_CACHE": str(tmp_path / "cache")}
    in_use: set[str] = set()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(cca, tmp_path, "run", str(TINY), env=env)
        while not wait([running], timeout=0.5).done:
            in_use |= {path.removeprefix(store.root) for path in store.fs.find(f"{store.root}/ray_train")}
        result = running.result()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| aligned " in result.stdout
    jobs = {path.split("/")[2].partition("-")[0] for path in in_use if path.count("/") == 3}
    assert jobs == {"train_base", "train_aligned_watched"}, "Ray Train kept its own files on S3 meanwhile"
    assert not (tmp_path / ".cca" / "storage").exists()
    store.fs.invalidate_cache()
    stages = {Path(path).name for path in store.fs.ls(store.root, detail=False)}
    assert {"tokenizer", "tokens", "base", "reference", "align", "evaluate"} <= stages
    assert not stages & {"_locks", "ray_train", "train_state"}, "nothing of what is in use only while it runs"

    def objects() -> dict[str, tuple[str, str]]:
        store.fs.invalidate_cache()
        found = store.fs.find(store.root, detail=True)
        return {path: (info["ETag"], str(info["LastModified"])) for path, info in found.items()}

    before = objects()
    result = cca(tmp_path, "run", str(TINY), env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    took = re.search(r"nothing had changed, ([\d.]+) s", result.stdout)
    assert took, result.stdout
    assert float(took[1]) < 10
    assert objects() == before
