"""Reads a platform's storage and registry, writes to a folder: somebody who uses the platform from a terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import s3fs
from mlflow.tracking import MlflowClient

from tests.driver import Driver, cca
from tests.platform.local_platform import BUCKET, Platform


class User:
    """Somebody at a terminal elsewhere, who has the platform's addresses and its token."""

    def __init__(self, platform: Platform, folder: Path, name: str) -> None:
        self.platform, self.folder, self.name = platform, folder, name
        self.environment = {
            **platform.user,
            "CCA_STORAGE": f"s3://{BUCKET}/{name}",
            "CCA_EXPERIMENT": name,
            "CCA_MODEL_NAME": name,
        }

    def cca(self, *arguments: str, **env: str) -> Any:
        return cca(self.folder, *arguments, env={**self.environment, **env})

    def start(self, *arguments: str, node: str = "") -> Driver:
        """A running command: at this terminal, or logged in on a node of the cluster."""
        if not node:
            return Driver(self.folder, verb=arguments, env=self.environment)
        env = {**self.environment, "RAY_ADDRESS": self.platform.gcs}
        return Driver(self.folder, verb=arguments, env=env, inside=self.platform.inside(node))

    def metrics(self) -> dict[str, Any]:
        """Measured quality by stage and sampler, from the storage; costs differ from run to run."""
        fs = self._storage()
        found = {}
        for stage in ("baseline", "evaluate"):
            (path,) = fs.glob(f"{BUCKET}/{self.name}/{stage}/*/results.json")
            for row in json.loads(fs.cat_file(path))["rows"]:
                found[stage, row["label"]] = row["per_seed"]
        return found

    def has(self, pattern: str) -> bool:
        fs = self._storage()
        fs.invalidate_cache()
        return bool(fs.glob(f"{BUCKET}/{self.name}/{pattern}"))

    def champion(self) -> str:
        client = MlflowClient(self.platform.mlflow.uri, self.platform.mlflow.uri)
        return str(client.get_model_version_by_alias(self.name, "champion").version)

    def _storage(self) -> s3fs.S3FileSystem:
        endpoint = self.platform.s3
        options = {"endpoint_url": endpoint.url, "region_name": endpoint.region}
        return s3fs.S3FileSystem(key=endpoint.access_key, secret=endpoint.secret_key, client_kwargs=options)
