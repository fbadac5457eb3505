"""Reads a list of image addresses and labels (CSV or JSONL) and the files it names; writes nothing."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from pyarrow import csv
from pyarrow import json as jsonl

from cca_core.config import ConfigError
from cca_core.sources.base import FoundRows, RawImage, Source
from cca_core.sources.files import no_file, open_folder, read_ranges, stamp_of, taken
from cca_core.sources.listing import check_columns, integers_or_strings

EXTENSIONS = (".csv", ".jsonl", ".ndjson")
#: Rows read at once; those of one file system are fetched together.
READ_ROWS = 256


class ListSource(Source):
    """An address is absolute (``s3://bucket/a.png``, ``/data/a.png``) or relative to the folder of the list.

    The id is that of the recipe's ``id_column``, else the address without that folder.
    """

    def find(self) -> FoundRows:
        config = self.config
        fs, folder = open_folder(config.uri)
        table = self._read_list(fs, folder)
        table = table.append_column("line", pa.array([f"line:{n:09d}" for n in range(1, table.num_rows + 1)]))
        addresses = table[config.uri_column].to_pylist()
        table = table.filter(pa.array([not address or taken(config, address) for address in addresses], pa.bool_()))
        if not table.num_rows:
            raise no_file(config, "address", "correct source.uri, or add rows")

        addresses = [address or "" for address in table[config.uri_column].to_pylist()]
        opened = [_locate(fs, folder, address) for address in addresses]
        if config.id_column:
            ids = table[config.id_column]
        else:
            paths = (path for _, path in opened)
            ids = pa.array([_short(folder, address, path) for address, path in zip(addresses, paths, strict=True)])
        no_address = table[config.uri_column].is_null()
        errors = pc.if_else(ids.is_null(), f"no id: {config.id_column} is empty", "")
        errors = pc.if_else(no_address, f"no address: {config.uri_column} is empty", errors)
        rows = {
            "image_id": pc.if_else(no_address, table["line"], pc.coalesce(ids, table["line"])),
            "uri": [system.unstrip_protocol(path) for system, path in opened],
            "location": table[config.uri_column].fill_null(""),
            "label": table[config.label_column],
            "stamp": _stamps(opened),
            "error": errors,
        }
        return FoundRows(pa.table(rows), f"{config.label_column} of {config.uri}")

    def read_rows(self, listing: pa.Table) -> Iterator[RawImage]:
        fs, folder = open_folder(self.config.uri)
        for start in range(0, listing.num_rows, READ_ROWS):
            part = listing.slice(start, READ_ROWS)
            opened = [_locate(fs, folder, address) for address in part.column("location").to_pylist()]
            systems = list({id(system): system for system, _ in opened}.values())
            images: dict[int, RawImage] = {}
            for system in systems:
                rows = [row for row, (its, _) in enumerate(opened) if its is system]
                paths = iter([opened[row][1] for row in rows])
                read = read_ranges(system, part.take(pa.array(rows)), lambda _, paths=paths: (next(paths), None, None))
                images.update(zip(rows, read, strict=True))
            yield from (images[row] for row in range(part.num_rows))

    def _read_list(self, fs: AbstractFileSystem, folder: str) -> pa.Table:
        """The columns that the recipe names: addresses and ids as strings, labels as integers or strings."""
        config, extension = self.config, posixpath.splitext(self.config.uri)[1].lower()
        if extension not in EXTENSIONS:
            raise ConfigError(f"source.uri={config.uri} is no list: give a file that ends in {', '.join(EXTENSIONS)}")
        texts = {name: pa.string() for name in (config.uri_column, config.id_column) if name}
        try:
            with fs.open(f"{folder}/{posixpath.basename(config.uri)}", "rb") as file:
                if extension == ".csv":
                    options = csv.ConvertOptions(column_types=texts)
                    table = csv.read_csv(file, convert_options=options)
                else:
                    table = jsonl.read_json(file)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{config.uri} cannot be read as a list: {error}") from error
        check_columns(config, table.column_names, config.uri, "uri_column", "label_column", "id_column")
        found = {}
        for name in (config.uri_column, config.label_column, config.id_column):
            if name:
                column = integers_or_strings(table[name], name, config.uri).combine_chunks()
                found[name] = column.cast(pa.string()) if name in texts else column
        return pa.table(found)


def _locate(fs: AbstractFileSystem, folder: str, address: str) -> tuple[AbstractFileSystem, str]:
    """File system and path of an address; fsspec hands out one object per store."""
    if "://" in address:
        try:
            return url_to_fs(address)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"the address {address} cannot be opened: {error}") from error
    return fs, posixpath.normpath(posixpath.join(folder, address))


def _short(folder: str, address: str, path: str) -> str:
    """A relative address, and one below the folder, as they are below or beside it: the same on every machine."""
    if "://" in address or posixpath.isabs(address):
        return path.removeprefix(f"{folder.rstrip('/')}/")
    return posixpath.normpath(address)


def _stamps(opened: list[tuple[AbstractFileSystem, str]]) -> list[str]:
    """Size and time of change of each file, for the price of listing the folders that hold them; "" where the store
    lists none (a web server), or where there is no such file."""
    known: dict[tuple[int, str], dict[str, str]] = {}
    stamps = []
    for fs, path in opened:
        key = (id(fs), posixpath.dirname(path))
        if key not in known:
            known[key] = _folder_stamps(fs, key[1])
        stamps.append(known[key].get(path, ""))
    return stamps


def _folder_stamps(fs: AbstractFileSystem, folder: str) -> dict[str, str]:
    if "http" in fs.protocol:
        return {}
    fs.invalidate_cache(folder)
    try:
        return {info["name"]: stamp_of(info) for info in fs.ls(folder, detail=True) if info["type"] != "directory"}
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
