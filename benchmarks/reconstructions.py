"""Reads the storage of a study, writes a table: how far real images are from themselves once encoded and decoded, which
no sampler of these tokens gets below.

    python benchmarks/reconstructions.py .cca/cifar10 > reconstructions.md

For each training seed: 2,000 images drawn with seed 0, as they are and reconstructed, against all real images, in the
study's features.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from cca_core.__main__ import load_recipe
from cca_core.generate import decode_images
from cca_core.metrics.measure import FeatureSet, measure
from cca_core.metrics.network import load_network
from cca_core.models import load_tokenizer, to_uint8
from cca_core.stages.features import features_of, real_set
from cca_core.stages.forget import finished
from cca_core.store import StageDirectory, Store
from cca_core.workers.images import load_images

IMAGES, BATCH = 2000, 100
SHOWN = ("distance", "inception_score", "precision", "recall", "class_consistency")


def first(store: Store, stage: str) -> StageDirectory:
    """The study's own: measured bases and arms import theirs later, from the same bytes."""
    return next(directory for directory, _ in finished(store, stage))


def main() -> int:
    storage = Path(sys.argv[1])
    print(f"| seed | images | {' | '.join(SHOWN)} |\n| ---: | --- | {' | '.join('---:' for _ in SHOWN)} |")
    for file in sorted(storage.glob("seed-*.json")):
        recipe, store = load_recipe(str(file), []), Store(str(file.with_suffix("")))
        features, tokenizer = first(store, "features"), load_tokenizer(first(store, "tokenizer").uri)
        images = load_images(recipe, first(store, "source"))
        rows = np.random.default_rng(0).choice(len(images.labels), IMAGES, replace=False)
        pixels = images.pixels[rows]
        with torch.inference_mode():
            given = torch.from_numpy(pixels).float() / 127.5 - 1
            tokens = torch.cat([tokenizer.encode(part) for part in given.split(BATCH)])
        decoded = to_uint8(decode_images(tokenizer, tokens, batch_size=BATCH)).permute(0, 3, 1, 2).contiguous().numpy()
        network, real = load_network(features, recipe.features), real_set(features, "all", k=recipe.evaluate.neighbour)
        for name, shown in (("real", pixels), ("reconstructed", decoded)):
            columns = features_of(network, shown, BATCH)
            ids = np.arange(IMAGES, dtype=np.uint64)
            found = measure(real, FeatureSet(labels=images.labels[rows], ids=ids, **columns), stream=0).values
            print(f"| {recipe.seed} | {name} | {' | '.join(f'{found[key]:.3f}' for key in SHOWN)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
