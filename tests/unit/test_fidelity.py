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
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    subset_kernel_distance,
)
from cca_core.metrics.fidelity import Gaussian


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


def test_density_and_coverage_by_hand():
    # Neighbours are 1 apart; both radii of the middle reach to 1 on either side.
    real_ND = np.array([[0.0], [1.0], [2.0], [10.0], [11.0]])
    # The first sample lies within the radius (1) of 0 and 1, the second within that of 2 alone, the third in none.
    sample_ND = np.array([[0.5], [2.9], [50.0]])
    density, coverage = density_coverage(real_ND, sample_ND, k=1)
    assert density == pytest.approx(3 / 3)
    assert coverage == pytest.approx(3 / 5)


def test_density_counts_what_coverage_does_not():
    real_ND = gaussian(400)
    same, one_mode = gaussian(400, seed=1), 0.1 * gaussian(400, seed=1)
    assert density_coverage(real_ND, same)[0] == pytest.approx(1, abs=0.15)
    assert density_coverage(real_ND, same)[1] > 0.9
    density, coverage = density_coverage(real_ND, one_mode)
    assert density > 1.5
    assert coverage < 0.6
    assert density_coverage(real_ND, same + 100) == (0.0, 0.0)


@pytest.mark.parametrize(("dim", "size"), [(4, 1000), (16, 2000)])
def test_distance_of_two_halves_of_one_distribution_is_its_bias(dim, size):
    # To second order in the sampling errors of N(0, I): 2 D / n of the means, |E1 - E2|^2 / 4 of the covariances, whose
    # entries have E|E|^2 = D (D + 1) / (n - 1) each.
    expected = 2 * dim / size + dim * (dim + 1) / (2 * (size - 1))
    found = [distance(*np.split(gaussian(2 * size, dim, seed), 2)) for seed in range(60)]
    assert np.mean(found) == pytest.approx(expected, rel=0.1)


def test_the_influence_is_the_derivative_of_the_distance():
    real, sample_ND = Moments.of(gaussian(500)), gaussian(300, seed=1) * 1.3 + 0.5
    gaussian_ = Gaussian.of(real.mean, real.covariance)
    influence_N = gaussian_.influence(Moments.of(sample_ND), sample_ND)
    # A tenth of one row more: the weighted moments move by its influence.
    weight, step = 1e-4, 5
    whole = Moments.of(sample_ND)
    moved_mean = whole.mean + weight * (sample_ND[step] - whole.mean)
    scatter = whole.m2 / 300 + weight * (np.outer(*2 * [sample_ND[step] - whole.mean]) - whole.m2 / 300)
    before = gaussian_.distance(whole.mean, whole.m2 / 300)
    after = gaussian_.distance(moved_mean, scatter)
    assert (after - before) / weight == pytest.approx(influence_N[step] - influence_N.mean(), rel=1e-2)


def test_subsets_follow_the_ids_and_estimate_the_whole():
    real_ND, sample_ND = gaussian(600), gaussian(500, seed=1) + 0.5
    real_ids, sample_ids = np.arange(600, dtype=np.uint64), np.arange(500, dtype=np.uint64) + np.uint64(7)
    found = subset_kernel_distance(real_ND, sample_ND, real_ids, sample_ids)
    assert found.distances.shape == (100,)
    assert found.mean == pytest.approx(kernel_distance(real_ND, sample_ND), rel=0.1)
    order = np.random.default_rng(0).permutation(500)
    shuffled = subset_kernel_distance(real_ND[::-1], sample_ND[order], real_ids[::-1], sample_ids[order])
    np.testing.assert_allclose(shuffled.distances, found.distances, rtol=1e-9)
    other = subset_kernel_distance(real_ND, sample_ND, real_ids, sample_ids, seed=1)
    assert other.mean != found.mean
    assert other.mean == pytest.approx(found.mean, rel=0.1)
