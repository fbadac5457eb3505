"""What the S3 server of these tests does, as s3fs shows it: the ground other tests stand on."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import s3fs
from botocore.exceptions import ClientError

from .swift_server import Endpoint, ServerFailed, running_swift


@pytest.fixture
def fs(s3_server: Endpoint) -> s3fs.S3FileSystem:
    """A file system that knows the server from the environment alone, as our users' do."""
    return s3fs.S3FileSystem()


def refused_because_it_exists(error: OSError) -> bool:
    """Whether a create was refused because the object is there already.

    s3fs 2026.9 raises FileExistsError only if the server's answer names the failed condition
    (<Condition>If-None-Match</Condition>, as AWS does). Swift answers the same 412 without that
    element, and s3fs then raises a plain OSError with EINVAL whose cause is the ClientError.
    Code that creates conditionally must accept both.
    """
    if isinstance(error, FileExistsError):
        return True
    cause = error.__cause__
    return isinstance(cause, ClientError) and cause.response["Error"]["Code"] in (
        "PreconditionFailed",
        "412",
    )


def test_bytes_put_are_the_bytes_got(fs: s3fs.S3FileSystem, s3_root: str, tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    (tmp_path / "there").write_bytes(data)
    fs.put(str(tmp_path / "there"), f"{s3_root}/deep/object.bin")
    fs.get(f"{s3_root}/deep/object.bin", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    assert fs.cat_file(f"{s3_root}/deep/object.bin", start=10, end=20) == data[10:20]
    assert fs.info(f"{s3_root}/deep/object.bin")["size"] == len(data)


def test_a_multipart_upload_arrives_whole(fs: s3fs.S3FileSystem, s3_root: str) -> None:
    part_bytes = 5 * 2**20
    with fs.open(f"{s3_root}/large", "wb", block_size=part_bytes) as file:
        for letter in b"abc":
            file.write(bytes([letter]) * part_bytes)
        file.write(b"the end")
    assert fs.info(f"{s3_root}/large")["size"] == 3 * part_bytes + 7
    assert fs.cat_file(f"{s3_root}/large", start=-10) == b"ccc" + b"the end"


def test_listing_shows_names_at_once(fs: s3fs.S3FileSystem, s3_root: str) -> None:
    names = [f"{s3_root}/shards/{i:03d}.arrow" for i in range(7)]
    fs.pipe({name: b"x" for name in names})
    keys = [name.removeprefix("s3://") for name in names]
    assert sorted(fs.find(s3_root)) == keys
    assert fs.ls(s3_root, detail=False) == [f"{s3_root}/shards".removeprefix("s3://")]
    assert fs.glob(f"{s3_root}/shards/00[12].arrow") == keys[1:3]

    fs.rm(names[0])
    assert sorted(fs.find(s3_root)) == keys[1:]
    fs.rm(s3_root, recursive=True)
    assert fs.find(s3_root) == []


def test_a_second_conditional_create_is_refused(fs: s3fs.S3FileSystem, s3_root: str) -> None:
    path = f"{s3_root}/lock"
    fs.pipe_file(path, b"first", mode="create")
    with pytest.raises(OSError, match="precondition") as refusal:
        fs.pipe_file(path, b"second", mode="create")
    assert fs.cat_file(path) == b"first"
    assert refused_because_it_exists(refusal.value)
    # What Swift makes of it, to the letter; on AWS this is a FileExistsError.
    assert type(refusal.value) is OSError
    assert refusal.value.errno == errno.EINVAL

    # Once the object is gone the name is free again.
    fs.rm_file(path)
    fs.pipe_file(path, b"third", mode="create")
    assert fs.cat_file(path) == b"third"


def test_simultaneous_creates_leave_one_whole_object(fs: s3fs.S3FileSystem, s3_root: str) -> None:
    """Swift checks first and writes then: of creates in the same instant SEVERAL may succeed.

    AWS lets exactly one through. A lock that is also to hold here reads back what it wrote,
    after a moment, and counts itself the holder only if it finds its own token.
    """
    path = f"{s3_root}/contended"

    def create(token: bytes) -> bytes | None:
        try:
            fs.pipe_file(path, token, mode="create")
        except OSError as error:
            if not refused_because_it_exists(error):
                raise
            return None
        return token

    with ThreadPoolExecutor(8) as pool:
        winners = {token for token in pool.map(create, [b"%d" % i for i in range(8)]) if token}
    assert fs.cat_file(path) in winners


def test_a_wrong_secret_is_refused(s3_server: Endpoint, s3_bucket: str) -> None:
    stranger = s3fs.S3FileSystem(key=s3_server.access_key, secret="not the secret")
    with pytest.raises(PermissionError):
        stranger.ls(s3_bucket)


def test_a_missing_object_is_a_missing_file(fs: s3fs.S3FileSystem, s3_root: str) -> None:
    assert not fs.exists(f"{s3_root}/nothing")
    with pytest.raises(FileNotFoundError):
        fs.cat_file(f"{s3_root}/nothing")


def test_without_swift_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServerFailed, match="make test-s3"), running_swift(tmp_path, tmp_path):
        pass
