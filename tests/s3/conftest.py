"""One real S3 server for the whole session, and a fresh prefix in its bucket for each test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from cca_core.store import Store

from .swift_server import SWIFT_BIN, Endpoint, running_swift


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """The running server, with the environment of this process (and its children) set to it."""
    with (
        running_swift(tmp_path_factory.mktemp("swift"), SWIFT_BIN) as endpoint,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        patch.setenv("AWS_ACCESS_KEY_ID", endpoint.access_key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", endpoint.secret_key)
        patch.setenv("AWS_REGION", endpoint.region)
        patch.setenv("AWS_DEFAULT_REGION", endpoint.region)
        # Nothing of the developer's own account or network may leak into these tests.
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        s3fs.S3FileSystem.clear_instance_cache()
        yield endpoint
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def s3_bucket(s3_server: Endpoint) -> str:
    """The URI of a bucket made for this session."""
    bucket = f"cca-tests-{uuid.uuid4().hex[:8]}"
    s3fs.S3FileSystem().mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def s3_root(s3_bucket: str) -> str:
    """An s3:// URI under which this test finds nothing and leaves what it likes."""
    return f"{s3_bucket}/{uuid.uuid4().hex[:8]}"


@pytest.fixture
def store(s3_root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A storage on S3, with a cache of files, and connections, that are this test's own."""
    monkeypatch.setenv("CCA_CACHE", str(tmp_path / "cache"))
    yield Store(s3_root)
    s3fs.S3FileSystem.clear_instance_cache()
