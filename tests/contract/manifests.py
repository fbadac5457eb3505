"""Reads deploy/k8s: its manifests as they stand in files and as kustomize makes them, and the schemas they must fit."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "k8s"
OVERLAYS = sorted(path.parent for path in FOLDER.glob("overlays/*/kustomization.yaml"))
#: The schemas of Kubernetes' own kinds; manifests use nothing newer.
KUBERNETES = "v1.32.0-local-strict"
SHORT = {"core.v1.": "io.k8s.api.core.v1.", "meta.v1.": "io.k8s.apimachinery.pkg.apis.meta.v1."}

Manifest = dict[str, Any]


def kustomizations() -> dict[Path, Manifest]:
    return {path: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.rglob("kustomization.yaml"))}


@cache
def manifests() -> list[tuple[Path, Manifest]]:
    """Every manifest with its file, as written: what no overlay has changed. Shared: copy before a change."""
    paths = [path for path in sorted(FOLDER.rglob("*.yaml")) if path.name != "kustomization.yaml"]
    return [(path, one) for path in paths for one in yaml.safe_load_all(path.read_text())]


def named(kind: str, name: str) -> Manifest:
    return next(one for _, one in manifests() if one["kind"] == kind and one["metadata"]["name"] == name)


def renderer() -> list[str] | None:
    """kustomize, or kubectl, which has it built in; None where neither is installed."""
    for command in (["kustomize", "build"], ["kubectl", "kustomize"]):
        if shutil.which(command[0]):
            return command
    return None


def rendered(folder: Path) -> list[Manifest]:
    command = renderer()
    assert command, "neither kustomize nor kubectl is installed"
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def walk(node: Any) -> Iterator[Manifest]:
    """Every mapping in a manifest, the outermost first."""
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from walk(value)
    elif isinstance(node, list):
        for value in node:
            yield from walk(value)


def pods(manifest: Manifest) -> Iterator[tuple[Manifest, Manifest]]:
    """(metadata, spec) of every pod template in a manifest, those within custom resources too."""
    for node in walk(manifest):
        if isinstance(node.get("template"), dict) and "containers" in node["template"].get("spec", {}):
            yield node["template"].get("metadata", {}), node["template"]["spec"]


def containers(manifest: Manifest) -> Iterator[Manifest]:
    for _, spec in pods(manifest):
        yield from spec["containers"]
        yield from spec.get("initContainers", [])


def problems(manifest: Manifest) -> list[str]:
    """What the schema of a manifest's kind has against it."""
    kind = f"{manifest['apiVersion']}/{manifest['kind']}"
    registry, schemas = _schemas()
    if kind not in schemas:
        return [f"no schema of {kind}"]
    validator = jsonschema.Draft202012Validator(schemas[kind], registry=registry)
    return [f"{kind} {error.json_path}: {error.message[:200]}" for error in validator.iter_errors(manifest)]


@cache
def _schemas() -> tuple[Registry, dict[str, Any]]:
    """The registry that references are looked up in, and the schema of each 'apiVersion/kind'."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / KUBERNETES
    core = json.loads((folder / "_definitions.json").read_text())
    schemas = {
        "/".join(filter(None, (kind["group"], kind["version"], kind["kind"]))): {"$ref": f"{core['$id']}#/$defs/{name}"}
        for name, definition in core["$defs"].items()
        for kind in definition.get("x-kubernetes-group-version-kind", ())
    }
    own = _long(yaml.safe_load((ROOT / "tests" / "data" / "custom_resources.yaml").read_text()), core["$id"])
    own_id = "custom_resources"
    for kind in own.keys() - {"$defs"}:
        schemas[kind] = {"$ref": own_id + own[kind]["$ref"]}
    pairs = [(core["$id"], core), (own_id, {"$schema": core["$schema"], "$id": own_id, **own})]
    return Registry().with_resources([(uri, Resource.from_contents(contents)) for uri, contents in pairs]), schemas


def _long(node: Any, core_id: str) -> Any:
    """The schema with `core.v1.X` and `meta.v1.X` spelled as references into Kubernetes' definitions."""
    if isinstance(node, list):
        return [_long(value, core_id) for value in node]
    if not isinstance(node, dict):
        return node
    found = {key: _long(value, core_id) for key, value in node.items()}
    for short, long in SHORT.items():
        if str(found.get("$ref", "")).startswith(short):
            found["$ref"] = f"{core_id}#/$defs/{long}{found['$ref'].removeprefix(short)}"
    return found
