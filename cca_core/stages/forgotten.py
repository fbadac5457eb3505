"""Reads and writes ``_forgotten.json`` in a storage root: hashes of the ids that no data set may hold again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import pyarrow as pa

from cca_core.store import Store

NAME = "_forgotten.json"


def id_hash(image_id: str) -> str:
    """What is kept of a forgotten id: enough to know it again, and nothing to read."""
    return hashlib.sha256(image_id.encode()).hexdigest()


def forgotten_ids(store: Store) -> frozenset[str]:
    """The hashes of all ids that were forgotten in this storage."""
    path = f"{store.root}/{NAME}"
    store.fs.invalidate_cache(store.root)
    try:
        return frozenset(json.loads(store.fs.cat_file(path)))
    except FileNotFoundError:
        return frozenset()


def remember_to_forget(store: Store, image_ids: Iterable[str]) -> None:
    """Add ids to what every later listing leaves out."""
    hashes = forgotten_ids(store) | {id_hash(image_id) for image_id in image_ids}
    store.write_bytes(f"{store.root}/{NAME}", json.dumps(sorted(hashes)).encode())


def without(listing: pa.Table, forgotten: frozenset[str]) -> pa.Table:
    """The rows of a listing (or of any table with ``image_id``) that were not forgotten."""
    if not forgotten:
        return listing
    kept = [id_hash(image_id) not in forgotten for image_id in listing.column("image_id").to_pylist()]
    return listing.filter(pa.array(kept, pa.bool_()))
