"""Reads the shards of a token data set, writes nothing: the tests that every data set passes before it is valid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cca_core import pairs
from cca_core.config import ConfigError
from cca_core.manifest import FileEntry

#: Standard deviations that the share of negatives equal to positives may lie from its expectation.
MAX_DEVIATIONS = 5.0


def check_tokens(
    shards: dict[str, pa.Table],
    files: dict[str, dict[str, FileEntry]],
    *,
    num_views: int,
    images_per_class: np.ndarray,
    codebook_size: int,
    seed: int,
) -> dict[str, Any]:
    """Test a data set whose shards are all there.

    Args:
        shards: by file name, in the order of their rows; ``files`` are their entries, and those of the siblings.
        images_per_class: as counted for the manifest.

    Returns:
        What was found, for the manifest and its readers: ``data_tests`` in words, and the shares of negatives.

    Raises ConfigError, naming the test, where one fails: the data set was damaged after it was written.
    """
    last, total_rows, by_class = "", 0, np.zeros_like(images_per_class)
    low, high = codebook_size, -1
    hashes, labels = [], []
    for name, table in shards.items():
        start, stop = (int(part) for part in name.removesuffix(".arrow").split("-")[1:])
        rows = table.num_rows + files["quarantine"][name].rows * num_views
        _require(rows == (stop - start) * num_views, "shards against manifest", f"{name} lacks rows")
        _require(
            files["tokens"][name].rows == table.num_rows and files["images"][name].rows * num_views == table.num_rows,
            "shards against manifest",
            f"{name} has {table.num_rows} rows",
        )
        total_rows += table.num_rows
        if not table.num_rows:
            continue
        tokens = table.column("tokens").combine_chunks().flatten().to_numpy()
        low, high = min(low, int(tokens.min())), max(high, int(tokens.max()))
        views = table.column("view").to_numpy().reshape(-1, num_views)
        _require((views == np.arange(num_views)).all(), "views", f"{name} has images without all {num_views} views")
        first = table.take(pa.array(np.arange(0, table.num_rows, num_views)))
        ids = first.column("image_id").combine_chunks()
        rising = pc.all(pc.less(ids[:-1], ids[1:])).as_py() is not False and last < ids[0].as_py()
        _require(rising, "duplicate ids", f"{name} repeats an id, or is out of order")
        last = ids[-1].as_py()
        label = first.column("label").to_numpy()
        _require(((label >= 0) & (label < len(by_class))).all(), "rows per class", f"{name} has an unknown class")
        by_class += np.bincount(label, minlength=len(by_class))
        hashes.append(pairs.id_hashes(ids.to_pylist()))
        labels.append(label)
    _require(low >= 0 and high < codebook_size, "token range", f"tokens from {low} to {high} of {codebook_size} codes")
    _require((by_class == images_per_class).all(), "rows per class", "the classes do not add up")
    share, expected = _share_of_equal_negatives(np.concatenate(hashes), np.concatenate(labels), seed)
    empty = int((by_class == 0).sum())
    return {
        "share_negative_equals_positive": share,
        # A negative is the label of a random row: it equals the true one with this probability.
        "expected_share_negative_equals_positive": expected,
        "data_tests": {
            "token range": f"{low} to {high} of {codebook_size} codes",
            "rows per class": f"{by_class[by_class > 0].min()} to {by_class.max()}"
            + (f", {empty} of {len(by_class)} classes without an image" if empty else ""),
            "duplicate ids": "none",
            "negatives equal to positives": f"{share:.4f} in epoch 0, expected {expected:.4f}",
            "shards against manifest": f"{len(shards)} shards, {total_rows} rows",
        },
    }


def _share_of_equal_negatives(hashes: np.ndarray, labels: np.ndarray, seed: int) -> tuple[float, float]:
    share = float((pairs.negatives(hashes, labels, seed=seed, epoch=0) == labels).mean())
    expected = float(((np.bincount(labels) / len(labels)) ** 2).sum())
    deviation = (expected * (1 - expected) / len(labels)) ** 0.5
    _require(
        abs(share - expected) <= MAX_DEVIATIONS * deviation + 1e-9,
        "negatives equal to positives",
        f"their share is {share:.4f} in epoch 0, far from {expected:.4f}",
    )
    return share, expected


def _require(holds: bool, test: str, found: str) -> None:
    if not holds:
        raise ConfigError(f"data test '{test}' failed: {found}; delete the tokens/ directory and run again")
