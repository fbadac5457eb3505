"""Reads the pages of documentation: their commands exist, with the options and recipe keys that they use."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from cca_core.__main__ import parser
from pipelines.cli import app
from pipelines.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{name}.md" for name in ("cluster", "operations", "review", "safety", "serving", "submit")),
)
#: Programs that do their work elsewhere. A block that uses one says so in its first line.
ELSEWHERE = ("aws", "curl", "docker", "helm", "kubectl", "ray")
MARK = re.compile(r"# needs a (cloud|container engine|Kubernetes cluster)")


def commands() -> list[list[str]]:
    """Every line of an indented or fenced block that starts with a program of ours, without its comment."""
    found = []
    for page in PAGES:
        for line in (ROOT / page).read_text().replace("\\\n", " ").splitlines():
            match = re.match(r"(?:    )?((?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:cca|make|python -m cca_core) .*)", line)
            if match:
                words = shlex.split(match[1], comments=True)
                found.append([word.removeprefix(".venv/bin/") for word in words if not re.match(r"[A-Z_]+=", word)])
    return found


def test_the_pages_show_commands():
    programs = {command[0] for command in commands()}
    assert {"cca", "make"} <= programs
    assert {"run", "plan", "serve", "ui", "promote", "status"} <= {c[1] for c in commands() if c[0] == "cca"}


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "make"], ids=" ".join)
def test_make_verbs_exist(command):
    verbs = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert {word for word in command[1:] if "=" not in word} <= set(verbs)


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "cca"], ids=" ".join)
def test_cca_commands_parse_and_their_recipes_load(command):
    group = typer.main.get_command(app)
    verb = group.commands[command[1]]
    context = verb.make_context(command[1], command[2:])
    if "set_" in context.params and not context.params.get("resume"):
        assert load_recipe(context.params["recipe"], list(context.params["set_"])).name


@pytest.mark.parametrize("command", [c for c in commands() if c[0] == "python"], ids=" ".join)
def test_core_commands_parse(command):
    assert parser().parse_args(command[3:]).command == command[3]


def blocks(page: str) -> list[list[str]]:
    """The indented blocks of a page, without their indentation."""
    found = re.findall(r"(?:^(?: {4}|\t).*\n?)+", (ROOT / page).read_text(), re.M)
    return [[line.strip() for line in block.splitlines()] for block in found]


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_no_test_can_run_say_what_they_need(page):
    for block in blocks(page):
        away = [line for line in block if "127.0.0.1" not in line]  # what asks the service here needs nothing else
        if any(line.startswith(tuple(f"{name} " for name in ELSEWHERE)) for line in away):
            assert MARK.fullmatch(block[0]), block
        for word in " ".join(block).split():
            if word.startswith(("deploy/", "tests/", "docs/")) and MARK.match(block[0]):
                assert (ROOT / word).exists(), word


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target
