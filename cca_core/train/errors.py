"""Reads and writes nothing: errors of training, apart from torch, for whoever only has to know them."""

from __future__ import annotations


class NonFiniteError(RuntimeError):
    """The gradient is not finite; nothing of that step was applied."""
