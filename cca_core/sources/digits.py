"""Reads scikit-learn's 1,797 embedded 8x8 handwritten digits; yields them as grayscale PNG. Writes nothing."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.datasets import load_digits

from cca_core.sources.base import FoundRows, RawImage, Source


class DigitsSource(Source):
    """The embedded default."""

    def find(self) -> FoundRows:
        pixels_NHW, labels = _load()
        rows = range(len(labels))
        columns = {
            "image_id": [f"digit-{row:04d}" for row in rows],
            "uri": [f"sklearn:load_digits/{row}" for row in rows],
            "location": [str(row) for row in rows],
            "label": labels.astype(np.int64),
            "stamp": [hashlib.sha256(pixels_NHW[row].tobytes()).hexdigest()[:16] for row in rows],
            "error": [""] * len(labels),
        }
        return FoundRows(pa.table(columns), "the digits", tuple(str(digit) for digit in range(10)))

    def read_rows(self, listing: pa.Table) -> Iterator[RawImage]:
        pixels_NHW, _ = _load()
        for row in listing.to_pylist():
            png = io.BytesIO()
            Image.fromarray(pixels_NHW[int(row["location"])]).save(png, "PNG")
            yield RawImage(row["image_id"], row["uri"], png.getvalue(), row["label"])


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [N, 8, 8] and labels int32 [N]; scikit-learn counts the pixels from 0 to 16."""
    digits = load_digits()
    return np.round(digits.images * 255 / 16).astype(np.uint8), digits.target.astype(np.int32)
