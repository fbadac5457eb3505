"""Reads images, writes features/: the classifier, and the features of the real images as two tables.

Where the source has codes and no images, the real images are reconstructions: the facts say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cca_core.config import Recipe
from cca_core.dataset import valid_manifest
from cca_core.manifest import Manifest
from cca_core.metrics.features import SPEC_NAME, WEIGHTS_NAME, classifier_files
from cca_core.stages.run import Context
from cca_core.store import StageDirectory
from cca_core.train.classifier import train_classifier
from cca_core.train.distributed import pick_device
from cca_core.workers.images import RECONSTRUCTIONS, load_images
from cca_core.workers.sample import features_table, image_features

TRAIN, HELD_OUT = "real-train.arrow", "real-held_out.arrow"


def run(stage: str, context: Context) -> Manifest:
    directory, tokenizer_uri = context.directory(stage), context.directory("tokenizer").uri
    arguments = {
        "directory": directory,
        "recipe": context.recipe,
        "source": context.source(),
        "tokenizer_uri": tokenizer_uri,
    }
    facts = context.executor.call(train, arguments)
    if context.recipe.source.kind == "codes":
        facts["real_images"] = RECONSTRUCTIONS
    names = [SPEC_NAME, WEIGHTS_NAME, TRAIN, HELD_OUT]
    return context.commit(stage, context.entries(stage, names), facts=facts)


def train(
    *,
    on_log: Callable[..., None],
    directory: StageDirectory,
    recipe: Recipe,
    source: StageDirectory,
    tokenizer_uri: str,
) -> dict[str, Any]:
    """Train the embedded classifier; write it and the features of all real images."""
    images = load_images(recipe, source, tokenizer_uri)
    pixels = torch.from_numpy(images.pixels).float() / 127.5 - 1
    classifier, facts = train_classifier(
        pixels,
        torch.from_numpy(images.labels),
        torch.from_numpy(images.held_out),
        recipe.features,
        num_classes=len(images.class_names),
        seed=recipe.seed,
        device=str(pick_device(recipe.execution.device)),
        on_epoch=lambda record: on_log({"step": record["epoch"], **record}),
    )
    for name, data in classifier_files(classifier).items():
        directory.write_bytes(name, data)
    features, logits = image_features(classifier, pixels, recipe.evaluate.batch_size)
    for name, rows in ((TRAIN, ~images.held_out), (HELD_OUT, images.held_out)):
        directory.write_table(name, features_table(images.labels[rows], features[rows], logits[rows]))
    return facts


def real_features(directory: StageDirectory, real: str) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, D] and labels [N] of the real set that the recipe names."""
    valid_manifest(directory)
    names = [HELD_OUT] if real == "held_out" else [TRAIN, HELD_OUT]
    return columns(pa.concat_tables([directory.read_table(name) for name in names]))[:2]


def columns(table: pa.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [N, D], labels [N] and logits [N, K] of a features table."""

    def matrix(name: str) -> np.ndarray:
        return table.column(name).combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)

    return matrix("features"), table.column("label").to_numpy().astype(np.int64), matrix("logits")
