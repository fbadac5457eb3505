"""Reads and writes .npz files in blocks of rows: what does not fit into memory passes through it. No pickles either
way."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cca_core.data_config import ConfigError


class NpzReader:
    """The arrays of an .npz file, each whole or in blocks of rows."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self.name = name
        try:
            self.archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile:
            raise ConfigError(f"{name} is no .npz file: give one that numpy.savez wrote") from None

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(name.removesuffix(".npy") for name in self.archive.namelist())

    def shape(self, key: str) -> tuple[int, ...]:
        with self.archive.open(f"{key}.npy") as file:
            return self._header(key, file)[0]

    def blocks(self, key: str, rows: int) -> Iterator[NDArray[Any]]:
        """``rows`` rows of an array at a time; they are read only."""
        with self.archive.open(f"{key}.npy") as file:
            shape, dtype = self._header(key, file)
            row_bytes = dtype.itemsize * math.prod(shape[1:])
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = file.read(count * row_bytes)
                if len(data) < count * row_bytes:
                    raise ConfigError(f"{self.name} ends within {key}: copy it again")
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])

    def read(self, key: str) -> NDArray[Any]:
        """A whole array."""
        return next(self.blocks(key, max(1, self.shape(key)[0])))

    def _header(self, key: str, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if dtype.hasobject or fortran or not shape:
            raise ConfigError(f"{key} of {self.name} is no plain array of rows: save it again with numpy.savez")
        return shape, dtype


def write_array(
    archive: zipfile.ZipFile, key: str, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[NDArray[Any]]
) -> None:
    """Write an array of an .npz file from blocks of its rows, which must add up to ``shape``."""
    written = 0
    with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
        described = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        npy.write_array_header_1_0(file, described)
        for block in blocks:
            if block.dtype != dtype or block.shape[1:] != shape[1:]:
                raise ValueError(f"a block of {key} is {block.dtype} {block.shape}, the array {dtype} {shape}")
            file.write(np.ascontiguousarray(block).tobytes())
            written += len(block)
    if written != shape[0]:
        raise ValueError(f"{written} rows of {key} instead of {shape[0]}")
