"""Reads nothing on import: family name -> module. A new family is one folder and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from cca_core.config import ConfigError
from cca_core.models.family import Family, State

FAMILIES = {
    "llamagen": "cca_core.models.llamagen",
    "var": "cca_core.models.var",
}


def family(name: str) -> Family:
    """The family of that name; ConfigError names those there are."""
    if name not in FAMILIES:
        raise ConfigError(f"unknown model family {name!r}; this release knows {', '.join(FAMILIES)}")
    return import_module(FAMILIES[name]).FAMILY


def detect(states: Sequence[State], part: str) -> tuple[str, Family, State]:
    """The family whose ``part`` ("model" or "tokenizer") one of these state dicts is, judged by its names; and which.

    A file may hold several, as VAR's training files hold transformer and tokenizer.
    """
    for state in states:
        for name in FAMILIES:
            candidate = family(name)
            if (candidate.is_model if part == "model" else candidate.is_tokenizer)(state):
                return name, candidate, state
    raise unknown(states[0], part)


def unknown(state: State, part: str) -> ConfigError:
    """The refusal of tensors that no family recognises."""
    some = ", ".join(sorted(state)[:4])
    return ConfigError(
        f"these tensors are no {part} of a known family ({', '.join(FAMILIES)}); the file holds {some}, ..."
    )
