"""Writes stage directories below a temporary folder and in memory: whole or not there, found damaged, read mapped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest

from cca_core.config import ConfigError
from cca_core.manifest import MANIFEST_NAME, Manifest
from cca_core.schema import RECORD_BATCH_ROWS
from cca_core.store import StageDirectory, Store, shard_name, table_bytes


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path, monkeypatch) -> Iterator[Store]:
    """A local folder, and a remote store as object stores are: no rename, no memory-mapping."""
    monkeypatch.setenv("CCA_CACHE", str(tmp_path / "cache"))
    if request.param == "folder":
        yield Store(str(tmp_path / "store"))
    else:
        made = Store(f"memory://{uuid.uuid4().hex}/prefix")
        made.fs.makedirs(made.root)
        yield made
        made.fs.rm(made.root.split("/prefix")[0], recursive=True)


def table(rows: int = 3, start: int = 0) -> pa.Table:
    return pa.table({"row": np.arange(start, start + rows), "text": [f"r{i}" for i in range(rows)]})


def finished(store: Store) -> tuple[StageDirectory, Manifest]:
    directory = store.directory("tokens", "d" * 64)
    files = {
        "rows.arrow": directory.write_table("rows.arrow", table()),
        "deep/facts.json": directory.write_json("deep/facts.json", {"a": 1}),
    }
    manifest = Manifest(
        stage="tokens", code_version=1, digest=directory.digest, config={"a": [1]}, upstream={}, files=files, rows=3
    )
    directory.commit(manifest)
    return directory, manifest


def files_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, step):
    directory = Store(str(tmp_path)).directory("tokens", "d")
    directory.write_bytes("kept", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(os, step, fail)
        for name in ("new", "kept"):
            with pytest.raises(OSError, match="disk full"):
                directory.write_bytes(name, b"content")
    assert files_below(tmp_path) == ["kept"]
    assert directory.read_bytes("kept") == b"old"
    directory.write_bytes("new", b"content")
    assert directory.read_bytes("new") == b"content"


def test_of_many_that_create_a_file_one_wins(tmp_path):
    store, barrier = Store(str(tmp_path)), Barrier(8)

    def attempt(number: int, path: str) -> bool:
        barrier.wait()
        return store.create_exclusive(path, str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        for turn in range(100):
            path = f"{store.root}/lock-{turn}"
            won = list(pool.map(attempt, range(8), [path] * 8))
            assert sum(won) == 1
            assert store.fs.cat_file(path) == str(won.index(True)).encode()


def test_a_file_is_created_once(store):
    path = f"{store.root}/locks/run"
    assert store.create_exclusive(path, b"first")
    assert not store.create_exclusive(path, b"second")
    assert store.fs.cat_file(path) == b"first"


def test_a_directory_is_valid_once_its_manifest_stands(store):
    directory = store.directory("tokens", "d" * 64)
    directory.write_table("rows.arrow", table())
    assert directory.manifest() is None
    directory, manifest = finished(store)
    assert directory.manifest() == manifest
    assert Store(store.uri).directory("tokens", "d" * 64).manifest() == manifest
    assert store.directory("tokens", "e" * 64).manifest() is None


def test_what_a_killed_writer_had_aside_goes_when_the_directory_is_finished(tmp_path):
    store = Store(str(tmp_path))
    killed = (
        "import os, signal, sys\n"
        "from cca_core.store import Store\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "Store(sys.argv[1]).directory('tokens', 'd' * 64).write_bytes('deep/rows.arrow', b'half')\n"
    )
    result = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert len(files_below(tmp_path)) == 1, "it had begun to write"
    finished(store)
    assert files_below(tmp_path) == [MANIFEST_NAME, "facts.json", "rows.arrow"]


@pytest.mark.parametrize("harm", ["missing", "shorter", "longer"])
@pytest.mark.parametrize("name", ["rows.arrow", "deep/facts.json"])
def test_a_missing_or_truncated_file_makes_the_directory_invalid(store, harm, name):
    directory, manifest = finished(store)
    path, data = f"{directory.path}/{name}", directory.read_bytes(name)
    if harm == "missing":
        store.fs.rm_file(path)
    else:
        store.fs.pipe_file(path, data[:-1] if harm == "shorter" else data + b"\0")
    assert directory.manifest() is None
    assert directory.damaged(manifest) == [name]


def test_a_flipped_byte_is_found_by_hash(store):
    directory, manifest = finished(store)
    assert directory.damaged(manifest) == []
    data = bytearray(directory.read_bytes("rows.arrow"))
    data[len(data) // 2] ^= 1
    store.fs.pipe_file(f"{directory.path}/rows.arrow", bytes(data))
    assert directory.manifest() == manifest, "reuse looks at names and sizes only"
    assert directory.damaged(manifest) == ["rows.arrow"]


def test_a_manifest_of_another_format_is_refused(store):
    directory, manifest = finished(store)
    directory.commit(replace(manifest, format_version=99))
    with pytest.raises(ConfigError, match=r"manifest format 99 .* delete the directory to have it made again"):
        directory.manifest()


def test_a_table_is_mapped_and_not_copied(store):
    directory = store.directory("tokens", "d")
    directory.write_table("rows.arrow", table(50_000))
    before = pa.total_allocated_bytes()
    read = directory.read_table("rows.arrow")
    assert pa.total_allocated_bytes() - before < 10_000
    assert read.nbytes > 400_000
    assert read.equals(table(50_000))


def test_a_remote_file_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CCA_CACHE", str(tmp_path / "cache"))
    store = Store(f"memory://{uuid.uuid4().hex}")
    first, second = (store.directory("tokens", digest) for digest in ("a", "b"))
    first.write_table("rows.arrow", table())
    second.write_table("rows.arrow", table(start=9))
    assert first.read_table("rows.arrow").equals(table())
    store.fs.rm_file(f"{first.path}/rows.arrow")
    assert first.read_table("rows.arrow").equals(table()), "from the cache"
    assert second.read_table("rows.arrow").equals(table(start=9)), "another digest is another file"
    assert files_below(tmp_path / "cache") == ["rows.arrow", "rows.arrow"], "no half files stay"


def test_equal_rows_give_equal_bytes_however_they_are_chunked():
    whole = table(2 * RECORD_BATCH_ROWS + 5)
    pieces = pa.concat_tables([whole.slice(0, 7), whole.slice(7, 1500), whole.slice(1507)])
    assert table_bytes(pieces) == table_bytes(whole) == table_bytes(table(2 * RECORD_BATCH_ROWS + 5))
    assert table_bytes(whole) != table_bytes(table(2 * RECORD_BATCH_ROWS + 5, start=1))


def test_shards_sort_as_their_rows_do():
    ranges = [(0, 512), (512, 1024), (10_240, 10_752), (9_999_999, 10_000_000)]
    names = [shard_name(*rows) for rows in ranges]
    assert sorted(names) == [shard_name(*rows) for rows in sorted(ranges)]


def test_a_storage_that_cannot_be_written_says_which_setting_to_change(store, tmp_path):
    store.check_writable()
    assert store.fs.find(store.root) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot write to the storage .*file/below .*set CCA_STORAGE to a folder"):
        Store(str(tmp_path / "file" / "below")).check_writable()


def test_the_same_folder_has_one_address_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative, absolute = Store("results"), Store(f"{tmp_path}/results/")
    relative.directory("a", "b").write_bytes("file", b"x")
    monkeypatch.chdir("/")
    assert relative.directory("a", "b").read_bytes("file") == b"x"
    assert absolute.directory("a", "b").uri == relative.directory("a", "b").uri


def test_a_user_opens_a_tokens_directory_with_pyarrow_alone(tmp_path, write_tokens):
    directory = write_tokens(tmp_path, images=60, views=2)
    assert directory.exists(MANIFEST_NAME)
    found = pyarrow.dataset.dataset(directory.path, format="ipc")
    assert found.count_rows() == 120
    rows = found.to_table()
    assert rows.column("image_id").to_pylist() == [f"image-{i:03d}" for i in range(60) for _ in range(2)]
