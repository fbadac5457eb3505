"""Reads the source's listing and the checkpoints a recipe names; writes nothing: digests of what comes from outside."""

from __future__ import annotations

import hashlib

import fsspec

from cca_core.bundle import INFO_NAME, MODEL_NAME, TOKENIZER_NAME, is_bundle
from cca_core.config import ConfigError, Recipe
from cca_core.models.base import ModelSpec
from cca_core.models.load import read_spec
from cca_core.sources import listing_digest, open_source
from cca_core.store import StageDirectory
from cca_core.train.tokenizer import tokenizer_spec


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


def check_checkpoints(recipe: Recipe, base: StageDirectory) -> None:
    """Refuse checkpoints that do not fit each other or the data before anything is computed with them.

    Nothing is read where ``base`` is finished: they fitted then, and their content is in its digest.
    """
    if base.manifest() is not None:
        return
    tokenizer = recipe.tokenizer.checkpoint
    vq = read_spec(tokenizer, "tokenizer") if tokenizer else tokenizer_spec(recipe.tokenizer)
    size, side = recipe.tokens.image_size, vq.downsample
    if size % side:
        raise ConfigError(f"tokens.image_size={size} is no multiple of the {side} pixels per token of {tokenizer}")
    uri = recipe.base.checkpoint
    if uri:
        num_tokens, num_classes = (size // side) ** 2, len(open_source(recipe.source).list()[1])
        asked = {} if is_bundle(uri) else {"num_tokens": num_tokens}
        spec = read_spec(uri, "model", weights=recipe.base.weights, **asked)
        check_fit(uri, spec, codebook_size=vq.codebook_size, num_tokens=num_tokens, num_classes=num_classes)


def check_fit(uri: str, spec: ModelSpec, *, codebook_size: int, num_tokens: int, num_classes: int) -> None:
    """Refuse a model that was made for another codebook, number of tokens or number of classes."""
    for what, have, want in (
        ("vocabulary", spec.vocab_size, codebook_size),
        ("tokens per image", spec.num_tokens, num_tokens),
        ("classes", spec.num_classes, num_classes),
    ):
        if have != want:
            raise ConfigError(
                f"the checkpoint {uri} has {what} {have}, the data set has {want}: use the tokenizer, image size and "
                "classes that the checkpoint was trained with"
            )
