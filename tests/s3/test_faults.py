"""Writes objects, sources and a run through a proxy that loses part of the requests: errors may come, wrong results
not."""

from __future__ import annotations

import io
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from aiohttp import ClientPayloadError
from botocore.exceptions import ConnectionClosedError, EndpointConnectionError

from cca_core.config import SourceConfig
from cca_core.manifest import Manifest
from cca_core.sources import open_source
from cca_core.store import Store
from pipelines.lock import RunLock
from pipelines.ray_errors import INFRASTRUCTURE_ERRORS
from tests.driver import TINY, Driver, cca, until

from .faulty_proxy import DROPS, ERRORS, EXPIRED, KINDS, FaultyProxy, running_proxy
from .swift_server import Endpoint

#: Said of objects that are there, or are not ours: a lost request must not look like one of these.
WRONG_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError)
#: What s3fs raises of these faults once nobody tries again.
RAISED = {OSError, ConnectionClosedError, EndpointConnectionError, ClientPayloadError}
#: Where nobody tries again, no request of a read may fail: there are some 40 in a folder's.
SHARES = {"folder": 0.02, "tar": 0.05, "parquet": 0.1}


@pytest.fixture
def proxy(s3_server: Endpoint, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy without faults so far; this process and its children speak to it."""
    with running_proxy(s3_server.url, seed=7) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield running


@pytest.fixture
def store(proxy: FaultyProxy, store: Store) -> Store:
    """Reached through the proxy."""
    return store


@pytest.fixture(params=["tried again", "tried once"])
def patient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether botocore and s3fs try again, as they do by default. If not, what they would hide comes to us."""
    if request.param == "tried once":
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    return request.param == "tried again"


class Attempts:
    """Does things until they succeed, as the driver of a run does, and counts the errors."""

    def __init__(self) -> None:
        self.errors: Counter[type[BaseException]] = Counter()

    def __call__(self, do: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        for _ in range(100):
            try:
                return do(*arguments, **options)
            except WRONG_ANSWERS:
                raise
            except INFRASTRUCTURE_ERRORS as error:
                self.errors[type(error)] += 1
        raise AssertionError(f"never succeeded: {self.errors}")

    def check(self, proxy: FaultyProxy, patient: bool) -> None:
        """Every kind of fault happened, and the errors are those that we know."""
        assert {fault.split()[0] for fault in proxy.faults} == set(KINDS)
        if patient:
            assert sum(self.errors.values()) <= proxy.faults.total() / 100
        assert set(self.errors) <= RAISED if patient else set(self.errors) == RAISED


def round_trip(store: Store, number: int, attempts: Attempts) -> None:
    """Everything a stage does with a directory, five objects."""
    data = random.Random(number).randbytes(3000)
    table = pa.table({"row": range(number, number + 50)})
    directory = store.directory("tokens", f"{number:064d}")
    assert attempts(directory.manifest) is None
    assert not attempts(directory.readable, "rows.arrow")
    files = {
        "data": attempts(directory.write_bytes, "data", data),
        "deep/data": attempts(directory.write_bytes, "deep/data", data[::-1]),
        "rows.arrow": attempts(directory.write_table, "rows.arrow", table),
    }
    assert attempts(directory.read_bytes, "data") == data
    assert attempts(directory.read_bytes, "deep/data") == data[::-1]
    assert attempts(directory.readable, "rows.arrow")
    assert attempts(directory.read_table, "rows.arrow").equals(table)
    stage, digest = directory.stage, directory.digest
    manifest = Manifest(stage=stage, code_version=1, digest=digest, config={}, upstream={}, files=files, rows=50)
    attempts(directory.commit, manifest)
    assert attempts(directory.manifest) == manifest
    assert attempts(directory.damaged, manifest) == []

    lock = f"{store.root}/locks/{number}"
    assert attempts(store.create_exclusive, lock, b"ours"), "though the answer was lost and it was tried again"
    assert not attempts(store.create_exclusive, lock, b"theirs")
    assert attempts(store.fs.cat_file, lock) == b"ours"
    attempts(store.fs.rm_file, lock)
    assert not attempts(store.fs.exists, lock)


def test_a_storage_that_loses_requests_is_right_or_says_so(store, proxy, patient, tmp_path):
    proxy.share = 0.2
    attempts = Attempts()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: round_trip(store, number, attempts), range(40)))
    attempts.check(proxy, patient)
    assert {f"{kind} after PUT" for kind in (*ERRORS, *DROPS)} <= set(proxy.faults), "stored, but not confirmed"
    assert any("after DELETE" in fault for fault in proxy.faults), "removed, but not confirmed"
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert set(left) == {"rows.arrow"}, "no half copies in the cache"


def test_a_lock_whose_answer_is_lost_is_held(store, proxy, monkeypatch):
    lost = iter(DROPS + DROPS)
    monkeypatch.setattr(proxy, "draw", lambda method: (next(lost, "") if method == "PUT" else "", "after"))
    with RunLock(store, "r" * 64) as lock:
        assert next(lost, None) is None
        assert lock.generation == 1
        lock.check()
    assert store.fs.find(f"{store.root}/_locks") == []


