"""Reads and writes MLflow: parent and stage runs, metrics, artifacts, the registry. The view; manifests are the
truth."""

from __future__ import annotations

import io
import json
import logging
import re
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image
from requests.exceptions import RequestException
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

import cca_core
from cca_core.config import ConfigError
from pipelines.mlflow_model import BUNDLE, signature
from pipelines.settings import HOME, Settings

#: Tag names; searches depend on them.
RUN_KEY, STAGE, DIGEST, STATE = "cca.run_key", "cca.stage", "cca.digest", "cca.state"
#: Aliases: the version that is served, and the one before it.
CHAMPION, PREVIOUS = "champion", "previous"
#: One tag per submission that drove the run, since a run that is resumed has several.
SUBMISSION = "cca.submission"
#: Tells the UI to open the experiment as model training.
EXPERIMENT_KIND = "mlflow.experimentKind"

#: What a served or scored model needs beside cca_core, whose code travels with it.
PYFUNC_REQUIREMENTS = [
    f"{name}=={installed(name).split('+')[0]}"
    for name in ("mlflow", "torch", "numpy", "pandas", "pyarrow", "pillow", "safetensors", "fsspec", "scikit-learn")
]

log = logging.getLogger(__name__)
Result = TypeVar("Result")
#: Errors of a server that may answer again; MlflowException wraps the HTTP ones.
_again = retry(
    retry=retry_if_exception_type((RequestException, MlflowException)),
    wait=wait_random_exponential(multiplier=0.5, max=5),
    stop=stop_after_attempt(3),
    reraise=True,
)


