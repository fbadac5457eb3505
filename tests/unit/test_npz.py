"""Writes to a temporary folder: .npz files in blocks, and samples in the layout of the ADM evaluator."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from cca_core.config import ConfigError
from cca_core.npz import NpzReader, write_array


def write(path: Path, **arrays: np.ndarray) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for key, array in arrays.items():
            blocks = np.array_split(array, 3)
            write_array(archive, key, array.shape, array.dtype, blocks)
    return path


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_what_is_written_in_blocks_numpy_reads_whole(tmp_path, dtype):
    images, labels = np.arange(7 * 2 * 2 * 3).reshape(7, 2, 2, 3).astype(dtype), np.arange(7)
    path = write(tmp_path / "a.npz", arr_0=images, arr_1=labels)
    with np.load(path, allow_pickle=False) as found:
        assert sorted(found) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(found["arr_0"], images)
        np.testing.assert_array_equal(found["arr_1"], labels)
        assert found["arr_0"].dtype == dtype


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read_in_blocks(tmp_path, save):
    images, mu = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8), np.arange(3.0)
    save(tmp_path / "a.npz", images, mu=mu)
    with (tmp_path / "a.npz").open("rb") as file:
        npz = NpzReader(file, "a.npz")
        assert npz.keys == {"arr_0", "mu"}
        assert npz.shape("arr_0") == images.shape
        blocks = list(npz.blocks("arr_0", 4))
        assert [len(block) for block in blocks] == [4, 4, 2]
        np.testing.assert_array_equal(np.concatenate(blocks), images)
        np.testing.assert_array_equal(npz.read("mu"), mu)


def test_pickles_and_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.array([{"a": 1}], dtype=object))
    with (tmp_path / "a.npz").open("rb") as file, pytest.raises(ConfigError, match="no plain array"):
        NpzReader(file, "a.npz").read("arr_0")
    (tmp_path / "b.npz").write_bytes(b"nothing of the kind")
    with (tmp_path / "b.npz").open("rb") as file, pytest.raises(ConfigError, match=r"is no \.npz"):
        NpzReader(file, "b.npz")


def test_rows_that_are_missing_are_noticed(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive, pytest.raises(ValueError, match="2 rows"):
        write_array(archive, "arr_0", (3, 4), np.dtype(np.uint8), [np.zeros((2, 4), np.uint8)])


def test_blocks_alone_are_in_memory(tmp_path):
    shape, size = (4096, 64, 64, 3), 4096 * 64 * 64 * 3
    blocks = (np.zeros((64, *shape[1:]), np.uint8) for _ in range(64))
    tracemalloc.start()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        write_array(archive, "arr_0", shape, np.dtype(np.uint8), blocks)
    with (tmp_path / "a.npz").open("rb") as file:
        assert sum(len(block) for block in NpzReader(file, "a.npz").blocks("arr_0", 64)) == 4096
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 8
