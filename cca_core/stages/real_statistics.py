"""Reads a published .npz of real statistics or images, writes them to features/ as tensors and features."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import fsspec
import numpy as np
from safetensors.numpy import load, save

from cca_core.config import ConfigError
from cca_core.metrics.measure import Statistics
from cca_core.npz import NpzReader
from cca_core.store import StageDirectory
from cca_core.workers.sample import features_table

STATISTICS, IMPORTED = "real-statistics.safetensors", "real-imported.arrow"
#: Names in the file -> names of ``Statistics``, and the column of features that they are of.
PARTS = {
    "mean": ("mu", "features"),
    "covariance": ("sigma", "features"),
    "spatial_mean": ("mu_s", "spatial"),
    "spatial_covariance": ("sigma_s", "spatial"),
}
#: Images read at once.
BLOCK_IMAGES = 256


def import_statistics(
    uri: str,
    directory: StageDirectory,
    dims: dict[str, int],
    features_of: Callable[[np.ndarray], dict[str, np.ndarray]],
) -> list[str]:
    """Write what the file holds; return the names of the files written.

    Args:
        dims: widths of the columns that the feature network makes.
        features_of: columns of uint8 images [N, 3, H, W].

    Raises ConfigError for a file without statistics or images, or with those of another network.
    """
    written = []
    with fsspec.open(uri, "rb") as file:
        npz = NpzReader(file, uri)
        statistics = _statistics(npz, dims)
        if statistics:
            directory.write_bytes(STATISTICS, save(statistics))
            written.append(STATISTICS)
        if "arr_0" in npz.keys:
            parts = [features_of(block) for block in _images(npz)]
            columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            # Class ids of the file, if any, need not be ours.
            unknown = np.full(len(columns["features"]), -1)
            directory.write_table(IMPORTED, features_table(unknown, columns))
            written.append(IMPORTED)
    if not written:
        raise ConfigError(
            f"{uri} holds {', '.join(sorted(npz.keys)) or 'nothing'}: evaluate.real_statistics needs mu and sigma, or "
            "images as arr_0"
        )
    return written


def read_statistics(directory: StageDirectory) -> Statistics:
    """The statistics in a features/ directory."""
    return Statistics(**load(directory.read_bytes(STATISTICS)))


def _statistics(npz: NpzReader, dims: dict[str, int]) -> dict[str, np.ndarray]:
    found = {
        name: npz.read(key).astype(np.float64)
        for name, (key, column) in PARTS.items()
        if key in npz.keys and column in dims
    }
    for mean, covariance in (("mean", "covariance"), ("spatial_mean", "spatial_covariance")):
        if (mean in found) != (covariance in found):
            raise ConfigError(
                f"{npz.name} has only one of {PARTS[mean][0]} and {PARTS[covariance][0]}: both are needed"
            )
        if mean not in found:
            continue
        key, column = PARTS[mean]
        dim = dims[column]
        if found[mean].shape != (dim,) or found[covariance].shape != (dim, dim):
            raise ConfigError(
                f"{key} of {npz.name} has shape {found[mean].shape}, the {column} of features.network have {dim} "
                "dimensions: use the statistics of that network"
            )
        if not all(np.isfinite(found[name]).all() for name in (mean, covariance)):
            raise ConfigError(f"{key} of {npz.name} or its covariance is not finite: copy the file again")
    if "spatial_mean" in found and "mean" not in found:
        raise ConfigError(f"{npz.name} has mu_s without mu: give a file with both")
    return found


def _images(npz: NpzReader) -> Iterator[np.ndarray]:
    shape = npz.shape("arr_0")
    for block in npz.blocks("arr_0", BLOCK_IMAGES):
        if block.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise ConfigError(f"arr_0 of {npz.name} is {block.dtype} {shape}, not images uint8 [N, H, W, 3]")
        yield np.ascontiguousarray(block.transpose(0, 3, 1, 2))
