"""Reads images, writes features/: the feature network (the embedded classifier, a TorchScript file, or both), what it
says of the real images as two tables, and published real statistics where the recipe names some.

Where the source has codes and no images, the real images are reconstructions: the facts say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cca_core.config import ConfigError, Recipe
from cca_core.dataset import valid_manifest
from cca_core.manifest import Manifest
from cca_core.metrics.features import SPEC_NAME, WEIGHTS_NAME, Classifier, classifier_files
from cca_core.metrics.measure import FeatureSet, RealSet
from cca_core.metrics.network import NETWORK_NAME, FeatureNetwork, scripted_network
from cca_core.stages.real_statistics import IMPORTED, STATISTICS, import_statistics, read_statistics
from cca_core.stages.run import Context
from cca_core.store import StageDirectory
from cca_core.train.classifier import train_classifier
from cca_core.train.distributed import pick_device
from cca_core.workers.images import RECONSTRUCTIONS, LoadedImages, load_images
from cca_core.workers.sample import features_table, image_features

TRAIN, HELD_OUT = "real-train.arrow", "real-held_out.arrow"
#: Images that are floating point at once.
BLOCK_IMAGES = 1024


def run(stage: str, context: Context) -> Manifest:
    directory, recipe = context.directory(stage), context.recipe
    arguments = {
        "directory": directory,
        "recipe": recipe,
        "source": context.source(),
        "tokenizer_uri": context.directory("tokenizer").uri,
    }
    facts = context.executor.call(make_features, arguments)
    if recipe.source.kind == "codes":
        facts["real_images"] = RECONSTRUCTIONS
    names = [*facts.pop("files"), TRAIN, HELD_OUT]
    return context.commit(stage, context.entries(stage, names), facts=facts)


def make_features(
    *,
    on_log: Callable[..., None],
    directory: StageDirectory,
    recipe: Recipe,
    source: StageDirectory,
    tokenizer_uri: str,
) -> dict[str, Any]:
    """Write the networks, the features of all real images, and the published statistics that the recipe names.

    Returns facts, and the names of the files beside the two tables as ``files``.
    """
    images = load_images(recipe, source, tokenizer_uri)
    facts: dict[str, Any] = {"files": []}
    classifier = scripted = None
    if not recipe.features.class_logits:
        classifier, trained = _trained_classifier(images, recipe, on_log)
        for name, data in classifier_files(classifier).items():
            directory.write_bytes(name, data)
        facts = {"files": [SPEC_NAME, WEIGHTS_NAME], **trained}
    if recipe.features.network:
        with fsspec.open(recipe.features.network, "rb") as file:
            data = file.read()
        scripted = scripted_network(data, recipe.features)
        directory.write_bytes(NETWORK_NAME, data)
        facts["files"].append(NETWORK_NAME)
        facts["network_sha256"] = recipe.features.sha256
    device, size = pick_device(recipe.execution.device), recipe.evaluate.batch_size
    network = FeatureNetwork(recipe.features, classifier, scripted).to(device)
    found = features_of(network, images.pixels, size)
    classes = len(images.class_names)
    if found["logits"].shape[1] != classes:
        raise ConfigError(
            f"features.class_logits=true, but {recipe.features.network} has {found['logits'].shape[1]} classes and the "
            f"source {classes}: set it to false, and a classifier is trained for class consistency"
        )
    for name, rows in ((TRAIN, ~images.held_out), (HELD_OUT, images.held_out)):
        columns = {column: values[rows] for column, values in found.items()}
        directory.write_table(name, features_table(images.labels[rows], columns))
    if recipe.evaluate.real_statistics:
        alone = FeatureNetwork(recipe.features, None, scripted).to(device)
        dims = {column: values.shape[1] for column, values in found.items()}
        facts["files"] += import_statistics(
            recipe.evaluate.real_statistics, directory, dims, lambda pixels: features_of(alone, pixels, size)
        )
    return facts


def _trained_classifier(
    images: LoadedImages, recipe: Recipe, on_log: Callable[..., None]
) -> tuple[Classifier, dict[str, float]]:
    return train_classifier(
        torch.from_numpy(images.pixels),
        torch.from_numpy(images.labels),
        torch.from_numpy(images.held_out),
        recipe.features,
        num_classes=len(images.class_names),
        seed=recipe.seed,
        device=str(pick_device(recipe.execution.device)),
        on_epoch=lambda record: on_log({"step": record["epoch"], **record}),
    )


def features_of(network: FeatureNetwork, pixels_NCHW: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
    """What the network says of uint8 images, by column."""
    parts = [
        image_features(network, _as_float(pixels_NCHW[start : start + BLOCK_IMAGES]), batch_size)
        for start in range(0, len(pixels_NCHW), BLOCK_IMAGES)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _as_float(pixels_NCHW: np.ndarray) -> Tensor:
    """uint8 as float32 in [-1, 1]."""
    return torch.from_numpy(pixels_NCHW).float() / 127.5 - 1


def real_set(directory: StageDirectory, real: str, *, k: int) -> RealSet:
    """The real side of the metrics: ``all`` or ``held_out`` images, or what was ``imported``.

    Args:
        k: neighbour of precision and recall.
    """
    manifest = valid_manifest(directory)
    if real != "imported":
        names = [HELD_OUT] if real == "held_out" else [TRAIN, HELD_OUT]
        return RealSet(read_features(directory, names), k=k)
    images = read_features(directory, [IMPORTED]) if IMPORTED in manifest.files else None
    statistics = read_statistics(directory) if STATISTICS in manifest.files else None
    return RealSet(images, k=k, statistics=statistics)


def read_features(directory: StageDirectory, names: list[str]) -> FeatureSet:
    """The features of the real images in these tables; valid as long as their directory is."""
    table = pa.concat_tables([directory.read_table(name) for name in names])
    return feature_set(table, np.arange(table.num_rows, dtype=np.uint64))


def feature_set(table: pa.Table, ids: np.ndarray) -> FeatureSet:
    """A features table in memory; ``ids`` are those of its rows."""

    def matrix(name: str) -> np.ndarray:
        return table.column(name).combine_chunks().flatten().to_numpy().reshape(table.num_rows, -1)

    columns = {name: matrix(name) for name in table.column_names if name != "label"}
    return FeatureSet(labels=table.column("label").to_numpy().astype(np.int64), ids=ids, **columns)
