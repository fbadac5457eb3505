"""Reads per-image values in memory, writes nothing: 95 % intervals by a bootstrap over blocks of images.

What is resampled: each number is the mean of one value per image, exactly or to first order, and the images are drawn
again with replacement in blocks, which a hash of their ids makes up; the rest is held fixed. Samples are drawn again
for the Frechet and kernel distances (their influence on it), the inception score, precision, density (the real
manifold fixed) and class consistency; real images for recall and coverage (the samples fixed). So an interval says how
far a number moves with the draw of that one side, at this n: not the bias that a Frechet distance has at a small n,
and not whether other real images would rank the samplers alike.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from cca_core import pairs

#: Blocks of images: enough for a normal quantile, few enough that a replicate costs nothing at any n.
NUM_BLOCKS = 256
NUM_REPLICATES = 1000
#: Of the replicates, what lies between is the interval.
QUANTILES = (0.025, 0.975)


def deviations(values_N: np.ndarray, ids_N: np.ndarray, stream: int) -> np.ndarray:
    """How far the mean moves in each replicate, float64 [NUM_REPLICATES]; a pure function of the arguments.

    Args:
        values_N: one value per image.
        ids_N: uint64 [N]; equal ids share a block, whatever the order of the rows.
        stream: replicates of one stream draw the same blocks: give independent samples streams of their own, so that
            deviations of a mean over them are the means of their deviations.
    """
    draws_N = pairs.uniform(ids_N, seed=0, epoch=0, purpose=pairs.Purpose.BLOCK)
    present_G, block_N = np.unique((draws_N * NUM_BLOCKS).astype(np.int64), return_inverse=True)
    values_N = values_N - values_N.mean()
    sums_G, sizes_G = np.bincount(block_N, weights=values_N), np.bincount(block_N)
    drawn_RG = _drawn(len(present_G), stream)
    return sums_G[drawn_RG].sum(axis=1) / sizes_G[drawn_RG].sum(axis=1)


def interval(estimate: float, deviations_R: np.ndarray) -> tuple[float, float]:
    """The 95 % interval around an estimate."""
    low, high = np.quantile(deviations_R, QUANTILES)
    return float(estimate + low), float(estimate + high)


@lru_cache(maxsize=4)  # all numbers of one set of samples share two or three
def _drawn(num_blocks: int, stream: int) -> np.ndarray:
    """Which blocks each replicate draws, int64 [NUM_REPLICATES, num_blocks]."""
    replicates, groups = np.arange(NUM_REPLICATES)[:, None], np.arange(-(-num_blocks // 4))[None]
    words = pairs.philox((replicates, 0, groups, int(pairs.Purpose.RESAMPLE)), stream)
    drawn = np.stack(words, axis=-1).reshape(NUM_REPLICATES, -1)[:, :num_blocks]
    return (drawn.astype(np.uint64) * np.uint64(num_blocks) >> np.uint64(32)).astype(np.int64)
