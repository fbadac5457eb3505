"""Writes the audit log: one JSON line per request for images, whatever became of it."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from cca_core.config import ConfigError

log = logging.getLogger("ray.serve")


class AuditLog:
    """Appends to a file; without one, it keeps nothing."""

    def __init__(self, file: str) -> None:
        self.file = file
        if file:
            try:
                self._append("")
            except OSError as error:
                raise ConfigError(
                    f"the audit log {file} cannot be written ({error.strerror}): name a file in a folder that is there"
                ) from error

    def write(self, fields: dict[str, Any]) -> None:
        if not self.file:
            return
        when = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        try:
            self._append(json.dumps({"when": when, **fields}) + "\n")
        except OSError as error:
            # The image is drawn already: refusing it would not make the line appear.
            log.error("the audit log lacks the request %s: %s", fields.get("request_id"), error)

    def _append(self, line: str) -> None:
        # Opened for each line, so that a log that was moved away (logrotate) is begun anew; one write per line, so that
        # lines of several processes do not mix.
        with open(self.file, "a", encoding="utf-8") as out:
            out.write(line)
