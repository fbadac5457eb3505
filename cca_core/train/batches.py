"""Reads a token data set and, for alignment, its reference: the micro-batches of a global step, for any number
of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cca_core import pairs
from cca_core.dataset import ReferenceColumns, TokenDataset
from cca_core.models.conditions import ClassConditions, Conditions, scorer
from cca_core.objectives.base import Batch, sequence_logps
from cca_core.train.distributed import autocast

T = TypeVar("T")


class Reference(Protocol):
    """Fills the reference columns of a batch."""

    def fill(self, batch: Batch, epoch: int, images: NDArray[np.int64]) -> Batch: ...


@dataclass(frozen=True)
class CachedReference:
    """Columns written once by the reference stage; training never holds the frozen model."""

    columns: ReferenceColumns

    def fill(self, batch: Batch, epoch: int, images: NDArray[np.int64]) -> Batch:
        pos, neg = self.columns.lookup(epoch, images, batch.null_B.numpy())
        return replace(batch, ref_pos_B=torch.from_numpy(pos), ref_neg_B=torch.from_numpy(neg))


@dataclass(frozen=True)
class OnlineReference:
    """The frozen model in the loop: the same columns, computed when they are needed."""

    model: nn.Module
    conditions: Conditions = field(default_factory=ClassConditions)
    precision: str = "float32"

    @torch.no_grad()
    def fill(self, batch: Batch, epoch: int, images: NDArray[np.int64]) -> Batch:
        device = next(self.model.parameters()).device
        with autocast(device, self.precision):
            pos, neg = sequence_logps(scorer(self.model, self.conditions), to_device(batch, device))
        return replace(batch, ref_pos_B=pos.cpu(), ref_neg_B=neg.cpu())


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device; copied to a GPU while it computes."""
    tensors = {name: value for name, value in vars(batch).items() if value is not None}
    if device.type == "cuda":
        tensors = {name: value.pin_memory() for name, value in tensors.items()}
    return replace(batch, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made by another thread while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(next, items, None)
        while (item := made.result()) is not None:
            made = pool.submit(next, items, None)
            yield item


class BatchSource:
    """The batches of training. Step s of an epoch holds rows order(seed, epoch)[s*G : (s+1)*G], for any world size.

    Args:
        null_share: share of rows under the null condition.
        null_purpose: the stream that decides which: NULL in alignment, LABEL_DROPOUT for the base.
        reference: None where the objective needs no reference.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        null_label: int,
        null_share: float,
        null_purpose: pairs.Purpose,
        reference: Reference | None = None,
    ) -> None:
        self.dataset, self.seed, self.reference = dataset, seed, reference
        self.global_batch_size = global_batch_size
        self.micro_batch_size = min(micro_batch_size, global_batch_size)
        self.null_label, self.null_share, self.null_purpose = null_label, null_share, null_purpose
        self.train_images = dataset.train_images
        self.steps_per_epoch = -(-len(self.train_images) // global_batch_size)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def images(self, step: int) -> NDArray[np.int64]:
        """The images of a global step; the last step of an epoch may be short."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            hashes = self.dataset.hashes_N[self.train_images]
            self._order = (
                epoch,
                self.train_images[pairs.order(hashes, seed=self.seed, epoch=epoch)],
            )
        return self._order[1][within * self.global_batch_size : (within + 1) * self.global_batch_size]

    def num_micro_batches(self, step: int, world_size: int) -> int:
        """Micro-batches of every rank in a step."""
        return -(-len(self.images(step)) // (self.micro_batch_size * world_size))

    def micro_batches(self, step: int, *, rank: int, world_size: int) -> Iterator[tuple[int, Batch]]:
        """This rank's micro-batches of a step with their numbers, dealt round robin.

        Every rank gets the same count: one without rows runs a micro-batch of weight zero, so that collectives match.
        """
        images = self.images(step)
        epoch = step // self.steps_per_epoch
        for round_ in range(self.num_micro_batches(step, world_size)):
            number = round_ * world_size + rank
            mine = images[number * self.micro_batch_size : (number + 1) * self.micro_batch_size]
            yield number, self._batch(epoch, mine, filler=images[:1])

    def _batch(self, epoch: int, images: NDArray[np.int64], filler: NDArray[np.int64]) -> Batch:
        weight = np.zeros(self.micro_batch_size, np.float32)
        weight[: len(images)] = 1.0
        images = np.concatenate([images, np.repeat(filler, self.micro_batch_size - len(images))])
        dataset = self.dataset
        hashes, labels = dataset.hashes_N[images], dataset.labels_N[images]
        views = pairs.views(hashes, dataset.num_views, seed=self.seed, epoch=epoch)
        negatives = pairs.negatives(hashes, dataset.labels_N, seed=self.seed, epoch=epoch)
        null = pairs.uniform(hashes, seed=self.seed, epoch=epoch, purpose=self.null_purpose) < self.null_share
        batch = Batch(
            tokens_BL=torch.from_numpy(dataset.tokens(images, views)),
            pos_cond_B=torch.from_numpy(np.where(null, self.null_label, labels)),
            neg_cond_B=torch.from_numpy(np.where(null, self.null_label, negatives)),
            null_B=torch.from_numpy(null),
            weight_B=torch.from_numpy(weight),
        )
        return self.reference.fill(batch, epoch, images) if self.reference is not None else batch
