"""Reads scikit-learn's digits: each check of safety finds the defect that was planted in samples, and only that one.

The samples stand for those of a model with the defect: real images that it would have drawn.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cca_core.metrics import safety
from cca_core.metrics.measure import FeatureSet
from cca_core.safety_config import SafetyConfig
from cca_core.stages.safety import Finding, row_of
from pipelines.stages.rules import safety_rules

CLASSES = range(10)
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


class Digits:
    """All digits, a fifth held out, a fifth that nobody trained on: what a perfect model would draw."""

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))
        self.pixels, self.labels = pixels[order].astype(np.float32), labels[order]
        self.centres = np.stack([self.pixels[self.labels == k].mean(axis=0) for k in CLASSES])
        self.spare, self.held_out, self.train = (self.samples(part) for part in self._parts())

    def _parts(self) -> list[np.ndarray]:
        fifth = len(self.labels) // 5
        return np.split(np.arange(len(self.labels)), [fifth, 2 * fifth])

    def samples(self, rows: np.ndarray, labels: np.ndarray | None = None) -> FeatureSet:
        """These images, as drawn for their own classes or for others; pixels are features, distances to the class means
        make logits."""
        return self.of(self.pixels[rows], self.labels[rows] if labels is None else labels)

    def of(self, pixels: np.ndarray, labels: np.ndarray) -> FeatureSet:
        logits = -np.square(pixels[:, None] - self.centres).sum(axis=2) / 100
        return FeatureSet(labels, np.arange(len(labels), dtype=np.uint64), pixels, logits)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def collapsed(digits: Digits) -> FeatureSet:
    """One image per class, a little blurred each time."""
    firsts = np.stack([digits.train.features[digits.train.labels == k][0] for k in digits.spare.labels])
    noise = np.random.default_rng(1).normal(0, 0.2, firsts.shape)
    return digits.of((firsts + noise).astype(np.float32), digits.spare.labels)


def memorising(digits: Digits) -> FeatureSet:
    rows = slice(0, len(digits.spare.labels))
    return digits.of(digits.train.features[rows], digits.train.labels[rows])


def broken(digits: Digits) -> FeatureSet:
    """Eights where threes were asked for."""
    pixels, labels = digits.spare.features.copy(), digits.spare.labels
    threes = np.flatnonzero(labels == 3)
    eights = digits.held_out.features[digits.held_out.labels == 8]
    pixels[threes] = eights[np.arange(len(threes)) % len(eights)]
    return digits.of(pixels, labels)


def refusals(digits: Digits, samples: FeatureSet) -> list[str]:
    finding = Finding.of(digits.train, digits.held_out, samples)
    rules = safety_rules(SafetyConfig(), [row_of("aligned", [finding], list(CLASSES), NAMES)])
    return [rule.name for rule in rules if not rule.passed]


def test_a_perfect_model_passes(digits):
    assert refusals(digits, digits.spare) == []


def test_one_image_per_class_is_refused_as_a_collapse(digits):
    found = refusals(digits, collapsed(digits))
    assert any("the least varied class" in name for name in found)
    assert "share of samples that are nearly the same as another one" in found


def test_training_images_as_samples_are_refused_as_memorisation(digits):
    (found,) = refusals(digits, memorising(digits))
    assert found.startswith("memorisation")


def test_a_model_broken_on_one_class_is_refused_and_the_class_is_named(digits):
    found = refusals(digits, broken(digits))
    assert found == [
        "class consistency of three, the worst class, below the mean",
        "share of three taken for eight, the classes most mixed up",
    ]


def test_values_are_means_over_seeds_and_do_not_depend_on_the_order_of_samples(digits):
    first = Finding.of(digits.train, digits.held_out, digits.spare)
    second = Finding.of(digits.train, digits.held_out, broken(digits))
    row = row_of("", [first, second], list(CLASSES), NAMES)
    assert row["memorisation"] == pytest.approx((first.memorisation + second.memorisation) / 2)
    assert row["leakage"] == pytest.approx((first.confusion_KK[3, 8] + second.confusion_KK[3, 8]) / 2)
    order = np.random.default_rng(2).permutation(len(digits.spare.labels))
    spare = digits.spare
    shuffled = FeatureSet(spare.labels[order], spare.ids[order], spare.features[order], spare.logits[order])
    other = Finding.of(digits.train, digits.held_out, shuffled)
    assert (other.twins, other.memorisation) == (first.twins, first.memorisation)
    assert other.diversity_K == pytest.approx(first.diversity_K)
    np.testing.assert_allclose(other.confusion_KK, first.confusion_KK)


def test_a_class_with_images_and_no_samples_is_not_the_worst(digits):
    rows = np.flatnonzero(digits.spare.labels < 9)
    spare = digits.spare
    few = FeatureSet(spare.labels[rows], spare.ids[rows], spare.features[rows], spare.logits[rows])
    assert refusals(digits, few) == []


def test_variety_scales_with_the_samples_and_is_unknown_for_a_class_of_one_image():
    rng = np.random.default_rng(0)
    real, labels = rng.normal(size=(4000, 5)), np.arange(4000) % 2
    half = safety.within_class_diversity(real, labels, 0.5 * real + 3, labels, num_classes=3)
    assert half[:2] == pytest.approx([0.5, 0.5])
    assert half[2] is None
    one = safety.within_class_diversity(real, labels, real[:3], labels[:3], num_classes=2)
    assert one[0] is not None
    assert one[1] is None


def test_nearest_is_that_of_all_pairs_in_whatever_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 4)), rng.normal(size=(70, 4))
    squared = np.square(a[:, None] - b).sum(axis=2)
    monkeypatch.setattr(safety, "_BLOCK_ELEMENTS", 7 * 70)
    found = safety.nearest(a, b)
    np.testing.assert_array_equal(found.index, squared.argmin(axis=1))
    np.testing.assert_allclose(found.squared, squared.min(axis=1), rtol=1e-5)
    within = safety.nearest(a, a, itself=True)
    assert (within.index != np.arange(50)).all()
    doubled = safety.nearest(np.concatenate([a, a]), np.concatenate([a, a]), itself=True)
    assert (doubled.squared == 0).all(), "equal images are exactly 0 apart"


def test_memorisation_is_zero_by_chance_and_one_for_copies():
    rng = np.random.default_rng(0)
    train, held_out, fresh = (rng.normal(size=(n, 3)) for n in (800, 200, 4000))
    assert safety.memorisation(train, held_out, fresh)[0] == pytest.approx(0, abs=0.15)
    assert safety.memorisation(train, held_out, train)[0] == 1
    half = np.concatenate([train, rng.normal(size=(800, 3))])
    assert safety.memorisation(train, held_out, half)[0] == pytest.approx(0.5, abs=0.15)
