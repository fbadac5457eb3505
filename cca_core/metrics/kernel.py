"""Reads features in memory, writes nothing: the kernel distance of whole sets, and over subsets (KID)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cca_core import pairs
from cca_core.metrics.fidelity import Array, as_float64

#: Elements of the largest block of pairwise values held at once: 128 MiB of float64.
_BLOCK_ELEMENTS = 1 << 24
#: The published KID: 100 subsets of 1000.
NUM_SUBSETS, SUBSET_SIZE = 100, 1000
#: A small set is cut finer, so that subsets differ: this share of it at most.
SUBSET_SHARE = 0.1


def kernel_distance(real_ND: Array, sample_ND: Array) -> float:
    """Unbiased MMD^2 of the whole sets, kernel (x.y / D + 1)^3 (KID: Binkowski et al. 2018).

    No subsets are drawn, so there is no randomness; it may fall slightly below 0. The work grows with the product of
    the sizes: for tens of thousands of images take ``subset_kernel_distance``, which estimates the same.
    """
    real_ND, sample_ND = as_float64(real_ND), as_float64(sample_ND)
    if min(len(real_ND), len(sample_ND)) < 2:
        raise ValueError("a kernel distance needs at least two images on either side")

    def within(x_ND: np.ndarray) -> float:
        itself = _cubic_kernel(np.square(x_ND).sum(axis=1), x_ND.shape[1]).sum()
        return (_kernel_sum(x_ND, x_ND) - itself) / (len(x_ND) * (len(x_ND) - 1))

    cross = _kernel_sum(real_ND, sample_ND) / (len(real_ND) * len(sample_ND))
    return float(within(real_ND) + within(sample_ND) - 2 * cross)


@dataclass(frozen=True, eq=False)
class SubsetDistances:
    """The kernel distance of each pair of subsets."""

    #: float64 [S].
    distances: np.ndarray
    #: Rows of the samples that are in some subset, and what each adds to the mean to first order, up to a constant.
    rows: np.ndarray
    influence: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.distances.mean())

    @property
    def sd(self) -> float:
        """Population sd over the subsets, as published: the spread of one subset's value, not of the mean."""
        return float(self.distances.std())


def subset_kernel_distance(
    real_ND: Array, sample_ND: Array, real_ids_N: np.ndarray, sample_ids_N: np.ndarray, *, seed: int = 0
) -> SubsetDistances:
    """KID: the kernel distance between subsets of real images and of samples.

    Args:
        real_ids_N, sample_ids_N: uint64 [N], unique. Subset s holds the rows whose hashes of (seed, s, id) are the
            smallest, so the order of the rows does not matter.
    """
    smaller = min(len(real_ND), len(sample_ND))
    size = min(SUBSET_SIZE, max(2, int(smaller * SUBSET_SHARE)))
    subsets = [
        (subset_rows(real_ids_N, size, subset, seed), subset_rows(sample_ids_N, size, subset, seed))
        for subset in range(NUM_SUBSETS)
    ]
    return distances_of_subsets(real_ND, sample_ND, subsets)


def distances_of_subsets(
    real_ND: Array, sample_ND: Array, subsets: list[tuple[np.ndarray, np.ndarray]]
) -> SubsetDistances:
    """The kernel distance of each pair (rows of real images, rows of samples)."""
    sums_N, counts_N = np.zeros(len(sample_ND)), np.zeros(len(sample_ND), np.int64)
    distances = []
    for real_rows, sample_rows in subsets:
        real, sample = as_float64(real_ND[real_rows]), as_float64(sample_ND[sample_rows])
        across_M = _cubic_kernel(sample @ real.T, real.shape[1]).mean(axis=1)
        within_M = _mean_without_itself(sample)
        distances.append(_mean_without_itself(real).mean() + within_M.mean() - 2 * across_M.mean())
        sums_N[sample_rows] += within_M - across_M
        counts_N[sample_rows] += 1
    rows = counts_N.nonzero()[0]
    return SubsetDistances(np.array(distances), rows, 2 * sums_N[rows] / counts_N[rows])


def subset_rows(ids_N: np.ndarray, size: int, subset: int, seed: int) -> np.ndarray:
    """The rows of a subset, in the order of their hashes."""
    draws_N = pairs.uniform(ids_N, seed=seed, epoch=subset, purpose=pairs.Purpose.SUBSET)
    rows = np.argpartition(draws_N, size - 1)[:size]
    return rows[np.argsort(draws_N[rows])]


def _mean_without_itself(x_ND: np.ndarray) -> np.ndarray:
    """Mean kernel of each row with the others, [N]."""
    kernel_NN = _cubic_kernel(x_ND @ x_ND.T, x_ND.shape[1])
    return (kernel_NN.sum(axis=1) - kernel_NN.diagonal()) / (len(x_ND) - 1)


def _cubic_kernel(dot: np.ndarray, dim: int) -> np.ndarray:
    one = dot / dim + 1
    return one * one * one  # much faster than a power


def _row_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // num_columns)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _kernel_sum(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    return sum(
        float(_cubic_kernel(a_ND[rows] @ b_ND.T, a_ND.shape[1]).sum()) for rows in _row_blocks(len(a_ND), len(b_ND))
    )
