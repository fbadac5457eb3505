"""Reads and writes nothing itself: what a stage made (``_manifest.json``), and the digest that names its directory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

from cca_core.config import ConfigError

FORMAT_VERSION = 1
MANIFEST_NAME = "_manifest.json"


@dataclass(frozen=True)
class FileEntry:
    """One file of a stage: its size and sha256, and its rows where it is a shard."""

    size_bytes: int
    sha256: str
    rows: int = 0


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The truth about a stage's directory, written last: without it, the directory is unfinished work."""

    stage: str
    code_version: int
    digest: str
    config: dict[str, Any]
    upstream: dict[str, str]
    files: dict[str, FileEntry]
    rows: int = 0
    #: The Arrow schema as text, for people; empty where the stage writes no table.
    schema: str = ""
    #: Small facts later stages read: counts, metrics, the choice that was made.
    facts: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        raw = json.loads(data)
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ConfigError(
                f"manifest format {version} is not the format {FORMAT_VERSION} of this release: "
                "run the release that wrote it, or delete the directory to have it made again"
            )
        files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
        return cls(files=files, **raw)


def stage_digest(stage: str, code_version: int, config: dict[str, Any], upstream: dict[str, str]) -> str:
    """sha256 over stage name, code version, config section and upstream digests, as 64 hex digits."""
    canonical = json.dumps([stage, code_version, config, upstream], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
