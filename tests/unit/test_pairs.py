"""Reads and writes nothing: the generator against its published vectors, and draws that belong to the image alone."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cca_core import pairs
from cca_core.pairs import Purpose

#: Known answers of Random123 for philox4x32-10: counter words, key words, result.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
IMAGES = 20_000


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.fixture(scope="module")
def hashes() -> np.ndarray:
    return pairs.id_hashes([f"class/{i}" for i in range(IMAGES)])


def draws(hashes, *, seed: int = 0, epoch: int = 0, purpose: Purpose = Purpose.NULL) -> np.ndarray:
    return pairs.uniform(hashes, seed=seed, epoch=epoch, purpose=purpose)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return abs(np.corrcoef(a, b)[0, 1])


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(counter, key, expected):
    low, high = words(key)
    result = pairs.philox(words(counter), low | high << 32)
    assert [int(word) for word in result] == words(expected)


def test_a_block_of_counters_is_each_of_them():
    counters = np.array([words(vector[0]) for vector in VECTORS], np.uint32)
    block = np.stack(pairs.philox(list(counters.T), 5), axis=-1)
    assert block.dtype == np.uint32
    for row, counter in zip(block, counters, strict=True):
        assert row.tolist() == [int(word) for word in pairs.philox(counter.tolist(), 5)]


def test_ids_hash_by_their_text_alone():
    # blake2b of 8 bytes, little endian: what the draws of every stored data set are a function of.
    assert [hex(value) for value in pairs.id_hashes(["", "digit-0000"])] == ["0xb4b2797457a0a6e4", "0xcdf6af3093acfa24"]
    assert pairs.id_hashes(["b", "a"]).tolist() == pairs.id_hashes(["a", "b"])[::-1].tolist()
    assert pairs.id_hashes([]).shape == (0,)


def test_draws_are_uniform(hashes):
    u = draws(hashes)
    assert u.dtype == np.float64
    assert 0 <= u.min() < 0.001
    assert 0.999 < u.max() < 1
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    chi_squared = ((counts - IMAGES / 50) ** 2 / (IMAGES / 50)).sum()
    assert chi_squared < 86  # 49 degrees of freedom: exceeded by one in a thousand
    # The last bits are random too: 53 of them.
    assert np.mean((u * (1 << 53)).astype(np.uint64) & np.uint64(1)) == pytest.approx(0.5, abs=0.02)


def test_every_purpose_epoch_and_seed_has_a_stream_of_its_own(hashes):
    streams = [draws(hashes, purpose=purpose) for purpose in Purpose]
    streams += [draws(hashes, epoch=1), draws(hashes, seed=1), draws(hashes, seed=1 << 32), draws(hashes, seed=-1)]
    for i, first in enumerate(streams):
        for second in streams[:i]:
            assert correlation(first, second) < 0.035  # five standard deviations
    assert np.array_equal(draws(hashes, seed=3, epoch=4), draws(hashes, seed=3, epoch=4))


def test_a_draw_belongs_to_the_image_whatever_it_is_drawn_with(hashes):
    some = np.random.default_rng(0).permutation(IMAGES)[:100]
    assert np.array_equal(draws(hashes)[some], draws(hashes[some]))
    labels = np.arange(IMAGES) % 7
    whole = pairs.negatives(hashes, labels, seed=1, epoch=2)
    assert np.array_equal(whole[some], pairs.negatives(hashes[some], labels, seed=1, epoch=2))


def test_another_process_draws_the_same():
    code = "from cca_core import pairs; h = pairs.id_hashes(['a', 'b']); print(repr(pairs.order(h, seed=1, epoch=0)), "
    code += "pairs.uniform(h, seed=1, epoch=2, purpose=pairs.Purpose.VIEW).tolist())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    h = pairs.id_hashes(["a", "b"])
    assert outputs == {
        f"{pairs.order(h, seed=1, epoch=0)!r} {draws(h, seed=1, epoch=2, purpose=Purpose.VIEW).tolist()}\n"
    }


def test_null_masks_and_held_out_sets_are_nested(hashes):
    u = draws(hashes)
    assert not ((u < 0.1) & ~(u < 0.2)).any()
    small, large = pairs.held_out(hashes, 0.2), pairs.held_out(hashes, 0.3)
    assert small.mean() == pytest.approx(0.2, abs=0.015)
    assert not (small & ~large).any()


def test_negatives_follow_the_labels_of_the_whole_data_set(hashes):
    shares = np.array([0.7, 0.2, 0.1])
    labels = np.repeat(np.arange(3), (shares * IMAGES).astype(int))
    negatives = pairs.negatives(hashes, labels, seed=0, epoch=0)
    assert negatives.dtype == np.int64
    np.testing.assert_allclose(np.bincount(negatives, minlength=3) / IMAGES, shares, atol=0.02)
    assert (negatives == labels).mean() == pytest.approx((shares**2).sum(), abs=0.02)
    assert correlation(negatives, pairs.negatives(hashes, labels, seed=0, epoch=1)) < 0.035


@pytest.mark.parametrize("num_views", [1, 2, 10])
def test_every_view_is_as_likely(hashes, num_views):
    counts = np.bincount(pairs.views(hashes, num_views, seed=0, epoch=3), minlength=num_views)
    assert len(counts) == num_views
    np.testing.assert_allclose(counts / IMAGES, 1 / num_views, atol=0.02)


def test_an_epoch_is_a_permutation_and_each_epoch_another(hashes):
    first, second = (pairs.order(hashes, seed=0, epoch=epoch) for epoch in (0, 1))
    assert np.array_equal(np.sort(first), np.arange(IMAGES))
    assert correlation(first, second) < 0.035
    assert correlation(first, np.arange(IMAGES)) < 0.035


def test_rows_with_equal_ids_keep_their_order():
    assert pairs.order(pairs.id_hashes(["same"] * 5), seed=0, epoch=0).tolist() == [0, 1, 2, 3, 4]


def test_the_uniforms_of_a_sequence_depend_on_its_seed_alone():
    seeds = np.array([3, 1 << 40, -1, 3])
    uniforms = pairs.sequence_uniforms(seeds, 10)
    assert uniforms.shape == (4, 10)
    assert uniforms.dtype == np.float64
    assert ((uniforms >= 0) & (uniforms < 1)).all()
    assert np.array_equal(uniforms[0], uniforms[3])
    assert len(np.unique(uniforms[:3])) == 30
    assert np.array_equal(pairs.sequence_uniforms(seeds[1:2], 7), uniforms[1:2, :7]), "a prefix of the longer one"
    assert np.array_equal(pairs.sequence_uniforms(seeds[:1], 1 << 12)[:, :10], uniforms[:1])


def test_the_uniforms_of_neighbouring_seeds_are_unrelated():
    uniforms = pairs.sequence_uniforms(np.arange(2000), 16)
    assert np.histogram(uniforms, bins=10, range=(0, 1))[0] / uniforms.size == pytest.approx([0.1] * 10, abs=0.01)
    assert correlation(uniforms[:-1].ravel(), uniforms[1:].ravel()) < 0.03
    assert correlation(uniforms[:, :-1].ravel(), uniforms[:, 1:].ravel()) < 0.03
