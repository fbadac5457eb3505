"""Writes storage roots, sources and train states on the S3 server: what is true of local ones is true there."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import numpy as np
import pyarrow as pa
import pytest
import s3fs
import torch

from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.config import ConfigError, SourceConfig
from cca_core.manifest import Manifest
from cca_core.sources import open_source
from cca_core.store import Store
from cca_core.votes import VoteStore, counting
from tests.invariant import trajectories
from tests.invariant.trajectories import Setting


def table(rows: int = 3) -> pa.Table:
    return pa.table({"row": range(rows)})


def contents(store: Store, *stages: str) -> dict[str, bytes]:
    """Every file of these stages by its path below the storage root."""
    paths = [path for stage in stages for path in store.fs.find(f"{store.root}/{stage}")]
    return {path.removeprefix(f"{store.root}/"): store.fs.cat_file(path) for path in paths}


def test_a_directory_is_valid_only_when_whole(store):
    directory = store.directory("tokens", "d" * 64)
    files = {name: directory.write_table(name, table()) for name in ("rows.arrow", "deep/rows.arrow")}
    assert directory.manifest() is None
    manifest = Manifest(stage="tokens", code_version=1, digest="d" * 64, config={}, upstream={}, files=files, rows=3)
    directory.commit(manifest)
    assert directory.manifest() == manifest
    assert Store(store.uri + "/").directory("tokens", "d" * 64).manifest() == manifest
    assert directory.read_table("deep/rows.arrow").equals(table())

    path, data = f"{directory.path}/deep/rows.arrow", directory.read_bytes("deep/rows.arrow")
    for harm in (data[:-1], data + b"\0", None):
        store.fs.rm_file(path) if harm is None else store.fs.pipe_file(path, harm)
        assert directory.manifest() is None
        assert directory.damaged(manifest) == ["deep/rows.arrow"]
    store.fs.pipe_file(path, data)
    assert directory.manifest() == manifest


def test_a_shard_is_readable_when_the_store_has_it_whole(store, tmp_path):
    directory = store.directory("tokens", "d")
    assert not directory.readable("rows.arrow")
    directory.write_bytes("rows.arrow", b"torn")
    assert not directory.readable("rows.arrow")
    directory.write_table("rows.arrow", table())
    assert directory.read_table("rows.arrow").equals(table()), "not the torn one, from the cache"
    assert directory.readable("rows.arrow")

    store.fs.rm(directory.path, recursive=True)
    assert not directory.readable("rows.arrow"), "though a copy is in the cache"
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_of_many_that_create_a_file_one_wins(store):
    barrier = Barrier(8)

    def attempt(number: int, path: str) -> bool:
        barrier.wait()
        return store.create_exclusive(path, str(number).encode())

    with ThreadPoolExecutor(8) as pool:
        for turn in range(10):
            path = f"{store.root}/lock-{turn}"
            won = list(pool.map(attempt, range(8), [path] * 8))
            assert sum(won) == 1
            assert store.fs.cat_file(path) == str(won.index(True)).encode()
            assert not any(pool.map(attempt, range(8, 16), [path] * 8)), "it stands"


def test_a_bucket_that_does_not_exist_is_said_and_not_made(store, s3_bucket):
    store.check_writable()
    assert store.fs.find(store.root) == []
    says = r"^cannot write to the storage s3://[-\w]+-misspelt/x \(.*bucket.*\): set CCA_STORAGE to [^\n]*$"
    with pytest.raises(ConfigError, match=says):
        Store(f"{s3_bucket}-misspelt/x").check_writable()
    assert s3_bucket.removeprefix("s3://") in store.fs.ls("", refresh=True)
    assert f"{s3_bucket}-misspelt".removeprefix("s3://") not in store.fs.ls("", refresh=True)


@pytest.mark.parametrize("secret", ["not the secret", None])
def test_a_wrong_secret_or_none_is_one_sentence(store, monkeypatch, secret):
    if secret:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(ConfigError, match=r"^cannot write to the storage s3://\S+ \(.+\): set CCA_STORAGE to [^\n]*$"):
        Store(store.uri).check_writable()
    if secret:
        with pytest.raises(ConfigError, match=r"^source.uri=s3://\S+ may not be read \(.+\): grant access [^\n]*$"):
            open_source(SourceConfig(kind="folder", uri=store.uri)).list()


def test_recorded_codes_are_the_same_on_s3(store, tmp_path, write_codes):
    codes = {str(n): np.arange(32).reshape(2, 16) + n for n in range(40)}
    seen = []
    for root in (str(tmp_path), f"{store.uri}/official"):
        write_codes(root, codes, {n: int(n) % 3 for n in codes} | {"lost": 0})
        for uri in (root, f"{root}/set8_codes"):
            source = open_source(SourceConfig(kind="codes", uri=uri))
            listing, names = source.list()
            read = [(image.id, image.label, image.data, bool(image.error)) for image in source.read(listing.slice(3))]
            seen.append((names, listing.select(["image_id", "location", "label"]).to_pydict(), read))
    assert seen[1:] == seen[:-1]
    assert (len(seen[0][2]), seen[0][2][-1]) == (38, ("lost", 0, b"", True))
    with pytest.raises(ConfigError, match=r"holds no folder <name>_codes"):
        open_source(SourceConfig(kind="codes", uri=store.uri)).list()


def test_votes_of_many_reviewers_are_all_there(store):
    votes = VoteStore(store, "d" * 64)
    assert votes.read() == []
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: votes.add(f"reviewer {i % 4}", i // 4, "ant", "equal"), range(40)))
    votes.add("reviewer 0", 0, "ant", "aligned")
    other = VoteStore(Store(store.uri), "d" * 64)
    assert len(other.read()) == 41
    found = {(vote.reviewer, vote.pair): vote.choice for vote in counting(other.read())}
    assert found == {(f"reviewer {i % 4}", i // 4): "equal" for i in range(40)} | {("reviewer 0", 0): "aligned"}
    assert {vote.pair for vote in other.read("Reviewer 3")} == set(range(10))
    assert VoteStore(store, "e" * 64).read() == []


def test_training_resumes_from_a_state_on_s3(store, write_tokens, random_llamagen):
    write_tokens(store.uri, images=84, rows_per_shard=40)
    model = random_llamagen(seed=1)
    info = BundleInfo(model=Part("llamagen", vars(model.spec)), tokenizer=None, image_size=8)
    for name, data in bundle_files(info, model.state_dict(), None).items():
        store.directory("base", trajectories.DIGESTS["base"]).write_bytes(name, data)

    def saved() -> dict[int, str]:
        names = {name.split("/")[2] for name in contents(store, "train_state/a")}
        return {int(name.split("-")[1]): name for name in names}

    setting = Setting(objective="likelihood", save_every=1)
    uninterrupted = trajectories.train(store.uri, setting)
    trajectories.train(store.uri, replace(setting, states="a", lost_in_step=5))
    assert set(saved()) == {3, 4}, "an older state goes once the newer one is whole"
    store.fs.rm_file(f"{store.root}/train_state/a/{saved()[4]}/.metadata")
    resumed = trajectories.train(store.uri, replace(setting, states="a"))
    assert resumed.resumed_from == 3, "the state that is not whole is passed over"
    assert resumed.curve == uninterrupted.curve
    assert all(torch.equal(resumed.weights[name], value) for name, value in uninterrupted.weights.items())
    assert trajectories.train(store.uri, replace(setting, states="a")).resumed_from == trajectories.STEPS
