"""Reads a folder (local or s3://) of codes and labels as the official LlamaGen extraction leaves them; writes nothing.

``<name>_codes/<n>.npy`` holds the codes of all views of image n, integers [1, views, N]; ``<name>_labels/<n>.npy`` its
class, an integer [1]. The images themselves are not there: what is shown or measured as a real image is a
reconstruction.
"""

from __future__ import annotations

import io
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pyarrow as pa
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from cca_core.config import ConfigError
from cca_core.sources.base import FoundRows, RawImage, Source
from cca_core.sources.files import FoundFile, find_files, no_file, open_folder, read_files
from cca_core.sources.listing import MAX_CLASSES

EXTENSION = ".npy"
CODES, LABELS = "_codes", "_labels"

#: Label files (some hundred bytes each) fetched at once.
FETCH_LABELS = 1024


class CodesSource(Source):
    """The id of an image is the name of its files without extension, which the extraction counts from 0."""

    def find(self) -> FoundRows:
        """As every source. An image with only one of its two files is listed, and cannot be read."""
        fs, codes, labels = self._folders()
        files, labelled = (self._files(fs, folder) for folder in (codes, labels))
        if not files:
            raise no_file(self.config, f"{EXTENSION} file", "correct source.uri, or source.kind")
        ids = sorted(files.keys() | labelled.keys())
        found = list(_read_labels(fs, [f"{labels}/{image_id}{EXTENSION}" for image_id in ids]))
        root = fs.unstrip_protocol(codes)
        columns = {
            "image_id": ids,
            "uri": [f"{root}/{image_id}{EXTENSION}" for image_id in ids],
            "location": [f"{image_id}{EXTENSION}" for image_id in ids],
            "label": pa.array([None if isinstance(label, str) else label for label in found], pa.int64()),
            "stamp": [files[image_id].stamp if image_id in files else "" for image_id in ids],
            "error": [f"no label: {label}" if isinstance(label, str) else "" for label in found],
        }
        return FoundRows(pa.table(columns), f"the labels in {labels}")

    def read_rows(self, listing: pa.Table) -> Iterator[RawImage]:
        """The bytes of the .npy files of codes; ``read_integers`` decodes them."""
        fs, codes, _ = self._folders()
        yield from read_files(fs, codes, listing)

    def _files(self, fs: AbstractFileSystem, folder: str) -> dict[str, FoundFile]:
        """Image id -> file in a folder."""
        found = find_files(replace(self.config, uri=fs.unstrip_protocol(folder)), (EXTENSION,))
        return {file.relative.removesuffix(EXTENSION): file for file in found if file.relative.endswith(EXTENSION)}

    def _folders(self) -> tuple[AbstractFileSystem, str, str]:
        """The file system, the folder of codes and that of labels; ConfigError unless there is exactly one pair."""
        uri = self.config.uri
        fs, folder = open_folder(uri)
        itself = [folder] if folder.endswith(CODES) else []
        if itself and fs.isdir(_labels_of(folder)):
            return fs, folder, _labels_of(folder)
        found = _folders_of_codes(fs, folder) or itself
        whole = [codes for codes in found if fs.isdir(_labels_of(codes))]
        if not found:
            raise ConfigError(
                f"{uri} holds no folder <name>{CODES}: set source.uri to the folder with <name>{CODES}/ and "
                f"<name>{LABELS}/ of the official extraction, or correct source.kind"
            )
        if not whole:
            labels = posixpath.basename(_labels_of(found[0]))
            raise ConfigError(f"{found[0]} has no labels beside it: put {labels}/ there")
        if len(whole) > 1:
            names = ", ".join(posixpath.basename(codes) for codes in whole)
            raise ConfigError(f"{uri} holds several data sets ({names}): set source.uri to one of these folders")
        return fs, whole[0], _labels_of(whole[0])


def read_integers(data: bytes) -> NDArray[np.integer]:
    """The array in the bytes of a .npy file, which is never unpickled.

    Raises ValueError, with a short reason, for whatever is not one whole array of integers.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except MemoryError:
        raise  # the machine's fault, not the file's
    except Exception as error:  # a damaged header makes numpy's parser raise almost anything
        raise ValueError(f"not a whole {EXTENSION} array: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        kind = array.dtype if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"holds {kind}, not integers")
    return array


def _labels_of(codes: str) -> str:
    return codes.removesuffix(CODES) + LABELS


def _folders_of_codes(fs: AbstractFileSystem, folder: str) -> list[str]:
    try:
        inside = sorted(path.rstrip("/") for path in fs.ls(folder, detail=False))
    except PermissionError as error:
        raise ConfigError(f"{folder} may not be read ({error}): grant access to it") from error
    return [path for path in inside if path.endswith(CODES) and fs.isdir(path)]


def _read_labels(fs: AbstractFileSystem, paths: Sequence[str]) -> Iterator[int | str]:
    """The label in each file, or in words why there is none."""
    for start in range(0, len(paths), FETCH_LABELS):
        for data in fs.cat_ranges(paths[start : start + FETCH_LABELS], None, None, on_error="return"):
            if isinstance(data, FileNotFoundError | PermissionError):
                yield f"{type(data).__name__}: {data}"
            elif isinstance(data, Exception):
                raise data
            else:
                yield _label(data)


@lru_cache(maxsize=1 << 12)  # as many files as images, as many contents as classes
def _label(data: bytes) -> int | str:
    try:
        label = read_integers(data)
    except ValueError as error:
        return str(error)
    if label.size != 1:
        return f"shape {list(label.shape)} instead of [1]"
    return int(label.item()) if 0 <= label.item() < MAX_CLASSES else f"{label.item()} is no class"
