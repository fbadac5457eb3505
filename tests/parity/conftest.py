"""Writes the compressed checkpoints of data/ below pytest's temporary folders, as the files that official scripts
wrote."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

DATA = Path(__file__).parent / "data"


def unpacked(name: str, folder: Path) -> str:
    path = folder / Path(name).stem
    path.write_bytes(lzma.decompress((DATA / name).read_bytes()))
    return str(path)


@pytest.fixture(scope="session")
def var_tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """VAR's flat tokenizer file."""
    return unpacked("var/vae.pth.xz", tmp_path_factory.mktemp("var"))


@pytest.fixture(scope="session")
def var_training_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What VAR's own training saves: transformer, tokenizer and optimizer in one file."""
    return unpacked("layouts_var/var_train_ar-ckpt-last.pth.xz", tmp_path_factory.mktemp("var"))
