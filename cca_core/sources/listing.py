"""Reads the class map (JSON); makes of the rows a source found its listing: classes numbered, bad rows marked."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cca_core import pairs
from cca_core.config import ConfigError, SourceConfig

#: The listing, sorted by image_id. ``location`` is the source's own way back to the bytes; ``stamp`` is size, etag or
#: mtime, so that data changed in place is seen; ``error`` is what is already known to be wrong with the row, and
#: ``label`` -1 where that is the label.
LISTING = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("location", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("stamp", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)

#: A label beyond this is taken for something else (a time stamp, an identifier).
MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class FoundRows:
    """What a source found, in its own order.

    Attributes:
        rows: columns image_id, uri, location, stamp and error (string, none null) and label (int64 or string, null
            where a row has none).
        class_names: by label, where the data itself carries them.
        labels_are: what holds the labels, in words, for errors.
    """

    rows: pa.Table
    labels_are: str
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClassMap:
    """The classes in order of their index: what the data calls each of them (a folder, a label), and its name."""

    keys: tuple[str, ...]
    names: tuple[str, ...]

    def index(self) -> dict[str, int]:
        """Both what the data calls a class and its name lead to it."""
        return {name: i for names in (self.names, self.keys) for i, name in enumerate(names)}


def make_listing(config: SourceConfig, found: FoundRows) -> tuple[pa.Table, tuple[str, ...]]:
    """The listing and the class names by label.

    Rows of classes that are not asked for are left out. A label that is no class and an id that an earlier row has are
    marked in ``error``. Raises ConfigError where fewer than two classes are left.
    """
    rows, given = found.rows, read_class_map(config)
    if given is None and found.class_names:
        given = ClassMap(found.class_names, found.class_names)
    labels = rows.column("label").combine_chunks()
    indices, names, errors = _number(config, found, labels, given)
    wanted = _wanted(config, labels, indices, names, given)
    rows = rows.append_column("order", pa.array(np.arange(rows.num_rows)))
    rows = rows.set_column(rows.column_names.index("label"), "label", pa.array(indices.astype(np.int32)))
    error = pc.if_else(pc.equal(rows.column("error"), ""), errors, rows.column("error"))
    rows = rows.set_column(rows.column_names.index("error"), "error", error).filter(pa.array(wanted))
    listing = _mark_duplicates(rows.sort_by([("image_id", "ascending"), ("order", "ascending")]))
    _check_classes(config, found, listing, names)
    return _limit(listing, config), names


def read_class_map(config: SourceConfig) -> ClassMap | None:
    """The classes that the recipe names, inline or in a file; None where it leaves that to the data."""
    if config.class_names:
        return ClassMap(config.class_names, config.class_names)
    if not config.class_map:
        return None
    try:
        with fsspec.open(config.class_map, "rb") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise ConfigError(f"source.class_map={config.class_map} does not exist: correct it, or create it") from None
    except ValueError as error:
        raise ConfigError(f"source.class_map={config.class_map} is not JSON: {error}") from None
    found = _parse_class_map(content)
    if found is None or len(set(found.keys)) < len(found.keys):
        raise ConfigError(
            f"source.class_map={config.class_map} does not list classes: write a list of names, an object {{label in "
            'the data: name}, or {"0": ["label", "name"], ...}, each label once'
        )
    return found


def _parse_class_map(content: Any) -> ClassMap | None:
    if isinstance(content, dict):
        numbered = sorted(content, key=int) if all(key.isdecimal() for key in content) else []
        if [int(key) for key in numbered] == list(range(len(content))):
            content = [content[key] for key in numbered]
        else:
            content = [[key, name] for key, name in content.items()]
    if not isinstance(content, list) or not content:
        return None
    pairs_ = [entry if isinstance(entry, list) else [entry, entry] for entry in content]
    if not all(len(pair) == 2 and all(isinstance(part, str) and part for part in pair) for pair in pairs_):
        return None
    return ClassMap(*(tuple(column) for column in zip(*pairs_, strict=True)))


def check_columns(config: SourceConfig, names: Sequence[str], where: str, *settings: str) -> None:
    """Refuse a table that lacks a column that the recipe names; only ``id_column`` may be left empty."""
    for setting in settings:
        name = getattr(config, setting)
        if name not in names and (name or setting != "id_column"):
            raise ConfigError(
                f"{where} has no column {name!r}: set source.{setting} to one of its columns, which are "
                f"{', '.join(names)}"
            )


def integers_or_strings(column: pa.ChunkedArray, name: str, where: str) -> pa.ChunkedArray:
    """Labels or ids as int64 or string, an empty string as null; ConfigError for any other type."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type):
        return column.cast(pa.int64())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.string())
        return pc.if_else(pc.equal(column, ""), None, column)
    raise ConfigError(f"column {name!r} of {where} is {column.type}: labels and ids are integers or strings")


