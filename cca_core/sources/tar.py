"""Reads WebDataset shards (.tar, local or s3://): an image and its label under one key; writes an index of remote
shards to the local cache."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, Any

import pyarrow as pa
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from cca_core.config import ConfigError
from cca_core.sources.base import FoundRows, RawImage, Source
from cca_core.sources.files import IMAGE_EXTENSIONS, FoundFile, find_files, no_file, open_folder, read_ranges
from cca_core.store import local_cache, table_bytes

#: Shards indexed at once.
INDEX_SHARDS = 8
#: A remote shard is read through once, in requests of this size: an image lies between every two headers.
BLOCK_BYTES = 1 << 23
#: Key and extension of a member, as WebDataset splits them: the extension starts at the first dot of the file name.
_MEMBER = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]*)$")
#: One row per sample; ``label`` is text, as both ``.cls`` and ``.json`` may hold either.
_INDEX = pa.schema(
    [(name, pa.string()) for name in ("key", "member", "label", "error")]
    + [(name, pa.int64()) for name in ("offset", "size")]
)


class TarSource(Source):
    """One shard, or a folder of shards. The id of an image is its key."""

    def find(self) -> FoundRows:
        files = find_files(self.config, (".tar",))
        if not files:
            raise no_file(self.config, ".tar file", "correct source.uri (shards are not compressed), or source.kind")
        fs, _ = open_folder(self.config.uri)
        with ThreadPoolExecutor(INDEX_SHARDS) as pool:
            parts = list(pool.map(partial(_index, fs, label_key=self.config.label_column), files))
        tables = []
        for file, part in zip(files, parts, strict=True):
            spans = zip(part["offset"].to_pylist(), part["size"].to_pylist(), strict=True)
            tables.append(
                pa.table(
                    {
                        "image_id": part["key"],
                        "uri": pa.array([f"{file.uri}:{name}" for name in part["member"].to_pylist()], pa.string()),
                        "location": pa.array([f"{file.relative}:{at}:{size}" for at, size in spans], pa.string()),
                        "label": part["label"],
                        "stamp": pa.repeat(file.stamp, part.num_rows),
                        "error": part["error"],
                    }
                )
            )
        rows = pa.concat_tables(tables)
        column = rows.column_names.index("label")
        return FoundRows(rows.set_column(column, "label", _integers(rows["label"])), f"the labels in {self.config.uri}")

    def read_rows(self, listing: pa.Table) -> Iterator[RawImage]:
        fs, folder = open_folder(self.config.uri)

        def part_of(location: str) -> tuple[str, int, int]:
            relative, offset, size = location.rsplit(":", 2)
            return f"{folder}/{relative}", int(offset), int(offset) + int(size)

        yield from read_ranges(fs, listing, part_of)


def _integers(labels: pa.ChunkedArray) -> pa.ChunkedArray:
    """Labels as int64 if all of them are integers."""
    try:
        return labels.cast(pa.int64())
    except pa.ArrowInvalid:
        return labels


def _index(fs: AbstractFileSystem, file: FoundFile, *, label_key: str) -> pa.Table:
    """The samples of one shard. That of a remote shard is kept, since it costs reading the shard."""
    if isinstance(fs, LocalFileSystem):
        with fs.open(file.path, "rb") as opened:
            return _read_index(opened, file.uri, label_key)
    name = hashlib.sha256(f"{file.uri}\0{file.stamp}\0{label_key}".encode()).hexdigest()
    kept = local_cache() / "tar" / f"{name}.arrow"
    if kept.exists():
        with pa.memory_map(str(kept)) as source:
            return pa.ipc.open_file(source).read_all()
    with fs.open(file.path, "rb", block_size=BLOCK_BYTES, cache_type="readahead") as opened:
        table = _read_index(opened, file.uri, label_key)
    kept.parent.mkdir(parents=True, exist_ok=True)
    aside = kept.with_name(f".{name}-{uuid.uuid4().hex}")
    aside.write_bytes(table_bytes(table))
    os.replace(aside, kept)
    return table


def _read_index(opened: IO[bytes], uri: str, label_key: str) -> pa.Table:
    samples: list[dict[str, Any]] = []
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            for member in tar:
                found = _MEMBER.match(member.name) if member.isreg() else None
                if found:
                    _add(samples, tar, member, found[1].removeprefix("./"), found[2].lower(), label_key)
            end = tar.offset
    except tarfile.TarError as error:
        raise ConfigError(f"{uri} is not a whole tar file ({error}): replace it") from error
    # tarfile takes whatever it cannot read, and every block of zeros, for the end.
    opened.seek(end)
    zeros = [not block.strip(b"\0") for block in iter(partial(opened.read, BLOCK_BYTES), b"")]
    if not zeros or not all(zeros):
        raise ConfigError(f"{uri} is cut short, damaged or several tar files in one, from byte {end} on: replace it")
    no_label = (None, f"no label: neither a .cls nor a .json with {label_key!r} under this key")
    for sample in samples:
        label, error = next((found for found in (sample["cls"], sample["json"]) if any(found)), no_label)
        if not sample["member"]:
            sample |= {"member": sample["key"], "error": "no image under this key"}
        sample |= {"label": label, "error": sample["error"] or error}
    try:
        return pa.Table.from_pylist(samples, schema=_INDEX)
    except UnicodeEncodeError as error:
        raise ConfigError(f"{uri} has a member name that is not UTF-8, {error.object!r}: write it again") from error


def _add(
    samples: list[dict[str, Any]],
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    key: str,
    extension: str,
    label_key: str,
) -> None:
    """Add a member to its sample: the last one, since the members of a sample lie side by side."""
    if not samples or samples[-1]["key"] != key:
        labels = {"cls": (None, ""), "json": (None, "")}
        samples.append({"key": key, "member": "", "error": "", "offset": 0, "size": 0, **labels})
    sample = samples[-1]
    if f".{extension}" in IMAGE_EXTENSIONS:
        if sample["member"]:
            sample["error"] = f"several images under this key: {sample['member']} and {member.name}"
        elif not member.size:  # and no range of bytes to ask an object store for
            sample["error"] = f"{member.name} is empty"
        sample |= {"member": member.name, "offset": member.offset_data, "size": member.size}
    elif extension in ("cls", "json"):
        content = tar.extractfile(member)
        assert content is not None  # a regular file
        sample[extension] = _label(content.read(), extension, label_key)


def _label(data: bytes, extension: str, label_key: str) -> tuple[str | None, str]:
    """The label as text, None where there is none; and what is wrong."""
    try:
        text = data.decode().strip()
        if extension == "cls":
            return text or None, ""
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"wrong label: the .{extension} cannot be read ({error})"
    label = content.get(label_key) if isinstance(content, dict) else None
    if label is None:
        return None, ""
    if isinstance(label, bool) or not isinstance(label, int | str):
        return None, f"wrong label: {label!r} is neither an integer nor a name"
    return str(label), ""
