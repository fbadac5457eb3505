"""Reads constraints.txt, pyproject.toml, the Dockerfile, every YAML of a cluster and its page: a version is the same in
all."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.contract.manifests import FOLDER, ROOT, containers, kustomizations, manifests, walk

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
IMAGE = "cca-pipeline"
#: Everything a cluster is made from, and what is said about it.
NAMED = (ROOT / name for name in ("ray_cluster.yaml", "deploy/Dockerfile", "docs/cluster.md"))
FILES = [*NAMED, *sorted(FOLDER.rglob("*.yaml"))]


def targets() -> set[str]:
    return set(re.findall(r"^FROM system AS (\w+)$", DOCKERFILE, re.M))


def test_ray_is_the_same_everywhere():
    asked = next(one for one in PROJECT["project"]["optional-dependencies"]["pipelines"] if one.startswith("ray["))
    assert asked.endswith(f"=={PINS['ray']}")
    versions = {node["rayVersion"] for _, one in manifests() for node in walk(one) if "rayVersion" in node}
    assert versions == {PINS["ray"]}


def test_python_is_the_oldest_that_the_project_supports():
    """A client and its cluster must have one Python; linters and tests look at this one."""
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert re.findall(r"^ARG PYTHON_VERSION=(\S+)$", DOCKERFILE, re.M) == [oldest]
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_image_is_this_version_of_a_target_that_is_built(path: Path):
    tags = re.findall(rf"\b{IMAGE}:(\S+?)['\"`]?(?=[\s}}]|$)", path.read_text(), re.M)
    version = PROJECT["project"]["version"]
    assert set(tags) <= {f"{version}-{target}" for target in ("cpu", "cuda")}


def test_both_targets_are_used_and_built():
    assert targets() == {"cpu", "cuda"}
    images = {container["image"] for _, one in manifests() for container in containers(one)}
    launcher = (ROOT / "ray_cluster.yaml").read_text()
    for target in targets():
        assert f"{IMAGE}:{PROJECT['project']['version']}-{target}" in images
        assert f"{IMAGE}:{PROJECT['project']['version']}-{target}" in launcher
        assert f"docker build -f deploy/Dockerfile --target {target} " in DOCKERFILE


def test_overlays_change_where_the_image_lies_and_not_its_version():
    for one in kustomizations().values():
        for image in one.get("images", []):
            assert image.keys() == {"name", "newName"}
            assert image["name"] == IMAGE


def test_every_other_image_has_an_exact_version():
    others = {c["image"] for _, one in manifests() for c in containers(one)}
    others = {image for image in others if not image.startswith(IMAGE)}
    assert all(re.fullmatch(r"[a-z./-]+:\d+\.\d+(\.\d+)?", image) for image in others), others


def test_the_image_is_installed_at_the_pinned_versions_and_runs_without_root():
    code = re.sub(r"\\\n", " ", "\n".join(line for line in DOCKERFILE.splitlines() if not line.startswith("#")))
    installs = re.findall(r"pip install .*", code)
    assert installs
    assert all("-c constraints.txt" in line for line in installs)
    extras = {name for line in installs for name in re.findall(r"\.\[([\w,-]+)\]", line)}
    assert extras == {"pipelines,mlflow-server"}
    for stage in re.split(r"^FROM ", code, flags=re.M):
        if re.match(r"system AS (cpu|cuda)\n", stage):
            assert "USER 1000:1000" in stage
    base = re.search(r"^FROM (\S+) AS system$", code, re.M)
    assert base
    assert base[1] == "python:${PYTHON_VERSION}-slim-bookworm"


def test_the_build_sees_every_package_and_no_more():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    packages = {name.removesuffix("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    documents = {*PROJECT["project"]["license-files"], PROJECT["project"]["readme"]}
    assert let_in == packages | documents | {"pyproject.toml", "constraints.txt"}


def test_the_page_names_the_versions_that_were_checked():
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert f"Ray {PINS['ray']}" in page
    kuberay = re.search(r"KubeRay (\S+),", (ROOT / "tests" / "data" / "custom_resources.yaml").read_text())
    assert kuberay
    assert f"KubeRay {kuberay[1]}" in page


def test_the_driver_of_the_database_is_named_and_installed():
    """SQLAlchemy takes another one than MLflow is used to where an address names none."""
    addresses = [address for path in FILES for address in re.findall(r"postgresql\S*://", path.read_text())]
    assert len(addresses) == 3
    assert set(addresses) == {"postgresql+psycopg://"}
    assert any(one.startswith("psycopg[") for one in PROJECT["project"]["optional-dependencies"]["mlflow-server"])
