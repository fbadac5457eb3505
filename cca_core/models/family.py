"""Reads and writes nothing: what one model family hands to the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cca_core.models.base import ARImageModel, ImageTokenizer

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Types and functions of a family; ``official_*`` turn an official state dict into (spec, tensors to load)."""

    model_spec_type: type
    build_model: Callable[[Any], ARImageModel]
    tokenizer_spec_type: type
    build_tokenizer: Callable[[Any], ImageTokenizer]
    is_model: Callable[[State], bool]
    is_tokenizer: Callable[[State], bool]
    official_model_spec: Callable[..., tuple[Any, dict[str, Tensor]]]
    official_tokenizer_spec: Callable[..., tuple[Any, dict[str, Tensor]]]
