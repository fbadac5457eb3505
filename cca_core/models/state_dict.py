"""Reads state dicts in memory, writes nothing: what families ask of official files before they know the sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from cca_core.config import ConfigError


def needed(state: Mapping[str, Tensor], key: str) -> Tensor:
    """A tensor that a spec is read off; ConfigError where the file lacks it."""
    if key not in state:
        raise ConfigError(f"missing keys: {key}, off which the sizes of the file are read")
    return state[key]


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """1 + the largest number that ``pattern``'s group matches among the keys; 0 if none does."""
    numbers = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(numbers) + 1 if numbers else 0
