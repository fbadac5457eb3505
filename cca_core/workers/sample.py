"""Reads a bundle and the feature network, draws samples straight into features; writes feature shards and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cca_core.config import Recipe
from cca_core.generate import Sampling, decode_images, generate, pad_rows, padded_batches
from cca_core.metrics.network import FeatureNetwork, load_network
from cca_core.models import ARImageModel, ImageTokenizer, load_to_draw, load_tokenizer, to_uint8
from cca_core.schema import features_schema
from cca_core.store import StageDirectory, shard_name
from cca_core.train.distributed import pick_device
from cca_core.workers.images import grid_png
from cca_core.workers.ranges import RangeWorker, report

#: Rows of pictures per class in a sampler's grid.
GRID_ROWS = 4


@dataclass(frozen=True)
class Sampler:
    """One row of the evaluation table: a model (a bundle) and how it is sampled."""

    label: str
    bundle_uri: str
    sampling: Sampling


def shard_file(sampler: int, seed: int, start: int, stop: int) -> str:
    return f"s{sampler:02d}/seed{seed}/{shard_name(start, stop)}"


def grid_file(sampler: int) -> str:
    return f"grid-s{sampler:02d}.png"


def sample_classes(start: int, stop: int, classes: Sequence[int]) -> Tensor:
    """Sample i is drawn for class i mod K of those that have images."""
    return torch.tensor(classes)[torch.arange(start, stop) % len(classes)]


def sample_seeds(seed: int, start: int, stop: int) -> Tensor:
    """Sequence seeds: equal for all samplers, so that tables and pictures compare like with like."""
    return seed * (1 << 32) + torch.arange(start, stop)


def sample_ids(seed: int, start: int, stop: int) -> np.ndarray:
    """Ids of samples for the metrics, uint64: those of all seeds differ."""
    return sample_seeds(seed, start, stop).numpy().astype(np.uint64)


def image_features(network: FeatureNetwork, images_NCHW: Tensor, batch_size: int) -> dict[str, np.ndarray]:
    """What the network says of images in [-1, 1], float32 rows by column, in padded batches of one shape."""
    found: dict[str, list[Tensor]] = {}
    for rows in padded_batches(len(images_NCHW), batch_size):
        outputs = network(pad_rows(images_NCHW[rows], batch_size))
        for name, values in outputs.columns().items():
            found.setdefault(name, []).append(values[: rows.stop - rows.start].cpu())
    return {name: torch.cat(parts).numpy() for name, parts in found.items()}


def features_table(labels: np.ndarray, columns: dict[str, np.ndarray]) -> pa.Table:
    """One row per image; ``columns`` are those of ``image_features``."""
    arrays = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        for name, values in columns.items()
    }
    schema = features_schema({name: values.shape[1] for name, values in columns.items()})
    return pa.table({"label": labels.astype(np.int32), **arrays}, schema=schema)


class Drawer:
    """Draws samples by their numbers, the same whatever they are drawn with; models stay loaded."""

    def __init__(self, recipe: Recipe, classes: Sequence[int]) -> None:
        self.classes, self.batch_size = classes, recipe.evaluate.batch_size
        self.device = pick_device(recipe.execution.device)
        self._models: dict[str, tuple[ARImageModel, ImageTokenizer]] = {}

    def __call__(self, sampler: Sampler, seed: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Classes [n] and images [n, 3, S, S] in [-1, 1]."""
        model, tokenizer = self._load(sampler.bundle_uri)
        stop = int(numbers.max()) + 1
        classes = sample_classes(0, stop, self.classes)[numbers]
        seeds = sample_seeds(seed, 0, stop)[numbers]
        tokens = generate(model, classes, sampler.sampling, seeds, batch_size=self.batch_size)
        return classes, decode_images(tokenizer, tokens, batch_size=self.batch_size)

    def _load(self, uri: str) -> tuple[ARImageModel, ImageTokenizer]:
        if uri not in self._models:
            device = str(self.device)
            self._models[uri] = load_to_draw(uri, device=device), load_tokenizer(uri, device=device)
        return self._models[uri]


class SampleShard(RangeWorker):
    """Draws samples start..stop-1 of one sampler and seed, and writes their features."""

    def __init__(
        self,
        directory: StageDirectory,
        recipe: Recipe,
        samplers: list[Sampler],
        features: StageDirectory,
        classes: Sequence[int],
        num_threads: int,
    ) -> None:
        torch.set_num_threads(num_threads)
        self.directory, self.recipe, self.samplers, self.classes = directory, recipe, samplers, classes
        self.draw = Drawer(recipe, classes)
        self.network = load_network(features, recipe.features).to(self.draw.device)

    def run(self, *, sampler: int, seed: int, start: int, stop: int) -> dict[str, Any]:
        classes, images = self.draw(self.samplers[sampler], seed, torch.arange(start, stop))
        features = image_features(self.network, images, self.recipe.evaluate.batch_size)
        if start == 0 and seed == self.recipe.evaluate.seeds[0]:
            columns = len(self.classes)
            count = min(columns * GRID_ROWS, len(images))
            pixels = to_uint8(images[:count]).numpy()
            rows = [pixels[i : i + columns] for i in range(0, count, columns)]
            self.directory.write_bytes(grid_file(sampler), grid_png(rows))
        name = shard_file(sampler, seed, start, stop)
        entry = self.directory.write_table(name, features_table(classes.numpy(), features))
        return report(name, entry)
