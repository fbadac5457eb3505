"""Reads and writes nothing: all numbers of a set of samples, whoever made them in whatever blocks, and how sure they
are."""

from __future__ import annotations

import numpy as np
import pytest

from cca_core.metrics import (
    Moments,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from cca_core.metrics.intervals import deviations, interval
from cca_core.metrics.measure import FeatureSet, RealSet, Statistics, mean_deviations, measure

REAL_SIZE, SIZE, DIM, CLASSES = 240, 300, 6, 4


def rows(size: int, *, seed: int, shift: float = 0.0, spatial: bool = False) -> FeatureSet:
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % CLASSES
    return FeatureSet(
        labels=labels,
        ids=np.arange(size, dtype=np.uint64) + np.uint64(seed << 32),
        features=(rng.normal(size=(size, DIM)) + shift).astype(np.float32),
        logits=(rng.normal(size=(size, CLASSES)) + 2 * np.eye(CLASSES)[labels]).astype(np.float32),
        score_logits=rng.normal(size=(size, 7)).astype(np.float32),
        spatial=rng.normal(size=(size, 5)).astype(np.float32) if spatial else None,
    )


def taken(drawn: FeatureSet, order: np.ndarray) -> FeatureSet:
    return FeatureSet(**{name: None if v is None else v[order] for name, v in vars(drawn).items()})


@pytest.fixture(scope="module")
def real() -> RealSet:
    return RealSet(rows(REAL_SIZE, seed=0, spatial=True), k=3)


@pytest.fixture(scope="module")
def drawn() -> FeatureSet:
    return rows(SIZE, seed=1, shift=0.4, spatial=True)


def test_measure_agrees_with_its_parts(real, drawn):
    values = measure(real, drawn).values
    a, b = Moments.of(real.images.features), Moments.of(drawn.features)
    assert values["distance"] == frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    a, b = Moments.of(real.images.spatial), Moments.of(drawn.spatial)
    assert values["spatial_distance"] == frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert (values["precision"], values["recall"]) == precision_recall(real.images.features, drawn.features, k=3)
    assert (values["density"], values["coverage"]) == density_coverage(real.images.features, drawn.features)
    assert values["inception_score"] == pytest.approx(inception_score(drawn.score_logits, splits=1)[0])
    assert values["kernel_distance"] == pytest.approx(kernel_distance(real.images.features, drawn.features), rel=0.2)
    assert values["class_consistency"] == (drawn.logits.argmax(axis=1) == drawn.labels).mean()
    assert (values["n"], values["n_real"]) == (SIZE, REAL_SIZE)


@pytest.mark.parametrize("cuts", [(), (1, 299), (50, 100, 150, 200, 250)])
def test_any_cut_into_blocks_in_any_order_gives_the_same_numbers_and_intervals(real, drawn, cuts):
    blocks = [taken(drawn, part) for part in np.split(np.arange(SIZE), cuts)]
    np.random.default_rng(len(cuts)).shuffle(blocks)
    joined = FeatureSet(
        **{name: np.concatenate([getattr(block, name) for block in blocks]) for name in vars(drawn)},
    )
    joined = taken(joined, np.random.default_rng(2).permutation(SIZE))
    one, other = measure(real, drawn, stream=4), measure(real, joined, stream=4)
    assert set(one.deviations) == {*one.values} - {
        *("kernel_distance_sd", "class_consistency_per_class", "distance_per_class", "label_shift", "n", "n_real")
    }
    for name, value in one.values.items():
        assert other.values[name] == pytest.approx(value, rel=1e-6), name
    for name, moved in one.deviations.items():
        np.testing.assert_allclose(other.deviations[name], moved, rtol=1e-6, atol=1e-9, err_msg=name)


def test_class_consistency_by_hand():
    # Drawn for 0, 0, 1, 1, 1, 3; classified as 0, 2, 1, 1, 0, 3. Nothing was drawn for class 2.
    drawn = taken(rows(SIZE, seed=1), np.arange(6))
    known = taken(rows(SIZE, seed=2), np.arange(6))
    drawn = FeatureSet(
        labels=np.array([0, 0, 1, 1, 1, 3]),
        ids=drawn.ids,
        features=drawn.features,
        logits=np.eye(4)[[0, 2, 1, 1, 0, 3]],
    )
    known = FeatureSet(labels=np.array([0, 0, 1, 1, 2, 3]), ids=known.ids, features=known.features)
    values = measure(RealSet(known, k=2), drawn).values
    assert values["class_consistency"] == pytest.approx(4 / 6)
    assert values["class_consistency_per_class"] == pytest.approx([1 / 2, 2 / 3, None, 1])
    assert values["label_shift"] == pytest.approx(1 / 6)
    assert "inception_score" not in values, "the network has no logits"
    assert "distance" in values


def test_a_class_has_a_distance_of_its_own_where_it_has_images_enough(real, drawn):
    values = measure(real, drawn).values
    pairs = [(x.features[x.labels == 2]) for x in (real.images, drawn)]
    (a, b) = map(Moments.of, pairs)
    expected = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    assert values["distance_per_class"][2] == pytest.approx(expected)
    few = taken(drawn, np.flatnonzero((drawn.labels != 2) | (np.arange(SIZE) < 10)))
    assert measure(real, few).values["distance_per_class"][2] is None
    assert "distance_per_class" not in measure(real, taken(drawn, np.arange(100))).values


def test_statistics_alone_give_frechet_distances_only(real, drawn):
    known, spatial = Moments.of(real.images.features), Moments.of(real.images.spatial)
    published = Statistics(known.mean, known.covariance, spatial.mean, spatial.covariance)
    alone, whole = measure(RealSet(None, k=3, statistics=published), drawn).values, measure(real, drawn).values
    for name in ("distance", "spatial_distance", "inception_score", "class_consistency"):
        assert alone[name] == whole[name], name
    missing = {"precision", "recall", "density", "coverage", "kernel_distance", "label_shift"}
    assert missing.isdisjoint(alone)
    assert alone["n_real"] == 0
    without = Statistics(known.mean, known.covariance)
    assert "spatial_distance" not in measure(RealSet(None, k=3, statistics=without), drawn).values


def test_the_interval_of_a_mean_covers_the_truth_about_95_times_in_100():
    rng, covered, ids = np.random.default_rng(0), 0, np.arange(400, dtype=np.uint64)
    for trial in range(300):
        values = rng.random(400) < 0.3
        low, high = interval(values.mean(), deviations(values, ids, stream=trial))
        covered += low <= 0.3 <= high
    # Three standard errors of 300 trials at 0.95.
    assert covered / 300 == pytest.approx(0.95, abs=0.038)


def test_the_interval_of_a_distance_covers_its_mean_at_this_n_about_95_times_in_100():
    known = RealSet(rows(4000, seed=0), k=3)
    found = []
    for seed in range(1, 151):
        drawn = rows(500, seed=seed, shift=0.3)
        moments = Moments.of(drawn.features)
        value = known.gaussian.distance(moments.mean, moments.covariance)
        moved = deviations(known.gaussian.influence(moments, drawn.features), drawn.ids, stream=seed)
        found.append((value, *interval(value, moved)))
    mean = np.mean([value for value, _, _ in found])
    assert np.mean([low <= mean <= high for _, low, high in found]) == pytest.approx(0.95, abs=0.05)


SAMPLED = ("distance", "inception_score", "kernel_distance", "precision", "density", "class_consistency")


@pytest.mark.parametrize(("redrawn", "names"), [("samples", SAMPLED), ("real", ("recall", "coverage"))])
def test_deviations_are_as_wide_as_the_numbers_scatter(redrawn, names):
    """Against redrawing what is resampled, with the other side fixed."""
    fixed = rows(800, seed=999)
    measured = []
    for seed in range(1, 31):
        new = rows(400, seed=seed, shift=0.3)
        known, drawn = (fixed, new) if redrawn == "samples" else (new, fixed)
        measured.append(measure(RealSet(known, k=3), drawn, stream=seed))
    for name in names:
        scatter = np.std([one.values[name] for one in measured], ddof=1)
        said = np.mean([one.deviations[name].std() for one in measured])
        assert 0.6 < said / scatter < 1.7, name


def test_intervals_repeat_themselves_and_narrow_over_independent_seeds(real):
    drawn = [rows(SIZE, seed=seed, shift=0.4) for seed in (1, 2, 3, 4)]
    measured = [measure(real, one, stream=seed) for seed, one in enumerate(drawn)]
    again = measure(real, drawn[0], stream=0)
    np.testing.assert_array_equal(again.deviations["distance"], measured[0].deviations["distance"])
    # Samples of another seed are drawn again by draws of their own, even if they had the same ids; real images are not.
    other = measure(real, drawn[0], stream=1)
    assert abs(np.corrcoef(other.deviations["precision"], again.deviations["precision"])[0, 1]) < 0.2
    np.testing.assert_array_equal(other.deviations["recall"], again.deviations["recall"])
    alone = mean_deviations(measured[:1], "precision").std()
    assert mean_deviations(measured, "precision").std() == pytest.approx(alone / 2, rel=0.25)
    # All four recalls are of the same real images, which are drawn again alike.
    alone = mean_deviations(measured[:1], "recall").std()
    assert mean_deviations(measured, "recall").std() > 0.7 * alone


def test_too_few_samples_have_a_distance_without_an_interval(real, drawn):
    found = measure(real, taken(drawn, np.arange(DIM)))
    assert found.values["distance"] > 0
    assert "distance" not in found.deviations
    assert mean_deviations([found], "distance") is None
