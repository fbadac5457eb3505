"""Writes below a temporary folder: one platform, which all tests of this tier use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.platform.local_platform import Platform, running_platform


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with running_platform(tmp_path_factory.mktemp("platform")) as made:
        yield made
