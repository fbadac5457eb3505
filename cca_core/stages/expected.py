"""Looks whether files are there, writes nothing: what a recipe expects of the files it names (``expect:``), and whether
they hold it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import fsspec

from cca_core.config import ConfigError, Recipe
from cca_core.models import family


def missing_files(recipe: Recipe) -> dict[str, str]:
    """Recipe key -> address of the source and the checkpoints that are not there."""
    named = {
        "source.uri": recipe.source.uri,
        "tokenizer.checkpoint": recipe.tokenizer.checkpoint,
        "base.checkpoint": recipe.base.checkpoint,
        "features.network": recipe.features.network,
        "evaluate.real_statistics": recipe.evaluate.real_statistics,
        "safety.filter": recipe.safety.filter,
    }
    return {key: uri for key, uri in named.items() if uri and not _exists(uri)}


def _exists(uri: str) -> bool:
    try:
        fs, path = fsspec.url_to_fs(uri)
    except (ValueError, ImportError):
        return True  # no address at all: whoever opens it says so
    try:
        return fs.exists(path)
    except PermissionError:
        return True


def released_spec(recipe: Recipe, part: str, *, num_tokens: int = 0) -> Any:
    """The spec of the released "model" or "tokenizer" that the recipe expects; None where it expects none."""
    name, released = getattr(recipe.expect, part), family(recipe.family).released
    if not name:
        return None
    if part == "tokenizer":
        return released.tokenizer_spec(name, recipe.tokenizer.patch_nums)
    return released.model_spec(name, num_tokens)


def check_expected(recipe: Recipe, part: str, found: Any, *, num_tokens: int = 0) -> None:
    """Refuse a checkpoint whose spec is not that of the released size that the recipe expects."""
    expected = released_spec(recipe, part, num_tokens=num_tokens)
    if expected is None or found == expected:
        return
    is_, should = asdict(found), asdict(expected)
    differences = [
        f"{key} {is_.get(key, 'missing')} instead of {should.get(key, 'none')}"
        for key in {**should, **is_}
        if is_.get(key) != should.get(key)
    ]
    uri = recipe.tokenizer.checkpoint if part == "tokenizer" else recipe.base.checkpoint
    raise ConfigError(
        f"{uri} is not the released {getattr(recipe.expect, part)} that expect.{part} names: "
        f"{', '.join(differences)}; correct either, or remove expect.{part}"
    )
