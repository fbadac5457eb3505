"""Reads and writes nothing: the metrics on sets whose answer is known by hand."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cca_core.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from cca_core.metrics.features import measure


def gaussian(n: int = 200, dim: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim))


def distance(real_ND, sample_ND) -> float:
    real, sample = Moments.of(real_ND), Moments.of(sample_ND)
    return frechet_distance(real.mean, real.covariance, sample.mean, sample.covariance)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 199), max_size=6, unique=True), st.randoms(use_true_random=False))
def test_blocks_merged_in_any_order_equal_the_whole(cuts, random):
    # A mean far from 0 is what a naive sum of squares loses digits on.
    features_ND = gaussian() + 1000
    blocks = [Moments.of(block) for block in np.split(features_ND, sorted(cuts))]
    random.shuffle(blocks)
    merged = reduce(Moments.merge, blocks)
    assert merged.count == 200
    np.testing.assert_allclose(merged.mean, features_ND.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(merged.covariance, np.cov(features_ND, rowvar=False), rtol=1e-9, atol=1e-9)


def test_plus_merges():
    features_ND = gaussian()
    total = Moments.of(features_ND[:70]) + Moments.of(torch.from_numpy(features_ND[70:]))
    np.testing.assert_allclose(total.m2, Moments.of(features_ND).m2, rtol=1e-9, atol=1e-9)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="two images"):
        _ = Moments.of(gaussian(1)).covariance


def test_distance_to_itself_is_0_and_to_a_shifted_copy_the_squared_shift():
    features_ND = gaussian()
    shift_D = np.arange(6.0)
    assert distance(features_ND, features_ND) == pytest.approx(0, abs=1e-9)
    assert distance(features_ND, features_ND + shift_D) == pytest.approx(np.square(shift_D).sum())


def test_distance_of_a_scaled_copy():
    # tr(A) + tr(9 A) - 2 tr(3 A) = 4 tr(A)
    centred_ND = gaussian() - gaussian().mean(axis=0)
    trace = np.trace(Moments.of(centred_ND).covariance)
    assert distance(centred_ND, 3 * centred_ND) == pytest.approx(4 * trace)


def test_a_singular_covariance_gives_a_finite_distance():
    few_ND, many_ND = gaussian(5, dim=32), gaussian(300, dim=32, seed=1)
    assert 0 < distance(few_ND, many_ND) < np.inf
    assert distance(few_ND, many_ND) == pytest.approx(distance(many_ND, few_ND), rel=1e-6)
    assert distance(few_ND, few_ND) == pytest.approx(0, abs=1e-6)
    constant_ND = np.ones((4, 32))
    assert distance(constant_ND, constant_ND + 1) == pytest.approx(32)


def test_inception_score_by_hand():
    # Certain, evenly spread classes score their number; the same answer for every image scores 1.
    sure_NK = 1000 * np.tile(np.eye(10), (20, 1))
    assert inception_score(sure_NK) == pytest.approx((10, 0))
    sure_of_5_NK = np.pad(sure_NK[:, :5][sure_NK[:, :5].any(axis=1)], ((0, 0), (0, 5)))
    assert inception_score(sure_of_5_NK) == pytest.approx((5, 0))
    assert inception_score(np.tile(gaussian(1, dim=10), (50, 1))) == pytest.approx((1, 0))
    with pytest.raises(ValueError, match="splits"):
        inception_score(sure_NK[:9])


def test_kernel_distance_by_hand():
    # One dimension, k(x, y) = (x y + 1)^3: within [1, 1] 8, within [0, 0] 1, across 1.
    assert kernel_distance(np.ones((2, 1)), np.zeros((2, 1))) == pytest.approx(8 + 1 - 2)
    # Unbiased: around 0 for two draws of one distribution, so sometimes below it.
    values = [kernel_distance(gaussian(seed=2 * i), gaussian(seed=2 * i + 1)) for i in range(20)]
    assert min(values) < 0 < max(values)


def test_precision_and_recall_of_equal_and_of_far_sets():
    features_ND = gaussian()
    assert precision_recall(features_ND, features_ND) == (1.0, 1.0)
    assert precision_recall(features_ND, features_ND + 100) == (0.0, 0.0)


def test_precision_and_recall_tell_fidelity_from_coverage():
    real_ND = np.concatenate([gaussian(), gaussian(seed=1) + 100])
    precision, recall = precision_recall(real_ND, gaussian(seed=2))
    assert precision > 0.8
    assert recall < 0.5


def test_the_neighbour_must_exist():
    with pytest.raises(ValueError, match="neighbour"):
        precision_recall(gaussian(3), gaussian(3), k=3)


def test_a_diverged_model_is_refused():
    broken_ND = gaussian()
    broken_ND[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        precision_recall(gaussian(), broken_ND)


def measured(order=None) -> dict:
    real_ND, sample_ND = gaussian(6), gaussian(6, seed=1)
    # Drawn for 0, 0, 1, 1, 1, 3; classified as 0, 2, 1, 1, 0, 3. Nothing was drawn for class 2.
    logits_NK = torch.eye(4)[[0, 2, 1, 1, 0, 3]]
    labels_N = torch.tensor([0, 0, 1, 1, 1, 3])
    order = range(6) if order is None else order
    return measure(
        real_ND,
        np.array([0, 0, 1, 1, 2, 3]),
        sample_ND[list(order)],
        logits_NK[list(order)],
        labels_N[list(order)],
        k=2,
    )


def test_class_consistency_by_hand():
    result = measured()
    assert result["class_consistency"] == pytest.approx(4 / 6)
    assert result["class_consistency_per_class"] == pytest.approx([1 / 2, 2 / 3, None, 1])
    assert result["label_shift"] == pytest.approx(1 / 6)
    assert (result["n"], result["n_real"]) == (6, 6)


def test_measure_agrees_with_its_parts_and_repeats_itself():
    result = measured()
    assert result["distance"] == distance(gaussian(6), gaussian(6, seed=1))
    assert result["kernel_distance"] == kernel_distance(gaussian(6), gaussian(6, seed=1))
    assert (result["precision"], result["recall"]) == precision_recall(gaussian(6), gaussian(6, seed=1), k=2)
    assert result == measured()


def test_measure_does_not_depend_on_the_order_of_the_samples():
    whole, shuffled = measured(), measured([4, 0, 5, 2, 1, 3])
    per_class = "class_consistency_per_class"
    assert shuffled.pop(per_class) == whole.pop(per_class)
    for key, value in whole.items():
        # The distance takes roots of the rounded zeros of a singular covariance.
        assert shuffled[key] == pytest.approx(value, rel=1e-6), key
