"""Reads a base's tokenizer, the feature network and the real features; measures a model in training on few samples."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cca_core.config import Recipe
from cca_core.generate import Sampling, decode_images, generate
from cca_core.metrics.measure import FeatureSet, measure
from cca_core.metrics.network import load_network
from cca_core.models import ARImageModel, load_tokenizer, to_uint8
from cca_core.stages.features import real_set
from cca_core.store import StageDirectory
from cca_core.workers.images import grid_png
from cca_core.workers.sample import GRID_ROWS, image_features, sample_classes, sample_ids, sample_seeds

#: Behind a metric of the model when it is guided all the same.
GUIDED = "_cfg"


@dataclass(frozen=True)
class _Sampled:
    values: dict[str, float]
    picture: bytes


class Judge:
    """Measures a model as the evaluation does, on fewer samples: guidance-free on all seeds; guided on the first, where
    a scale is given. ``classes`` are those that have images, ``real`` names the real set (``real_set``)."""

    def __init__(
        self,
        recipe: Recipe,
        base: StageDirectory,
        features: StageDirectory,
        classes: Sequence[int],
        seeds: Sequence[int],
        num_samples: int,
        device: torch.device,
        *,
        real: str,
        cfg_scale: float | None = None,
    ) -> None:
        self.recipe, self.classes, self.seeds, self.num_samples = recipe, classes, seeds, num_samples
        self.cfg_scale = cfg_scale
        self.tokenizer: nn.Module = load_tokenizer(base.uri, device=str(device))
        self.network = load_network(features, recipe.features).to(device)
        self.real = real_set(features, real, k=recipe.evaluate.neighbour)

    def __call__(self, model: ARImageModel) -> tuple[dict[str, float], bytes]:
        """Means over seeds by name, those of the guided model with ``GUIDED`` behind; and a picture of free ones."""
        free = [self._sample(model, Sampling(), seed) for seed in self.seeds]
        metrics = {name: statistics.fmean(one.values[name] for one in free) for name in free[0].values}
        if self.cfg_scale is not None:
            guided = self._sample(model, Sampling(cfg_scale=self.cfg_scale), self.seeds[0])
            metrics |= {f"{name}{GUIDED}": value for name, value in guided.values.items()}
        return metrics, free[0].picture

    def _sample(self, model: ARImageModel, sampling: Sampling, seed: int) -> _Sampled:
        count = self.num_samples
        size = min(self.recipe.evaluate.batch_size, count)
        classes = sample_classes(0, count, self.classes)
        tokens = generate(model, classes, sampling, sample_seeds(seed, 0, count), batch_size=size)
        images = decode_images(self.tokenizer, tokens, batch_size=size)
        columns = image_features(self.network, images, size)
        drawn = FeatureSet(labels=classes.numpy(), ids=sample_ids(seed, 0, count), **columns)
        found = measure(self.real, drawn, stream=seed).values
        return _Sampled({n: v for n, v in found.items() if isinstance(v, float)}, self._picture(images))

    def _picture(self, images_NCHW: torch.Tensor) -> bytes:
        """One column per class, as in the pictures of the evaluation."""
        columns = len(self.classes)
        count = min(columns * GRID_ROWS, len(images_NCHW))
        pixels: np.ndarray = to_uint8(images_NCHW[:count]).numpy()
        return grid_png([pixels[i : i + columns] for i in range(0, count, columns)])
