"""Reads features and logits in memory, writes nothing: distances between real images and samples.

All arithmetic is float64 on the CPU: the metrics are differences of large sums. A Frechet distance
may be called FID only where the features are those of the published Inception network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray | torch.Tensor

#: Elements of the largest block of pairwise values held at once: 128 MiB of float64.
_BLOCK_ELEMENTS = 1 << 24


def as_float64(values: Array) -> np.ndarray:
    """Tensor or array as float64; refuses NaN and infinity, which would pass for a bad score."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("a metric was given values that are not finite: the model has diverged")
    return array


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of features; blocks merge, so workers need not share the features.

    Any order and any cut into blocks give one result up to rounding; merge in a fixed order for
    equal bits.
    """

    count: int
    #: float64 [D].
    mean: np.ndarray
    #: Sum of outer products of the deviations from ``mean``, float64 [D, D].
    m2: np.ndarray

    @classmethod
    def of(cls, features_ND: Array) -> Moments:
        """The moments of one block of features."""
        features_ND = as_float64(features_ND)
        mean_D = features_ND.mean(axis=0)
        centred_ND = features_ND - mean_D
        return cls(len(features_ND), mean_D, centred_ND.T @ centred_ND)

    def merge(self, other: Moments) -> Moments:
        """The moments of both blocks together (Chan, Golub and LeVeque 1979, pairwise update)."""
        count = self.count + other.count
        delta_D = other.mean - self.mean
        mean_D = self.mean + delta_D * (other.count / count)
        between_DD = np.outer(delta_D, delta_D) * (self.count * other.count / count)
        return Moments(count, mean_D, self.m2 + other.m2 + between_DD)

    __add__ = merge

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (ddof = 1), float64 [D, D]."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, not {self.count}")
        return self.m2 / (self.count - 1)


def frechet_distance(mu_a: Array, sigma_a: Array, mu_b: Array, sigma_b: Array) -> float:
    """Squared Frechet distance of two Gaussians, the formula of FID (Heusel et al. 2017, eq. 6).

    ``|mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)``: the product has the eigenvalues
    of the usual ``A B`` but is symmetric, so they come out real, and a singular covariance (fewer
    images than features) needs no special case.
    """
    mu_a, sigma_a, mu_b, sigma_b = (as_float64(x) for x in (mu_a, sigma_a, mu_b, sigma_b))
    values_D, vectors_DD = np.linalg.eigh(sigma_a)
    # Rounding makes eigenvalues of a singular matrix slightly negative.
    root_a = (vectors_DD * np.sqrt(values_D.clip(min=0))) @ vectors_DD.T
    shared_D = np.linalg.eigvalsh(root_a @ sigma_b @ root_a).clip(min=0)
    spread = np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.sqrt(shared_D).sum()
    return max(0.0, float(np.square(mu_a - mu_b).sum() + spread))


def inception_score(logits_ND: Array, splits: int = 10) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016): mean and population sd over the splits.

    Splits are contiguous: a set sorted by class must be shuffled first, or each sees few classes.
    """
    logits_ND = as_float64(logits_ND)
    if len(logits_ND) < splits:
        raise ValueError(f"{len(logits_ND)} samples cannot be cut into {splits} splits")
    shifted_ND = logits_ND - logits_ND.max(axis=1, keepdims=True)
    logp_ND = shifted_ND - np.log(np.exp(shifted_ND).sum(axis=1, keepdims=True))
    scores = []
    for i in range(splits):
        part = logp_ND[i * len(logp_ND) // splits : (i + 1) * len(logp_ND) // splits]
        p_part = np.exp(part)
        # A class of probability 0 everywhere contributes 0, not 0 * log 0.
        marginal = np.maximum(p_part.mean(axis=0), np.finfo(np.float64).tiny)
        scores.append(np.exp((p_part * (part - np.log(marginal))).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(real_ND: Array, sample_ND: Array) -> float:
    """Unbiased MMD^2 of the whole sets, kernel (x.y / D + 1)^3 (KID: Binkowski et al. 2018).

    No subsets are drawn, so there is no randomness; it may fall slightly below 0.
    """
    real_ND, sample_ND = as_float64(real_ND), as_float64(sample_ND)
    if min(len(real_ND), len(sample_ND)) < 2:
        raise ValueError("a kernel distance needs at least two images on either side")

    def within(x_ND: np.ndarray) -> float:
        itself = _cubic_kernel(np.square(x_ND).sum(axis=1), x_ND.shape[1]).sum()
        return (_kernel_sum(x_ND, x_ND) - itself) / (len(x_ND) * (len(x_ND) - 1))

    cross = _kernel_sum(real_ND, sample_ND) / (len(real_ND) * len(sample_ND))
    return float(within(real_ND) + within(sample_ND) - 2 * cross)


def precision_recall(real_ND: Array, sample_ND: Array, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision: share of samples that lie within the k-th neighbour radius of some real image.
    Recall: the same with the roles exchanged.
    """
    real_ND, sample_ND = as_float64(real_ND), as_float64(sample_ND)
    real_radii_N, sample_radii_N = squared_radii(real_ND, k), squared_radii(sample_ND, k)
    precise = 0
    recalled_N = np.zeros(len(real_ND), dtype=bool)
    for rows, distances in _squared_distances(sample_ND, real_ND):
        precise += int((distances <= real_radii_N).any(axis=1).sum())
        recalled_N |= (distances <= sample_radii_N[rows, None]).any(axis=0)
    return precise / len(sample_ND), float(recalled_N.mean())


def squared_radii(features_ND: Array, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row, float64 [N]."""
    features_ND = as_float64(features_ND)
    if not 0 < k < len(features_ND):
        raise ValueError(f"{len(features_ND)} images have no neighbour number {k}")
    radii_N = np.empty(len(features_ND))
    for rows, distances in _squared_distances(features_ND, features_ND):
        # The row itself is neighbour 0.
        radii_N[rows] = np.partition(distances, k, axis=1)[:, k]
    return radii_N


def _row_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS // num_columns)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _squared_distances(a_ND: np.ndarray, b_ND: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Row blocks of the squared distances of all pairs, each with the rows of ``a`` it covers."""
    norms_a, norms_b = np.square(a_ND).sum(axis=1), np.square(b_ND).sum(axis=1)
    for rows in _row_blocks(len(a_ND), len(b_ND)):
        distances = norms_a[rows, None] + norms_b - 2 * (a_ND[rows] @ b_ND.T)
        yield rows, distances.clip(min=0)


def _cubic_kernel(dot: np.ndarray, dim: int) -> np.ndarray:
    return (dot / dim + 1) ** 3


def _kernel_sum(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    return sum(
        float(_cubic_kernel(a_ND[rows] @ b_ND.T, a_ND.shape[1]).sum()) for rows in _row_blocks(len(a_ND), len(b_ND))
    )
