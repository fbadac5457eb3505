"""Reads a bundle, writes samples as one .npz in the layout of the ADM evaluator: arr_0 images, arr_1 class ids."""

from __future__ import annotations

import os
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cca_core.config import ConfigError
from cca_core.generate import Sampling, decode_images, generate
from cca_core.models import load_to_draw, load_tokenizer, to_uint8
from cca_core.npz import write_array
from cca_core.train.distributed import pick_device
from cca_core.workers.sample import sample_classes, sample_seeds


def export_samples(
    bundle: str,
    out: Path,
    *,
    num_samples: int,
    sampling: Sampling,
    seed: int = 0,
    classes: Sequence[int] = (),
    batch_size: int = 50,
    device: str = "auto",
    on_progress: Callable[[int], None] = lambda done: None,
) -> tuple[int, int, int, int]:
    """Draw samples as the evaluation draws them (sample i has class i mod K) and write them, a batch in memory.

    Args:
        classes: class ids to draw in turn; none: all that the model has.
        on_progress: called with the number of samples written.

    Returns:
        The shape of arr_0, uint8 [N, H, W, 3].

    Raises ConfigError where ``out`` exists or a class is none of the model's.
    """
    if out.exists():
        raise ConfigError(f"{out} exists: choose another name, nothing is overwritten")
    if num_samples < 1 or batch_size < 1:
        raise ConfigError("the number of samples and the batch size must be positive")
    chosen = str(pick_device(device))
    model, tokenizer = load_to_draw(bundle, device=chosen), load_tokenizer(bundle, device=chosen)
    num_classes = model.spec.num_classes
    classes = tuple(classes) or tuple(range(num_classes))
    if not set(classes) <= set(range(num_classes)):
        raise ConfigError(f"{bundle} has the classes 0 to {num_classes - 1}: ask for some of them")
    labels = sample_classes(0, num_samples, classes)

    def images() -> Iterator[NDArray[np.uint8]]:
        for start in range(0, num_samples, batch_size):
            stop = min(start + batch_size, num_samples)
            seeds = sample_seeds(seed, start, stop)
            tokens = generate(model, labels[start:stop], sampling, seeds, batch_size=batch_size)
            yield to_uint8(decode_images(tokenizer, tokens, batch_size=batch_size)).numpy()
            on_progress(stop)

    drawn = images()
    first = next(drawn)
    shape = (num_samples, *first.shape[1:])

    def blocks() -> Iterator[NDArray[np.uint8]]:
        yield first
        yield from drawn

    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}-{uuid.uuid4().hex}")
    try:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            write_array(archive, "arr_0", shape, np.dtype(np.uint8), blocks())
            write_array(archive, "arr_1", (num_samples,), np.dtype(np.int64), [labels.numpy()])
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return shape
