"""The rules of the source tree that no linter checks: size, names, docstrings, pins, pickles."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cca_core", "pipelines", "deploy")
FOLDERS = (*PACKAGES, "tests", "benchmarks")
LINES_AT_MOST = 400
LINES_OF_A_NETWORK_AT_MOST = 450
NAMES_THAT_SAY_NOTHING = {"utils.py", "helpers.py", "common.py", "misc.py"}

UNPICKLERS = {
    f"{module}.{name}"
    for module in ("pickle", "cloudpickle", "dill", "joblib", "pandas")
    for name in ("load", "loads", "Unpickler", "read_pickle")
}
BUILTIN_INTERPRETERS = {"eval", "exec"}


def python_files(*folders: str) -> list[Path]:
    """Every python file under these folders, relative to the repository root."""
    return sorted(path.relative_to(ROOT) for name in folders for path in (ROOT / name).rglob("*.py"))


def too_long(path: Path, lines: int) -> bool:
    """Whether a file exceeds its budget; a model family's own files have a little more."""
    in_a_family = len(path.parts) > 3 and path.parts[:2] == ("cca_core", "models")
    return lines > (LINES_OF_A_NETWORK_AT_MOST if in_a_family else LINES_AT_MOST)


def forbidden_calls(source: str) -> Iterator[str]:
    """Each call in `source` that would run what a file says, as 'line N: name: reason'."""
    tree = ast.parse(source)
    full_names = imported_names(tree)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = called(call.func, full_names)
        keywords = {word.arg: word.value for word in call.keywords}
        if name in BUILTIN_INTERPRETERS:
            reason = "runs text as code"
        elif name in UNPICKLERS:
            reason = "reads a pickle"
        elif name == "torch.load" and not is_true(keywords.get("weights_only")):
            reason = "reads a pickle without weights_only=True"
        elif is_true(keywords.get("allow_pickle")):
            reason = "reads a pickle with allow_pickle=True"
        else:
            continue
        yield f"line {call.lineno}: {name}: {reason}"


def imported_names(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for: {"load": "torch.load", "t": "torch"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def called(function: ast.expr, full_names: dict[str, str]) -> str:
    """The dotted name of what a call calls, imports resolved; empty for anything computed."""
    if isinstance(function, ast.Attribute):
        owner = called(function.value, full_names)
        return f"{owner}.{function.attr}" if owner else ""
    return full_names.get(function.id, function.id) if isinstance(function, ast.Name) else ""


def is_true(value: ast.expr | None) -> bool:
    """Whether an argument is the literal True."""
    return isinstance(value, ast.Constant) and value.value is True


def pinned_versions() -> dict[str, str]:
    """{canonical name: exact version} of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    not_exact = [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", pin)]
    assert not not_exact, f"not NAME==VERSION (a build such as +cpu is the index's affair): {not_exact}"
    names = [canonicalize_name(pin.split("==")[0]) for pin in pins]
    assert names == sorted(set(names)), "the lines of constraints.txt are to be sorted and unique"
    return dict(zip(names, (pin.split("==")[1] for pin in pins), strict=True))


def direct_requirements() -> list[Requirement]:
    """What pyproject.toml asks for, extras included, our own extras left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    requirements = [Requirement(line) for lines in lists for line in lines]
    return [one for one in requirements if canonicalize_name(one.name) != project["name"]]


def test_files_stay_short() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in python_files(*FOLDERS)}
    found = {str(path): lines for path, lines in lengths.items() if too_long(path, lines)}
    assert not found, f"split these files: {found}"


def test_names_say_what_is_inside() -> None:
    found = [str(path) for path in python_files(*FOLDERS) if path.name in NAMES_THAT_SAY_NOTHING]
    assert not found, f"name these files after what they hold: {found}"


def test_every_module_says_what_it_is() -> None:
    found = [
        str(path) for path in python_files(*PACKAGES) if not ast.get_docstring(ast.parse((ROOT / path).read_text()))
    ]
    assert not found, f"no docstring as the first statement: {found}"


def test_no_package_runs_what_a_file_says() -> None:
    found = [
        f"{path}: {call}" for path in python_files(*PACKAGES) for call in forbidden_calls((ROOT / path).read_text())
    ]
    assert not found, "\n".join(found)


def test_every_direct_requirement_is_pinned_within_its_range() -> None:
    pins = pinned_versions()
    missing = [str(one) for one in direct_requirements() if canonicalize_name(one.name) not in pins]
    assert not missing, f"no pin in constraints.txt for {missing}"
    outside = [
        f"{one} is pinned to {pins[canonicalize_name(one.name)]}"
        for one in direct_requirements()
        if not one.specifier.contains(pins[canonicalize_name(one.name)])
    ]
    assert not outside, f"pins outside the range of pyproject.toml: {outside}"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "from torch import load as read\nread(path, weights_only=flag)",
        "import pickle\npickle.load(file)",
        "from pickle import loads\nloads(data)",
        "import pandas as pd\npd.read_pickle(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "eval('1')",
        "def inner():\n    exec(text)",
    ],
)
def test_the_check_finds(source: str) -> None:
    assert len(list(forbidden_calls(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "model.eval()",
        "import json\njson.load(file)",
        "from safetensors.torch import load\nload(data)",
        "import numpy as np\nnp.load(path)",
    ],
)
def test_the_check_lets_pass(source: str) -> None:
    assert list(forbidden_calls(source)) == []


def test_a_model_family_may_be_a_little_longer() -> None:
    assert too_long(Path("cca_core/store.py"), 401)
    assert not too_long(Path("cca_core/models/var/network.py"), 450)
    assert too_long(Path("cca_core/models/var/network.py"), 451)
    assert too_long(Path("cca_core/models/load.py"), 401)
