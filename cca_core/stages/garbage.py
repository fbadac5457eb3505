"""Reads and deletes stage directories of a storage root: those that nothing needs any more."""

from __future__ import annotations

import datetime
from collections.abc import Collection
from dataclasses import dataclass

from cca_core.manifest import Manifest
from cca_core.stages.forget import directories
from cca_core.stages.graph import STAGES, folder_of
from cca_core.store import StageDirectory, Store

#: Folders of directories that a run names by their digests, or that lie beside one under the same digest. Votes of
#: people, locks and the list of forgotten images are in none of them.
NAMED = ("source", *(spec.name for spec in STAGES), "sweep", "images", "quarantine", "conditions", "train_state")
#: Folders of directories that no run names: needed for as long as all is that they were made from.
DERIVED = ("decide", "report", "pairs")


@dataclass(frozen=True)
class Garbage:
    """A directory that nothing needs."""

    directory: StageDirectory
    size_bytes: int


def garbage(store: Store, needed: Collection[str], *, older_than: datetime.datetime) -> list[Garbage]:
    """The directories to which no needed digest leads.

    Args:
        needed: digests of stages; what they were made from is needed too, as far as manifests tell.
        older_than: a directory with a file written after this is left alone (with its time zone).
    """
    found = [directory for stage in (*NAMED, *DERIVED) for directory in directories(store, stage)]
    manifests = {(d.stage, d.digest): d.manifest() for d in found}
    kept = _closure(set(needed), {key: m for key, m in manifests.items() if key[0] not in DERIVED})
    kept |= {
        digest
        for (stage, digest), manifest in manifests.items()
        if stage in DERIVED and manifest is not None and _made_from(manifest) <= kept
    }
    collected = []
    for directory in found:
        if directory.digest not in kept:
            size_bytes, written = _size_and_time(directory)
            if written is None or written < older_than:
                collected.append(Garbage(directory, size_bytes))
    return collected


def _closure(needed: set[str], manifests: dict[tuple[str, str], Manifest | None]) -> set[str]:
    """The digests, and those that they were made from."""
    upstream: dict[str, set[str]] = {}
    for (_, digest), manifest in manifests.items():
        upstream.setdefault(digest, set()).update(manifest.upstream.values() if manifest else ())
    kept, left = set(), needed
    while left:
        kept |= left
        left = set().union(*(upstream.get(digest, set()) for digest in left)) - kept
    return kept


def _made_from(manifest: Manifest) -> set[str]:
    """Digests of stages; a champion and votes enter as digests of their own."""
    return {digest for name, digest in manifest.upstream.items() if folder_of(name) in NAMED}


def _size_and_time(directory: StageDirectory) -> tuple[int, datetime.datetime | None]:
    """Bytes of all files, and when the newest was written; None without a file."""
    fs = directory.store.fs
    fs.invalidate_cache(directory.path)
    files = fs.find(directory.path, detail=True)
    times = [fs.modified(path) for path in files]
    aware = [time if time.tzinfo else time.replace(tzinfo=datetime.UTC) for time in times]
    return sum(entry["size"] for entry in files.values()), max(aware, default=None)
