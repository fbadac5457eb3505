"""Reads features in memory, writes nothing: precision, recall, density and coverage, from distances to neighbours.

Distances are float32 products in blocks: all pairs of 50,000 images are never held at once. The features are moved by
the mean of the real ones first, which changes no distance and keeps the digits that a far origin would cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cca_core.metrics.fidelity import Array, float64_blocks

#: Elements of the largest block of pairwise values held at once: 64 MiB of float32.
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Manifold:
    """Points, moved by ``centre`` [D], float32 [N, D], and the squared distances to their neighbours."""

    points: Tensor
    centre: np.ndarray
    #: k -> squared distance of each point to its k-th nearest other one, float32 [N].
    radii: dict[int, Tensor]

    @classmethod
    def of(cls, features_ND: Array, neighbours: Sequence[int], centre: np.ndarray | None = None) -> Manifold:
        """The manifold of features; ``centre`` is that of another one to compare with, or the mean."""
        if centre is None:
            centre = sum(block.sum(axis=0) for _, block in float64_blocks(features_ND)) / len(features_ND)
        points = torch.empty(len(features_ND), len(centre))
        for rows, block_ND in float64_blocks(features_ND):
            points[rows] = torch.from_numpy(block_ND - centre)
        return cls(points, centre, _radii(points, neighbours))


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is near what. Means of the four are precision, recall, density and coverage."""

    #: Whether a sample lies within the k-th neighbour radius of some real image, bool [N].
    precise: np.ndarray
    #: Whether a real image lies within that of some sample, bool [M].
    recalled: np.ndarray
    #: Real images in whose radius a sample lies, over k, float64 [N].
    dense: np.ndarray
    #: Whether some sample lies within the radius of a real image, bool [M].
    covered: np.ndarray


def compare(real: Manifold, sample_ND: Array, *, k: int, density_k: int) -> Comparison:
    """Samples against real images.

    Args:
        real: with radii of both neighbours.
        k: neighbour of precision and recall.
        density_k: neighbour of density and coverage.
    """
    sample = Manifold.of(sample_ND, [k], real.centre)
    count, num_real = len(sample.points), len(real.points)
    precise, dense = torch.empty(count, dtype=torch.bool), torch.empty(count, dtype=torch.float64)
    recalled, covered = (torch.zeros(num_real, dtype=torch.bool) for _ in range(2))
    for rows, distances in _squared_distances(sample.points, real.points):
        precise[rows] = (distances <= real.radii[k]).any(dim=1)
        recalled |= (distances <= sample.radii[k][rows, None]).any(dim=0)
        inside = distances <= real.radii[density_k]
        dense[rows] = inside.sum(dim=1).double() / density_k
        covered |= inside.any(dim=0)
    return Comparison(precise.numpy(), recalled.numpy(), dense.numpy(), covered.numpy())


def precision_recall(real_ND: Array, sample_ND: Array, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2).

    Precision: share of samples that lie within the k-th neighbour radius of some real image.
    Recall: the same with the roles exchanged.
    """
    found = compare(Manifold.of(real_ND, [k]), sample_ND, k=k, density_k=k)
    return float(found.precise.mean()), float(found.recalled.mean())


def density_coverage(real_ND: Array, sample_ND: Array, k: int = 5) -> tuple[float, float]:
    """Density and coverage (Naeem et al. 2020, equations 3 and 4).

    Density: in how many of the real images' k-th neighbour radii a sample lies, over k, on average; it may exceed 1,
    and an outlier among the real images weighs less than in precision. Coverage: share of real images within whose
    radius some sample lies; unlike recall it needs no radii of the samples.
    """
    found = compare(Manifold.of(real_ND, [k]), sample_ND, k=k, density_k=k)
    return float(found.dense.mean()), float(found.covered.mean())


def squared_radii(features_ND: Array, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row, float32 [N]."""
    return Manifold.of(features_ND, [k]).radii[k].numpy()


def _radii(points: Tensor, neighbours: Sequence[int]) -> dict[int, Tensor]:
    size, most = len(points), max(neighbours)
    if not 0 < min(neighbours) <= most < size:
        raise ValueError(f"{size} images have no neighbour number {most}")
    radii = {k: torch.empty(size) for k in neighbours}
    for rows, distances in _squared_distances(points, points):
        # The row itself is neighbour 0.
        nearest = distances.topk(most + 1, dim=1, largest=False, sorted=True).values
        for k in neighbours:
            radii[k][rows] = nearest[:, k]
    return radii


def _squared_distances(a_ND: Tensor, b_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of the squared distances of all pairs, each with the rows of ``a`` that it covers."""
    norms_a, norms_b = a_ND.square().sum(dim=1), b_ND.square().sum(dim=1)
    step = max(1, _BLOCK_ELEMENTS // len(b_ND))
    for start in range(0, len(a_ND), step):
        rows = slice(start, start + step)
        distances = torch.addmm(norms_b, a_ND[rows], b_ND.T, alpha=-2)
        yield rows, distances.add_(norms_a[rows, None]).clamp_(min=0)
