"""Reads a bundle, a stage directory or an official checkpoint; writes nothing: says what it is."""

from __future__ import annotations

from typing import Any

from cca_core.bundle import is_bundle, read_info
from cca_core.config import ConfigError
from cca_core.models.load import read_official
from cca_core.models.registry import FAMILIES, family
from cca_core.store import Store


def describe(path: str, *, verify: bool = False) -> dict[str, Any]:
    """What lies at ``path``, as words by name. ``verify`` reads every file of a stage directory and compares hashes."""
    parent, _, digest = path.rstrip("/").rpartition("/")
    root, _, stage = parent.rpartition("/")
    directory = Store(root or ".").directory(stage or ".", digest)
    manifest = directory.manifest() if directory.exists("_manifest.json") else None
    if manifest is not None:
        answer: dict[str, Any] = {
            "what": f"finished stage directory ({manifest.stage}, code version {manifest.code_version})",
            "digest": manifest.digest,
            "rows": manifest.rows,
            "files": f"{len(manifest.files)}, {sum(f.size_bytes for f in manifest.files.values())} bytes",
            "upstream": ", ".join(f"{name} {value[:12]}" for name, value in manifest.upstream.items()),
            "facts": manifest.facts,
        }
        if verify:
            damaged = directory.damaged(manifest)
            if damaged:
                raise ConfigError(
                    f"{path} is damaged: {', '.join(damaged)} differ from the manifest; delete the directory and "
                    f"run again"
                )
            answer["verified"] = "all files match their sha256"
        return answer
    if is_bundle(path):
        info = read_info(path)
        return {
            "what": "bundle",
            "model": info.model or "none",
            "tokenizer": info.tokenizer or "none",
            "image size": info.image_size,
            "classes": ", ".join(info.class_names[:20]),
            "sampling": info.sampling,
            "metrics": info.metrics,
        }
    state = read_official(path)
    kinds = [
        f"{name} {part}"
        for name in FAMILIES
        for part in ("model", "tokenizer")
        if getattr(family(name), f"is_{part}")(state)
    ]
    return {
        "what": f"official checkpoint: {kinds[0] if kinds else 'no family this release knows'}",
        "tensors": len(state),
        "parameters": f"{sum(value.numel() for value in state.values()):,}",
    }
