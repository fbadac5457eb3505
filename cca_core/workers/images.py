"""Reads raw images or recorded codes from a source, decodes them; writes nothing, or a PNG of images side by side."""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from cca_core import pairs
from cca_core.config import ConfigError, Recipe
from cca_core.dataset import read_source
from cca_core.generate import BATCH_SIZE, decode_images
from cca_core.models import load_tokenizer, to_uint8
from cca_core.sources import Source, open_source
from cca_core.store import StageDirectory
from cca_core.train.distributed import pick_device
from cca_core.workers.codes import read_codes
from cca_core.workers.decode import DecodedImage, decode_views

#: Decoded images that take more than this lie in a file.
IN_MEMORY_BYTES = 1 << 30
#: What real images are where the source has codes; stands in facts and reports.
RECONSTRUCTIONS = "reconstructions, decoded from recorded codes"


def decode_codes(source: Source, listing: pa.Table, recipe: Recipe, tokenizer_uri: str) -> Iterator[DecodedImage]:
    """The reconstruction of the centre view of each image in a slice of a listing of codes, as its only view."""
    config = recipe.tokens
    tokenizer = load_tokenizer(tokenizer_uri, device=str(pick_device(recipe.execution.device)))
    shape = {"num_views": config.num_views, "num_tokens": tokenizer.spec.num_tokens(config.image_size)}
    for start in range(0, listing.num_rows, BATCH_SIZE):
        part = listing.slice(start, BATCH_SIZE)
        found = list(read_codes(source, part, **shape, codebook_size=tokenizer.spec.codebook_size))
        centres = [image.tokens_VL[config.centre_view] for image in found if not image.error]
        pixels = iter(to_uint8(decode_images(tokenizer, torch.from_numpy(np.stack(centres))))) if centres else iter(())
        for image in found:
            nothing = np.empty((0, config.image_size, config.image_size, 3), np.uint8)
            views = nothing if image.error else next(pixels).numpy()[None]
            yield DecodedImage(image.id, image.uri, image.label, views, image.error)


@dataclass(frozen=True)
class LoadedImages:
    """View 0 (of codes, the centre one) of every readable image: pixels uint8 [N, 3, S, S], labels [N], held-out mask
    [N]. Large ones lie in a temporary file that the system pages in, so that rows should be asked for in batches."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    class_names: tuple[str, ...]


def load_images(recipe: Recipe, kept: StageDirectory, tokenizer_uri: str = "") -> LoadedImages:
    """Decode the whole source (its listing is in ``kept``), for the trainers of tokenizer and classifier.

    Where the source has codes, these are reconstructions of the centre view, by the tokenizer at ``tokenizer_uri``.

    Raises ConfigError where no image is readable, or training or held-out images of it are missing, or where they do
    not fit on the disk of the temporary folder.
    """
    source = open_source(recipe.source)
    listing, class_names = read_source(kept)
    ids, labels = [], []
    pixels = _room((listing.num_rows, 3, recipe.tokens.image_size, recipe.tokens.image_size))
    from_codes = recipe.source.kind == "codes"
    images = (
        decode_codes(source, listing, recipe, tokenizer_uri)
        if from_codes
        else decode_views(source, listing, recipe.tokens)
    )
    for image in images:
        if not image.error:
            pixels[len(ids)] = image.views_VSS3[0].transpose(2, 0, 1)
            ids.append(image.id)
            labels.append(image.label)
    if not ids:
        raise ConfigError(
            f"no readable image among the {len(listing)} of {recipe.source.uri or recipe.source.kind}: "
            f"check that source.uri points at {'codes' if from_codes else 'PNG, JPEG, WebP, BMP, GIF or TIFF'} files"
        )
    held_out = pairs.held_out(pairs.id_hashes(ids), recipe.source.held_out_fraction)
    if held_out.all() or not held_out.any():
        raise ConfigError(
            f"{len(ids)} images are too few to hold out a share of {recipe.source.held_out_fraction}: add images"
        )
    return LoadedImages(pixels[: len(ids)], np.asarray(labels, np.int64), held_out, class_names)


def _room(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Room for images: memory, or a file that goes with the process."""
    size = math.prod(shape)
    if size <= IN_MEMORY_BYTES:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:  # the mapping keeps it
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full says so here, and not in the middle
        except OSError as error:
            raise ConfigError(
                f"the decoded images take {size / 1e9:.1f} GB in the temporary folder {tempfile.gettempdir()} "
                f"({error.strerror}): point TMPDIR at a larger disk, or take fewer images (source.fraction)"
            ) from error
        return np.memmap(file, np.uint8, "r+", shape=shape)


def grid_png(rows: list[NDArray[np.uint8]], *, min_side: int = 32) -> bytes:
    """Rows of uint8 images [n, S, S, 3] as one PNG; small images are enlarged by a whole factor."""
    height, width = rows[0].shape[1:3]
    factor = max(1, -(-min_side // height))
    gap = 2
    columns = max(len(row) for row in rows)
    canvas = np.full(
        (len(rows) * (height * factor + gap) + gap, columns * (width * factor + gap) + gap, 3), 255, np.uint8
    )
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = gap + r * (height * factor + gap), gap + c * (width * factor + gap)
            large = image.repeat(factor, 0).repeat(factor, 1)
            canvas[top : top + large.shape[0], left : left + large.shape[1]] = large
    out = io.BytesIO()
    Image.fromarray(canvas).save(out, format="PNG")
    return out.getvalue()
