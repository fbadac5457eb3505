"""Reads an official checkpoint and writes it as a bundle (model or tokenizer alone), or a bundle as official files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from cca_core.bundle import BundleInfo, Part, bundle_files, is_bundle, read_bundle
from cca_core.config import ConfigError
from cca_core.models.load import detect_part, fill, official_spec
from cca_core.models.registry import family

#: Files of an exported bundle.
OFFICIAL_NAMES = {"model": "model.pt", "tokenizer": "tokenizer.pt"}


def convert(source: str, out: Path, *, weights: str = "model", **spec: Any) -> str:
    """Write the bundle of an official file, or the official files of a bundle; return what it is, in words.

    Every tensor keeps its bits both ways: an aligned bundle drops back into the official scripts.

    Args:
        spec: what an official file's tensors cannot tell, as in ``load_model`` and ``load_tokenizer``.

    Raises ConfigError where ``out`` holds files already, the file is no known checkpoint, or the spec is incomplete.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: choose another directory, nothing is overwritten")
    if is_bundle(source):
        what, files = _export(source)
    else:
        what, files = _import(source, weights, spec)
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)
    return what


def _import(official: str, weights: str, spec: Mapping[str, Any]) -> tuple[str, dict[str, bytes]]:
    part, name, state = detect_part(official, weights)
    chosen = family(name)
    if part == "tokenizer":
        found, tensors = official_spec(chosen, part, state, spec)
        fill(chosen.build_tokenizer, found, tensors, official)
        info = BundleInfo(model=None, tokenizer=Part(name, asdict(found)), image_size=0)
        return f"bundle of a {name} tokenizer", bundle_files(info, None, tensors)
    found, tensors = official_spec(chosen, part, state, spec)
    fill(chosen.build_model, found, tensors, official)
    info = BundleInfo(model=Part(name, asdict(found)), tokenizer=None, image_size=0)
    return f"bundle of a {name} model", bundle_files(info, tensors, None)


def _export(uri: str) -> tuple[str, dict[str, bytes]]:
    bundle = read_bundle(uri)
    files, words = {}, []
    for part, found, tensors in (
        ("model", bundle.info.model, bundle.model_tensors),
        ("tokenizer", bundle.info.tokenizer, bundle.tokenizer_tensors),
    ):
        if found is None:
            continue
        chosen = family(found.family)
        spec_type, build, official = (
            (chosen.model_spec_type, chosen.build_model, chosen.official_model)
            if part == "model"
            else (chosen.tokenizer_spec_type, chosen.build_tokenizer, chosen.official_tokenizer)
        )
        module = fill(build, spec_type(**found.spec), tensors, uri)
        out = BytesIO()
        torch.save(official(module), out)
        files[OFFICIAL_NAMES[part]] = out.getvalue()
        words.append(f"{found.family} {part} in {OFFICIAL_NAMES[part]}")
    if bundle.info.filter is not None:
        words.append("without the content filter, for which it has no place")
    return f"official layout: {', '.join(words)}", files
