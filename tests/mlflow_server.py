"""Writes below a folder: a real MLflow server, which can be killed and started again at the same address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_S = 300.0
HOST = "127.0.0.1"


class MlflowServer:
    """One worker; runs and artifacts in the folder unless ``store`` and ``artifacts`` say where. Its log is
    mlflow.log."""

    def __init__(
        self, folder: Path, port: int, env: dict[str, str], *, store: str | None = None, artifacts: str | None = None
    ) -> None:
        self.folder, self.port = folder, port
        self.env = {**env, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # starts sooner
        self.store = store or f"sqlite:///{folder / 'mlflow.db'}"
        self.artifacts = artifacts or str(folder / "artifacts")
        self.uri = f"http://{HOST}:{port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self.port)]
        command += ["--workers", "1", "--serve-artifacts", "--artifacts-destination", self.artifacts]
        command += ["--backend-store-uri", self.store]
        with (self.folder / "mlflow.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + START_S
        while not self._healthy():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"MLflow did not start: see {self.folder / 'mlflow.log'}")
            time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # a group of its own: the server and its worker
            self.process.wait()

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False
