"""Reads Parquet files (local or s3://) with a column of image bytes and a column of labels; writes nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from numpy.typing import NDArray

from cca_core.config import ConfigError, SourceConfig
from cca_core.sources.base import FoundRows, RawImage, Source
from cca_core.sources.files import IMAGE_EXTENSIONS, FoundFile, find_files, no_file, open_folder
from cca_core.sources.listing import check_columns, integers_or_strings

#: Images decoded at once from a row group that is too large to keep.
BATCH_ROWS = 256
#: Row groups up to this size are kept whole, for the images of the next part.
KEPT_BYTES = 1 << 28
#: Rows that one reader reads at a time, about; each such part reads all row groups that its rows lie in.
PART_ROWS = 64
#: A source is refused whose images would take reading this many bytes, and this many times its files.
MAX_READ_BYTES, MAX_READ_TIMES = 100 << 30, 20
#: ``source.id_column``: name images by their place, whatever path the files give them.
FILE_ROW = "file:row"

_EXTENSION = rf"(?i)\.({'|'.join(extension[1:] for extension in IMAGE_EXTENSIONS)})$"


class ParquetSource(Source):
    """One file, or a folder of files. A listing reads the labels and ids, never the images."""

    #: Rows and bytes of each row group, by file.
    _groups: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    #: (file, row group) and the image bytes of the row group that was read last.
    _kept: tuple[tuple[str, int], pa.ChunkedArray] | None = None

    def __init__(self, config: SourceConfig) -> None:
        self._by_row = config.id_column == FILE_ROW
        super().__init__(replace(config, id_column="") if self._by_row else config)

    def list(self) -> tuple[pa.Table, tuple[str, ...]]:
        listing, names = super().list()
        self._check_order(listing)
        return listing, names

    def find(self) -> FoundRows:
        uri = self.config.uri
        files = find_files(self.config, (".parquet",))
        if not files:
            raise no_file(self.config, ".parquet file", "correct source.uri, or source.kind")
        fs, _ = open_folder(uri)
        parts, embedded_names = [], set()
        self._groups = {}
        for file in files:
            with _open(fs, file.path) as parquet:
                groups = [parquet.metadata.row_group(group) for group in range(parquet.num_row_groups)]
                rows, sizes = ([getattr(group, name) for group in groups] for name in ("num_rows", "total_byte_size"))
                self._groups[file.relative] = np.array(rows, np.int64), np.array(sizes, np.int64)
                parts.append(self._list_file(parquet, file))
                embedded_names.add(_embedded_names(parquet, self.config.label_column))
        if len(embedded_names) > 1:
            raise ConfigError(
                f"the files in {uri} carry different class names: split them into data sets, or write them again with "
                "one list of names"
            )
        if len({part.schema.field("label").type for part in parts}) > 1:
            raise ConfigError(
                f"{self.config.label_column} is an integer in some files of {uri} and a string in others: write them "
                "again with one type"
            )
        rows = pa.concat_tables(parts)
        ids, errors = self._image_ids(rows)
        columns = {"image_id": ids, "error": errors, **{k: rows[k] for k in ("uri", "location", "label", "stamp")}}
        return FoundRows(pa.table(columns), f"{self.config.label_column} of {uri}", embedded_names.pop())

    def read_rows(self, listing: pa.Table) -> Iterator[RawImage]:
        rows = listing.to_pylist()
        wanted = defaultdict(set)
        for row in rows:
            relative, _, number = row["location"].rpartition(":")
            wanted[relative].add(int(number))
        fs, folder = open_folder(self.config.uri)
        images: dict[str, bytes | None] = {}
        for relative, numbers in wanted.items():
            with _open(fs, f"{folder}/{relative}") as parquet:
                column = self._image_column(parquet.schema_arrow, relative)
                for number, data in self._read_file(parquet, relative, column, np.array(sorted(numbers))):
                    images[f"{relative}:{number}"] = data
        for row in rows:
            data = images.pop(row["location"], None)
            error = "" if data else "the row holds no image bytes"
            yield RawImage(row["image_id"], row["uri"], data or b"", row["label"], error)

    def _read_file(
        self, parquet: pq.ParquetFile, relative: str, column: str, numbers: np.ndarray
    ) -> Iterator[tuple[int, bytes | None]]:
        """The bytes of the rows with these sorted numbers, from the row groups that hold them and no others.

        A row group can only be read from its start: the last one is kept, where it is not too large, since the next
        rows asked for are likely to follow.
        """
        start = 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group)
            stop = start + rows.num_rows
            inside = numbers[(start <= numbers) & (numbers < stop)]
            if len(inside) and rows.total_byte_size > KEPT_BYTES:
                yield from _read_group(parquet, group, column, inside, start)
            elif len(inside):
                if self._kept is None or self._kept[0] != (relative, group):
                    values = _bytes_of(parquet.read_row_group(group, columns=[column]).column(0))
                    self._kept = (relative, group), values
                values = self._kept[1]
                yield from ((number, values[number - start].as_py()) for number in inside.tolist())
            start = stop

    def _list_file(self, parquet: pq.ParquetFile, file: FoundFile) -> pa.Table:
        """label, id, path (both may be null), location, uri and stamp of every row."""
        config, schema = self.config, parquet.schema_arrow
        check_columns(config, schema.names, file.relative, "image_column", "label_column", "id_column")
        bytes_column = self._image_column(schema, file.relative)
        image_type = schema.field(config.image_column).type
        in_struct = bytes_column != config.image_column and not self._by_row
        has_path = in_struct and image_type.get_field_index("path") >= 0
        path_column = f"{config.image_column}.path" if has_path else ""
        wanted = (config.label_column, config.id_column, path_column)
        table = parquet.read(columns=[name for name in dict.fromkeys(wanted) if name])

        rows = range(table.num_rows)
        ids = paths = pa.nulls(len(rows), pa.string())
        if config.id_column:
            ids = integers_or_strings(table[config.id_column], config.id_column, file.relative)
        if has_path:
            paths = pc.struct_field(table[config.image_column], "path")
        return pa.table(
            {
                "label": integers_or_strings(table[config.label_column], config.label_column, file.relative),
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
        name = self.config.image_column
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

    def _check_order(self, listing: pa.Table) -> None:
        """Refuse ids in an order that has nothing to do with that of the rows, where reading would take too long.

        Shards are ranges of sorted ids, read in parts, and a part reads every row group that one of its rows is in.
        """
        bytes_of_all = sum(int(sizes.sum()) for _, sizes in self._groups.values())
        offsets = np.cumsum([0, *(len(sizes) for _, sizes in self._groups.values())])
        first = dict(zip(self._groups, offsets.tolist(), strict=False))
        stops = {relative: np.cumsum(rows) for relative, (rows, _) in self._groups.items()}
        split = (location.rpartition(":") for location in listing["location"].to_pylist())
        groups = [first[file] + int(np.searchsorted(stops[file], int(row), "right")) for file, _, row in split]
        sizes = np.concatenate([sizes for _, sizes in self._groups.values()])
        kept, reading = -1, 0
        for start in range(0, len(groups), PART_ROWS):
            needed = sorted(set(groups[start : start + PART_ROWS]))
            reading += int(sizes[[group for group in needed if group != kept]].sum())
            kept = needed[-1] if sizes[needed[-1]] <= KEPT_BYTES else -1
        if reading > max(MAX_READ_BYTES, MAX_READ_TIMES * bytes_of_all):
            raise ConfigError(
                f"the images of {self.config.uri} would take reading {reading >> 30} GiB, {reading // bytes_of_all} "
                f"times its files, since the rows are not in the order of their ids or a row group is larger than "
                f"{KEPT_BYTES >> 20} MiB: set source.id_column={FILE_ROW} to name images by file and row, or write the "
                "files again, sorted by id, in smaller row groups"
            )

    def _image_ids(self, rows: pa.Table) -> tuple[pa.ChunkedArray | pa.Array, pa.Array]:
        """The id of each row, and what is wrong with it."""
        fine = pa.repeat("", rows.num_rows)
        # Padded to a fixed width, so that the order of ids is the order of rows.
        split = (location.rpartition(":") for location in rows["location"].to_pylist())
        by_row = pa.array([f"{relative}:{int(row):09d}" for relative, _, row in split], pa.string())
        if self.config.id_column:
            missing = f"no id: {self.config.id_column} is empty"
            ids = rows["id"].combine_chunks()
            return pc.coalesce(ids, by_row), pc.if_else(ids.is_null(), missing, fine)
        if _is_unique(rows["path"]):
            short = pc.replace_substring_regex(rows["path"], _EXTENSION, "")
            return short if _is_unique(short) else rows["path"], fine
        return by_row, fine


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


def _read_group(
    parquet: pq.ParquetFile, group: int, column: str, numbers: np.ndarray, start: int
) -> Iterator[tuple[int, bytes | None]]:
    """The bytes of the rows with these sorted numbers from one row group, which begins at row ``start``."""
    for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column]):
        values = _bytes_of(batch.column(0))
        inside = (start <= numbers) & (numbers < start + len(values))
        for number in numbers[inside].tolist():
            yield number, values[number - start].as_py()
        start += len(values)


def _bytes_of(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    return pc.struct_field(values, "bytes") if pa.types.is_struct(values.type) else values


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_unique(values: pa.ChunkedArray) -> bool:
    return values.null_count == 0 and len(pc.unique(values)) == len(values)
