"""Reads features and logits in memory, writes nothing: moments, Frechet distance and inception score.

Arithmetic is float64 on the CPU, in blocks of rows: the metrics are differences of large sums. A Frechet distance may
be called FID only where the features are those of the published Inception network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray | torch.Tensor

#: Rows that are float64 at once: 64 MiB of 2048 features.
_BLOCK_ROWS = 4096


def as_float64(values: Array) -> np.ndarray:
    """Tensor or array as float64; refuses NaN and infinity, which would pass for a bad score."""
    if isinstance(values, torch.Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError("a metric was given values that are not finite: the model has diverged")
    return array


def float64_blocks(values_ND: Array) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows as float64, each with the rows that it covers."""
    for start in range(0, len(values_ND), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        yield rows, as_float64(values_ND[rows])


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
        """The moments of features, a block at a time."""
        return reduce(Moments.merge, (cls._of_block(block_ND) for _, block_ND in float64_blocks(features_ND)))

    @classmethod
    def _of_block(cls, features_ND: np.ndarray) -> Moments:
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
    """Squared Frechet distance of two Gaussians, the formula of FID (Heusel et al. 2017, eq. 6)."""
    return Gaussian.of(mu_a, sigma_a).distance(mu_b, sigma_b)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """One side of Frechet distances, the real images': the root of its covariance serves all samplers."""

    mean: np.ndarray
    covariance: np.ndarray
    #: Symmetric root of the covariance, float64 [D, D].
    root: np.ndarray

    @classmethod
    def of(cls, mean: Array, covariance: Array) -> Gaussian:
        mean_D, covariance_DD = as_float64(mean), as_float64(covariance)
        values_D, vectors_DD = np.linalg.eigh(covariance_DD)
        # Rounding makes eigenvalues of a singular matrix slightly negative.
        return cls(mean_D, covariance_DD, (vectors_DD * np.sqrt(values_D.clip(min=0))) @ vectors_DD.T)

    def distance(self, mean: Array, covariance: Array) -> float:
        """``|mu_a - mu_b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2)``.

        The product has the eigenvalues of the usual ``A B`` but is symmetric, so they come out real, and a singular
        covariance (fewer images than features) needs no special case.
        """
        mean_D, covariance_DD = as_float64(mean), as_float64(covariance)
        shared_D = np.linalg.eigvalsh(self.root @ covariance_DD @ self.root).clip(min=0)
        spread = np.trace(self.covariance) + np.trace(covariance_DD) - 2 * np.sqrt(shared_D).sum()
        return max(0.0, float(np.square(self.mean - mean_D).sum() + spread))

    def influence(self, sample: Moments, features_ND: Array) -> np.ndarray:
        """What each row of ``features_ND`` adds to the distance of ``sample`` to first order, up to a constant, [N].

        The gradient of the distance by the covariance B is ``I - T``, with ``T = A^1/2 (A^1/2 B A^1/2)^-1/2 A^1/2``
        the optimal transport from B to A. It needs more rows than features, or B has no inverse.
        """
        values_D, vectors_DD = np.linalg.eigh(self.root @ sample.covariance @ self.root)
        tiny = values_D.max(initial=0.0) * len(values_D) * np.finfo(np.float64).eps
        inverse_root_D = np.divide(1.0, np.sqrt(values_D.clip(min=tiny)), where=values_D > tiny, out=0 * values_D)
        half_DD = (self.root @ vectors_DD) * np.sqrt(inverse_root_D)
        shift_D = 2 * (sample.mean - self.mean)
        values_N = np.empty(len(features_ND))
        for rows, block_ND in float64_blocks(features_ND):
            centred_ND = block_ND - sample.mean
            moved_N = np.square(centred_ND @ half_DD).sum(axis=1)
            values_N[rows] = centred_ND @ shift_D + np.square(centred_ND).sum(axis=1) - moved_N
        return values_N


def inception_score(logits_ND: Array, splits: int = 10) -> tuple[float, float]:
    """exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016): mean and population sd over the splits.

    Splits are contiguous: a set sorted by class must be shuffled first, or each sees few classes.
    """
    size = len(logits_ND)
    if size < splits:
        raise ValueError(f"{size} samples cannot be cut into {splits} splits")
    parts = (logits_ND[i * size // splits : (i + 1) * size // splits] for i in range(splits))
    scores = [np.exp(class_divergence(part).mean()) for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def class_divergence(logits_NK: Array) -> np.ndarray:
    """KL(p(y|x) || p(y)) of each image in nats, float64 [N]; p(y) is the mean over these images."""
    total_K = sum(np.exp(_log_softmax(block)).sum(axis=0) for _, block in float64_blocks(logits_NK))
    # A class of probability 0 everywhere contributes 0, not 0 * log 0.
    log_marginal_K = np.log(np.maximum(total_K / len(logits_NK), np.finfo(np.float64).tiny))
    values_N = np.empty(len(logits_NK))
    for rows, block in float64_blocks(logits_NK):
        logp = _log_softmax(block)
        values_N[rows] = (np.exp(logp) * (logp - log_marginal_K)).sum(axis=1)
    return values_N


def _log_softmax(logits_NK: np.ndarray) -> np.ndarray:
    shifted_NK = logits_NK - logits_NK.max(axis=1, keepdims=True)
    return shifted_NK - np.log(np.exp(shifted_NK).sum(axis=1, keepdims=True))
