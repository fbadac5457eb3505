"""Reads some images and their tokens; writes a picture of images above their reconstructions, and measures them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from cca_core import pairs
from cca_core.config import Recipe
from cca_core.dataset import read_source
from cca_core.generate import decode_images
from cca_core.models import load_tokenizer, to_uint8
from cca_core.sources import open_source
from cca_core.store import StageDirectory
from cca_core.train.distributed import pick_device
from cca_core.workers.decode import decode_views
from cca_core.workers.images import grid_png

#: The underscore hides it from pyarrow.dataset.
PICTURE = "_reconstructions.png"
COLUMNS, MAX_ROWS = 12, 4
#: Decoding some images must stay cheap beside encoding all of them.
MAX_SHARE = 0.04


def reconstruct(
    *,
    on_log: Callable[..., None],
    directory: StageDirectory,
    recipe: Recipe,
    source: StageDirectory,
    tokenizer_uri: str,
    good: pa.Table,
) -> dict[str, Any]:
    """Decode the tokens of some images, drawn by their ids, and compare them with the images.

    Args:
        directory: images/, where the picture goes.
        good: image_id and tokens of the images to show.

    Returns:
        ``reconstruction_psnr_db``, the mean over the images, and how many they were.
    """
    del on_log
    listing, _ = read_source(source)
    rows = listing.filter(pc.is_in(listing.column("image_id"), good.column("image_id").combine_chunks()))
    rows = rows.filter(pc.equal(rows.column("error"), ""))
    images = [image for image in decode_views(open_source(recipe.source), rows, recipe.tokens) if not image.error]
    real = np.stack([image.views_VSS3[recipe.tokens.centre_view] for image in images])
    tokenizer = load_tokenizer(tokenizer_uri, device=str(pick_device(recipe.execution.device)))
    tokens = good.column("tokens").combine_chunks().flatten().to_numpy().reshape(good.num_rows, -1).astype(np.int64)
    decoded = to_uint8(decode_images(tokenizer, torch.from_numpy(tokens), batch_size=COLUMNS)).numpy()
    grid = []
    for start in range(0, len(real), COLUMNS):
        grid += [real[start : start + COLUMNS], decoded[start : start + COLUMNS]]
    directory.write_bytes(PICTURE, grid_png(grid))
    return {"reconstruction_psnr_db": float(psnr(real, decoded).mean()), "reconstructed_images": len(real)}


def shown_images(shards: list[pa.Table], num_images: int, centre_view: int) -> pa.Table:
    """image_id and tokens of the centre view of the images whose ids have the smallest hashes, in the order of ids."""
    count = min(COLUMNS * MAX_ROWS, max(2, int(num_images * MAX_SHARE)))
    views = [table.filter(pc.equal(table.column("view"), centre_view)) for table in shards]
    rows = pa.concat_tables(views).select(["image_id", "tokens"])
    hashes = pairs.id_hashes(rows.column("image_id").to_pylist())
    return rows.take(pa.array(np.sort(np.argsort(hashes, kind="stable")[:count])))


def psnr(real_NHWC: NDArray[np.uint8], decoded_NHWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio of each image in dB; equal images count as 100 dB."""
    squared = (real_NHWC.astype(np.float64) - decoded_NHWC) ** 2
    error = np.maximum(squared.mean(axis=(1, 2, 3)), 255**2 * 1e-10)
    return 10 * np.log10(255**2 / error)
