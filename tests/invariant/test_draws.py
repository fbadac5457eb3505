"""Writes a small data set: draws are functions of (seed, epoch, image id), and batches the same for any workers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from cca_core import pairs
from cca_core.dataset import TokenDataset
from cca_core.store import StageDirectory
from cca_core.train.batches import BatchSource

N = 20_000
HASHES = pairs.id_hashes([f"image-{i}" for i in range(N)])

DRAWS: dict[str, Callable[..., np.ndarray]] = {
    "view": lambda hashes, **key: pairs.views(hashes, 10, **key),
    "negative": lambda hashes, **key: pairs.negatives(hashes, np.arange(N), **key),
    **{p.name: lambda hashes, p=p, **key: pairs.uniform(hashes, purpose=p, **key) for p in pairs.Purpose},
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_is_a_function_of_its_own_image(name):
    draw = DRAWS[name]
    whole = draw(HASHES, seed=5, epoch=2)
    some = np.random.default_rng(0).permutation(N)[:500]
    assert np.array_equal(draw(HASHES[some], seed=5, epoch=2), whole[some])
    assert np.array_equal(draw(HASHES[some[:1]], seed=5, epoch=2), whole[some[:1]])
    for other in ({"seed": 6, "epoch": 2}, {"seed": 5, "epoch": 3}):
        assert (draw(HASHES, **other) == whole).mean() < 0.2


def test_the_order_of_an_epoch_does_not_depend_on_where_images_lie_or_what_else_there_is():
    some = np.random.default_rng(0).permutation(N)[:500]
    order = pairs.order(HASHES, seed=5, epoch=2)
    assert np.array_equal(np.sort(order), np.arange(N))
    chosen = set(some.tolist())
    expected = [row for row in order.tolist() if row in chosen]
    assert some[pairs.order(HASHES[some], seed=5, epoch=2)].tolist() == expected
    assert expected != [row for row in pairs.order(HASHES, seed=5, epoch=3).tolist() if row in chosen]


def test_purposes_draw_independently():
    draws = np.stack([pairs.uniform(HASHES, seed=5, epoch=2, purpose=p) for p in pairs.Purpose])
    off_diagonal = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(off_diagonal).max() < 5 / N**0.5
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.apply_along_axis(lambda u: np.histogram(u, bins=10, range=(0, 1))[0], 1, draws)
    assert (np.abs(counts - N / 10) < 5 * (N * 0.1 * 0.9) ** 0.5).all()


def test_negatives_follow_the_classes_of_the_data():
    share = np.array([0.6, 0.3, 0.1])
    labels = np.sort(np.random.default_rng(1).choice(3, size=N, p=share))  # as a folder lists them
    labels_of = np.random.default_rng(2).permutation(labels)
    negatives = pairs.negatives(HASHES, labels, seed=5, epoch=0)
    p = np.bincount(labels) / N
    assert np.abs(np.bincount(negatives) / N - p).max() < 5 * 0.5 / N**0.5
    assert abs((negatives == labels_of).mean() - (p**2).sum()) < 5 * 0.5 / N**0.5


def batches(directory: StageDirectory, *, null_share: float = 0.1, micro_batch: int = 8) -> BatchSource:
    return BatchSource(
        TokenDataset(directory),
        seed=5,
        global_batch_size=32,
        micro_batch_size=micro_batch,
        null_label=3,
        null_share=null_share,
        null_purpose=pairs.Purpose.NULL,
    )


def rows_of(source: BatchSource, step: int, world_size: int) -> list[list[Any]]:
    """The weighted rows of a global step in order, whoever holds them."""
    ranks = [list(source.micro_batches(step, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1, "collectives need as many micro-batches on every rank"
    dealt = [numbered for rank in ranks for numbered in rank]
    rows = []
    for _, batch in sorted(dealt, key=lambda numbered: numbered[0]):
        keep = batch.weight_B > 0
        columns = (batch.tokens_BL, batch.pos_cond_B, batch.neg_cond_B, batch.null_B)
        rows += [list(row) for row in zip(*(column[keep].tolist() for column in columns), strict=True)]
    return rows


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, write_tokens: Callable[..., StageDirectory]) -> StageDirectory:
    return write_tokens(tmp_path_factory.mktemp("small"), images=120)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("micro_batch", [32, 8, 5, 1])
def test_a_global_step_holds_the_same_rows_for_any_workers(small, world_size, micro_batch):
    expected, source = batches(small), batches(small, micro_batch=micro_batch)
    for step in range(2 * expected.steps_per_epoch):
        assert rows_of(source, step, world_size) == rows_of(expected, step, 1)


def test_an_epoch_meets_every_training_image_once_and_no_other(small):
    source = batches(small)
    epochs = [
        np.concatenate([source.images(e * source.steps_per_epoch + s) for s in range(source.steps_per_epoch)])
        for e in range(2)
    ]
    assert source.dataset.held_out_N.any()
    for images in epochs:
        assert np.array_equal(np.sort(images), np.flatnonzero(~source.dataset.held_out_N))
    assert not np.array_equal(*epochs)


def test_null_masks_are_nested(small):
    def null_images(share: float) -> set[int]:
        source = batches(small, null_share=share)
        return {
            int(image)
            for step in range(source.steps_per_epoch)
            for image, row in zip(source.images(step), rows_of(source, step, 1), strict=True)
            if row[3]
        }

    masks = [null_images(share) for share in (0.0, 0.1, 0.3, 0.6)]
    assert all(less < more for less, more in pairwise(masks))
    assert not masks[0]
    draws = pairs.uniform(HASHES, seed=5, epoch=0, purpose=pairs.Purpose.NULL)
    assert abs((draws < 0.1).mean() - 0.1) < 5 * (0.09 / N) ** 0.5
