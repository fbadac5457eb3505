"""Reads bundles and official checkpoint files (any fsspec URI), detected by content; writes nothing."""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from typing import Any, TypeVar

import fsspec
import torch
from torch import Tensor, nn

from cca_core.bundle import is_bundle, read_bundle, read_info
from cca_core.config import ConfigError
from cca_core.models.base import ARImageModel, ImageTokenizer
from cca_core.models.family import Family, State
from cca_core.models.registry import FAMILIES, detect, family, unknown

Module = TypeVar("Module", bound=nn.Module)

#: Where official training and sampling scripts put the weights, in the order in which they are preferred.
CONTAINERS = (("model",), ("module",), ("state_dict",))


def read_file(uri: str) -> Any:
    """The content of a ``.pt``/``.pth`` file, read with weights_only=True.

    Raises ConfigError for a missing file, or one that torch cannot read safely.
    """
    try:
        # Official training files carry their argparse flags; a Namespace is plain data.
        with fsspec.open(uri, "rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"no checkpoint at {uri}: give a bundle directory or an official .pt/.pth file") from None
    except IsADirectoryError:
        raise ConfigError(
            f"{uri} is a directory without bundle.json: give a bundle directory or an official file"
        ) from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{uri} is not a checkpoint that can be read safely (weights_only): {reason}") from error


def state_dicts(content: Any, uri: str) -> dict[str, State]:
    """The state dicts inside a file by their path of keys ("" is the file itself), the preferred first."""
    paths = (*CONTAINERS, *(path for name in FAMILIES for path in family(name).containers), ())
    states = {".".join(path): dict(found) for path in paths if is_state(found := _inside(content, path))}
    if not states:
        raise ConfigError(
            f"{uri} holds no state dict: expected a plain dict of tensors, or one under "
            f"{', '.join('.'.join(path) for path in paths if path)}"
        )
    return states


def read_official(uri: str, *, weights: str = "model") -> list[State]:
    """The state dicts inside an official file, the preferred first; ConfigError where those asked for are not there."""
    content = read_file(uri)
    if weights == "ema":
        if not (isinstance(content, Mapping) and is_state(content.get("ema"))):
            raise ConfigError(f"{uri} holds no EMA weights: use weights=model")
        return [dict(content["ema"])]
    return list(state_dicts(content, uri).values())


def _inside(content: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def is_state(value: Any) -> bool:
    """Whether ``value`` is a dict of tensors, and not empty."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def detect_part(uri: str, weights: str = "model") -> tuple[str, str, State]:
    """("model" or "tokenizer", family name, state dict) of an official file; a model goes before a tokenizer."""
    states = read_official(uri, weights=weights)
    for part in ("model", "tokenizer"):
        for state in states:
            for name in FAMILIES:
                if getattr(family(name), f"is_{part}")(state):
                    return part, name, state
    raise unknown(states[0], "model or tokenizer")


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


def official_spec(chosen: Family, part: str, state: State, asked: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Spec and tensors of an official state dict; ConfigError for a fact that says nothing of such a file."""
    derive = chosen.official_model_spec if part == "model" else chosen.official_tokenizer_spec
    known = list(signature(derive).parameters)[1:]
    if strange := [name for name in asked if name not in known]:
        raise ConfigError(
            f"{strange[0]} says nothing of this {part} file: it may be told {', '.join(known) or 'nothing'}"
        )
    return derive(state, **asked)


def read_spec(path_or_uri: str, part: str, *, weights: str = "model", **spec: Any) -> Any:
    """The spec of a checkpoint's ``part`` ("model" or "tokenizer") without building it; errors as in load_model."""
    if is_bundle(path_or_uri):
        return _bundle_spec(path_or_uri, part, spec)[1]
    _, chosen, state = detect(read_official(path_or_uri, weights=weights), part)
    return official_spec(chosen, part, state, spec)[0]


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
        tokenizer: VAR needs its own, loaded or as a path (a bundle, which needs no spec); a bundle of model and
            tokenizer brings it along. LlamaGen needs none.
        weights: "model", or "ema" where an official file has both.
        spec: what an official file's tensors cannot tell: ``num_tokens`` (LlamaGen), ``num_heads`` for unofficial
            sizes, ``num_cond_tokens`` for captions of another length than 120.
    """
    if is_bundle(path_or_uri):
        chosen, model_spec = _bundle_spec(path_or_uri, "model", spec)
        tensors = read_bundle(path_or_uri).model_tensors
    else:
        _, chosen, state = detect(read_official(path_or_uri, weights=weights), "model")
        model_spec, tensors = official_spec(chosen, "model", state, spec)
    model = fill(chosen.build_model, model_spec, tensors, path_or_uri).to(device=device, dtype=dtype).eval()
    if model.tokenizer_fields:
        if tokenizer is None and is_bundle(path_or_uri) and read_info(path_or_uri).tokenizer is not None:
            tokenizer = path_or_uri
        if tokenizer is None:
            raise ConfigError(
                f"{path_or_uri} is a {model.family} model, which reads its tokenizer's codes: pass tokenizer= "
                "(a path, or a loaded one)"
            )
        if isinstance(tokenizer, str):
            known = {name: getattr(model.spec, name) for name in model.tokenizer_fields}
            tokenizer = load_tokenizer(tokenizer, **known)
        model.attach_tokenizer(tokenizer)
    return model


def load_to_draw(uri: str, *, device: str = "cpu") -> ARImageModel:
    """The model of a bundle as it draws: in the precision that it was trained to compute in (``bundle.json``)."""
    return load_model(uri, device=device, dtype=getattr(torch, read_info(uri).precision))


def load_tokenizer(
    path_or_uri: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, **spec: Any
) -> ImageTokenizer:
    """Load an image tokenizer from a bundle directory or an official file, in eval mode."""
    if is_bundle(path_or_uri):
        chosen, tokenizer_spec = _bundle_spec(path_or_uri, "tokenizer", spec)
        tensors = read_bundle(path_or_uri).tokenizer_tensors
    else:
        _, chosen, state = detect(read_official(path_or_uri), "tokenizer")
        tokenizer_spec, tensors = official_spec(chosen, "tokenizer", state, spec)
    return fill(chosen.build_tokenizer, tokenizer_spec, tensors, path_or_uri).to(device=device, dtype=dtype).eval()
