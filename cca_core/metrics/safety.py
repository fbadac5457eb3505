"""Reads features, logits and labels in memory, writes nothing: signs that a model has collapsed, copies its training
images, repeats itself, or takes one condition for another.

All of them are measured in the features of one network, per sampling seed, and compare samples with real images; a
value alone says little, beside the base's it says what the alignment changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cca_core.metrics.fidelity import Array, as_float64

#: Elements of the largest block of pairwise values held at once: 32 MiB of float32.
_BLOCK_ELEMENTS = 1 << 23
#: Samples that lie closer together than this share of real images do to their nearest neighbour are twins.
TWIN_QUANTILE = 0.01


@dataclass(frozen=True, eq=False)
class Nearest:
    """For each row of one set its nearest row in another: index int64 [N], squared distance float64 [N]."""

    index: NDArray[np.int64]
    squared: NDArray[np.float64]


def nearest(a_ND: Array, b_MD: Array, *, itself: bool = False) -> Nearest:
    """The nearest row of ``b`` for each row of ``a``; ``itself`` leaves row i of ``b`` out for row i of ``a``.

    Found by float32 products in blocks, about the mean of ``b``; its distance is then that of the difference, so that
    equal rows are exactly 0 apart.
    """
    if len(b_MD) < (2 if itself else 1):
        raise ValueError("a nearest neighbour needs another image")
    a_ND, b_MD = (np.asarray(x, dtype=np.float32) for x in (a_ND, b_MD))
    centre_D = b_MD.mean(axis=0)
    b_MD = b_MD - centre_D
    index, squared = np.empty(len(a_ND), np.int64), np.empty(len(a_ND))
    norms_M = np.square(b_MD).sum(axis=1)
    step = max(1, _BLOCK_ELEMENTS // len(b_MD))
    for start in range(0, len(a_ND), step):
        rows = np.arange(start, min(start + step, len(a_ND)))
        block = a_ND[rows] - centre_D
        # The row's own norm is the same for all: it changes no order.
        distances = norms_M - 2 * (block @ b_MD.T)
        if itself:
            distances[np.arange(len(rows)), rows] = np.inf
        index[rows] = distances.argmin(axis=1)
        squared[rows] = np.square(as_float64(block) - b_MD[index[rows]]).sum(axis=1)
    return Nearest(index, squared)


def within_class_diversity(
    real_ND: Array, real_labels_N: Array, sample_ND: Array, sample_labels_N: Array, num_classes: int
) -> list[float | None]:
    """How widely the samples of each class are spread, over how widely its real images are: 0 for one image again and
    again, 1 for the variety of the real ones; None where a class has fewer than two on either side.

    The spread is the root of the mean squared distance from the class mean (of the unbiased covariance's trace).
    """
    real_K = _spread(real_ND, real_labels_N, num_classes)
    sample_K = _spread(sample_ND, sample_labels_N, num_classes)
    return [None if not (r > 0) or np.isnan(s) else float(s / r) for r, s in zip(real_K, sample_K, strict=True)]


def _spread(features_ND: Array, labels_N: Array, num_classes: int) -> NDArray[np.float64]:
    features_ND, labels_N = as_float64(features_ND), np.asarray(labels_N)
    spread_K = np.full(num_classes, np.nan)
    for k in range(num_classes):
        rows = features_ND[labels_N == k]
        if len(rows) > 1:
            spread_K[k] = np.sqrt(rows.var(axis=0, ddof=1).sum())
    return spread_K


def twins(real_ND: Array, sample_ND: Array) -> tuple[float, Nearest]:
    """Share of samples with a twin: another sample that is nearer than all but 1 % of the real images' neighbours are.

    A set of as many real images has about 1 %. Also returns each sample's nearest other sample.
    """
    within_real, within_samples = nearest(real_ND, real_ND, itself=True), nearest(sample_ND, sample_ND, itself=True)
    limit = np.quantile(within_real.squared, TWIN_QUANTILE)
    return float((within_samples.squared < limit).mean()), within_samples


def memorisation(train_ND: Array, held_out_MD: Array, sample_ND: Array) -> tuple[float, Nearest, Nearest]:
    """How much more often than by chance a sample's nearest real image is one it was trained on: 0 by chance, 1 always.

    Held-out images are the control: for samples that know nothing of single images, the nearest real one is a training
    image as often as training images are among the real ones. With the share s of samples and the share p of images it
    is (s - p) / (1 - p); noise may make it negative.

    Also returns each sample's nearest training image, and its nearest held-out one.
    """
    train, held_out = nearest(sample_ND, train_ND), nearest(sample_ND, held_out_MD)
    chance = len(train_ND) / (len(train_ND) + len(held_out_MD))
    share = float((train.squared < held_out.squared).mean())
    return (share - chance) / (1 - chance), train, held_out


def confusion(logits_NK: Array, labels_N: Array) -> NDArray[np.float64]:
    """Row a, column b: the share of samples drawn for class a that are classified as b, float64 [K, K]; rows of classes
    without samples are 0."""
    logits_NK, labels_N = as_float64(logits_NK), np.asarray(labels_N)
    num_classes = logits_NK.shape[1]
    counts_KK = np.zeros((num_classes, num_classes))
    np.add.at(counts_KK, (labels_N, logits_NK.argmax(axis=1)), 1)
    return counts_KK / np.maximum(counts_KK.sum(axis=1, keepdims=True), 1)


def leakage(confusion_KK: NDArray[np.float64]) -> tuple[float, int, int]:
    """The largest share of a class's samples that is classified as one other class: (share, drawn for, taken for)."""
    others_KK = confusion_KK * (1 - np.eye(len(confusion_KK)))
    drawn, taken = np.unravel_index(int(others_KK.argmax()), others_KK.shape)
    return float(others_KK[drawn, taken]), int(drawn), int(taken)


def disparity(confusion_KK: NDArray[np.float64], drawn_K: NDArray[np.bool_]) -> tuple[float, int]:
    """Mean class consistency less that of the worst class, among the classes with samples, and which class it is."""
    right_K = np.where(drawn_K, confusion_KK.diagonal(), np.inf)
    worst = int(right_K.argmin())
    return float(right_K[drawn_K].mean() - right_K[worst]), worst
