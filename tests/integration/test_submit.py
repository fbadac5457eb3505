"""Writes to temporary folders: what `cca submit` refuses before it sends anything, and what it sends."""

from __future__ import annotations

import secrets
import socket
from dataclasses import replace

import pytest
from fastapi import FastAPI

from cca_core.config import ConfigError, ExecutionConfig
from pipelines import submit
from pipelines.cluster import Cluster, check_size, connect
from pipelines.recipe import load_recipe
from pipelines.settings import Settings
from tests.driver import answering

TOKEN = secrets.token_hex(32)


def test_a_cluster_that_may_grow_is_waited_for():
    """Nodes of KubeRay and of Ray's launcher carry a label that those here lack."""
    small = Cluster("http://head:8265", TOKEN, client=None, nodes=({"CPU": 2.0},), may_grow=False)
    wide = ExecutionConfig(num_workers=8)
    with pytest.raises(ConfigError, match=r"http://head:8265 is smaller than the recipe asks: execution.num_workers=8"):
        check_size(wide, small)
    assert check_size(wide, replace(small, may_grow=True))[0].startswith("waits until the cluster has grown")
    assert check_size(ExecutionConfig(num_workers=(2, 8), num_actors=3), small) == [
        "2 CPUs for 5 actors: stages of images run on fewer"
    ]


def test_a_cluster_that_asks_for_no_token_gets_no_secrets(monkeypatch):
    """The dashboard is one of ours: a cluster here would have a token, or be open to whoever is on this machine."""
    app = FastAPI()
    app.get("/api/v0/nodes")(lambda: {"data": {"result": {"result": []}}})
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        answering(app, listener) as address,
        pytest.raises(ConfigError, match="asks for no token, so whoever reaches it could read the keys"),
    ):
        connect(address)


def test_what_only_this_machine_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"CCA_STORAGE=.cca/storage is a folder of this machine: set it to s3://"):
        submit.check_settings(Settings())
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_URI to its address"):
        submit.check_settings(Settings(storage="/mnt/shared"))
    submit.check_settings(Settings(storage="/mnt/shared", MLFLOW_TRACKING_URI="http://mlflow:5000"))
    images = load_recipe("digits", ["source.kind=folder", "source.uri=./images"])
    with pytest.raises(ConfigError, match=r"source.uri=./images is on this machine, and images do not travel"):
        submit.pack(images, "digits", tmp_path / "there")


def test_the_recipe_and_the_files_it_names_travel(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("tokenizer: {checkpoint: files/vq}\nbase: {checkpoint: /mnt/shared/c2i.pt}\n")
    loaded = load_recipe("recipes/mine.yaml", [])
    with pytest.raises(ConfigError, match=r"tokenizer.checkpoint=files/vq is not here"):
        submit.pack(loaded, "recipes/mine.yaml", tmp_path / "first")
    (tmp_path / "files" / "vq").mkdir(parents=True)
    (tmp_path / "files" / "vq" / "bundle.json").write_text("{}")
    there = tmp_path / "second"
    assert submit.pack(loaded, "recipes/mine.yaml", there) == "mine.yaml"
    assert (there / "mine.yaml").read_text() == recipe.read_text()
    assert (there / "files" / "vq" / "bundle.json").is_file()
    assert (there / "pipelines" / "__main__.py").is_file()
    monkeypatch.setattr(submit, "MAX_LOCAL_BYTES", 1)
    with pytest.raises(ConfigError, match=r"tokenizer.checkpoint=files/vq is too large to be sent"):
        submit.pack(loaded, "recipes/mine.yaml", tmp_path / "third")
