"""Reads folders of images made here, writes a storage below a temporary folder: `python -m cca_core` as typed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow.dataset
import pytest

from cca_core.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"tokenizer": {"epochs": 1, "codebook_size": 8, "batch_size": 16}, "tokens": {"rows_per_shard": 100}}
SMALL_OPTIONS = ["--set", "tokenizer.epochs=1", "--set", "tokenizer.codebook_size=8"]


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def python_m(*arguments: object, folder: Path, **env: str) -> Answer:
    """A process of its own, in ``folder``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CCA_")}
    done = subprocess.run(
        [sys.executable, "-m", "cca_core", *map(str, arguments)],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The same command inside this process, for the many that end before any work."""

    monkeypatch.setenv("CCA_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(os, "cpu_count", lambda: 1)

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["cca_core", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        return Answer(code, *capsys.readouterr())

    return run


class Encoded(NamedTuple):
    answer: Answer
    folder: Path
    arguments: list[object]

    def stage(self, name: str) -> Path:
        return next((self.folder / "storage" / name).iterdir())


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, write_images) -> Encoded:
    """Forty images and a broken one, encoded by a recipe file and one override."""
    folder = tmp_path_factory.mktemp("encoded")
    images = write_images(folder / "images")
    (images / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nand then nothing")
    (folder / "recipe.json").write_text(json.dumps(SMALL | {"source": {"kind": "folder", "uri": str(images)}}))
    arguments = ["encode", "--recipe", "recipe.json", "--set", "tokens.rows_per_shard=16"]
    return Encoded(python_m(*arguments, "--storage", "storage", folder=folder), folder, arguments)


def test_encode_makes_tokens_that_a_user_can_open(encoded):
    assert encoded.answer.code == 0, encoded.answer.err
    lines = [line.split() for line in encoded.answer.err.splitlines() if not line.startswith(" ")]
    made = [(stage, str(encoded.stage(stage))) for stage in ("tokenizer", "tokens")]
    assert [(line[0], line[-1]) for line in lines] == made
    table = pyarrow.dataset.dataset(encoded.stage("tokens"), format="ipc").to_table()
    names = [f"{label}/{i:03d}" for label in ("dark", "light") for i in range(20)]
    assert table.column("image_id").to_pylist() == names
    assert max(map(max, table.column("tokens").to_pylist())) < 8
    shards = list(encoded.stage("tokens").glob("rows-*"))
    assert len(shards) == 3, "the override beats the recipe file: 41 images in shards of 16"


def test_a_broken_file_is_listed_in_quarantine_and_the_run_goes_on(encoded):
    rows = pyarrow.dataset.dataset(encoded.stage("quarantine"), format="ipc").to_table().to_pylist()
    assert [row["image_id"] for row in rows] == ["dark/broken"]
    assert rows[0]["uri"].endswith("images/dark/broken.png")
    assert rows[0]["error"]


def test_the_second_call_reuses_everything(encoded):
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in encoded.folder.glob("storage/*/*/*")}

    before = written()
    again = python_m(*encoded.arguments, "--set", "execution.device=cpu", folder=encoded.folder, CCA_STORAGE="storage")
    assert again.code == 0, again.err
    stages = [line.split()[:2] for line in again.err.splitlines() if not line.startswith(" ")]
    assert stages == [["tokenizer", "reused"], ["tokens", "reused"]]
    assert written() == before


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_a_shard_that_was_harmed_is_made_again(tmp_path, encoded, here, monkeypatch, harm):
    shutil.copytree(encoded.folder, tmp_path / "copy", copy_function=shutil.copy2)
    monkeypatch.chdir(tmp_path / "copy")
    (shard,) = Path().glob("storage/tokens/*/rows-0000000016*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    if harm == "missing":
        shard.unlink()
    assert here(*encoded.arguments, "--storage", "storage").code == 0
    assert shard.read_bytes() == whole


def test_help_lists_the_commands(tmp_path):
    answer = python_m("--help", folder=tmp_path)
    assert (answer.code, answer.err) == (0, "")
    assert "usage: python -m cca_core" in answer.out
    assert all(name in answer.out and text in answer.out for name, (_, text) in COMMANDS.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_how_far_it_goes_and_what_it_takes(here, command):
    answer = here(command, "--help")
    assert (answer.code, answer.err) == (0, "")
    stage, text = COMMANDS[command]
    assert f"{text}. Runs the stages up to '{stage}'." in answer.out
    assert "--set SECTION.KEY=VALUE" in answer.out


def refused(answer: Answer, message: str) -> None:
    assert answer.code == 2
    assert answer.out == ""
    *progress, last = answer.err.splitlines()
    assert last.startswith("error: ")
    assert message in last
    assert all(line.startswith(("  tokenizer: ", "tokenizer ")) for line in progress)


def test_an_unknown_key_is_one_line_with_the_nearest(tmp_path):
    answer = python_m("fit", "--set", "align.betta=0.05", "--storage", "s", folder=tmp_path)
    assert answer == (2, "", "error: unknown recipe key align.betta: did you mean align.beta?\n")
    assert list(tmp_path.iterdir()) == []


OVERRIDES = {
    "align.beta": "--set align.beta: write section.key=value",
    "align.beta=strong": "align.beta",
    "profile=pilot": "profile=pilot belongs to `cca run`",
    "source.uri=/data": "source.kind=digits reads no uri",
    "base.checkpoint=/nowhere.pt": "no checkpoint at /nowhere.pt",
}


@pytest.mark.parametrize(("override", "message"), OVERRIDES.items())
def test_a_bad_override_is_refused(here, override, message):
    refused(here("train-tokenizer", "--set", "align.lambda_=1", "--set", override), message)


RECIPES = {"half": b"{", "list": b"[]", "number": b"3", "binary": b"\xff", "unknown key": b'{"algin": {}}'}


@pytest.mark.parametrize("text", RECIPES.values(), ids=RECIPES)
def test_a_bad_recipe_is_refused(here, tmp_path, text):
    (tmp_path / "recipe.json").write_bytes(text)
    refused(here("encode", "--recipe", tmp_path / "recipe.json"), "did you mean align?" if b"algin" in text else "JSON")


def test_a_path_that_cannot_be_used_is_refused(here, tmp_path):
    refused(here("encode", "--recipe", tmp_path / "none.json"), "no recipe at ")
    (tmp_path / "file").touch()
    refused(here("encode", "--storage", tmp_path / "file"), "set CCA_STORAGE")
    refused(here("encode", "--recipe", tmp_path), str(tmp_path))


def test_a_folder_without_two_classes_of_readable_images_is_refused(here, tmp_path, write_images):
    def encode(folder: Path) -> Answer:
        return here("encode", *SMALL_OPTIONS, "--set", "source.kind=folder", "--set", f"source.uri={folder}")

    (tmp_path / "empty").mkdir()
    refused(encode(tmp_path / "empty"), "no image file found")
    refused(encode(write_images(tmp_path / "one", ("dark",))), "only one class folder, dark")
    two = write_images(tmp_path / "two")
    for path in (two / "light").iterdir():
        path.write_bytes(b"not an image")
    refused(encode(two), "images of one class only (dark)")
    for path in (two / "dark").iterdir():
        path.write_bytes(b"")
    refused(encode(two), "no readable image among the 40")
