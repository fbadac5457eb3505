"""Reads the source's listing and the checkpoints a recipe names; writes nothing: digests of what comes from outside."""

from __future__ import annotations

import hashlib

import fsspec

from cca_core.bundle import INFO_NAME, MODEL_NAME, TOKENIZER_NAME, is_bundle
from cca_core.config import ConfigError, Recipe
from cca_core.sources import listing_digest, open_source


def file_sha256(uri: str) -> str:
    """sha256 of a file, or of a bundle's files in order; ConfigError where there is none."""
    sha = hashlib.sha256()
    fs, path = fsspec.url_to_fs(uri)
    names = [path]
    if is_bundle(uri):
        parts = (f"{path.rstrip('/')}/{name}" for name in (INFO_NAME, MODEL_NAME, TOKENIZER_NAME))
        names = [name for name in parts if fs.exists(name)]
    try:
        for name in names:
            with fs.open(name, "rb") as file:
                while block := file.read(1 << 22):
                    sha.update(block)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no checkpoint at {uri}: give a bundle directory or an official .pt/.pth file") from None
    return sha.hexdigest()


def input_digests(recipe: Recipe) -> dict[str, str]:
    """What a plan starts from: the source as it is now, and the content of the checkpoints.

    Raises ConfigError for a source with nothing to read, or a checkpoint that is not there.
    """
    listing, names = open_source(recipe.source).list()
    if len(names) < 2:
        raise ConfigError("CCA contrasts conditions: the source needs at least two classes")
    digests = {"source": listing_digest(listing, names)}
    for part, uri in (("tokenizer", recipe.tokenizer.checkpoint), ("base", recipe.base.checkpoint)):
        if uri:
            digests[f"{part}_checkpoint"] = file_sha256(uri)
    return digests
