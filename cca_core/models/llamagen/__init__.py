"""Reads nothing on import: the LlamaGen family as the registry sees it."""

from cca_core.models.family import Family, Released
from cca_core.models.llamagen.memory import activation_bytes
from cca_core.models.llamagen.network import LlamaGen, LlamaGenSpec
from cca_core.models.llamagen.official import PUBLISHED, released_model_spec, released_tokenizer_spec
from cca_core.models.llamagen.small import small_model_spec, small_tokenizer_spec
from cca_core.models.llamagen.tokenizer import VQSpec, VQTokenizer
from cca_core.models.llamagen.weights import is_model, is_tokenizer, model_spec, official_file, tokenizer_spec

FAMILY = Family(
    model_spec_type=LlamaGenSpec,
    build_model=LlamaGen,
    small_model_spec=small_model_spec,
    tokenizer_spec_type=VQSpec,
    build_tokenizer=VQTokenizer,
    small_tokenizer_spec=small_tokenizer_spec,
    containers=(),
    is_model=is_model,
    is_tokenizer=is_tokenizer,
    official_model_spec=model_spec,
    official_tokenizer_spec=tokenizer_spec,
    official_model=official_file,
    official_tokenizer=official_file,
    released=Released(released_model_spec, released_tokenizer_spec, PUBLISHED),
    activation_bytes=activation_bytes,
)