class Tracker:
    """One MLflow store, one experiment. Every write is retried briefly; a write of metrics that still fails is a
    warning,
    because training must not die of its dashboard."""

    def __init__(self, settings: Settings) -> None:
        self.uri = settings.resolved_tracking_uri
        if settings.local_tracking:
            HOME.mkdir(parents=True, exist_ok=True)
            logging.getLogger("alembic").setLevel(logging.WARNING)
        mlflow.set_tracking_uri(self.uri)  # before any client: one built earlier talks to another store
        mlflow.set_registry_uri(self.uri)
        self.client = MlflowClient()
        try:
            found = self.client.get_experiment_by_name(settings.experiment)
            if found is None:
                root = settings.artifact_root if settings.local_tracking else None
                self.experiment_id = self.client.create_experiment(
                    settings.experiment, artifact_location=root, tags={EXPERIMENT_KIND: "custom_model_development"}
                )
            else:
                self.experiment_id = found.experiment_id
        except (RequestException, MlflowException) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"the MLflow server {self.uri} does not answer ({reason[:200]}): start it, or unset "
                f"MLFLOW_TRACKING_URI "
                "to use a local file"
            ) from error

    def find_parent(self, run_key: str) -> Run | None:
        """The newest workflow run of that key."""
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{RUN_KEY}` = '{run_key}'", order_by=["start_time DESC"], max_results=1
        )
        return found[0] if found else None

    def find_submitted(self, submission: str) -> Run | None:
        """The workflow run that a submission of that name drove."""
        query = f"tags.`{SUBMISSION}.{submission}` = 'true'"
        found = self.client.search_runs([self.experiment_id], query, order_by=["start_time DESC"], max_results=1)
        return found[0] if found else None

    def parents(self, limit: int = 20) -> list[Run]:
        """Workflow runs, newest first."""
        return list(
            self.client.search_runs(
                [self.experiment_id], f"tags.`{STAGE}` = 'workflow'", order_by=["start_time DESC"], max_results=limit
            )
        )

    def stage_runs(self, parent_id: str) -> list[Run]:
        """The stage runs below a workflow run, oldest first."""
        query = f"tags.`mlflow.parentRunId` = '{parent_id}'"
        return list(self.client.search_runs([self.experiment_id], query, order_by=["start_time ASC"]))

    def finished_stage(self, stage: str, digest: str) -> Run | None:
        """A finished run of that stage and digest, of any workflow run."""
        query = f"tags.`{STAGE}` = '{stage}' and tags.`{DIGEST}` = '{digest}' and attributes.status = 'FINISHED'"
        found = self.client.search_runs([self.experiment_id], query, max_results=1)
        return found[0] if found else None

    def versions_of(self, digests: set[str]) -> list[tuple[str, str, str]]:
        """Name, version and aliases of the registered versions whose models have one of these digests."""
        found = []
        for version in self.client.search_model_versions():
            digest = version.tags.get(DIGEST, "").partition(":")[0]
            if digest in digests:
                model = self.client.get_registered_model(version.name)
                aliases = [alias for alias, number in model.aliases.items() if str(number) == str(version.version)]
                found.append((str(version.name), str(version.version), ", ".join(sorted(aliases))))
        return sorted(found, key=lambda entry: (entry[0], int(entry[1])))

    @_again
    def start(self, name: str, tags: dict[str, str], parent_id: str | None = None) -> str:
        """Create a run and return its id; it stays open until ``end``."""
        tags = {"mlflow.source.name": "cca run", **tags}
        if parent_id:
            tags["mlflow.parentRunId"] = parent_id
        return self.client.create_run(self.experiment_id, run_name=name, tags=tags).info.run_id

    @_again
    def reopen(self, run_id: str) -> None:
        self.client.update_run(run_id, status="RUNNING")

    @_again
    def end(self, run_id: str, status: str) -> None:
        """status: FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    @_again
    def wait(self, run_id: str) -> None:
        """Neither running nor ended: the run goes on once people have done their part."""
        self.client.update_run(run_id, status="SCHEDULED")

    def kill_stale(self, parent_id: str) -> list[str]:
        """Mark stage runs that a dead driver left open as KILLED, and the trials below them; return their names."""
        stale = [run for run in self.stage_runs(parent_id) if run.info.status == "RUNNING"]
        for run in stale:
            self.kill_stale(run.info.run_id)
            self.end(run.info.run_id, "KILLED")
        return [run.info.run_name or "" for run in stale]

    @_again
    def tag(self, run_id: str, key: str, value: str) -> None:
        self.client.set_tag(run_id, key, value)

    def params(self, run_id: str, values: dict[str, Any], prefix: str = "") -> None:
        """Nested values as dotted parameters; long ones are cut, the recipe artifact has them whole."""
        flat = [Param(key, str(value)[:500]) for key, value in _flatten(values, prefix)]
        for start in range(0, len(flat), 100):
            part = flat[start : start + 100]
            self._view(lambda part=part: self.client.log_batch(run_id, params=part))

    def metrics(self, run_id: str, values: dict[str, float], step: int = 0) -> None:
        now = int(time.time() * 1000)
        batch = [
            Metric(key, float(value), now, step) for key, value in values.items() if isinstance(value, (int, float))
        ]
        self._view(lambda: self.client.log_batch(run_id, metrics=batch))

    def tags(self, run_id: str, values: dict[str, str]) -> None:
        self._view(
            lambda: self.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in values.items()])
        )

    def note(self, run_id: str, markdown: str) -> None:
        """The description that the UI shows on top of a run."""
        self._view(lambda: self.client.set_tag(run_id, "mlflow.note.content", markdown))

    def artifact(self, run_id: str, path: str, data: bytes) -> None:
        """Store bytes under ``path`` in the run's artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(path).name
            file.write_bytes(data)
            parent = str(Path(path).parent)
            self._view(lambda: self.client.log_artifact(run_id, str(file), None if parent == "." else parent))

    def text(self, run_id: str, path: str) -> str:
        """A text among the run's artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.client.download_artifacts(run_id, path, folder)).read_text()

    def figure(self, run_id: str, figure: Any, path: str) -> None:
        self._view(lambda: self.client.log_figure(run_id, figure, path))

    def image(self, run_id: str, png: bytes, key: str, step: int) -> None:
        """A picture at a step, for the UI's grid of images; artifacts have it too."""
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        self._view(lambda: self.client.log_image(run_id, picture, key=key, step=step))

    def table(self, run_id: str, columns: dict[str, list[Any]], path: str) -> None:
        self._view(lambda: self.client.log_table(run_id, columns, path))

    def dataset(self, run_id: str, *, uri: str, name: str, digest: str, context: str) -> None:
        """Lineage: what data a run read or wrote."""

        def write() -> None:
            source = mlflow.data.dataset_source_registry.resolve_dataset_source(uri)
            data = MetaDataset(source, name=name, digest=digest[:36])
            entity = mlflow.entities.DatasetInput(
                dataset=data._to_mlflow_entity(), tags=[mlflow.entities.InputTag("mlflow.data.context", context)]
            )
            self.client.log_inputs(run_id, datasets=[entity])

        self._view(write)

    def _view(self, write: Callable[[], Result]) -> Result | None:
        """A write to the view: retried, then a warning."""
        try:
            return _again(write)()
        except (RequestException, MlflowException) as error:
            log.warning("MLflow did not take a write: %s", str(error).splitlines()[0])
            return None

    def page(self, server: str) -> str:
        """The experiment's runs on the MLflow server at ``server``."""
        return f"{server.rstrip('/')}/#/experiments/{self.experiment_id}/runs?workflowType=machine_learning"

    def run_page(self, run_id: str) -> str:
        """A run on the MLflow server that this is, without the password that its address may hold."""
        server = re.sub(r"//[^/@]*@", "//", self.uri)
        return f"{server.rstrip('/')}/#/experiments/{self.experiment_id}/runs/{run_id}"


@dataclass(frozen=True)
class Version:
    """A registered model version."""

    version: str
    tags: dict[str, str]


class Registry:
    """One registered model: versions are found by digest tag, aliases move between them."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.client, self.name = tracker.client, name

    def by_digest(self, digest: str) -> Version | None:
        return next((v for v in self.versions() if v.tags.get(DIGEST) == digest), None)

    def versions(self) -> list[Version]:
        """All versions, oldest first; none where the model was never registered."""
        found = self.client.search_model_versions(f"name='{self.name}'")
        return sorted((Version(str(v.version), dict(v.tags)) for v in found), key=lambda v: int(v.version))

    def alias(self, alias: str) -> Version | None:
        try:
            found = self.client.get_model_version_by_alias(self.name, alias)
        except MlflowException:
            return None
        return Version(str(found.version), dict(found.tags))

    @_again
    def set_alias(self, alias: str, version: str) -> None:
        self.client.set_registered_model_alias(self.name, alias, version)

    def crown(self, version: str) -> None:
        """Make a version the champion, and keep in mind which one was."""
        before = self.alias(CHAMPION)
        if before is not None and before.version != version:
            self.set_alias(PREVIOUS, before.version)
        self.set_alias(CHAMPION, version)

    def add(self, run_id: str, bundle_folder: str, name: str, sampling: dict[str, Any], tags: dict[str, str]) -> str:
        """Log the bundle as a model of ``run_id``, register it with its tags, and return the version."""
        with mlflow.start_run(run_id=run_id):
            logged = mlflow.pyfunc.log_model(
                name=name,
                python_model=str(Path(__file__).with_name("mlflow_model.py")),
                artifacts={BUNDLE: bundle_folder},
                code_paths=[str(Path(cca_core.__file__).parent)],
                signature=signature(sampling),
                pip_requirements=PYFUNC_REQUIREMENTS,
            )
        if not self.client.search_registered_models(f"name='{self.name}'"):
            self.client.create_registered_model(self.name)
        version = self.client.create_model_version(
            self.name, logged.model_uri, run_id, tags=tags, model_id=logged.model_id
        )
        return str(version.version)


def _flatten(values: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat += _flatten(value, f"{name}.") if isinstance(value, dict) else [(name, json.dumps(value))]
    return flat
