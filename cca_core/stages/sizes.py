"""Reads a recipe (and the source's listing, where it is there), writes nothing: how large a run will be."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from cca_core.bundle import is_bundle
from cca_core.config import ConfigError, Recipe
from cca_core.generate import Sampling, calls_per_image
from cca_core.models import family
from cca_core.models.load import read_spec
from cca_core.schema import REFERENCE, token_dtype
from cca_core.sources import open_source
from cca_core.stages.expected import released_spec
from cca_core.stages.inputs import tokenizer_spec
from cca_core.train.memory import Spread, StepOptions, num_parameters, spread

#: Mean bytes of an image's id where the images are not there, as ImageNet's are: n01440764/n01440764_10026.
ID_BYTES = 25


@dataclass(frozen=True)
class Sizes:
    """What can be known of a run before it: numbers per image and, where ``num_images`` is known (else 0), in all."""

    num_images: int
    #: The images are there and were counted.
    counted: bool
    num_views: int
    num_tokens: int
    model_parameters: int
    tokenizer_parameters: int
    #: Of tokens/, all views; of reference/, all epochs (0 where the reference is online).
    tokens_bytes: int
    reference_bytes: int
    #: Every image decoded, as the features stage and the tokenizer's trainer read them.
    decoded_bytes: int
    #: Model calls that one image costs, with and without guidance.
    calls_guided: int
    calls_free: int
    micro_batch_size: int
    #: Micro-batches of a worker in one optimiser step.
    micro_batches: int
    #: How the alignment step fits GPUs of the size asked for.
    spread: Spread


def plan_sizes(recipe: Recipe, *, gpu_bytes: int, missing: Collection[str] = ()) -> Sizes:
    """The sizes of a run, from released sizes (``expect``), the checkpoints, or what the recipe trains itself.

    Args:
        gpu_bytes: memory of one GPU.
        missing: recipe keys of files that are not there (``missing_files``).

    Raises ConfigError, with the remedy, where the recipe alone does not tell the sizes of a model.
    """
    chosen = family(recipe.family)
    listing, num_classes = None, len(recipe.source.class_names)
    if "source.uri" not in missing:
        listing, names = open_source(recipe.source).list()
        num_classes = len(names)
    vq = _tokenizer_spec(recipe, missing)
    num_tokens = vq.num_tokens(recipe.tokens.image_size)
    spec = _model_spec(recipe, missing, vq, num_tokens, num_classes)
    with torch.device("meta"):
        model, tokenizer = chosen.build_model(spec), chosen.build_tokenizer(vq)
    align, execution = recipe.align, recipe.execution
    num_images = _expected_images(recipe) if listing is None else len(listing)
    micro_batch_size = min(execution.micro_batch_size, align.global_batch_size)
    micro_batches = -(-align.global_batch_size // micro_batch_size)
    cached = recipe.reference.mode == "cached"
    return Sizes(
        num_images=num_images,
        counted=listing is not None,
        num_views=recipe.tokens.num_views,
        num_tokens=num_tokens,
        model_parameters=num_parameters(model),
        tokenizer_parameters=num_parameters(tokenizer),
        tokens_bytes=round(num_images * recipe.tokens.num_views * token_row_bytes(num_tokens, vq, listing)),
        reference_bytes=round(num_images * align.epochs * reference_row_bytes()) if cached else 0,
        decoded_bytes=num_images * recipe.tokens.image_size**2 * 3,
        calls_guided=calls_per_image(model, Sampling(cfg_scale=recipe.evaluate.cfg_scales[0])),
        calls_free=calls_per_image(model, Sampling()),
        micro_batch_size=micro_batch_size,
        micro_batches=-(-micro_batches // execution.max_workers),
        spread=spread(
            model,
            gpu_bytes,
            StepOptions(
                dropout=align.dropout > 0,
                frozen_model=not cached,
                checkpointing=execution.activation_checkpointing,
                bfloat16=recipe.precision == "bfloat16",
            ),
            micro_batch_size=micro_batch_size,
        ),
    )


def token_row_bytes(num_tokens: int, vq: Any, listing: pa.Table | None = None) -> float:
    """Bytes of one (image, view) in tokens/: the tokens, id and its offset, view, label, and one bit of held_out."""
    id_bytes = ID_BYTES
    if listing is not None and len(listing):
        id_bytes = pc.mean(pc.binary_length(listing.column("image_id"))).as_py()
    return num_tokens * token_dtype(vq.codebook_size).bit_width / 8 + id_bytes + 4 + 1 + 4 + 1 / 8


def reference_row_bytes() -> float:
    """Bytes of one image and epoch in reference/: the columns, and one bit for each that may be null."""
    return sum(field.type.bit_width + field.nullable for field in REFERENCE) / 8


def _expected_images(recipe: Recipe) -> int:
    known, limit = recipe.expect.images, recipe.source.limit
    return math.ceil((min(known, limit) if limit else known) * recipe.source.fraction)


def _tokenizer_spec(recipe: Recipe, missing: Collection[str]) -> Any:
    released = released_spec(recipe, "tokenizer")
    if released is None:
        _refuse_unknown("tokenizer", "tokenizer.checkpoint", missing)
    return released or tokenizer_spec(recipe)


def _model_spec(recipe: Recipe, missing: Collection[str], vq: Any, num_tokens: int, num_classes: int) -> Any:
    """The spec of the model that draws ``vq``'s codes."""
    released = released_spec(recipe, "model", num_tokens=num_tokens)
    if released is not None:
        return released
    _refuse_unknown("model", "base.checkpoint", missing)
    if uri := recipe.base.checkpoint:
        asked = {} if is_bundle(uri) else {"num_tokens": num_tokens}
        return read_spec(uri, "model", weights=recipe.base.weights, **asked)
    if not num_classes:
        raise ConfigError("the size of the model depends on the number of classes, and the images are not there")
    small = family(recipe.family).small_model_spec
    return small(recipe.base, vq, num_tokens=num_tokens, num_classes=num_classes)


def _refuse_unknown(part: str, key: str, missing: Collection[str]) -> None:
    if key in missing:
        raise ConfigError(
            f"the size of the {part} is unknown: {key} is not there, and the recipe names no released size; set "
            f"expect.{part} if it is one"
        )
