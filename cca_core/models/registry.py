"""Reads nothing on import: family name -> module. A new family is one folder and one line here."""

from __future__ import annotations

from importlib import import_module

from cca_core.config import ConfigError
from cca_core.models.family import Family, State

FAMILIES = {
    "llamagen": "cca_core.models.llamagen",
}


def family(name: str) -> Family:
    """The family of that name; ConfigError names those there are."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown model family {name!r}; this release knows {', '.join(FAMILIES)}")
    return import_module(FAMILIES[name]).FAMILY


def detect(state: State, part: str) -> tuple[str, Family]:
    """The family whose ``part`` ("model" or "tokenizer") these tensors are, judged by their names."""
    for name in FAMILIES:
        candidate = family(name)
        if (candidate.is_model if part == "model" else candidate.is_tokenizer)(state):
            return name, candidate
    some = ", ".join(sorted(state)[:4])
    raise ConfigError(
        f"these tensors are no {part} of a known family ({', '.join(FAMILIES)}); the file holds {some}, ..."
    )
