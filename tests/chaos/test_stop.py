"""Writes to temporary folders: Ctrl-C and SIGTERM end a run within ten seconds, and say how it goes on."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from tests.driver import TINY, Driver, cca

STOP_WITHIN_S = 10.0


@pytest.mark.parametrize("stage", ["tokenizer", "tokens", "base"])
@pytest.mark.parametrize("how", ["terminal", "scheduler"])
def test_a_stopped_run_ends_soon_and_goes_on(tmp_path, stage, how):
    driver = Driver(tmp_path, own_session=True)
    driver.wait_stage(stage)
    tree = psutil.Process(driver.process.pid).children(recursive=True)
    started = time.monotonic()
    if how == "terminal":  # every process of the terminal is told
        os.killpg(driver.process.pid, signal.SIGINT)
    else:
        driver.process.send_signal(signal.SIGTERM)
    assert driver.finish() == 130, driver.output
    assert time.monotonic() - started < STOP_WITHIN_S
    assert f"stopped; what finished is kept. Go on with: cca run {TINY}" in driver.output
    assert "Traceback" not in driver.output
    _, alive = psutil.wait_procs(tree, timeout=20)
    assert [process.name() for process in alive] == []
    assert "KILLED" in cca(tmp_path, "status", str(TINY)).stdout
    again = Driver(tmp_path)
    again.wait_line("continuing run")
    again.wait_stage(stage)
    again.kill()
