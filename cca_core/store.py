"""Reads and writes stage directories on any fsspec root (a folder, s3://): atomic files, Arrow IPC shards,
manifest last."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow import ipc

from cca_core.config import ConfigError
from cca_core.manifest import MANIFEST_NAME, FileEntry, Manifest
from cca_core.schema import RECORD_BATCH_ROWS

#: Names that ``Store.write_bytes`` gives to files while they are written.
ASIDE = re.compile(r"\..+-[0-9a-f]{32}")


def shard_name(start: int, stop: int) -> str:
    """The file of rows start..stop-1 of the listing; names sort as their ranges do."""
    return f"rows-{start:010d}-{stop:010d}.arrow"


def table_bytes(table: pa.Table) -> bytes:
    """An uncompressed Arrow IPC file of fixed record batches: equal rows give equal bytes."""
    sink = io.BytesIO()
    # Taken, since a slice of a larger table would be written with traces of where it lay.
    table = table.take(pa.array(range(table.num_rows), pa.int64()))
    with ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches(max_chunksize=RECORD_BATCH_ROWS):
            writer.write_batch(batch)
    return sink.getvalue()


def local_cache() -> Path:
    """Where files of a remote store are kept for memory-mapping; CCA_CACHE moves it."""
    return Path(os.environ.get("CCA_CACHE", Path.home() / ".cache" / "cca"))


class Store:
    """A storage root. Everything below it is addressed as (stage, digest, file name)."""

    def __init__(self, root: str) -> None:
        self.uri = root.rstrip("/") if "://" in root else str(Path(root).absolute())
        self.fs, self.root = fsspec.url_to_fs(self.uri)

    def check_writable(self, more: str = "") -> None:
        """Write and remove a file; ConfigError says what to do where that fails, and ``more``."""
        probe = f"{self.root}/.write-check-{uuid.uuid4().hex}"
        try:
            if isinstance(self.fs, LocalFileSystem):  # s3fs would make a bucket of a misspelt name
                self.fs.makedirs(self.root, exist_ok=True)
            self.fs.pipe_file(probe, b"")
            self.fs.rm_file(probe)
        except Exception as error:  # botocore's own: no credentials, no server
            raise ConfigError(
                f"cannot write to the storage {self.uri} ({error}): set CCA_STORAGE to a folder or s3:// prefix "
                f"you may write to, and for S3 a key that is valid{more}"
            ) from error

    def directory(self, stage: str, digest: str) -> StageDirectory:
        return StageDirectory(self, stage, digest)

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write a file that appears whole or not at all (one PUT on S3; write aside and rename on disk)."""
        if not isinstance(self.fs, LocalFileSystem):
            self.fs.pipe_file(path, data)
            return
        self.fs.makedirs(os.path.dirname(path), exist_ok=True)
        aside = f"{os.path.dirname(path)}/.{os.path.basename(path)}-{uuid.uuid4().hex}"  # as ASIDE says
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            if os.path.exists(aside):
                os.unlink(aside)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create a file only if there is none (a link, or a conditional PUT); False where one exists.

        It appears whole: who sees the file can read it. Give each call data of its own, for what stands in the file
        tells whose it is: some S3 servers look first and write then, so that of creates in the same instant several
        succeed and the last one stands; and a create whose answer was lost is tried again and refused by itself.
        """
        if isinstance(self.fs, LocalFileSystem):
            return self._link_exclusive(path, data)
        try:
            self.fs.pipe_file(path, data, mode="create")
        except OSError:
            # Some S3 servers refuse with an error that s3fs does not translate to FileExistsError.
            self.fs.invalidate_cache()
            if not self.fs.exists(path):
                raise
        return self.fs.cat_file(path) == data

    def _link_exclusive(self, path: str, data: bytes) -> bool:
        # A link fails where the name is taken, and until then nobody sees the file.
        aside = f"{path}-{uuid.uuid4().hex}"
        self.write_bytes(aside, data)
        try:
            os.link(aside, path)
        except FileExistsError:
            return False
        finally:
            os.unlink(aside)
        return True


class StageDirectory:
    """One stage's directory. Files appear atomically; the manifest is written last and makes the directory valid."""

    def __init__(self, store: Store, stage: str, digest: str) -> None:
        self.store, self.stage, self.digest = store, stage, digest
        self.path = f"{store.root}/{stage}/{digest}"
        self.uri = f"{store.uri}/{stage}/{digest}"

    def sibling(self, stage: str) -> StageDirectory:
        """The directory of the same digest under another name (quarantine/, conditions/)."""
        return StageDirectory(self.store, stage, self.digest)

    def write_bytes(self, name: str, data: bytes) -> FileEntry:
        self.store.write_bytes(f"{self.path}/{name}", data)
        return FileEntry(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def write_json(self, name: str, value: Any) -> FileEntry:
        return self.write_bytes(name, json.dumps(value, indent=1, sort_keys=True).encode())

    def write_table(self, name: str, table: pa.Table) -> FileEntry:
        entry = self.write_bytes(name, table_bytes(table))
        return FileEntry(size_bytes=entry.size_bytes, sha256=entry.sha256, rows=table.num_rows)

    def exists(self, name: str) -> bool:
        return self.store.fs.exists(f"{self.path}/{name}")

    def readable(self, name: str) -> bool:
        """Whether a shard is there and whole; work on a harmed one is done again."""
        self._forget(name)  # the store is asked: a cached copy outlives a directory that was deleted
        try:
            with pa.memory_map(self.local(name)) as source:
                ipc.open_file(source)
        except (FileNotFoundError, pa.ArrowInvalid):
            self._forget(name)
            return False
        return True

    def read_bytes(self, name: str) -> bytes:
        return self.store.fs.cat_file(f"{self.path}/{name}")

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def read_table(self, name: str) -> pa.Table:
        """The table of a finished file, memory-mapped; a remote file is first copied to the local cache."""
        with pa.memory_map(self.local(name)) as source:
            return ipc.open_file(source).read_all()

    def local(self, name: str) -> str:
        """A local path with the file's content. Files never change under a digest, so a cached copy stays valid."""
        if isinstance(self.store.fs, LocalFileSystem):
            return f"{self.path}/{name}"
        cached = self._cached(name)
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            aside = cached.with_name(f".{cached.name}-{uuid.uuid4().hex}")
            try:
                self.store.fs.get_file(f"{self.path}/{name}", str(aside))
                os.replace(aside, cached)
            finally:
                aside.unlink(missing_ok=True)
        return str(cached)

    def remove(self) -> None:
        """Delete the directory, and this machine's copies of its files. The manifest goes first: what an interruption
        leaves is unfinished work to everyone."""
        fs = self.store.fs
        for path in (f"{self.path}/{MANIFEST_NAME}", self.path):
            if fs.exists(path):
                fs.rm(path, recursive=True)
        if not isinstance(fs, LocalFileSystem):
            shutil.rmtree(self._cached(""), ignore_errors=True)

    def _cached(self, name: str) -> Path:
        root = hashlib.sha256(self.store.uri.encode()).hexdigest()[:16]
        return local_cache() / root / self.stage / self.digest / name

    def _forget(self, name: str) -> None:
        if not isinstance(self.store.fs, LocalFileSystem):
            self._cached(name).unlink(missing_ok=True)

    def entry(self, name: str, *, rows: int = 0) -> FileEntry:
        """The manifest entry of a file that an earlier attempt finished: read again and hashed."""
        data = self.read_bytes(name)
        return FileEntry(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), rows=rows)

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest: from now on the directory is valid and never changes. What writers that were killed had
        aside goes."""
        self.store.write_bytes(f"{self.path}/{MANIFEST_NAME}", manifest.to_json())
        if isinstance(self.store.fs, LocalFileSystem):
            for path in Path(self.path).rglob(".*"):
                if ASIDE.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def manifest(self) -> Manifest | None:
        """The manifest if the directory is whole (every file there, of the recorded size); None if work is left."""
        try:
            manifest = Manifest.from_json(self.store.fs.cat_file(f"{self.path}/{MANIFEST_NAME}"))
        except FileNotFoundError:
            return None
        sizes = self._sizes()
        whole = all(sizes.get(name) == entry.size_bytes for name, entry in manifest.files.items())
        return manifest if whole else None

    def _sizes(self) -> Mapping[str, int]:
        self.store.fs.invalidate_cache(self.path)
        found = self.store.fs.find(self.path, detail=True)
        prefix = len(self.path) + 1
        return {path[prefix:]: info["size"] for path, info in found.items()}

    def damaged(self, manifest: Manifest) -> list[str]:
        """Names of files that are missing or whose sha256 differs from the manifest."""
        bad = []
        for name, entry in manifest.files.items():
            try:
                ok = self.entry(name).sha256 == entry.sha256
            except FileNotFoundError:
                ok = False
            if not ok:
                bad.append(name)
        return bad
