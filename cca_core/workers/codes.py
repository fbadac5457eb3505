"""Reads recorded codes from a source and checks them against the tokenizer and the recipe; writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cca_core.config import ConfigError, Recipe
from cca_core.sources import RawImage, Source, open_source
from cca_core.sources.codes import read_integers

#: Files whose shape is looked at before anything runs.
FIRST_FILES = 32

#: Number of views -> the recipe's word for them.
VIEWS = {1: "centre", 2: "centre_flip", 10: "ten_crop"}


@dataclass(frozen=True)
class RecordedTokens:
    """The tokens of all views of one image as they were recorded, int64 [V, L]; or ``error``, in words, and none."""

    id: str
    uri: str
    label: int
    tokens_VL: NDArray[np.int64]
    error: str = ""


def read_codes(
    source: Source, listing: pa.Table, *, num_views: int, num_tokens: int, codebook_size: int
) -> Iterator[RecordedTokens]:
    """Read a slice of a listing of codes in order. A bad file is an answer, not an exception."""
    for raw in source.read(listing):
        try:
            codes = _integers(raw)
            if codes.shape != (1, num_views, num_tokens):
                raise ValueError(f"codes of shape {list(codes.shape)} instead of [1, {num_views}, {num_tokens}]")
            if codes.min() < 0 or codes.max() >= codebook_size:
                raise ValueError(
                    f"codes from {codes.min()} to {codes.max()}, outside the codebook of {codebook_size} (0 to "
                    f"{codebook_size - 1})"
                )
        except ValueError as error:
            nothing = np.empty((0, num_tokens), np.int64)
            yield RecordedTokens(raw.id, raw.uri, raw.label, nothing, str(error))
        else:
            yield RecordedTokens(raw.id, raw.uri, raw.label, codes[0].astype(np.int64))


def check_codes(recipe: Recipe, listing: pa.Table, num_tokens: int) -> None:
    """Refuse recorded codes whose views or tokens are not the recipe's, before anything runs.

    The first files are looked at; where one of them fits, the others are odd ones, for quarantine.
    """
    shapes = Counter(_shapes(open_source(recipe.source), listing.slice(0, FIRST_FILES)))
    config, uri = recipe.tokens, recipe.source.uri
    if not shapes or (1, config.num_views, num_tokens) in shapes:
        return
    shape = shapes.most_common(1)[0][0]
    if len(shape) != 3 or shape[0] != 1:
        raise ConfigError(
            f"the codes in {uri} have shape {list(shape)}, not [1, views, tokens]: point source.uri at what the "
            "official extraction wrote"
        )
    if shape[1] != config.num_views:
        known = ", ".join(f"{count} ({name})" for count, name in VIEWS.items())
        remedy = f"set tokens.views={VIEWS[shape[1]]}" if shape[1] in VIEWS else f"a recipe knows {known}"
        raise ConfigError(
            f"the codes in {uri} have {shape[1]} views of an image, tokens.views={config.views} has "
            f"{config.num_views}: {remedy}"
        )
    raise ConfigError(
        f"the codes in {uri} have {shape[2]} tokens per view, tokens.image_size={config.image_size} has {num_tokens} "
        "with this tokenizer: set tokens.image_size and tokenizer.checkpoint to those that the codes were made with"
    )


def _shapes(source: Source, listing: pa.Table) -> Iterator[tuple[int, ...]]:
    for raw in source.read(listing):
        try:
            yield _integers(raw).shape
        except ValueError:
            continue


def _integers(raw: RawImage) -> NDArray[np.integer]:
    if raw.error:
        raise ValueError(raw.error)
    return read_integers(raw.data)
