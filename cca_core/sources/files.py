"""Reads a file system (a folder, s3://bucket/prefix), its listing and its files; writes nothing. Shared by sources."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources.base import RawImage

#: What counts as an image file.
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

#: Location -> (path, first byte, byte after the last).
PartOf = Callable[[str], tuple[str, int | None, int | None]]

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


def find_files(config: SourceConfig, extensions: Collection[str]) -> list[FoundFile]:
    """The files below ``source.uri`` (or that file itself) with one of the extensions, by relative path.

    Hidden files are left out, and those that the recipe's globs leave out.
    """
    fs, root = _open(config.uri)
    if root["type"] == "directory":
        folder, found = root["name"], _walk(fs, root["name"])
    else:
        folder, found = posixpath.dirname(root["name"]), [root]
    files = []
    for info in found:
        path = info["name"]
        relative = path[len(folder) :].lstrip("/")
        hidden = any(part.startswith(".") for part in relative.split("/"))
        if not hidden and posixpath.splitext(relative)[1].lower() in extensions and taken(config, relative):
            _check_name(relative)
            files.append(FoundFile(relative, path, fs.unstrip_protocol(path), stamp_of(info)))
    return sorted(files, key=lambda file: file.relative)


def taken(config: SourceConfig, path: str) -> bool:
    """Whether the recipe's globs take a file."""
    included = not config.include or any(fnmatchcase(path, glob) for glob in config.include)
    return included and not any(fnmatchcase(path, glob) for glob in config.exclude)


def no_file(config: SourceConfig, what: str, remedy: str) -> ConfigError:
    """The error for a source without files of its kind."""
    globs = " that source.include and source.exclude take" if config.include or config.exclude else ""
    return ConfigError(f"no {what}{globs} found in {config.uri}: {remedy}")


def read_files(fs: AbstractFileSystem, folder: str, listing: pa.Table) -> Iterator[RawImage]:
    """The files below ``folder`` that (a slice of) a listing names by location, in its order."""
    yield from read_ranges(fs, listing, lambda location: (f"{folder}/{location}", None, None))


def read_ranges(fs: AbstractFileSystem, listing: pa.Table, part_of: PartOf) -> Iterator[RawImage]:
    """The parts of files that (a slice of) a listing names by location, in its order.

    Args:
        part_of: location -> (path, first byte, byte after the last); None, None is the whole file.
    """
    for start in range(0, listing.num_rows, FETCH_FILES):
        rows = listing.slice(start, FETCH_FILES).to_pylist()
        paths, starts, stops = zip(*(part_of(row["location"]) for row in rows), strict=True)
        # Not fs.cat: it would take the brackets in a name like "a[1].png" for a pattern.
        contents = fs.cat_ranges(list(paths), list(starts), list(stops), on_error="return")
        for row, data in zip(rows, contents, strict=True):
            if _is_of_the_image(data):
                error = f"{type(data).__name__}: {data}"
                yield RawImage(row["image_id"], row["uri"], b"", row["label"], error)
            elif isinstance(data, Exception):
                raise data  # the store's fault, not the image's: the unit of work is retried
            else:
                yield RawImage(row["image_id"], row["uri"], data, row["label"])


def _is_of_the_image(found: object) -> bool:
    """Whether what was read is an error that has to do with this image alone. Credentials that expired are not: they
    look like a file that may not be read, for every file that follows."""
    if isinstance(found, PermissionError):
        code = getattr(found.__cause__, "response", {}).get("Error", {}).get("Code", "AccessDenied")
        return code in ("AccessDenied", "403")
    return isinstance(found, FileNotFoundError | IsADirectoryError | NotADirectoryError)


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


def stamp_of(info: dict[str, Any]) -> str:
    """Size, and the etag or time of change, whatever the file system calls it."""
    names = ("ETag", "etag", "mtime", "LastModified", "created")
    change = next((str(info[name]).strip('"') for name in names if name in info), "")
    return f"{info['size']}-{change}"
