"""Reads a bundle and the classifier, draws samples straight into features; writes feature shards and one picture."""

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
from cca_core.metrics.features import Classifier, load_classifier
from cca_core.models import ARImageModel, ImageTokenizer, load_model, load_tokenizer, to_uint8
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


def image_features(classifier: Classifier, images_NCHW: Tensor, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] and logits [N, K], float32, in padded batches of one shape."""
    device = next(classifier.parameters()).device
    features, logits = [], []
    with torch.inference_mode():
        for rows in padded_batches(len(images_NCHW), batch_size):
            out = classifier(pad_rows(images_NCHW[rows], batch_size).to(device))
            count = rows.stop - rows.start
            features.append(out[0][:count].cpu())
            logits.append(out[1][:count].cpu())
    return torch.cat(features).numpy(), torch.cat(logits).numpy()


def features_table(labels: np.ndarray, features: np.ndarray, logits: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "label": labels.astype(np.int32),
            "features": pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1]),
            "logits": pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1]),
        },
        schema=features_schema(features.shape[1], logits.shape[1]),
    )


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
        self.device = pick_device(recipe.execution.device)
        self.classifier = load_classifier(features).to(self.device)
        self._models: dict[str, tuple[ARImageModel, ImageTokenizer]] = {}

    def run(self, *, sampler: int, seed: int, start: int, stop: int) -> dict[str, Any]:
        chosen = self.samplers[sampler]
        model, tokenizer = self._load(chosen.bundle_uri)
        size = self.recipe.evaluate.batch_size
        classes = sample_classes(start, stop, self.classes)
        tokens = generate(model, classes, chosen.sampling, sample_seeds(seed, start, stop), batch_size=size)
        images = decode_images(tokenizer, tokens, batch_size=size)
        features, logits = image_features(self.classifier, images, size)
        if start == 0 and seed == self.recipe.evaluate.seeds[0]:
            columns = len(self.classes)
            count = min(columns * GRID_ROWS, len(images))
            pixels = to_uint8(images[:count]).numpy()
            rows = [pixels[i : i + columns] for i in range(0, count, columns)]
            self.directory.write_bytes(grid_file(sampler), grid_png(rows))
        name = shard_file(sampler, seed, start, stop)
        entry = self.directory.write_table(name, features_table(classes.numpy(), features, logits))
        return report(name, entry)

    def _load(self, uri: str) -> tuple[ARImageModel, ImageTokenizer]:
        if uri not in self._models:
            device = str(self.device)
            self._models[uri] = load_model(uri, device=device), load_tokenizer(uri, device=device)
        return self._models[uri]
