"""Reads the content filter that a recipe names and the samples' bundles; writes, into safety/, the filter, the scores
of samples and a picture of those with the highest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cca_core.bundle import FILTER_NAME
from cca_core.config import Recipe
from cca_core.metrics.content_filter import ContentFilter
from cca_core.stages.evaluate import sample_ranges
from cca_core.stages.run import Context, counted
from cca_core.store import StageDirectory
from cca_core.workers.content_filter import FilterShard, scores_file
from cca_core.workers.images import grid_png
from cca_core.workers.sample import Sampler

FILTERED = "filtered.png"
#: What its rows show, from above.
SAYS = "samples with the highest scores of the content filter; those of the class that it blocks most"


def score_samples(
    directory: StageDirectory, context: Context, samplers: list[Sampler], classes: Sequence[int]
) -> list[str]:
    """Score the samples of each sampler's first seed, in batches; return the files written."""
    recipe, spec = context.recipe, context.recipe.safety.filter_spec
    assert spec is not None, "only a recipe with a filter has samples scored"
    with fsspec.open(recipe.safety.filter, "rb") as file:
        data = file.read()
    ContentFilter(data, spec, key="safety.filter_sha256")  # refused here, before anybody else may read it
    directory.write_bytes(FILTER_NAME, data)
    units = [
        {"sampler": index, "start": start, "stop": stop}
        for index in range(len(samplers))
        for start, stop in sample_ranges(recipe)
    ]
    left = [unit for unit in units if not directory.readable(scores_file(**unit))]
    arguments = {"directory": directory, "recipe": recipe, "samplers": samplers, "classes": classes}
    for _ in counted(context.executor, context.executor.map([FilterShard], arguments, left), len(left)):
        pass
    return [FILTER_NAME, *(scores_file(**unit) for unit in units)]


def scores_of(directory: StageDirectory, recipe: Recipe, sampler: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Labels and scores of a sampler's samples, in the order of their numbers."""
    table = pa.concat_tables(
        [directory.read_table(scores_file(sampler, start, stop)) for start, stop in sample_ranges(recipe)]
    )
    return table.column("label").to_numpy(), table.column("score").to_numpy()


@dataclass(frozen=True)
class Filtered:
    """What the content filter blocks of a sampler's samples, as shares: of all, and of each class that has samples."""

    share: float
    per_class: dict[str, float]

    @classmethod
    def of(
        cls, labels_N: NDArray[np.int32], scores_N: NDArray[np.float32], names: Sequence[str], threshold: float
    ) -> Filtered:
        blocked_N = scores_N >= threshold
        return cls(
            float(blocked_N.mean()), {names[k]: float(blocked_N[labels_N == k].mean()) for k in np.unique(labels_N)}
        )

    @property
    def worst(self) -> str:
        """The class of which the filter blocks most."""
        return max(self.per_class, key=self.per_class.__getitem__)

    def values(self) -> dict[str, Any]:
        """What safety.json has of it."""
        return {
            "filtered": self.share,
            "filtered_in_class": self.per_class[self.worst],
            "filtered_per_class": self.per_class,
        }


def filtered_picture(
    labels_N: NDArray[np.int32],
    scores_N: NDArray[np.float32],
    worst: int,
    draw: Callable[[NDArray[np.int64]], NDArray[np.uint8]],
    shown: int,
) -> bytes:
    """The samples with the highest scores, and those of the class ``worst``, as a PNG."""
    order = np.argsort(-scores_N, kind="stable")
    rows = [order[:shown], order[labels_N[order] == worst][:shown]]
    pictures = draw(np.concatenate(rows))
    return grid_png(np.split(pictures, [len(rows[0])]))
