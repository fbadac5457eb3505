"""Writes to a temporary folder: starts `cca` as a user does, watches what it prints, and compares what it leaves."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from cca_core.manifest import Manifest

#: What is waited for at most: a guard against hanging, not a measurement. A slow machine takes four times as long.
LONG_S = 900.0
TINY = Path(__file__).parent / "data" / "tiny.yaml"
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "MLFLOW_DISABLE_TELEMETRY": "true", "COLUMNS": "200"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from pipelines.cli import main; main()", *arguments]


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("CCA_", "MLFLOW_", "RAY_"))}
    return {**inherited, **ENVIRONMENT, **(extra or {})}


def cca(folder: Path, *arguments: str, env: dict[str, str] | None = None, timeout_s: float = LONG_S) -> Any:
    """Run `cca` in ``folder`` to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=folder,
        env=environment(env),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


class Driver:
    """A running `cca run` (or another verb) whose output can be waited for; ``inside`` is a command that runs it."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        verb: tuple[str, ...] = ("run", str(TINY)),
        own_session: bool = False,
        env: dict[str, str] | None = None,
        inside: tuple[str, ...] = (),
    ) -> None:
        self.lines: list[str] = []
        self.changed = threading.Condition()
        self.process = subprocess.Popen(
            [*inside, *command(*verb, *arguments)],
            cwd=folder,
            env=environment(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=own_session,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.changed:
                self.lines.append(line.rstrip())
                self.changed.notify_all()
        with self.changed:
            self.lines.append("")
            self.changed.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_line(self, pattern: str, timeout_s: float = LONG_S) -> re.Match[str]:
        """Until a line of the output starts with ``pattern``."""

        def found() -> re.Match[str] | None:
            return next(filter(None, (re.match(pattern, line) for line in self.lines)), None)

        with self.changed:
            self.changed.wait_for(lambda: found() or self.process.poll() is not None, timeout_s)
        match = found()
        assert match, f"never said {pattern!r}:\n{self.output}"
        return match

    def wait_stage(self, stage: str, timeout_s: float = LONG_S) -> None:
        """Until the driver says that it is in ``stage``."""
        self.wait_line(rf" +{stage} ", timeout_s)

    def kill(self) -> None:
        """kill -9 of the driver alone."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join()

    def finish(self, timeout_s: float = LONG_S) -> int:
        code = self.process.wait(timeout_s)
        self.reader.join()
        return code


@contextmanager
def answering(app: Any, listener: socket.socket) -> Iterator[str]:
    """The address of an ASGI app that answers on a socket, in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def until(condition: Callable[[], Any], timeout_s: float = LONG_S) -> Any:
    """Poll until the condition gives something; its last answer."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.05)
    return answer


def manifests(folder: Path) -> dict[str, Manifest]:
    """Finished stage directories below ``folder``/.cca by stage name (one digest each)."""
    found = (folder / ".cca" / "storage").glob("*/*/_manifest.json")
    return {path.parts[-3]: Manifest.from_json(path.read_bytes()) for path in found}


def written(folder: Path) -> dict[str, int]:
    """Modification times (ns) of all files of finished stages and finished shards, by path."""
    root = folder / ".cca" / "storage"
    skip = ("_locks", "ray_train", "train_state")
    files = (p for p in root.rglob("*") if p.is_file() and p.relative_to(root).parts[0] not in skip)
    return {str(path.relative_to(root)): path.stat().st_mtime_ns for path in files if not path.name.startswith(".")}
