"""Writes to temporary folders: one whole run of a tiny recipe, and a running service, which several tests look at."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.driver import TINY, cca
from tests.service import NAME, SAMPLING, Service, bundle, filtered_bundle, start


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which `cca run tiny` has ended, and what it printed. Change nothing in it."""
    folder = tmp_path_factory.mktemp("run")
    result = cca(folder, "run", str(TINY))
    assert result.returncode == 0, result.stdout + result.stderr
    return folder, result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="module")
def registry(folder: Path) -> Any:
    """Versions 1 and 2 draw different images, version 3 cannot be loaded, version 4 is version 1 with a content filter;
    version 1 is the champion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        from pipelines.settings import Settings
        from pipelines.tracking import Registry, Tracker

        tracker = Tracker(Settings())
        made = Registry(tracker, NAME)
        run_id = tracker.start("seed", {})
        for files in (bundle(0), bundle(1), {"bundle.json": b'{"format_version": 99}'}, filtered_bundle()):
            with tempfile.TemporaryDirectory() as parts:
                for name, data in files.items():
                    (Path(parts) / name).write_bytes(data)
                made.add(run_id, parts, "tiny", SAMPLING, {})
        made.set_alias("champion", "1")
    return made


@pytest.fixture(scope="module")
def start_service(folder: Path, registry: Any) -> Iterator[Callable[..., Service]]:
    """Starts `cca serve` on the champion with more options; it ends with the module's tests."""
    drivers = []

    def begin(*options: str) -> Service:
        driver, port = start(folder, "--model", f"models:/{NAME}@champion", "--max-replicas", "1", *options)
        drivers.append(driver)
        dashboard = driver.wait_line(r"starting .*Ray dashboard (\S+)\)")[1]
        driver.wait_line("ready: ")
        return Service(driver, f"http://127.0.0.1:{port}", dashboard)

    yield begin
    for driver in drivers:
        if driver.process.poll() is None:
            driver.process.send_signal(signal.SIGTERM)
            driver.finish(90)


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service]) -> Service:
    return start_service()
