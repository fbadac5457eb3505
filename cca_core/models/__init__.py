"""Reads nothing on import: autoregressive image models and tokenizers, from bundles or official files."""

from cca_core.models.base import (
    ARImageModel,
    Captions,
    ClassIds,
    Cond,
    Decoder,
    ImageTokenizer,
    ModelSpec,
    as_condition,
    captions,
    class_ids,
    to_uint8,
)
from cca_core.models.load import load_model, load_to_draw, load_tokenizer
from cca_core.models.registry import FAMILIES, family

__all__ = [
    "FAMILIES",
    "ARImageModel",
    "Captions",
    "ClassIds",
    "Cond",
    "Decoder",
    "ImageTokenizer",
    "ModelSpec",
    "as_condition",
    "captions",
    "class_ids",
    "family",
    "load_model",
    "load_to_draw",
    "load_tokenizer",
    "to_uint8",
]
