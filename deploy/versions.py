"""Reads the MLflow registry, writes a temporary folder: which bundle a model's name means.

An alias is followed once, by whoever starts a rollout (``pin``); a replica takes only what cannot change (``fetched``),
so that replicas started at different times serve the same version.
"""

from __future__ import annotations

import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from requests.exceptions import RequestException

from cca_core.bundle import INFO_NAME, read_info
from cca_core.config import ConfigError

REGISTERED = "models:/"
SQLITE = "sqlite:///"
CONNECT_S = 5.0
#: models:/NAME@ALIAS or models:/NAME/VERSION
_NAMED = re.compile(r"models:/(?P<name>[^/@']+)(?:@(?P<alias>[^/@']+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class Fetched:
    """A bundle that can be read now: what it is called, and where it lies."""

    version: str
    uri: str


def pin(model: str, tracking_uri: str) -> str:
    """The immutable form of ``model``: models:/NAME/VERSION, or a bundle's absolute path or URI.

    ConfigError, with the remedy, for a model that is not there; nothing is created on the way.
    """
    if not model.startswith(REGISTERED):
        uri = model if "://" in model else str(Path(model).absolute())
        info = read_info(uri)
        if info.model is None or info.tokenizer is None:
            part = "a tokenizer only" if info.model is None else "no tokenizer"
            raise ConfigError(f"the bundle {model} holds {part}: to draw images it needs a model and a tokenizer")
        return uri
    named = _NAMED.fullmatch(model)
    if named is None:
        raise ConfigError(f"{model} names no model: use models:/NAME@champion, models:/NAME/VERSION or a bundle's path")
    name, alias, version = named["name"], named["alias"], named["version"]
    client = _client(tracking_uri)
    try:
        known = sorted(int(found.version) for found in client.search_model_versions(f"name='{name}'"))
    except (MlflowException, RequestException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ConfigError(_silent(tracking_uri, reason)) from error
    if not known:
        raise ConfigError(f"no model {name} is registered in {tracking_uri}: `cca run` registers one")
    has = f"{name} has version{'s' if len(known) > 1 else ''} {', '.join(map(str, known))}"
    if alias:
        try:
            version = client.get_model_version_by_alias(name, alias).version
        except MlflowException:
            raise ConfigError(
                f"{name} has no {alias}: choose one with `cca promote VERSION`, or name a version ({has})"
            ) from None
    elif int(version) not in known:
        raise ConfigError(f"{name} has no version {version}: {has}")
    return f"{REGISTERED}{name}/{version}"


@contextmanager
def fetched(model: str, tracking_uri: str) -> Iterator[Fetched]:
    """The bundle of a pinned model, downloaded from the registry for as long as the context lasts."""
    if not model.startswith(REGISTERED):
        yield Fetched(Path(model.rstrip("/")).name, model)
        return
    named = _NAMED.fullmatch(model)
    if named is None or named["alias"]:
        raise ConfigError(f"{model} may change its meaning: a replica serves models:/NAME/VERSION")
    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)
        mlflow.set_registry_uri(tracking_uri)
    with tempfile.TemporaryDirectory(prefix="cca-model-") as folder:
        mlflow.artifacts.download_artifacts(f"{model}/artifacts", dst_path=folder)
        found = sorted(Path(folder).rglob(INFO_NAME))
        if not found:
            raise ConfigError(f"{model} holds no bundle: register it with `cca run`")
        yield Fetched(model.removeprefix(REGISTERED), str(found[0].parent))


def _client(tracking_uri: str) -> MlflowClient:
    """A client of a store that is there: MLflow would make a missing SQLite file with all its tables, and try a silent
    server again and again."""
    if tracking_uri.startswith(SQLITE):
        file = Path(tracking_uri.removeprefix(SQLITE))
        if not file.is_file():
            raise ConfigError(
                f"no model is registered here, {file} does not exist: make one with `cca run`, or name another "
                f"store in MLFLOW_TRACKING_URI"
            )
    address = urlsplit(tracking_uri)
    if address.scheme in ("http", "https") and address.hostname:
        port = address.port or (443 if address.scheme == "https" else 80)
        try:
            socket.create_connection((address.hostname, port), CONNECT_S).close()
        except OSError as error:
            raise ConfigError(_silent(tracking_uri, (error.strerror or str(error)).lower())) from error
    return MlflowClient(tracking_uri, tracking_uri)


def _silent(tracking_uri: str, reason: str) -> str:
    return f"the MLflow registry {tracking_uri} does not answer ({reason}): start it, or correct MLFLOW_TRACKING_URI"
