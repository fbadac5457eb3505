"""Reads a file system (a folder, s3://bucket/prefix), its listing and its files; writes nothing. Shared by sources."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from cca_core.config import ConfigError
from cca_core.sources.base import RawImage

#: In order of preference: the first file of a name keeps the name without extension as its id.
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

#: Files fetched at once (an object store answers them concurrently) and held in memory.
FETCH_FILES = 32


@dataclass(frozen=True)
class FoundFile:
    """``path`` is the file system's own, ``relative`` is below the source's folder and the same on every machine."""

    relative: str
    path: str
    uri: str
    stamp: str


def open_folder(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system and the folder of ``uri``; where ``uri`` is one file, the folder that holds it."""
    fs, info = _open(uri)
    return fs, info["name"] if info["type"] == "directory" else posixpath.dirname(info["name"])


def find_files(uri: str, extensions: Collection[str]) -> list[FoundFile]:
    """The files below ``uri`` (or ``uri`` itself) with one of the extensions, hidden ones apart, by relative path."""
    fs, root = _open(uri)
    if root["type"] == "directory":
        folder, found = root["name"], _walk(fs, root["name"])
    else:
        folder, found = posixpath.dirname(root["name"]), [root]
    files = []
    for info in found:
        path = info["name"]
        relative = path[len(folder) :].lstrip("/")
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if not hidden and posixpath.splitext(relative)[1].lower() in extensions:
            _check_name(relative)
            files.append(FoundFile(relative, path, fs.unstrip_protocol(path), _stamp(info)))
    return sorted(files, key=lambda file: file.relative)


def read_files(fs: AbstractFileSystem, folder: str, listing: pa.Table) -> Iterator[RawImage]:
    """The files below ``folder`` that (a slice of) a listing names by location, in its order."""
    for start in range(0, listing.num_rows, FETCH_FILES):
        rows = listing.slice(start, FETCH_FILES).to_pylist()
        # Not fs.cat: it would take the brackets in a name like "a[1].png" for a pattern.
        contents = fs.cat_ranges([f"{folder}/{row['location']}" for row in rows], None, None, on_error="return")
        for row, data in zip(rows, contents, strict=True):
            if isinstance(data, FileNotFoundError | PermissionError):
                error = f"{type(data).__name__}: {data}"
                yield RawImage(row["image_id"], row["uri"], b"", row["label"], error)
            elif isinstance(data, Exception):
                raise data  # the store's fault, not the image's: the unit of work is retried
            else:
                yield RawImage(row["image_id"], row["uri"], data, row["label"])


def _open(uri: str) -> tuple[AbstractFileSystem, dict[str, Any]]:
    try:
        fs, root = url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"source.uri={uri} cannot be opened: {error}") from error
    fs.invalidate_cache()  # object stores remember listings for the life of the process
    try:
        return fs, fs.info(root)
    except FileNotFoundError as error:
        raise ConfigError(f"source.uri={uri} does not exist: correct it, or create it") from error
    except PermissionError as error:
        raise ConfigError(f"source.uri={uri} may not be read ({error}): grant access to it, or correct it") from error


def _walk(fs: AbstractFileSystem, folder: str) -> Iterable[dict[str, Any]]:
    if not isinstance(fs, LocalFileSystem):
        return fs.find(folder, detail=True).values()
    try:
        return list(_walk_local(fs, folder, ()))
    except PermissionError as error:
        raise ConfigError(f"{error.filename} may not be read: grant access to it") from error


def _walk_local(fs: LocalFileSystem, folder: str, above: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Not fs.find: it skips, without a word, folders that it may not read and links to folders."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that holds it
        return
    for info in fs.ls(folder, detail=True):
        if info["type"] == "directory" or (info["islink"] and fs.isdir(info["name"])):
            yield from _walk_local(fs, info["name"], (*above, real))
        else:
            yield info


def _check_name(relative: str) -> None:
    try:
        relative.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"the file name {relative!r} is not UTF-8: rename the file") from error


def _stamp(info: dict[str, Any]) -> str:
    """Size, and the etag or time of change, whatever the file system calls it."""
    names = ("ETag", "etag", "mtime", "LastModified", "created")
    change = next((str(info[name]).strip('"') for name in names if name in info), "")
    return f"{info['size']}-{change}"
