"""Reads bundles and the content filter in safety/, draws samples again; writes their scores as shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cca_core.bundle import FILTER_NAME
from cca_core.config import Recipe
from cca_core.metrics.content_filter import ContentFilter
from cca_core.schema import SCORES
from cca_core.store import StageDirectory, shard_name
from cca_core.workers.ranges import RangeWorker, report
from cca_core.workers.sample import Drawer, Sampler


def scores_file(sampler: int, start: int, stop: int) -> str:
    return f"scores-s{sampler:02d}/{shard_name(start, stop)}"


class FilterShard(RangeWorker):
    """Draws samples start..stop-1 of one sampler's first seed again, and writes what the filter says of them."""

    def __init__(
        self,
        directory: StageDirectory,
        recipe: Recipe,
        samplers: list[Sampler],
        classes: Sequence[int],
        num_threads: int,
    ) -> None:
        torch.set_num_threads(num_threads)
        self.directory, self.samplers, self.evaluate = directory, samplers, recipe.evaluate
        self.draw = Drawer(recipe, classes)
        spec = recipe.safety.filter_spec
        assert spec is not None, "only a recipe with a filter has this work"
        data = directory.read_bytes(FILTER_NAME)
        self.filter = ContentFilter(data, spec, key="safety.filter_sha256", device=str(self.draw.device))

    def run(self, *, sampler: int, start: int, stop: int) -> dict[str, Any]:
        classes, images = self.draw(self.samplers[sampler], self.evaluate.seeds[0], torch.arange(start, stop))
        scores = self.filter.scores(images, self.evaluate.batch_size)
        columns = {"label": classes.numpy().astype(np.int32), "score": scores.numpy()}
        name = scores_file(sampler, start, stop)
        return report(name, self.directory.write_table(name, pa.table(columns, schema=SCORES)))
