"""Reads a range of tokens/ and the frozen base, writes reference log-probs: one file per epoch of that range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from cca_core import pairs
from cca_core.config import Recipe
from cca_core.dataset import TokenDataset
from cca_core.generate import pad_rows, padded_batches
from cca_core.models import load_model
from cca_core.schema import REFERENCE
from cca_core.store import StageDirectory, shard_name
from cca_core.train.distributed import autocast, pick_device
from cca_core.workers.ranges import RangeWorker, report


def shard_file(epoch: int, start: int, stop: int) -> str:
    return f"e{epoch}/{shard_name(start, stop)}"


class ScoreShard(RangeWorker):
    """Scores the images start..stop-1 of a token data set for every epoch of alignment.

    The positive log-prob of an (image, view) is computed once, however many epochs draw it; null log-probs only where
    the null draw lies below ``null_share_max``. Held-out images stay null: alignment never reads them.
    """

    def __init__(
        self, directory: StageDirectory, recipe: Recipe, tokens: StageDirectory, base_uri: str, num_threads: int
    ) -> None:
        torch.set_num_threads(num_threads)
        self.directory, self.recipe = directory, recipe
        self.dataset = TokenDataset(tokens)
        self.device = pick_device(recipe.execution.device)
        self.model = load_model(base_uri, device=str(self.device))

    def run(self, *, start: int, stop: int) -> dict[str, Any]:
        dataset, seed = self.dataset, self.recipe.seed
        images = np.arange(start, stop)
        hashes, labels = dataset.hashes_N[images], dataset.labels_N[images]
        train = ~dataset.held_out_N[images]
        null_label = np.full_like(labels, self.model.spec.null_label)
        known: dict[tuple[str, int], NDArray[np.float32]] = {}
        for epoch in range(self.recipe.align.epochs):
            view = pairs.views(hashes, dataset.num_views, seed=seed, epoch=epoch)
            negative = pairs.negatives(hashes, dataset.labels_N, seed=seed, epoch=epoch)
            null_draw = pairs.uniform(hashes, seed=seed, epoch=epoch, purpose=pairs.Purpose.NULL)
            null = null_draw < self.recipe.reference.null_share_max
            pos = self._once(known, "pos", images, view, labels, train)
            on_null = self._once(known, "null", images, view, null_label, train & null)
            table = pa.table(
                {
                    "row": images,
                    "view": view.astype(np.uint8),
                    "cond_neg": negative.astype(np.int32),
                    "ref_logp_pos": pa.array(pos, mask=~train),
                    "ref_logp_neg": pa.array(self._score(images, view, negative, train), mask=~train),
                    "ref_logp_null": pa.array(on_null, mask=~(train & null)),
                },
                schema=REFERENCE,
            )
            name = shard_file(epoch, start, stop)
            entry = self.directory.write_table(name, table)
        return report(name, entry)

    def _once(
        self,
        known: dict[tuple[str, int], NDArray[np.float32]],
        column: str,
        images: NDArray[np.int64],
        view: NDArray[np.int64],
        cond: NDArray[np.int64],
        wanted: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Log-probs that do not depend on the epoch beyond the view it draws: computed where not known yet."""
        out = np.full(len(images), np.nan, np.float32)
        for v in np.unique(view):
            values = known.setdefault((column, int(v)), np.full(len(images), np.nan, np.float32))
            new = wanted & (view == v) & np.isnan(values)
            values[new] = self._score(images, view, cond, new)[new]
            out[view == v] = values[view == v]
        return out

    @torch.inference_mode()
    def _score(
        self, images: NDArray[np.int64], view: NDArray[np.int64], cond: NDArray[np.int64], wanted: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """log p(image | cond) in nats, float32 [n], NaN where not wanted; in padded batches of one shape."""
        out = np.full(len(images), np.nan, np.float32)
        rows = np.flatnonzero(wanted)
        size = self.recipe.execution.micro_batch_size
        for part in padded_batches(len(rows), size):
            mine = rows[part]
            tokens = torch.from_numpy(self.dataset.tokens(images[mine], view[mine]))
            padded = [pad_rows(x, size).to(self.device) for x in (tokens, torch.from_numpy(cond[mine]))]
            with autocast(self.device, self.recipe.precision):
                logp = self.model(*padded)
            out[mine] = logp.sum(-1)[: len(mine)].float().cpu().numpy()
        return out
