"""Reads and writes ``_locks/`` in the storage: one driver per run, with heartbeat and takeover of a dead one."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from cca_core.config import ConfigError
from cca_core.store import Store

HEARTBEAT_S = 5.0
#: A lock without a heartbeat for this long belongs to a dead driver.
STALE_S = 30.0


class LockLostError(RuntimeError):
    """Another driver took this run over, because this one showed no sign of life."""


@dataclass(frozen=True)
class Owner:
    host: str
    pid: int

    @property
    def alive(self) -> bool | None:
        """Whether the process lives; None where that cannot be known from here."""
        if self.host != socket.gethostname():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


class RunLock:
    """Exclusive right to drive a run. Generations are files that are created exclusively, so a takeover has one
    winner."""

    def __init__(self, store: Store, run_key: str) -> None:
        self.store, self.run_key = store, run_key
        self.folder = f"{store.root}/_locks/{run_key[:16]}"
        self.generation = 0
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.lost = False

    def __enter__(self) -> RunLock:
        while True:
            newest = max(self._generations(), default=0)
            if newest:
                self._refuse_if_held(self._path(newest))
            if self.store.create_exclusive(self._path(newest + 1), self._content()):
                self.generation = newest + 1
                break
        for old in self._generations():
            if old < self.generation:
                self.store.fs.rm_file(self._path(old))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self.lost:
            return
        try:
            if self.store.fs.exists(self._path(self.generation)):
                self.store.fs.rm_file(self._path(self.generation))
        except Exception:
            # It must not hide what ended the run; the lock of a driver that is gone counts no more.
            if value is None:
                raise

    def check(self) -> None:
        """Raise LockLostError if another driver took over."""
        if self.lost:
            raise LockLostError(
                "another driver took over this run because this one was silent for too long: stop one of them"
            )

    def refuse_if_held(self) -> None:
        """Raise ConfigError where a living driver holds the run."""
        newest = max(self._generations(), default=0)
        if newest:
            self._refuse_if_held(self._path(newest))

    def _refuse_if_held(self, path: str) -> None:
        held = self._read(path)
        if held is None:
            return
        owner = Owner(held["host"], held["pid"])
        silent_s = time.time() - held["time"]
        if owner.alive is False or (owner.alive is None and silent_s > STALE_S):
            return
        raise ConfigError(
            f"this run is already driven by process {owner.pid} on {owner.host} (last sign of life {silent_s:.0f} "
            f"s ago): "
            "wait for it, or stop it and run again"
        )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                held = self._read(self._path(self.generation))
                # Another's token: some S3 servers let two create the file in the same instant, and the last one stands.
                overwritten = held is not None and held.get("token") != self._token
                if overwritten or max(self._generations(), default=0) != self.generation:
                    self.lost = True
                    return
                self.store.write_bytes(self._path(self.generation), self._content())
            except Exception:  # noqa: S112  (botocore's errors are no OSError)
                continue  # the next beat tries again; a lock that stays silent is taken over

    def _generations(self) -> list[int]:
        fs = self.store.fs
        fs.invalidate_cache(self.folder)
        names = fs.ls(self.folder, detail=False) if fs.exists(self.folder) else []
        return sorted(int(match[1]) for name in names if (match := re.search(r"/(\d+)\.json$", name)))

    def _path(self, generation: int) -> str:
        return f"{self.folder}/{generation}.json"

    def _content(self) -> bytes:
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "token": self._token}
        return json.dumps({**owner, "time": time.time()}).encode()

    def _read(self, path: str) -> dict[str, Any] | None:
        try:
            return json.loads(self.store.fs.cat_file(path))
        except (FileNotFoundError, json.JSONDecodeError):
            return None


def check_idle(store: Store) -> None:
    """Raise ConfigError where any run of this storage is being driven now."""
    folder = f"{store.root}/_locks"
    for path in store.fs.ls(folder, detail=False) if store.fs.exists(folder) else []:
        RunLock(store, path.rstrip("/").rsplit("/", 1)[1]).refuse_if_held()
