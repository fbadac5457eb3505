"""Reads an official checkpoint, writes a bundle directory (model or tokenizer alone)."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.config import ConfigError
from cca_core.models.load import load_model, load_tokenizer, read_official
from cca_core.models.registry import FAMILIES, detect, family


def convert_official(official: str, out: Path, *, weights: str = "model", **spec: Any) -> str:
    """Write the bundle of an official file; return what it is, in words.

    Raises ConfigError where ``out`` holds files already, the file is no known checkpoint, or num_tokens is missing.
    """
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty: choose another directory, nothing is overwritten")
    state = read_official(official, weights=weights)
    if any(family(name).is_tokenizer(state) for name in FAMILIES):
        name, _ = detect(state, "tokenizer")
        tokenizer = load_tokenizer(official)
        info = BundleInfo(model=None, tokenizer=Part(name, asdict(tokenizer.spec)), image_size=0)
        files, what = bundle_files(info, None, tokenizer.state_dict()), f"{name} tokenizer"
    else:
        name, _ = detect(state, "model")
        model = load_model(official, weights=weights, **spec)
        info = BundleInfo(model=Part(name, asdict(model.spec)), tokenizer=None, image_size=0)
        files, what = bundle_files(info, model.state_dict(), None), f"{name} model"
    out.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (out / file).write_bytes(data)
    return what
