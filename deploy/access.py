"""Reads the keys file, writes the audit log: who may ask for how much, and the record of what was asked."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from deploy.api import ApiError, ImageRequest, plain
from deploy.audit import AuditLog
from deploy.generator import Drawn
from deploy.keys import VARIABLE, Holder, KeyRing
from deploy.limits import Limits
from deploy.metrics import Metrics
from deploy.tracing import describe, span

log = logging.getLogger("ray.serve")
#: What a trace has of an audit line: what was asked, and not who asked.
TRACED = ("request_id", "class", "n", "seed", "version", "outcome")
OPEN = f"no keys: whoever reaches the service may use it; make a key with `cca key NAME`, or set {VARIABLE}"


@dataclass
class Record:
    """What is known of one request for images so far."""

    request_id: str
    metrics: Metrics
    key: str | None = None
    asked: ImageRequest | None = None
    drawn: Drawn | None = None
    #: ok, or an error's code; a request that nobody waits for any more keeps this one.
    outcome: str = "cancelled"
    first_image_s: float | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def drew(self, drawn: Drawn) -> None:
        """Images of the request are there."""
        if self.drawn is None:
            self.first_image_s = self.seconds
        self.drawn = drawn
        self.metrics.drew(drawn.version, len(drawn.pixels_BHW3), drawn.calls_per_image)

    def fail(self, error: ApiError) -> None:
        self.outcome = error.code or str(error.status)

    def line(self) -> dict[str, Any]:
        asked, drawn = self.asked, self.drawn
        return {
            "request_id": self.request_id,
            "key": self.key,
            "class": drawn.class_name if drawn else plain(asked.prompt) if asked else None,
            "n": asked.n if asked else None,
            "seed": asked.seed if asked else None,
            "sampling": drawn.sampling if drawn else asked.sampling({}) if asked else None,
            "version": drawn.version if drawn else None,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 4),
        }


class Access:
    """The door of the service."""

    def __init__(self) -> None:
        self.keys, self.audit, self.limits, self.metrics = KeyRing(""), AuditLog(""), Limits(), Metrics()

    def configure(self, *, keys: str = "", audit: str = "") -> None:
        """Take other files; what was counted stays. ConfigError where one of them cannot be used."""
        self.keys, self.audit = KeyRing(keys), AuditLog(audit)
        if self.keys.open:
            log.warning(OPEN)

    def holder(self, authorization: str | None) -> tuple[str, Holder] | None:
        """Whose key a request brings; None where the service is open, ApiError 401 where there is no good key."""
        if self.keys.open:
            return None
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "a key is needed: send the header Authorization: Bearer KEY", None, "missing_api_key")
        found = self.keys.find(key.strip())
        if found is None:
            raise ApiError(401, "this key is unknown or disabled: ask who runs the service", None, "invalid_api_key")
        return found

    def admitted(self, found: tuple[str, Holder] | None, images: int) -> AbstractContextManager[None]:
        return self.limits.admitted(*found, images) if found else nullcontext()

    @contextmanager
    def recorded(self, request_id: str) -> Iterator[Record]:
        """The record of a request, which is written when the request ends, however it ends."""
        record = Record(request_id, self.metrics)
        self.metrics.begun()
        with span("images") as traced:
            try:
                yield record
            except ApiError as error:
                record.fail(error)
                raise
            except Exception:
                record.outcome = "internal_error"
                raise
            finally:
                line = record.line()
                self.audit.write(line)
                model = record.drawn.version if record.drawn else ""
                self.metrics.ended(record.outcome, model, record.seconds, record.first_image_s)
                describe(traced, **{name: line[name] for name in TRACED})
