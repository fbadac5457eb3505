"""Reads YAML recipes (built in by name, or a file) and ``--set`` overrides; gives the validated configuration."""

from __future__ import annotations

import difflib
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from cca_core.config import ConfigError, Recipe
from cca_core.parse import as_dict, check_keys, from_dict, merge, parse_override

DEFAULT = "digits"


def built_in() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = files("pipelines") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: list[str]) -> Recipe:
    """The recipe of that name or file with the overrides on top.

    Raises ConfigError for a missing file, bad YAML, an unknown key (with the nearest one), a wrong type, or options
    that contradict each other.
    """
    data = merge(_read(name_or_path), reduce(merge, (parse_override(text) for text in overrides), {}))
    check_keys(Recipe, data)
    # Defaults first, so that a partial section keeps those of its place; then types, strictly as YAML gives them.
    complete = as_dict(from_dict(Recipe, data))
    try:
        return TypeAdapter(Recipe).validate_python(complete)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"recipe key {where}: {first['msg'].removeprefix('Value error, ')}") from None


def _read(name_or_path: str) -> dict[str, Any]:
    if name_or_path in built_in():
        text = (files("pipelines") / "recipes" / f"{name_or_path}.yaml").read_text()
    else:
        path = Path(name_or_path)
        if not path.is_file():
            nearest = difflib.get_close_matches(name_or_path, built_in(), n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"built in: {', '.join(built_in())}"
            raise ConfigError(f"no recipe {name_or_path}: give a YAML file or a built-in name ({hint})")
        text = path.read_text()
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{name_or_path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name_or_path} is no mapping of sections")
    return data


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every value stated."""
    return yaml.safe_dump(as_dict(recipe), sort_keys=False)