def _number(
    config: SourceConfig, found: FoundRows, labels: pa.Array, given: ClassMap | None
) -> tuple[np.ndarray, tuple[str, ...], pa.Array]:
    """The class index of each row (-1: none), the class names, and what is wrong with the label."""
    if pa.types.is_string(labels.type):
        present = pc.unique(labels).drop_null().to_pylist()
        if given is None:
            taken = sorted(set(present) & set(config.classes) if config.classes else present)
            given = ClassMap(tuple(taken), tuple(taken))
        index = given.index()
        numbers = [index.get(label, -1) for label in present]
        places = pc.index_in(labels, pa.array(present, pa.string())).fill_null(-1).to_numpy(zero_copy_only=False)
        indices = np.where(places >= 0, np.asarray([*numbers, -1])[places], -1)
    else:
        indices = labels.fill_null(-1).to_numpy(zero_copy_only=False)
        top = int(indices.max(initial=-1))
        if given is None:
            if top >= MAX_CLASSES:
                raise ConfigError(
                    f"{found.labels_are} reaches {top}, too many classes: set source.label_column to one of class "
                    "indices or class names"
                )
            names = tuple(str(number) for number in range(top + 1))
            given = ClassMap(names, names)
        if given.keys != given.names and all(key.isdecimal() for key in given.keys):  # the map says what they mean
            keys = pa.array([int(key) for key in given.keys], pa.int64())
            indices = pc.index_in(labels, keys).fill_null(-1).to_numpy(zero_copy_only=False)
        indices = np.where((indices >= 0) & (indices < len(given.names)), indices, -1)
    wrong = f" is none of the {len(given.names)} classes"
    text = pc.binary_join_element_wise("wrong label: ", labels.cast(pa.string()), wrong, "")
    errors = pc.if_else(pa.array(indices >= 0), "", pc.fill_null(text, "no label"))
    return indices, given.names, errors


def _wanted(
    config: SourceConfig, labels: pa.Array, indices: np.ndarray, names: tuple[str, ...], given: ClassMap | None
) -> np.ndarray:
    """The rows of the classes asked for, and the rows without a usable label."""
    if not config.classes:
        return np.ones(len(indices), bool)
    known = given or ClassMap(names, names)
    index = known.index()
    unknown = [name for name in config.classes if name not in index]
    if unknown:
        raise ConfigError(f"source.classes has {unknown[0]!r}, which is no class of {config.uri}: correct it")
    bad = indices < 0
    if given is None and pa.types.is_string(labels.type):  # a name that was not asked for has no number
        bad = labels.is_null().to_numpy(zero_copy_only=False)
    # A name may stand for two classes: ImageNet has two called crane.
    both = enumerate(zip(known.keys, known.names, strict=True))
    return bad | np.isin(indices, [i for i, called in both if not set(called).isdisjoint(config.classes)])


def _mark_duplicates(rows: pa.Table) -> pa.Table:
    """Of rows with one id the first stays, the others are marked; the columns of a listing."""
    ids = rows.column("image_id").combine_chunks()
    again = np.zeros(len(ids), bool)
    if len(ids) > 1:
        again[1:] = pc.equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
    error = rows.column("error").combine_chunks()
    if again.any():
        first = np.maximum.accumulate(np.where(again, 0, np.arange(len(ids))))
        other = rows.column("uri").combine_chunks().take(pa.array(first))
        text = pc.binary_join_element_wise("duplicate id: ", other, " has it already; give it another", "")
        error = pc.if_else(pa.array(again), text, error)
    columns = {name: rows.column(name) for name in LISTING.names if name != "error"}
    return pa.table({**columns, "error": error}, schema=LISTING).combine_chunks()


def _check_classes(config: SourceConfig, found: FoundRows, listing: pa.Table, names: tuple[str, ...]) -> None:
    present = pc.unique(listing.filter(pc.equal(listing.column("error"), "")).column("label"))
    if len(present) < 2:
        is_ = f" ({names[present[0].as_py()]})" if len(present) else ""
        raise ConfigError(
            f"{found.labels_are}: {len(present)} class(es) with images{is_}, and CCA needs at least two; add images of "
            "another, or correct source.label_column, source.classes or the class names"
        )


def _limit(listing: pa.Table, config: SourceConfig) -> pa.Table:
    """The images whose ids have the smallest hashes: the same ones on any machine, classes mixed as before.

    A larger limit or fraction adds images and removes none.
    """
    count = min(config.limit or listing.num_rows, listing.num_rows)
    count = math.ceil(count * config.fraction)
    if count == listing.num_rows:
        return listing
    hashes = pairs.id_hashes(listing.column("image_id").to_pylist())
    return listing.take(pa.array(np.sort(np.argsort(hashes, kind="stable")[:count])))
