"""Reads tokens/, conditions/ and reference/ directories as memory-mapped columns; a row is found by arithmetic."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cca_core import pairs
from cca_core.config import ConfigError
from cca_core.manifest import Manifest
from cca_core.store import StageDirectory


def valid_manifest(directory: StageDirectory) -> Manifest:
    """The manifest of a finished directory; ConfigError where the stage has not finished."""
    manifest = directory.manifest()
    if manifest is None:
        raise ConfigError(f"{directory.uri} is not a finished {directory.stage} directory: run the stage first")
    return manifest


def shard_tables(directory: StageDirectory) -> list[pa.Table]:
    """The memory-mapped shards of a finished directory, in the order of their rows."""
    names = sorted(name for name in valid_manifest(directory).files if name.startswith("rows-"))
    return [directory.read_table(name) for name in names]


def class_names(tokens: StageDirectory) -> tuple[str, ...]:
    """Names of the conditions by index, of the token data set with the same digest."""
    table = tokens.sibling("conditions").read_table("conditions.arrow")
    return tuple(table.column("name").to_pylist())


def classes_with_images(tokens: StageDirectory) -> list[int]:
    """Indices of the classes that have images: the others cannot be compared with anything."""
    return [index for index, count in enumerate(valid_manifest(tokens).facts["images_per_class"]) if count]


#: Files of a source/ directory: the listing, and the class names by label.
LISTING_NAME, CLASSES_NAME = "listing.arrow", "classes.arrow"


def read_source(directory: StageDirectory) -> tuple[pa.Table, tuple[str, ...]]:
    """The listing (schema ``LISTING``) and the class names of a source as they were when the run was planned."""
    valid_manifest(directory)
    names = directory.read_table(CLASSES_NAME).column("name").to_pylist()
    return directory.read_table(LISTING_NAME), tuple(names)


class TokenDataset:
    """A token data set: N images with V views each. Columns per image are in memory, the tokens stay on disk.

    Attributes:
        hashes_N: uint64, of the image ids; what every draw is a function of.
        labels_N: int64.
        held_out_N: bool, images that training never sees.
        fraction: the share of the other images that training sees. Their number N stays, and so does every draw: the
            reference of the whole data set is that of a share of it.
    """

    def __init__(self, directory: StageDirectory, *, fraction: float = 1.0) -> None:
        self.fraction = fraction
        self.manifest = valid_manifest(directory)
        self.num_views: int = self.manifest.facts["num_views"]
        self.num_tokens: int = self.manifest.facts["num_tokens"]
        self.num_classes: int = self.manifest.facts["num_classes"]
        ids: list[str] = []
        labels, held_out, starts = [], [], [0]
        self._chunks: list[NDArray[np.integer]] = []
        for table in shard_tables(directory):
            images = table.take(np.arange(0, table.num_rows, self.num_views)) if self.num_views > 1 else table
            ids += images.column("image_id").to_pylist()
            labels.append(images.column("label").to_numpy())
            held_out.append(images.column("held_out").to_numpy())
            for chunk in table.column("tokens").chunks:
                self._chunks.append(chunk.flatten().to_numpy().reshape(-1, self.num_tokens))
                starts.append(starts[-1] + len(chunk))
        self._starts = np.asarray(starts)
        self.hashes_N = pairs.id_hashes(ids)
        self.labels_N = np.concatenate(labels).astype(np.int64)
        self.held_out_N = np.concatenate(held_out)

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def train_images(self) -> NDArray[np.int64]:
        return np.flatnonzero(~self.held_out_N & pairs.within_fraction(self.hashes_N, self.fraction))

    def tokens(self, images: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens int64 [n, L] of these (image, view) pairs."""
        rows = images * self.num_views + views
        out = np.empty((len(rows), self.num_tokens), np.int64)
        chunk_of = np.searchsorted(self._starts, rows, side="right") - 1
        for chunk in np.unique(chunk_of):
            mine = chunk_of == chunk
            out[mine] = self._chunks[chunk][rows[mine] - self._starts[chunk]]
        return out


class ReferenceColumns:
    """The cached reference of one data set: float32 [N] columns per epoch, NaN where a column was not needed."""

    def __init__(self, directory: StageDirectory) -> None:
        self.manifest = valid_manifest(directory)
        self.null_share_max: float = self.manifest.facts["null_share_max"]
        self._epochs: dict[int, dict[str, NDArray[np.float32]]] = {}
        for epoch in range(self.manifest.facts["epochs"]):
            names = sorted(name for name in self.manifest.files if name.startswith(f"e{epoch}/"))
            table = pa.concat_tables([directory.read_table(name) for name in names])
            self._epochs[epoch] = {
                name: table.column(name).to_numpy() for name in ("ref_logp_pos", "ref_logp_neg", "ref_logp_null")
            }

    def lookup(
        self, epoch: int, images: NDArray[np.int64], null: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Reference log-probs of the positive and the negative condition; both are the null one where ``null``."""
        if epoch not in self._epochs:
            raise ConfigError(
                f"the reference holds {len(self._epochs)} epochs, not epoch {epoch}: run the reference stage again"
            )
        columns = {name: column[images] for name, column in self._epochs[epoch].items()}
        pos = np.where(null, columns["ref_logp_null"], columns["ref_logp_pos"])
        neg = np.where(null, columns["ref_logp_null"], columns["ref_logp_neg"])
        return pos, neg