def packed(kind: str, images: dict[str, bytes]) -> dict[str, bytes]:
    """The files of a source of this kind: name -> content."""
    if kind == "folder":
        return images
    sink = io.BytesIO()
    if kind == "parquet":
        rows = [{"image": {"bytes": data, "path": name}, "label": name.split("/")[0]} for name, data in images.items()]
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=30)
        return {"images.parquet": sink.getvalue()}
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, data in images.items():
            for member, content in ((name, data), (f"{name[:-4]}.cls", name.split("/")[0].encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return {"images.tar": sink.getvalue()}


@pytest.mark.parametrize("kind", ["folder", "parquet", "tar"])
def test_a_source_that_loses_requests_is_whole_or_says_so(store, proxy, patient, tmp_path, write_images, kind):
    paths = sorted(write_images(tmp_path / "images", per_class=60).rglob("*.png"))
    images = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in paths}
    store.fs.pipe({f"{store.root}/images/{name}": data for name, data in packed(kind, images).items()})
    source = open_source(SourceConfig(kind=kind, uri=f"{store.uri}/images"))
    expected = source.list()
    assert len(expected[0]) == len(images)

    attempts = Attempts()
    proxy.share = 0.2 if patient else SHARES[kind]
    for _ in range(5):
        assert attempts(source.list) == expected
    slices = [expected[0].slice(start, 20) for start in range(0, len(images), 20)]
    with ThreadPoolExecutor(4) as pool:
        read = pool.map(lambda rows: attempts(lambda: list(source.read(rows))), slices)
        found = [(image.error, image.data) for some in read for image in some]
    assert found == [("", images[name]) for name in sorted(images)]
    assert proxy.faults
    assert set(attempts.errors) <= RAISED


def test_a_run_that_loses_requests_makes_the_same_tokens(store, proxy, tmp_path, write_images):
    paths = write_images(tmp_path / "images", per_class=60).rglob("*.png")
    store.fs.pipe({f"{store.root}/images/{path.parent.name}/{path.name}": path.read_bytes() for path in paths})
    recipe = ("source.kind=folder", f"source.uri={store.uri}/images", "tokens.rows_per_shard=15")
    settings = [word for setting in recipe for word in ("--set", setting)]

    def run(root: str, stage: str, **more: str) -> Any:
        env = {"CCA_STORAGE": f"{store.uri}/{root}", "CCA_CACHE": str(tmp_path / root), **more}
        return cca(tmp_path, "run", str(TINY), *settings, "--only", stage, env=env)

    def made(root: str, *stages: str) -> dict[str, bytes]:
        store.fs.invalidate_cache()
        paths = [path for stage in stages for path in store.fs.find(f"{store.root}/{root}/{stage}")]
        return {path.removeprefix(f"{store.root}/{root}/"): store.fs.cat_file(path) for path in paths}

    for stage in ("tokenizer", "tokens"):
        result = run("calm", stage)
        assert result.returncode == 0, result.stdout + result.stderr
    store.fs.pipe({f"{store.root}/lossy/{name}": data for name, data in made("calm", "tokenizer").items()})

    proxy.share = 0.05
    may_say = "|".join(["cannot write to the storage", *(f"{kind.__name__}: " for kind in RAISED)])
    for _ in range(5):
        result = run("lossy", "tokens", AWS_MAX_ATTEMPTS="2")  # of its 5 by default, which hide nearly all
        if result.returncode == 0:
            break
        assert re.match(f"error: ({may_say})", result.stderr), result.stdout + result.stderr
    proxy.share = 0
    assert result.returncode == 0, result.stdout + result.stderr
    assert proxy.faults.total() > 10

    expected, tokens = made("calm", "tokens", "conditions"), made("lossy", "tokens", "conditions")
    rows = {name for name in expected if "/rows-" in name or name.endswith("conditions.arrow")}
    assert len(rows) == 8 + 1
    assert tokens.keys() == expected.keys()
    assert {name: tokens[name] for name in rows} == {name: expected[name] for name in rows}


def test_a_key_that_expires_in_the_middle_of_a_run_costs_nothing_but_the_same_command_again(store, proxy, tmp_path):
    env = {"CCA_STORAGE": store.uri, "CCA_CACHE": str(tmp_path / "cache")}

    def finished() -> dict[str, str]:
        """ETags of finished stage directories by their paths."""
        store.fs.invalidate_cache()
        found = store.fs.find(store.root, detail=True)
        whole = {path.rpartition("/")[0] for path in found if path.endswith("/_manifest.json")}
        return {path: info["ETag"] for path, info in found.items() if path.rpartition("/")[0] in whole}

    driver = Driver(tmp_path, env=env)
    driver.wait_stage("align")
    until(lambda: store.fs.invalidate_cache() or store.fs.glob(f"{store.root}/train_state/*/step-*"))
    before = finished()
    proxy.kinds, proxy.share = (EXPIRED,), 1.0
    assert driver.finish() != 0
    proxy.share = 0.0
    assert proxy.faults.total() > 0
    said = [line for line in driver.lines if line.startswith("error: ")]
    assert len(said) == 1, driver.output
    assert re.search("cannot write to the storage .*ExpiredToken.*a key that is valid.*same command", said[0]), said[0]
    assert "Traceback" not in driver.output
    again = cca(tmp_path, "run", str(TINY), env=env)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: tag for path, tag in finished().items() if path in before} == before
