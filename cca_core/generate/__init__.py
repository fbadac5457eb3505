"""Reads nothing on import: generation of image tokens."""

from cca_core.generate.engine import (
    BATCH_SIZE,
    Drawn,
    Engine,
    calls_per_image,
    decode_images,
    generate,
    pad_rows,
    padded_batches,
)
from cca_core.generate.sampling import Sampling, draw, filtered_probs

__all__ = [
    "BATCH_SIZE",
    "Drawn",
    "Engine",
    "Sampling",
    "calls_per_image",
    "decode_images",
    "draw",
    "filtered_probs",
    "generate",
    "pad_rows",
    "padded_batches",
]
