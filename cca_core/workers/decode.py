"""Reads a range of a source's listing, decodes its images; writes nothing. Imports no torch: readers are many and start
fast."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from cca_core.config import Recipe, TokensConfig
from cca_core.dataset import read_source
from cca_core.schema import FOUND
from cca_core.sources import Source, open_source
from cca_core.store import StageDirectory, table_bytes
from cca_core.transforms import open_image, to_rgb, view_crops
from cca_core.workers.codes import RecordedTokens
from cca_core.workers.ranges import RangeWorker

#: Images of one part where the encoder's device decides on the batch.
PART_IMAGES = 64


def part_images(config: TokensConfig) -> int:
    """Images of one part of a shard: the fewest whose views fill whole batches of the encoder."""
    return config.batch_size // math.gcd(config.batch_size, config.num_views) or PART_IMAGES


def part_bytes(config: TokensConfig) -> int:
    """Bytes of the pixels of one part."""
    return part_images(config) * config.num_views * 3 * config.image_size**2


@dataclass(frozen=True)
class DecodedImage:
    """All views of one image, uint8 [V, S, S, 3], and what the file was; or ``error``, in words, and no views."""

    id: str
    uri: str
    label: int
    views_VSS3: NDArray[np.uint8]
    error: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0


def decode_views(source: Source, listing: pa.Table, config: TokensConfig) -> Iterator[DecodedImage]:
    """Decode a slice of the listing in order. A bad image is an answer, not an exception."""
    nothing = np.empty((0, config.image_size, config.image_size, 3), np.uint8)
    for raw in source.read(listing):
        try:
            if raw.error:
                raise ValueError(raw.error)
            opened = open_image(raw.data)
            found = {"format": opened.format or "", "mode": opened.mode, "width": opened.width, "height": opened.height}
            crops = view_crops(to_rgb(opened), config, raw.id)
        except ValueError as error:
            yield DecodedImage(raw.id, raw.uri, raw.label, nothing, str(error))
        else:
            views = np.stack([np.asarray(crop) for crop in crops])
            yield DecodedImage(raw.id, raw.uri, raw.label, views, **found)


class DecodePart(RangeWorker):
    """Reads and decodes a part of the listing: what was found, and the pixels uint8 [n V, S, S, 3] of what can be
    used."""

    runs_model = False

    def __init__(self, recipe: Recipe, source: StageDirectory, tokenizer_uri: str, num_threads: int) -> None:
        del tokenizer_uri, num_threads
        self.recipe, self.source = recipe, open_source(recipe.source)
        self.listing, _ = read_source(source)

    def run(self, *, start: int, stop: int) -> dict[str, Any]:
        images = list(decode_views(self.source, self.listing.slice(start, stop - start), self.recipe.tokens))
        kinds = [(image.format, image.mode, image.width, image.height) for image in images]
        pixels = b"".join(image.views_VSS3.tobytes() for image in images)
        return {"start": start, "stop": stop, "found": found_bytes(images, kinds), "pixels": pixels}


def found_bytes(images: Sequence[DecodedImage | RecordedTokens], kinds: Sequence[tuple[str, str, int, int]]) -> bytes:
    """The rows of a part (schema ``FOUND``) as an Arrow file; ``kinds`` are format, mode, width and height."""
    rows = [(i.id, i.uri, i.error, i.label, *kind) for i, kind in zip(images, kinds, strict=True)]
    columns = zip(*rows, strict=True)
    return table_bytes(pa.table([pa.array(c, f.type) for c, f in zip(columns, FOUND, strict=True)], schema=FOUND))


def found_table(found: bytes) -> pa.Table:
    """The rows of a part (schema ``FOUND``)."""
    return ipc.open_file(pa.BufferReader(found)).read_all()
