"""Reads and writes nothing: what one model family hands to the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cca_core.models.base import ARImageModel, ImageTokenizer

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Released:
    """The released sizes by their official names, for a plan without the files: ``model_spec(name, num_tokens)`` and
    ``tokenizer_spec(name, patch_nums)``. ``published`` is where the files are."""

    model_spec: Callable[[str, int], Any]
    tokenizer_spec: Callable[[str, tuple[int, ...]], Any]
    published: str


@dataclass(frozen=True)
class Family:
    """Types and functions of a family.

    ``small_*`` give the spec of what a recipe trains itself. ``official_*_spec`` turn an official state dict into
    (spec, tensors to load); ``official_model`` and ``official_tokenizer`` give the content of the file that official
    scripts load. ``containers`` are the paths of keys under which the family's own training files keep their state
    dicts, beside the common ones. ``activation_bytes(spec, rows, dropout=...)`` is what a forward pass saves.
    """

    model_spec_type: type
    build_model: Callable[[Any], ARImageModel]
    small_model_spec: Callable[..., Any]
    tokenizer_spec_type: type
    build_tokenizer: Callable[[Any], ImageTokenizer]
    small_tokenizer_spec: Callable[..., Any]
    containers: tuple[tuple[str, ...], ...]
    is_model: Callable[[State], bool]
    is_tokenizer: Callable[[State], bool]
    official_model_spec: Callable[..., tuple[Any, dict[str, Tensor]]]
    official_tokenizer_spec: Callable[..., tuple[Any, dict[str, Tensor]]]
    official_model: Callable[[Any], dict[str, Any]]
    official_tokenizer: Callable[[Any], dict[str, Any]]
    released: Released
    activation_bytes: Callable[..., int]
