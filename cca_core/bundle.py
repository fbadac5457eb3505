"""Reads and writes bundles: the artefact that is registered and served (bundle.json, model and tokenizer safetensors,
and filter.pt where images are filtered).

Plain JSON and tensors, no model classes and no pickle, so that any release can say what a bundle is before it loads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import fsspec
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cca_core.config import ConfigError
from cca_core.safety_config import FilterSpec

FORMAT_VERSION = 1
#: Of a bundle with a content filter: a release that knows of none refuses it, rather than serve it unfiltered.
FILTERED_FORMAT_VERSION = 2
INFO_NAME, MODEL_NAME, TOKENIZER_NAME = "bundle.json", "model.safetensors", "tokenizer.safetensors"
FILTER_NAME = "filter.pt"
FLOAT32, BFLOAT16 = "float32", "bfloat16"


@dataclass(frozen=True)
class Part:
    """A model or a tokenizer inside a bundle: its family and its spec as plain data."""

    family: str
    spec: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BundleInfo:
    """bundle.json. ``sampling`` holds the defaults to serve with, among them cfg_scale (1.0 = one call per token);
    ``precision``, float32 or bfloat16, is what the model computes in when it draws (its weights are kept in float32);
    ``filter`` says that what is drawn goes through the content filter in filter.pt."""

    model: Part | None
    tokenizer: Part | None
    image_size: int
    class_names: tuple[str, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    precision: str = FLOAT32
    filter: FilterSpec | None = None


@dataclass(frozen=True)
class Bundle:
    info: BundleInfo
    model_tensors: dict[str, Tensor]
    tokenizer_tensors: dict[str, Tensor]


def is_bundle(uri: str) -> bool:
    """Whether ``uri`` is a directory that holds a bundle.json."""
    fs, path = fsspec.url_to_fs(uri)
    return fs.exists(f"{path.rstrip('/')}/{INFO_NAME}")


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """safetensors bytes, tensors in the order of their names, so that equal weights give equal files."""
    return save_tensors({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def bundle_files(
    info: BundleInfo,
    model_tensors: Mapping[str, Tensor] | None,
    tokenizer_tensors: Mapping[str, Tensor] | None,
    filter_data: bytes | None = None,
) -> dict[str, bytes]:
    """The files of a bundle by name, bundle.json last. ``filter_data`` is the content filter's file, where ``info`` has
    one."""
    files: dict[str, bytes] = {}
    described = asdict(info) | {"format_version": FORMAT_VERSION}
    if info.precision == FLOAT32:
        del described["precision"]  # as older releases write and read it
    if info.filter is None:
        del described["filter"]  # likewise
    else:
        assert filter_data is not None, "a filter that is named is there"
        files[FILTER_NAME] = filter_data
        described["format_version"] = FILTERED_FORMAT_VERSION
    if model_tensors is not None:
        files[MODEL_NAME] = encode_tensors(model_tensors)
    if tokenizer_tensors is not None:
        files[TOKENIZER_NAME] = encode_tensors(tokenizer_tensors)
    files[INFO_NAME] = json.dumps(described, indent=1, sort_keys=True).encode()
    return files


def read_info(uri: str) -> BundleInfo:
    """bundle.json alone; ConfigError for another format version."""
    fs, path = fsspec.url_to_fs(uri)
    try:
        raw = json.loads(fs.cat_file(f"{path.rstrip('/')}/{INFO_NAME}"))
    except FileNotFoundError:
        raise ConfigError(f"no bundle at {uri}: it has no {INFO_NAME}") from None
    version = raw.pop("format_version", None)
    if version not in (FORMAT_VERSION, FILTERED_FORMAT_VERSION):
        raise ConfigError(
            f"{uri} has bundle format {version}, this release reads {FORMAT_VERSION} and {FILTERED_FORMAT_VERSION}: "
            "use the release that wrote it"
        )
    filter_ = raw.pop("filter", None)
    if (filter_ is not None) != (version == FILTERED_FORMAT_VERSION):
        raise ConfigError(
            f"{uri} has bundle format {version} and {'a' if filter_ else 'no'} content filter, which contradict each "
            "other: register the model again"
        )
    if raw.setdefault("precision", FLOAT32) not in (FLOAT32, BFLOAT16):
        raise ConfigError(f"{uri} draws in {raw['precision']}: this release draws in {FLOAT32} or {BFLOAT16}")
    spec = FilterSpec(**filter_) if filter_ is not None else None
    parts = {name: Part(**raw.pop(name)) if raw.get(name) else raw.pop(name) for name in ("model", "tokenizer")}
    return BundleInfo(**parts, **{**raw, "class_names": tuple(raw["class_names"]), "filter": spec})


def read_filter(uri: str) -> bytes:
    """The content filter's file, to be checked against the sha256 in bundle.json; ConfigError where it is missing."""
    fs, path = fsspec.url_to_fs(uri)
    try:
        return fs.cat_file(f"{path.rstrip('/')}/{FILTER_NAME}")
    except FileNotFoundError:
        raise ConfigError(f"the bundle {uri} names a content filter and has no {FILTER_NAME}") from None


def read_bundle(uri: str) -> Bundle:
    """Model and tokenizer of a bundle, tensors on the CPU."""
    info = read_info(uri)
    fs, path = fsspec.url_to_fs(uri)

    def tensors(part: Part | None, name: str) -> dict[str, Tensor]:
        return load_tensors(fs.cat_file(f"{path.rstrip('/')}/{name}")) if part is not None else {}

    return Bundle(info, tensors(info.model, MODEL_NAME), tensors(info.tokenizer, TOKENIZER_NAME))
