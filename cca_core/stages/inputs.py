"""Reads the source's listing and the checkpoints a recipe names; writes nothing: digests of what comes from outside."""

from __future__ import annotations

import hashlib
from typing import Any

import fsspec

from cca_core.bundle import INFO_NAME, MODEL_NAME, TOKENIZER_NAME, is_bundle
from cca_core.config import ConfigError, Recipe
from cca_core.models import family
from cca_core.models.base import ModelSpec
from cca_core.models.load import read_spec
from cca_core.sources import listing_digest, open_source
from cca_core.stages.expected import check_expected
from cca_core.store import StageDirectory
from cca_core.workers.codes import check_codes


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
    vq = tokenizer_spec(recipe)
    check_expected(recipe, "tokenizer", vq)
    num_tokens = vq.num_tokens(recipe.tokens.image_size)
    uri, codes = recipe.base.checkpoint, recipe.source.kind == "codes"
    if not (uri or codes):
        return
    listing, names = open_source(recipe.source).list()
    if codes:
        check_codes(recipe, listing, num_tokens)
    if uri:
        asked = {} if is_bundle(uri) else {"num_tokens": num_tokens}
        spec = read_spec(uri, "model", weights=recipe.base.weights, **asked)
        if not isinstance(spec, family(recipe.family).model_spec_type):
            raise ConfigError(f"{uri} is no model of family {recipe.family}: set family: in the recipe")
        check_fit(uri, spec, codebook_size=vq.codebook_size, num_tokens=num_tokens, num_classes=len(names))
        check_expected(recipe, "model", spec, num_tokens=num_tokens)


def tokenizer_spec(recipe: Recipe) -> Any:
    """The spec of the recipe's tokenizer: its checkpoint's, or that of the small one it trains."""
    chosen, config = family(recipe.family), recipe.tokenizer
    if not config.checkpoint:
        return chosen.small_tokenizer_spec(config)
    spec = read_spec(config.checkpoint, "tokenizer", **tokenizer_arguments(recipe))
    if not isinstance(spec, chosen.tokenizer_spec_type):
        raise ConfigError(f"{config.checkpoint} is no tokenizer of family {recipe.family}: set family: in the recipe")
    return spec


def tokenizer_arguments(recipe: Recipe) -> dict[str, Any]:
    """What the recipe says of a tokenizer file that its tensors cannot tell."""
    return {"patch_nums": recipe.tokenizer.patch_nums} if recipe.tokenizer.patch_nums else {}


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
