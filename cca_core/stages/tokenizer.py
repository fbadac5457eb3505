"""Reads images (or a checkpoint), writes tokenizer/: a bundle with the tokenizer alone, and a picture of
reconstructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from cca_core.bundle import INFO_NAME, TOKENIZER_NAME
from cca_core.config import Recipe
from cca_core.generate import decode_images
from cca_core.manifest import Manifest
from cca_core.models import ImageTokenizer, family, load_tokenizer, to_uint8
from cca_core.stages.inputs import tokenizer_arguments
from cca_core.stages.run import Context
from cca_core.store import StageDirectory
from cca_core.train.distributed import pick_device
from cca_core.train.jobs import CURVE_NAME, bundle_info, write_bundle
from cca_core.train.tokenizer import train_tokenizer
from cca_core.workers.images import grid_png, load_images

PICTURE = "reconstructions.png"
#: Held-out images in it.
SHOWN = 12


def run(stage: str, context: Context) -> Manifest:
    directory, recipe = context.directory(stage), context.recipe
    names = [INFO_NAME, TOKENIZER_NAME]
    if recipe.tokenizer.checkpoint:
        facts = context.executor.call(import_tokenizer, {"directory": directory, "recipe": recipe})
    else:
        arguments = {"directory": directory, "recipe": recipe, "source": context.source()}
        facts = context.executor.call(train, arguments)
        names += [CURVE_NAME, PICTURE]
    return context.commit(stage, context.entries(stage, names), facts=facts)


def import_tokenizer(*, on_log: Callable[..., None], directory: StageDirectory, recipe: Recipe) -> dict[str, Any]:
    """Read the recipe's tokenizer checkpoint and write it as a bundle."""
    del on_log
    tokenizer = load_tokenizer(recipe.tokenizer.checkpoint, **tokenizer_arguments(recipe))
    write_bundle(directory, bundle_info(None, tokenizer, recipe, (), {}), None, tokenizer)
    return {"imported": 1}


def train(
    *, on_log: Callable[..., None], directory: StageDirectory, recipe: Recipe, source: StageDirectory
) -> dict[str, Any]:
    """Train the small tokenizer on the training images and write it with its curve and a picture."""
    images = load_images(recipe, source)
    curve: list[dict[str, float]] = []

    def on_epoch(record: dict[str, float]) -> None:
        curve.append(record)
        on_log({"step": record["epoch"], **record})

    tokenizer, facts = train_tokenizer(
        torch.from_numpy(images.pixels),
        torch.from_numpy(images.held_out),
        recipe.tokenizer,
        family(recipe.family),
        seed=recipe.seed,
        device=pick_device(recipe.execution.device),
        on_epoch=on_epoch,
        on_log=on_log,
    )
    write_bundle(directory, bundle_info(None, tokenizer, recipe, images.class_names, {}), None, tokenizer)
    directory.write_json(CURVE_NAME, curve)
    directory.write_bytes(
        PICTURE, reconstruction_grid(tokenizer, images.pixels[np.flatnonzero(images.held_out)[:SHOWN]])
    )
    return facts


def reconstruction_grid(tokenizer: ImageTokenizer, pixels_NCHW: np.ndarray) -> bytes:
    """A PNG of images above their reconstructions."""
    shown = torch.from_numpy(pixels_NCHW)
    device = next(tokenizer.parameters()).device
    with torch.inference_mode():
        tokens = tokenizer.encode(shown.to(device).float() / 127.5 - 1)
    decoded = to_uint8(decode_images(tokenizer, tokens)).numpy()
    return grid_png([shown.permute(0, 2, 3, 1).numpy(), decoded])
