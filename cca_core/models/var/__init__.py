"""Reads nothing on import: the VAR family as the registry sees it."""

from cca_core.models.family import Family, Released
from cca_core.models.var.memory import activation_bytes
from cca_core.models.var.network import VAR, VARSpec
from cca_core.models.var.official import PUBLISHED, released_model_spec, released_tokenizer_spec
from cca_core.models.var.small import small_model_spec, small_tokenizer_spec
from cca_core.models.var.tokenizer import MultiScaleVQSpec, MultiScaleVQTokenizer
from cca_core.models.var.weights import (
    CONTAINERS,
    is_model,
    is_tokenizer,
    model_spec,
    official_model,
    official_tokenizer,
    tokenizer_spec,
)

FAMILY = Family(
    model_spec_type=VARSpec,
    build_model=VAR,
    small_model_spec=small_model_spec,
    tokenizer_spec_type=MultiScaleVQSpec,
    build_tokenizer=MultiScaleVQTokenizer,
    small_tokenizer_spec=small_tokenizer_spec,
    containers=CONTAINERS,
    is_model=is_model,
    is_tokenizer=is_tokenizer,
    official_model_spec=model_spec,
    official_tokenizer_spec=tokenizer_spec,
    official_model=official_model,
    official_tokenizer=official_tokenizer,
    released=Released(released_model_spec, released_tokenizer_spec, PUBLISHED),
    activation_bytes=activation_bytes,
)
