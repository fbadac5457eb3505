"""Writes to a temporary folder: decoded images are the same in memory and in a file, and a full disk says so."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import numpy as np
import pytest

from cca_core.config import ConfigError, Recipe, SourceConfig
from cca_core.stages.inputs import input_digests, keep_source
from cca_core.store import Store
from cca_core.workers import images


@pytest.fixture
def load(tmp_path):
    recipe = Recipe(source=SourceConfig(limit=60))
    source = Store(str(tmp_path)).directory("source", input_digests(recipe)["source"])
    keep_source(recipe, source)
    return lambda: images.load_images(recipe, source)


def test_a_file_holds_what_memory_would(load, monkeypatch):
    in_memory = load()
    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)
    in_a_file = load()
    assert not isinstance(in_memory.pixels, np.memmap)
    assert isinstance(in_a_file.pixels, np.memmap)
    assert len(in_a_file.pixels) == 60
    assert np.array_equal(in_memory.pixels, in_a_file.pixels)


def test_a_full_disk_is_told_before_anything_is_decoded(load, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(images, "os", SimpleNamespace(posix_fallocate=full))  # a disk that is full, which is not here
    with pytest.raises(ConfigError, match=r"No space left on device\): point TMPDIR at a larger disk"):
        load()
