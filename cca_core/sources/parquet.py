"""Reads Parquet files (local or s3://) with a column of image bytes and a column of labels; writes nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources.base import LISTING, MAX_CLASSES, RawImage
from cca_core.sources.files import IMAGE_EXTENSIONS, FoundFile, find_files, open_folder

#: Images decoded from a row group at once.
BATCH_ROWS = 256

_EXTENSION = rf"(?i)\.({'|'.join(extension[1:] for extension in IMAGE_EXTENSIONS)})$"


class ParquetSource:
    """One file, or a folder of files. A listing reads the labels and ids, never the images."""

    def __init__(self, config: SourceConfig) -> None:
        self._config = config

    def list(self) -> tuple[pa.Table, tuple[str, ...]]:
        files = find_files(self._config.uri, (".parquet",))
        if not files:
            raise ConfigError(f"no .parquet file found in {self._config.uri}: correct source.uri, or source.kind")
        fs, _ = open_folder(self._config.uri)
        parts, embedded_names = [], set()
        for file in files:
            with _open(fs, file.path) as parquet:
                parts.append(self._list_file(parquet, file))
                embedded_names.add(_embedded_names(parquet, self._config.label_column))
        if len(embedded_names) > 1:
            raise ConfigError(
                f"the files in {self._config.uri} carry different class names: split them into "
                "data sets, or write them again with one list of names"
            )
        if len({part.schema.field("label").type for part in parts}) > 1:
            raise ConfigError(
                f"{self._config.label_column} is an integer in some files of {self._config.uri} "
                "and a string in others: write them again with one type"
            )
        rows = pa.concat_tables(parts)
        labels, class_names = self._labels(rows["label"], embedded_names.pop())
        columns = [self._image_ids(rows), rows["uri"], rows["location"], labels, rows["stamp"]]
        return pa.table(columns, schema=LISTING).sort_by("image_id"), class_names

    def read(self, listing: pa.Table) -> Iterator[RawImage]:
        rows = listing.to_pylist()
        wanted = defaultdict(set)
        for row in rows:
            if row["label"] >= 0:
                relative, _, number = row["location"].rpartition(":")
                wanted[relative].add(int(number))
        fs, folder = open_folder(self._config.uri)
        images: dict[str, bytes | None] = {}
        for relative, numbers in wanted.items():
            with _open(fs, f"{folder}/{relative}") as parquet:
                column = self._image_column(parquet.schema_arrow, relative)
                for number, data in _read_rows(parquet, column, np.array(sorted(numbers))):
                    images[f"{relative}:{number}"] = data
        for row in rows:
            data, error = images.pop(row["location"], None), ""
            if row["label"] < 0:
                error = "label is missing, negative or beyond the class names"
            elif not data:
                error = "the row holds no image bytes"
            yield RawImage(row["image_id"], row["uri"], data or b"", row["label"], error)

    def _list_file(self, parquet: pq.ParquetFile, file: FoundFile) -> pa.Table:
        """label, id, path (both may be null), location, uri and stamp of every row."""
        config, schema = self._config, parquet.schema_arrow
        for setting in ("image_column", "label_column", "id_column"):
            name = getattr(config, setting)
            if name not in schema.names and (name or setting != "id_column"):
                raise ConfigError(
                    f"{file.relative} has no column {name!r}: set source.{setting} to one of its "
                    f"columns, which are {', '.join(schema.names)}"
                )
        bytes_column = self._image_column(schema, file.relative)
        image_type = schema.field(config.image_column).type
        has_path = bytes_column != config.image_column and image_type.get_field_index("path") >= 0
        path_column = f"{config.image_column}.path" if has_path else ""
        wanted = (config.label_column, config.id_column, path_column)
        table = parquet.read(columns=[name for name in dict.fromkeys(wanted) if name])

        rows = range(table.num_rows)
        ids = paths = pa.nulls(len(rows), pa.string())
        if config.id_column:
            ids = self._integers_or_strings(table, config.id_column, file.relative)
        if has_path:
            paths = pc.struct_field(table[config.image_column], "path")
        return pa.table(
            {
                "label": self._integers_or_strings(table, config.label_column, file.relative),
                "id": ids.cast(pa.string()),
                "path": paths.cast(pa.string()),
                "location": pa.array([f"{file.relative}:{row}" for row in rows], pa.string()),
                "uri": pa.array([f"{file.uri}:{row}" for row in rows], pa.string()),
                # Another column of the same file is other data.
                "stamp": pa.repeat(f"{file.stamp}-{config.image_column}", len(rows)),
            }
        )

    def _image_column(self, schema: pa.Schema, relative: str) -> str:
        """The column of bytes in Parquet's own spelling: ``image``, or ``image.bytes`` in a struct."""
        name = self._config.image_column
        kind = schema.field(name).type
        if _is_bytes(kind):
            return name
        if pa.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            if index >= 0 and _is_bytes(kind.field(index).type):
                return f"{name}.bytes"
        raise ConfigError(
            f"column {name!r} of {relative} is {kind}, not image bytes: set source.image_column to "
            "a column of type binary or struct<bytes, path>"
        )

    @staticmethod
    def _integers_or_strings(table: pa.Table, name: str, relative: str) -> pa.ChunkedArray:
        column = table[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_integer(column.type):
            return column.cast(pa.int64())
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            return column.cast(pa.string())
        raise ConfigError(f"column {name!r} of {relative} is {column.type}: labels and ids are integers or strings")

    def _labels(self, labels: pa.ChunkedArray, embedded_names: tuple[str, ...]) -> tuple[pa.Array, tuple[str, ...]]:
        """The class index of each row, -1 where it has none, and the class names."""
        name, names = self._config.label_column, self._config.class_names
        if pa.types.is_string(labels.type):
            present = sorted(pc.unique(labels).drop_null().to_pylist())
            unknown = [label for label in present if names and label not in names]
            if unknown:
                raise ConfigError(
                    f"{name} holds {unknown[0]!r}, which source.class_names lacks: add it, or leave class_names empty"
                )
            names = names or tuple(present)
            indices = pc.index_in(labels, pa.array(names, pa.string()))
            indices = indices.fill_null(-1).to_numpy()
        else:
            indices = labels.fill_null(-1).to_numpy()
            top = int(indices.max(initial=-1))
            if names and top >= len(names):
                raise ConfigError(
                    f"{name} reaches {top}, but source.class_names has only {len(names)} names "
                    f"(0 to {len(names) - 1}): name every class"
                )
            if not names and not embedded_names and top >= MAX_CLASSES:
                raise ConfigError(
                    f"{name} reaches {top}, too many classes: set source.label_column to a column "
                    "of class indices or class names"
                )
            names = names or embedded_names or tuple(str(index) for index in range(top + 1))
            indices = np.where((indices >= 0) & (indices < len(names)), indices, -1)
        present = np.unique(indices[indices >= 0])
        if len(present) < 2:
            raise ConfigError(
                f"{name} of {self._config.uri} holds {len(present)} class(es), and CCA needs at "
                "least two: add images of another class, or correct source.label_column"
            )
        return pa.array(indices.astype(np.int32)), names

    def _image_ids(self, rows: pa.Table) -> pa.ChunkedArray | pa.Array:
        if self._config.id_column:
            if not _is_unique(rows["id"]):
                raise ConfigError(
                    f"source.id_column={self._config.id_column} has missing or repeated values: "
                    "name a column of unique ids, or leave it empty"
                )
            return rows["id"]
        if _is_unique(rows["path"]):
            short = pc.replace_substring_regex(rows["path"], _EXTENSION, "")
            return short if _is_unique(short) else rows["path"]
        # Padded to a fixed width, so that the order of ids is the order of rows.
        split = (location.rpartition(":") for location in rows["location"].to_pylist())
        return pa.array([f"{relative}:{int(row):09d}" for relative, _, row in split], pa.string())


@contextmanager
def _open(fs: AbstractFileSystem, path: str) -> Iterator[pq.ParquetFile]:
    # No read-ahead: Parquet asks for exactly the ranges of its columns.
    with fs.open(path, "rb", cache_type="none") as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise ConfigError(f"{path} is not a whole Parquet file ({error}): replace it") from error
        with parquet:
            yield parquet


def _embedded_names(parquet: pq.ParquetFile, label_column: str) -> tuple[str, ...]:
    """The names of a Hugging Face ClassLabel, where the file carries them."""
    metadata = (parquet.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    features = json.loads(metadata).get("info", {}).get("features", {})
    return tuple(features.get(label_column, {}).get("names", ()))


def _read_rows(parquet: pq.ParquetFile, column: str, numbers: np.ndarray) -> Iterator[tuple[int, bytes | None]]:
    """The bytes of the rows with these sorted numbers, from the row groups that hold them and no others."""
    start = 0
    for group in range(parquet.num_row_groups):
        stop = start + parquet.metadata.row_group(group).num_rows
        if np.searchsorted(numbers, start) < np.searchsorted(numbers, stop):
            first = start
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
                values = batch.column(0)
                if pa.types.is_struct(values.type):
                    values = pc.struct_field(values, "bytes")
                inside = (first <= numbers) & (numbers < first + len(values))
                for number in numbers[inside].tolist():
                    yield number, values[number - first].as_py()
                first += len(values)
        start = stop


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_unique(values: pa.ChunkedArray) -> bool:
    return values.null_count == 0 and len(pc.unique(values)) == len(values)
