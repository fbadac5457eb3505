"""Reads features and logits in memory, writes nothing: every number about one set of samples, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cca_core.metrics.fidelity import Gaussian, Moments, class_divergence
from cca_core.metrics.intervals import deviations
from cca_core.metrics.kernel import subset_kernel_distance
from cca_core.metrics.neighbours import Manifold, compare

#: Neighbour of density and coverage, as published.
DENSITY_NEIGHBOUR = 5
#: A Frechet distance of one class wants this many images per feature on either side; below, bias is most of it.
PER_CLASS_IMAGES_PER_FEATURE = 10
#: Replicates that draw real images are those of one stream for all samples; samples have streams above it.
_REAL_STREAM = 0


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What a network says of images, one row per image."""

    #: Class ids, int64 [N]; of samples, those that they were drawn for.
    labels: np.ndarray
    #: uint64 [N], unique; metrics depend on them, never on the order of the rows.
    ids: np.ndarray
    #: float32 [N, D].
    features: np.ndarray
    #: Logits of the data's classes [N, K]; only samples need them.
    logits: np.ndarray | None = None
    #: Logits of the inception score [N, C]; None where the feature network has none.
    score_logits: np.ndarray | None = None
    #: Spatial features [N, E]; None where the feature network has none.
    spatial: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Statistics:
    """Published mean [D] and covariance [D, D], float64, of features, and of spatial features where there are any."""

    mean: np.ndarray
    covariance: np.ndarray
    spatial_mean: np.ndarray | None = None
    spatial_covariance: np.ndarray | None = None


class RealSet:
    """The real side of all comparisons, and what of it serves every set of samples.

    With published statistics, Frechet distances are to these. Precision, recall, density, coverage and the kernel
    distance need the features of real images: without ``images`` they are omitted.
    """

    def __init__(self, images: FeatureSet | None, *, k: int, statistics: Statistics | None = None) -> None:
        if images is None and statistics is None:
            raise ValueError("the real side needs images or statistics")
        self.images, self.statistics, self.k = images, statistics, k
        self._of_class: dict[int, Gaussian] = {}

    @cached_property
    def gaussian(self) -> Gaussian:
        if self.statistics is not None:
            return Gaussian.of(self.statistics.mean, self.statistics.covariance)
        return _gaussian(self.images.features)

    @cached_property
    def spatial(self) -> Gaussian | None:
        """None where real images or samples have no spatial features."""
        found = self.statistics
        if found is not None and found.spatial_mean is not None:
            return Gaussian.of(found.spatial_mean, found.spatial_covariance)
        if found is not None or self.images.spatial is None:
            return None
        return _gaussian(self.images.spatial)

    @cached_property
    def manifold(self) -> Manifold:
        return Manifold.of(self.images.features, [self.k, DENSITY_NEIGHBOUR])

    def of_class(self, label: int) -> Gaussian:
        """The Gaussian of the real images of one class."""
        if label not in self._of_class:
            self._of_class[label] = _gaussian(self.images.features[self.images.labels == label])
        return self._of_class[label]


@dataclass(frozen=True, eq=False)
class Measured:
    """Numbers by name, and how far each moves in the replicates of the bootstrap (``intervals.deviations``)."""

    values: dict[str, Any]
    deviations: dict[str, np.ndarray]


