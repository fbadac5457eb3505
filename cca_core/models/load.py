"""Reads bundles and official checkpoint files (any fsspec URI), detected by content; writes nothing."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import fsspec
import torch
from torch import Tensor, nn

from cca_core.bundle import is_bundle, read_bundle, read_info
from cca_core.config import ConfigError
from cca_core.models.base import ARImageModel, ImageTokenizer
from cca_core.models.family import Family
from cca_core.models.registry import detect, family

Module = TypeVar("Module", bound=nn.Module)

#: Where official training and sampling scripts put the weights, in the order in which they are preferred.
CONTAINER_KEYS = ("model", "module", "state_dict")


def read_official(uri: str, *, weights: str = "model") -> dict[str, Tensor]:
    """The state dict inside an official ``.pt``/``.pth`` file, read with weights_only=True.

    Raises ConfigError for a missing file, a file torch cannot read safely, or one without the weights asked for.
    """
    try:
        # Official training files carry their argparse flags; a Namespace is plain data.
        with fsspec.open(uri, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"no checkpoint at {uri}: give a bundle directory or an official .pt/.pth file") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{uri} is a directory without bundle.json: give a bundle directory or an official file"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{uri} is not a checkpoint that can be read safely (weights_only): {reason}") from error
    if weights == "ema":
        if not (isinstance(content, dict) and "ema" in content):
            raise ConfigError(f"{uri} holds no EMA weights: use weights=model")
        return dict(content["ema"])
    if isinstance(content, dict):
        for key in CONTAINER_KEYS:
            if isinstance(content.get(key), Mapping):
                return dict(content[key])
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
    raise ConfigError(
        f"{uri} holds no state dict: expected one of {', '.join(CONTAINER_KEYS)}, or a plain dict of tensors"
    )


def fill(build: Callable[[Any], Module], spec: Any, tensors: Mapping[str, Tensor], origin: str) -> Module:
    """A module of ``spec`` with exactly these tensors; ConfigError lists what is missing, unexpected or of
    another shape."""
    with torch.device("meta"):
        module = build(spec)
    want, have = module.state_dict(), dict(tensors)
    missing, unexpected = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    shapes = [
        f"{key} {tuple(have[key].shape)} instead of {tuple(want[key].shape)}"
        for key in sorted(want.keys() & have.keys())
        if have[key].shape != want[key].shape
    ]
    problems = [
        f"{what}: {', '.join(items)}"
        for what, items in (
            ("missing keys", missing),
            ("unexpected keys", unexpected),
            ("shapes", shapes),
        )
        if items
    ]
    if problems:
        raise ConfigError(f"{origin} does not fit {spec}: {'; '.join(problems)}")
    module.load_state_dict(have, strict=True, assign=True)
    return module


def _bundle_spec(uri: str, part: str, asked: Mapping[str, Any]) -> tuple[Family, Any]:
    """Family and spec of a bundle's part; a bundle knows its spec, so what the caller states must agree with it."""
    info = read_info(uri)
    found = info.model if part == "model" else info.tokenizer
    if found is None:
        raise ConfigError(f"the bundle {uri} holds no {part}")
    chosen = family(found.family)
    spec = (chosen.model_spec_type if part == "model" else chosen.tokenizer_spec_type)(**found.spec)
    known = {field.name for field in fields(spec)}
    for key, value in asked.items():
        if key not in known or getattr(spec, key) != value:
            actual = getattr(spec, key, "no such field")
            raise ConfigError(f"{uri} is a bundle with its own spec: {key}={value} contradicts it ({actual})")
    return chosen, spec


def read_spec(path_or_uri: str, part: str, *, weights: str = "model", **spec: Any) -> Any:
    """The spec of a checkpoint's ``part`` ("model" or "tokenizer") without building it; errors as in load_model."""
    if is_bundle(path_or_uri):
        return _bundle_spec(path_or_uri, part, spec)[1]
    state = read_official(path_or_uri, weights=weights)
    _, chosen = detect(state, part)
    derive = chosen.official_model_spec if part == "model" else chosen.official_tokenizer_spec
    return derive(state, **spec)[0]


def load_model(
    path_or_uri: str,
    *,
    tokenizer: ImageTokenizer | str | None = None,
    weights: str = "model",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    **spec: Any,
) -> ARImageModel:
    """Load an autoregressive model from a bundle directory or an official file, in eval mode.

    Args:
        path_or_uri: any fsspec URI.
        tokenizer: for families whose model needs its tokenizer; LlamaGen needs none.
        weights: "model", or "ema" where an official file has both.
        spec: what an official file's tensors cannot tell: ``num_tokens`` always, ``num_heads`` for unofficial sizes.
    """
    del tokenizer
    if is_bundle(path_or_uri):
        chosen, model_spec = _bundle_spec(path_or_uri, "model", spec)
        tensors = read_bundle(path_or_uri).model_tensors
    else:
        state = read_official(path_or_uri, weights=weights)
        _, chosen = detect(state, "model")
        model_spec, tensors = chosen.official_model_spec(state, **spec)
    return fill(chosen.build_model, model_spec, tensors, path_or_uri).to(device=device, dtype=dtype).eval()


def load_tokenizer(
    path_or_uri: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, **spec: Any
) -> ImageTokenizer:
    """Load an image tokenizer from a bundle directory or an official file, in eval mode."""
    if is_bundle(path_or_uri):
        chosen, tokenizer_spec = _bundle_spec(path_or_uri, "tokenizer", spec)
        tensors = read_bundle(path_or_uri).tokenizer_tensors
    else:
        state = read_official(path_or_uri)
        _, chosen = detect(state, "tokenizer")
        tokenizer_spec, tensors = chosen.official_tokenizer_spec(state, **spec)
    return fill(chosen.build_tokenizer, tokenizer_spec, tensors, path_or_uri).to(device=device, dtype=dtype).eval()
