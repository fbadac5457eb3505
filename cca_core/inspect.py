"""Reads a bundle, a stage directory or an official checkpoint; writes nothing: says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cca_core.bundle import is_bundle, read_info
from cca_core.config import ConfigError
from cca_core.models.family import Family, State
from cca_core.models.load import read_file, state_dicts
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
            "content filter": info.filter or "none",
        }
    return _official(path)


def _official(path: str) -> dict[str, Any]:
    """What an official file holds: each state dict with its place, its family and the spec its tensors tell."""
    content = read_file(path)
    states = state_dicts(content, path)
    kinds = {
        f"{place or 'the file itself'}": (name, part, state)
        for place, state in states.items()
        for name in FAMILIES
        for part in ("model", "tokenizer")
        if getattr(family(name), f"is_{part}")(state)
    }
    if not kinds:
        place, state = next(iter(states.items()))
        return {
            "what": f"checkpoint of no family this release knows ({', '.join(FAMILIES)})",
            "tensors": f"{len(state)} in {place or 'the file itself'}, among them {', '.join(sorted(state)[:4])}",
        }
    answer: dict[str, Any] = {"what": "official checkpoint: " + ", ".join(f"{n} {p}" for n, p, _ in kinds.values())}
    for place, (name, part, state) in kinds.items():
        answer[f"{name} {part}"] = (
            f"in {place}: {len(state)} tensors, {sum(value.numel() for value in state.values()):,} numbers; "
            + _spec_words(family(name), part, state)
        )
    if isinstance(content, Mapping) and "" not in states:
        roots = {place.partition(".")[0] for place in states}
        answer["beside them"] = ", ".join(str(key) for key in content if str(key) not in roots) or "nothing"
    return answer


def _spec_words(chosen: Family, part: str, state: State) -> str:
    try:
        derive = chosen.official_model_spec if part == "model" else chosen.official_tokenizer_spec
        return str(derive(state)[0])
    except ConfigError as error:
        return str(error)
