"""Reads the source's listing and the checkpoints a recipe names; writes source/: digests of what comes from outside."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import fsspec
import pyarrow as pa

from cca_core.bundle import INFO_NAME, MODEL_NAME, TOKENIZER_NAME, is_bundle
from cca_core.config import ConfigError, Recipe
from cca_core.dataset import CLASSES_NAME, LISTING_NAME
from cca_core.manifest import Manifest
from cca_core.metrics.torchscript import check_sha256
from cca_core.models import family
from cca_core.models.base import ModelSpec
from cca_core.models.load import read_spec
from cca_core.parse import as_dict
from cca_core.schema import CONDITIONS
from cca_core.sources import listing_digest, open_source
from cca_core.stages.expected import check_expected
from cca_core.stages.forgotten import forgotten_ids, without
from cca_core.store import StageDirectory, Store
from cca_core.workers.codes import check_codes

#: Kinds of bad images that an error names.
SHOWN_REASONS = 3


def file_sha256(
    uri: str, what: str = "checkpoint", give: str = "a bundle directory or an official .pt/.pth file"
) -> str:
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
        raise ConfigError(f"no {what} at {uri}: give {give}") from None
    return sha.hexdigest()


def list_source(recipe: Recipe, store: Store | None = None) -> tuple[pa.Table, tuple[str, ...]]:
    """The listing and the class names of the source as it is now, without what was forgotten in ``store``."""
    listing, names = open_source(recipe.source).list()
    forgotten = forgotten_ids(store) if store else frozenset()
    return without(listing, forgotten), names


def input_digests(recipe: Recipe, store: Store | None = None) -> dict[str, str]:
    """What a plan starts from: the source as it is now, and the content of the checkpoints.

    Raises ConfigError for a source with nothing to read, a file that is not there, or a feature network or content
    filter that is not the one the recipe pins.
    """
    listing, names = list_source(recipe, store)
    if len(names) < 2:
        raise ConfigError("CCA contrasts conditions: the source needs at least two classes")
    check_listing(recipe, listing)
    digests = {"source": listing_digest(listing, names)}
    for part, uri in (("tokenizer", recipe.tokenizer.checkpoint), ("base", recipe.base.checkpoint)):
        if uri:
            digests[f"{part}_checkpoint"] = file_sha256(uri)
    if recipe.evaluate.real_statistics:
        uri = recipe.evaluate.real_statistics
        digests["real_statistics"] = file_sha256(uri, "real statistics", "an .npz of statistics or images")
    for what, uri, pinned, key in (
        ("feature network", recipe.features.network, recipe.features.sha256, "features.sha256"),
        ("content filter", recipe.safety.filter, recipe.safety.filter_sha256, "safety.filter_sha256"),
    ):
        if uri:
            check_sha256(file_sha256(uri, what, "a TorchScript file"), pinned, name=uri, key=key)
    return digests


def keep_source(recipe: Recipe, directory: StageDirectory) -> None:
    """Write source/: the listing that the plan's digest is of, so that every stage works on the same rows.

    Raises ConfigError where the source is no longer the one that was planned.
    """
    if directory.manifest() is not None:
        return
    listing, names = list_source(recipe, directory.store)
    if listing_digest(listing, names) != directory.digest:
        raise ConfigError(f"{recipe.source.uri} changed after it was listed: run again when nobody writes to it")
    write_source(directory, listing, names, as_dict(recipe.source))


def write_source(directory: StageDirectory, listing: pa.Table, names: tuple[str, ...], section: dict[str, Any]) -> None:
    """Write the listing and the classes; ``section`` is the source's configuration, for people."""
    classes = pa.table({"index": list(range(len(names))), "name": list(names)}, schema=CONDITIONS)
    files = {
        LISTING_NAME: directory.write_table(LISTING_NAME, listing),
        CLASSES_NAME: directory.write_table(CLASSES_NAME, classes),
    }
    directory.commit(
        Manifest(
            stage="source",
            code_version=1,
            digest=directory.digest,
            config=section,
            upstream={},
            files=files,
            rows=listing.num_rows,
        )
    )


def check_listing(recipe: Recipe, listing: pa.Table) -> None:
    """Refuse a source of which the listing alone tells that too many images are bad."""
    errors = Counter(error for error in listing.column("error").to_pylist() if error)
    if errors.total() > recipe.source.max_bad_fraction * listing.num_rows:
        raise too_many_bad(recipe, errors, listing.num_rows)


def too_many_bad(recipe: Recipe, errors: Counter[str], total: int) -> ConfigError:
    """The error that ends a run over ``source.max_bad_fraction``, with the reasons met most often."""
    reasons = "; ".join(f"{count} x {error}" for error, count in errors.most_common(SHOWN_REASONS))
    return ConfigError(
        f"{errors.total()} of {total} images of {recipe.source.uri or recipe.source.kind} are bad, more than "
        f"source.max_bad_fraction={recipe.source.max_bad_fraction:g} allows ({reasons}): repair or remove them, or "
        "raise source.max_bad_fraction"
    )


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
    listing, names = list_source(recipe, base.store)
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
