"""Reads token data sets written here: which rows a global step holds, and what a micro-batch says of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.dataset
import pytest
import torch
from numpy.typing import NDArray

from cca_core import pairs
from cca_core.dataset import TokenDataset
from cca_core.objectives import Batch
from cca_core.pairs import Purpose
from cca_core.store import StageDirectory
from cca_core.train.batches import BatchSource

NULL_LABEL = 3


@pytest.fixture(scope="module")
def directory(tmp_path_factory, write_tokens) -> StageDirectory:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def dataset(directory) -> TokenDataset:
    return TokenDataset(directory)


def source(dataset: TokenDataset, **changes) -> BatchSource:
    default = {"seed": 5, "global_batch_size": 16, "micro_batch_size": 5, "null_label": NULL_LABEL, "null_share": 0.0}
    return BatchSource(dataset, **{**default, "null_purpose": Purpose.NULL, **changes})


def real_rows(batches: BatchSource, step: int, *, world_size: int = 1) -> dict[str, torch.Tensor]:
    """The rows of weight 1 of a step, in the order of the step."""
    numbered = [
        pair for rank in range(world_size) for pair in batches.micro_batches(step, rank=rank, world_size=world_size)
    ]
    parts = [batch for _, batch in sorted(numbered, key=lambda pair: pair[0])]
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    return {name: torch.cat([getattr(part, name)[part.weight_B > 0] for part in parts]) for name in names}


def views_of(dataset: TokenDataset, images: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
    return pairs.views(dataset.hashes_N[images], dataset.num_views, seed=5, epoch=epoch)


def test_the_rows_of_a_step_are_its_slice_of_the_permutation(dataset):
    batches = source(dataset)
    train = np.flatnonzero(~dataset.held_out_N)
    assert 32 < len(train) < 60
    assert batches.steps_per_epoch == -(-len(train) // 16)
    for epoch in (0, 1):
        expected = train[pairs.order(dataset.hashes_N[train], seed=5, epoch=epoch)]
        steps = range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch)
        for within, step in enumerate(steps):
            assert batches.images(step).tolist() == expected[within * 16 : (within + 1) * 16].tolist()
        assert sorted(np.concatenate([batches.images(step) for step in steps])) == train.tolist()
    assert batches.images(0).tolist() != batches.images(batches.steps_per_epoch).tolist()
    assert batches.images(0).tolist() != source(dataset, seed=6).images(0).tolist()


def test_rows_carry_the_tokens_of_their_view_and_their_label(directory, dataset):
    batches = source(dataset)
    written = pyarrow.dataset.dataset(directory.path, format="ipc").to_table().column("tokens").to_pylist()
    for step in (1, batches.steps_per_epoch + 1):
        epoch, images = step // batches.steps_per_epoch, batches.images(step)
        rows = real_rows(batches, step)
        views = views_of(dataset, images, epoch)
        assert set(views) == {0, 1}
        for tokens, image, view in zip(rows["tokens_BL"].numpy(), images, views, strict=True):
            assert tokens.tolist() == written[2 * image + view]
        assert rows["tokens_BL"].dtype == torch.int64
        assert rows["pos_cond_B"].tolist() == dataset.labels_N[images].tolist()
        assert rows["tokens_BL"][:, 0].tolist() == rows["pos_cond_B"].tolist()


def test_negatives_are_labels_of_the_whole_data_set(dataset):
    batches, images = source(dataset), source(dataset).images(0)
    draw = pairs.uniform(dataset.hashes_N[images], seed=5, epoch=0, purpose=Purpose.NEGATIVE)
    expected = [dataset.labels_N[int(u * len(dataset))] for u in draw]
    rows = real_rows(batches, 0)
    assert rows["neg_cond_B"].tolist() == expected
    assert 0 < (rows["neg_cond_B"] != rows["pos_cond_B"]).sum() < 16


def test_the_last_short_batch_is_kept(dataset):
    batches = source(dataset)
    left = len(batches.train_images) % 16
    assert left
    last = batches.steps_per_epoch - 1
    assert len(batches.images(last)) == left == len(real_rows(batches, last)["weight_B"])


@pytest.mark.parametrize("micro_batch_size", [1, 3, 5, 16, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_workers_and_micro_batches_deal_the_same_rows(dataset, micro_batch_size, world_size):
    whole = source(dataset, micro_batch_size=16, null_share=0.3)
    dealt = source(dataset, micro_batch_size=micro_batch_size, null_share=0.3)
    for step in (0, whole.steps_per_epoch - 1, whole.steps_per_epoch):
        expected, found = real_rows(whole, step), real_rows(dealt, step, world_size=world_size)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        ranks = [list(dealt.micro_batches(step, rank=r, world_size=world_size)) for r in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1, "collectives match"
        numbers = sorted(number for rank in ranks for number, _ in rank)
        assert numbers == list(range(len(numbers)))
        shapes = {batch.tokens_BL.shape for rank in ranks for _, batch in rank}
        assert shapes == {(min(micro_batch_size, 16), 16)}, "one shape for all"


def test_padding_has_weight_0_and_is_a_row_of_the_step(dataset):
    batches = source(dataset, micro_batch_size=6)
    step = batches.steps_per_epoch - 1
    images = batches.images(step)
    micro = [batch for _, batch in batches.micro_batches(step, rank=0, world_size=1)]
    assert sum(float(batch.weight_B.sum()) for batch in micro) == len(images)
    last = micro[-1]
    real = len(images) % 6
    assert last.weight_B.tolist() == [1.0] * real + [0.0] * (6 - real)
    # Finite whatever the reference lacks: held-out rows have none.
    first = micro[0].tokens_BL[0]
    assert all(torch.equal(row, first) for row in last.tokens_BL[real:])


def test_a_rank_without_rows_runs_a_micro_batch_of_weight_0(dataset):
    batches = source(dataset, micro_batch_size=16)
    ((_, idle),) = batches.micro_batches(0, rank=2, world_size=3)
    assert idle.weight_B.tolist() == [0.0] * 16
    assert idle.tokens_BL.shape == (16, 16)


def test_null_rows_are_null_on_both_sides(dataset):
    batches = source(dataset, null_share=0.3)
    rows = real_rows(batches, 0)
    images = batches.images(0)
    draw = pairs.uniform(dataset.hashes_N[images], seed=5, epoch=0, purpose=Purpose.NULL)
    assert rows["null_B"].tolist() == (draw < 0.3).tolist()
    null = rows["null_B"]
    assert 0 < null.sum() < 16
    assert (rows["pos_cond_B"][null] == NULL_LABEL).all()
    assert (rows["neg_cond_B"][null] == NULL_LABEL).all()
    without = real_rows(source(dataset), 0)
    for name in ("pos_cond_B", "neg_cond_B"):
        assert torch.equal(rows[name][~null], without[name][~null])
        assert (without[name] != NULL_LABEL).all()
    more = real_rows(source(dataset, null_share=0.6), 0)["null_B"]
    assert (more | ~null).all()
    assert more.sum() > null.sum()


def test_label_dropout_is_a_stream_of_its_own_and_another_in_each_epoch(dataset):
    null = source(dataset, null_share=0.3, global_batch_size=60)
    dropout = source(dataset, null_share=0.3, global_batch_size=60, null_purpose=Purpose.LABEL_DROPOUT)
    first, second = real_rows(dropout, 0)["null_B"], real_rows(dropout, 1)["null_B"]
    images = dropout.images(0)
    draw = pairs.uniform(dataset.hashes_N[images], seed=5, epoch=0, purpose=Purpose.LABEL_DROPOUT)
    assert first.tolist() == (draw < 0.3).tolist()
    assert first.tolist() != real_rows(null, 0)["null_B"].tolist()
    by_image = dict(zip(images, first.tolist(), strict=True))
    assert [by_image[image] for image in dropout.images(1)] != second.tolist()


class RowNumbers:
    """A reference that says which images it was asked for."""

    def fill(self, batch: Batch, epoch: int, images: NDArray[np.int64]) -> Batch:
        assert len(images) == len(batch.weight_B)
        asked = torch.from_numpy(images).float()
        return replace(batch, ref_pos_B=asked, ref_neg_B=asked + 1000 * epoch)


def test_the_reference_is_asked_for_the_rows_of_the_batch(dataset):
    batches = source(dataset, reference=RowNumbers())
    step = batches.steps_per_epoch + 1
    rows = real_rows(batches, step)
    assert rows["ref_pos_B"].tolist() == batches.images(step).tolist()
    assert rows["ref_neg_B"].tolist() == (batches.images(step) + 1000).tolist()
    assert "ref_pos_B" not in real_rows(source(dataset), step)
