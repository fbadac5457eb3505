"""Reads a recipe, the files it names and the environment, writes a job to a Ray cluster: a run of its own there."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import tempfile
from pathlib import Path

import cca_core
import deploy
import pipelines
from cca_core.config import ConfigError, Recipe
from pipelines.cluster import RECIPE, Cluster
from pipelines.recipe import built_in
from pipelines.sealed import environment, runtime_env
from pipelines.settings import Settings

#: The package of a job stays in the memory of the head.
MAX_LOCAL_BYTES = 256 * 1024**2
#: A run that is stopped has this long to end where nothing is half-written.
STOP_S = 60


def check_settings(settings: Settings) -> None:
    """ConfigError where the storage or MLflow are this machine's alone."""
    if _is_relative(settings.storage):
        raise ConfigError(
            f"CCA_STORAGE={settings.storage} is a folder of this machine: set it to s3://BUCKET/PREFIX, or to an "
            "absolute path that is the same on all nodes"
        )
    if not settings.tracking_uri.startswith(("http://", "https://")):
        raise ConfigError(
            "a submitted run is looked at on an MLflow server: set MLFLOW_TRACKING_URI to its address, such as "
            "http://HOST:5000"
        )


def submit(cluster: Cluster, recipe: Recipe, name_or_path: str, overrides: list[str]) -> str:
    """Send the code, the recipe and the local files that it names, start the run there, and return its name.

    The nodes need the dependencies of this package, not the package: they run the code that is sent.
    """
    name = f"cca-{re.sub('[^A-Za-z0-9_-]+', '-', recipe.name)}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="cca-submit-") as folder:
        there = pack(recipe, name_or_path, Path(folder))
        values = (word for value in overrides for word in ("--set", value))
        command = shlex.join(["python", "-m", pipelines.__name__, "run", there, *values])
        env = runtime_env({**environment(), "CCA_SUBMISSION": name}, cluster.token)
        env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] = str(STOP_S)
        cluster.client.submit_job(
            # In place of the shell, so that signals reach it. No CPU is asked for: the head may have none.
            entrypoint=f"exec {command}",
            submission_id=name,
            metadata={RECIPE: recipe.name},
            runtime_env={**env, "working_dir": folder},
        )
    return name


def pack(recipe: Recipe, name_or_path: str, folder: Path) -> str:
    """Fill the folder that the run will be in; returns how the recipe is called there."""
    for package in (cca_core, deploy, pipelines):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    size = 0
    for key, path in _local_files(recipe).items():
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        size += sum(file.stat().st_size for file in files)
        if size > MAX_LOCAL_BYTES:
            raise ConfigError(
                f"{key}={path} is too large to be sent (more than {MAX_LOCAL_BYTES >> 20} MiB): put it on S3, or on an "
                "absolute path that is the same on all nodes"
            )
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / file)
    if name_or_path in built_in():
        return name_or_path
    shutil.copyfile(name_or_path, folder / Path(name_or_path).name)
    return Path(name_or_path).name


def _local_files(recipe: Recipe) -> dict[str, Path]:
    """Recipe key -> relative path of a file or bundle that has to travel; absolute paths are those of the nodes."""
    if _is_relative(recipe.source.uri):
        raise ConfigError(
            f"source.uri={recipe.source.uri} is on this machine, and images do not travel with a run: put them on S3, "
            "or on an absolute path that is the same on all nodes"
        )
    named = {
        "source.class_map": recipe.source.class_map,
        "tokenizer.checkpoint": recipe.tokenizer.checkpoint,
        "base.checkpoint": recipe.base.checkpoint,
        "features.network": recipe.features.network,
        "evaluate.real_statistics": recipe.evaluate.real_statistics,
        "safety.filter": recipe.safety.filter,
    }
    found = {key: Path(uri) for key, uri in named.items() if _is_relative(uri)}
    for key, path in found.items():
        if not path.exists():
            raise ConfigError(f"{key}={path} is not here: correct it, or run cca submit where it is")
        if ".." in path.parts:
            raise ConfigError(f"{key}={path} lies outside of this folder: run cca submit in a folder above it")
    return found


def _is_relative(uri: str) -> bool:
    return bool(uri) and "://" not in uri and not os.path.isabs(uri)