def measure(real: RealSet, sample: FeatureSet, *, stream: int = 0) -> Measured:
    """Every number about one set of samples; the order of the rows matters only to rounding.

    Args:
        stream: sampling seed: samples of different seeds are drawn again independently.

    Returns:
        distance (Frechet), kernel_distance (mean over subsets) and kernel_distance_sd (of one subset), precision,
        recall, density, coverage; inception_score and spatial_distance where the network makes them;
        class_consistency, the share of samples classified as what they were drawn for, and the same as
        class_consistency_per_class (None for a class without samples); distance_per_class where some class has
        ``PER_CLASS_IMAGES_PER_FEATURE`` images per feature on both sides (None for the others); label_shift, the
        total variation distance between the class shares of real images and samples, which inflates the distances
        (0: same mix); the counts n (samples) and n_real (0: statistics alone).
    """
    values: dict[str, Any] = {}
    moved: dict[str, np.ndarray] = {}
    redrawn = 1 + stream

    def add(name: str, per_image_N: np.ndarray, ids_N: np.ndarray, of: int) -> None:
        values[name] = float(per_image_N.mean())
        moved[name] = deviations(per_image_N, ids_N, of)

    def add_distance(name: str, gaussian: Gaussian, features_ND: np.ndarray) -> None:
        moments = Moments.of(features_ND)
        values[name] = gaussian.distance(moments.mean, moments.covariance)
        if moments.count > features_ND.shape[1]:  # else it has no derivative, and so no interval
            moved[name] = deviations(gaussian.influence(moments, features_ND), sample.ids, redrawn)

    add_distance("distance", real.gaussian, sample.features)
    if sample.spatial is not None and real.spatial is not None:
        add_distance("spatial_distance", real.spatial, sample.spatial)
    if sample.score_logits is not None:
        # One split, as the official evaluator has up to 5000 images: it depends on no order.
        divergence_N = class_divergence(sample.score_logits)
        score = float(np.exp(divergence_N.mean()))
        values["inception_score"] = score
        moved["inception_score"] = deviations(score * divergence_N, sample.ids, redrawn)
    if real.images is not None:
        found = compare(real.manifold, sample.features, k=real.k, density_k=DENSITY_NEIGHBOUR)
        add("precision", found.precise, sample.ids, redrawn)
        add("recall", found.recalled, real.images.ids, _REAL_STREAM)
        add("density", found.dense, sample.ids, redrawn)
        add("coverage", found.covered, real.images.ids, _REAL_STREAM)
        kernel = subset_kernel_distance(real.images.features, sample.features, real.images.ids, sample.ids)
        values |= {"kernel_distance": kernel.mean, "kernel_distance_sd": kernel.sd}
        moved["kernel_distance"] = deviations(kernel.influence, sample.ids[kernel.rows], redrawn)
    right_N = sample.logits.argmax(axis=1) == sample.labels
    add("class_consistency", right_N, sample.ids, redrawn)
    values |= _per_class(real, sample, right_N)
    values |= {"n": len(sample.labels), "n_real": 0 if real.images is None else len(real.images.labels)}
    return Measured(values, moved)


def mean_deviations(measured: Sequence[Measured], name: str) -> np.ndarray | None:
    """Deviations of the mean over sampling seeds; None where some have no interval."""
    if not all(name in one.deviations for one in measured):
        return None
    return np.mean([one.deviations[name] for one in measured], axis=0)


def _gaussian(features_ND: np.ndarray) -> Gaussian:
    moments = Moments.of(features_ND)
    return Gaussian.of(moments.mean, moments.covariance)


def _per_class(real: RealSet, sample: FeatureSet, right_N: np.ndarray) -> dict[str, Any]:
    num_classes = sample.logits.shape[1]
    drawn_K = np.bincount(sample.labels, minlength=num_classes)
    right_K = np.bincount(sample.labels[right_N], minlength=num_classes)
    values: dict[str, Any] = {
        "class_consistency_per_class": [
            float(right / drawn) if drawn else None for right, drawn in zip(right_K, drawn_K, strict=True)
        ]
    }
    if real.images is None or len(real.images.labels) == 0 or real.images.labels.min() < 0:
        return values
    real_K = np.bincount(real.images.labels, minlength=num_classes)
    values["label_shift"] = float(np.abs(drawn_K / drawn_K.sum() - real_K / real_K.sum()).sum() / 2)
    enough_K = np.minimum(drawn_K, real_K) >= PER_CLASS_IMAGES_PER_FEATURE * sample.features.shape[1]
    if enough_K.any():
        values["distance_per_class"] = [
            _class_distance(real, sample, label) if enough else None for label, enough in enumerate(enough_K)
        ]
    return values


def _class_distance(real: RealSet, sample: FeatureSet, label: int) -> float:
    moments = Moments.of(sample.features[sample.labels == label])
    return real.of_class(label).distance(moments.mean, moments.covariance)
