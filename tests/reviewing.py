"""Writes to a temporary folder: pairs of images to review, and the review page served on a free port."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from cca_core.stages.review_pairs import Pair
from cca_core.store import Store
from cca_core.votes import VoteStore
from pipelines.review.server import review_api
from pipelines.review.session import listen
from tests.driver import answering

DIGEST = "d" * 64
CLASSES = ("ant", "bee", "<b>cat</b>")


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, format="PNG")
    return out.getvalue()


def make_pairs(count: int, side: int = 8) -> list[Pair]:
    """Guided images are flat and dark, which compresses well; aligned ones are bright noise."""
    rng = np.random.default_rng(0)
    shape = (side, side, 3)
    return [Pair(CLASSES[i % 3], png(np.full(shape, i)), png(rng.integers(128, 256, size=shape))) for i in range(count)]


def is_aligned(image: bytes) -> bool:
    return bool(np.asarray(Image.open(io.BytesIO(image))).mean() >= 128)


@contextmanager
def served(folder: Path, pairs: list[Pair], on_vote: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The address of the page, whose votes go below ``folder``."""
    with listen("127.0.0.1", 0) as listener:
        app = review_api(pairs, VoteStore(Store(str(folder)), DIGEST), on_vote)
        with answering(app, listener) as address:
            yield address
