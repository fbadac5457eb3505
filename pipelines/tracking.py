"""Reads and writes MLflow: parent and stage runs, metrics, artifacts, the registry. The view; manifests are the
truth."""

from __future__ import annotations

import io
import json
import logging
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking import SEARCH_MAX_RESULTS_DEFAULT
from mlflow.tracking import MlflowClient
from PIL import Image
from requests.exceptions import RequestException

import cca_core
from cca_core.config import ConfigError
from pipelines.mlflow_model import BUNDLE, signature
from pipelines.patience import AWAY_S, LOCKED_S, Patience
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

#: What MLflow's client raises.
ERRORS = (RequestException, MlflowException)
TOO_MANY, SERVER_ERROR = 429, 500

log = logging.getLogger(__name__)


def away(error: BaseException) -> bool:
    """The server may answer the same call later; another error is its answer. A lost connection comes as an
    MlflowException with the status of an internal error."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status == TOO_MANY or status >= SERVER_ERROR
    return isinstance(error, RequestException)


class Tracker:
    """One MLflow store, one experiment. What a run cannot go on without waits for a server that is away; what people
    look at (curves, pictures) does not: it is written once the server is back, since training must not wait for its
    dashboard.

    ``stopped``, when it is set, ends all waiting.
    """

    def __init__(self, settings: Settings, stopped: threading.Event | None = None) -> None:
        self.uri = settings.resolved_tracking_uri
        self.server = re.sub(r"//[^/@]*@", "//", self.uri.rstrip("/"))  # without the password it may hold
        seconds = LOCKED_S if settings.local_tracking else AWAY_S
        self.patiently = Patience(f"MLflow at {self.server}", away, seconds, stopped or threading.Event())
        self._late: deque[Callable[[], Any]] = deque()
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
        except ERRORS as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"the MLflow server {self.server} does not answer ({reason[:200]}): start it, or unset "
                f"MLFLOW_TRACKING_URI "
                "to use a local file"
            ) from error

    def find_parent(self, run_key: str) -> Run | None:
        """The newest workflow run of that key."""
        found = self._search(f"tags.`{RUN_KEY}` = '{run_key}'", "DESC", 1)
        return found[0] if found else None

    def find_submitted(self, submission: str) -> Run | None:
        """The workflow run that a submission of that name drove."""
        found = self._search(f"tags.`{SUBMISSION}.{submission}` = 'true'", "DESC", 1)
        return found[0] if found else None

    def parents(self, limit: int = 20) -> list[Run]:
        """Workflow runs, newest first."""
        return self._search(f"tags.`{STAGE}` = 'workflow'", "DESC", limit)

    def stage_runs(self, parent_id: str) -> list[Run]:
        """The stage runs below a workflow run, oldest first."""
        return self._search(f"tags.`mlflow.parentRunId` = '{parent_id}'", "ASC", SEARCH_MAX_RESULTS_DEFAULT)

    def finished_stage(self, stage: str, digest: str) -> Run | None:
        """A finished run of that stage and digest, of any workflow run."""
        query = f"tags.`{STAGE}` = '{stage}' and tags.`{DIGEST}` = '{digest}' and attributes.status = 'FINISHED'"
        found = self._search(query, "DESC", 1)
        return found[0] if found else None

    def _search(self, query: str, order: str, limit: int) -> list[Run]:
        by_start = [f"start_time {order}"]
        search = self.client.search_runs
        return list(self.patiently(search, [self.experiment_id], query, order_by=by_start, max_results=limit))

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

    def start(self, name: str, tags: dict[str, str], parent_id: str | None = None) -> str:
        """Create a run and return its id; it stays open until ``end``."""
        tags = {"mlflow.source.name": "cca run", **tags}
        if parent_id:
            tags["mlflow.parentRunId"] = parent_id
        return self.patiently(self.client.create_run, self.experiment_id, run_name=name, tags=tags).info.run_id

    def reopen(self, run_id: str) -> None:
        self.patiently(self.client.update_run, run_id, status="RUNNING")

    def end(self, run_id: str, status: str) -> None:
        """status: FINISHED, FAILED or KILLED. All that is to be seen of the run is there by then."""
        self.patiently(self._catch_up)
        self.patiently(self.client.set_terminated, run_id, status)

    def wait(self, run_id: str) -> None:
        """Neither running nor ended: the run goes on once people have done their part."""
        self.patiently(self.client.update_run, run_id, status="SCHEDULED")

    def kill_stale(self, parent_id: str) -> list[str]:
        """Mark stage runs that a dead driver left open as KILLED, and the trials below them; return their names."""
        stale = [run for run in self.stage_runs(parent_id) if run.info.status == "RUNNING"]
        for run in stale:
            self.kill_stale(run.info.run_id)
            self.end(run.info.run_id, "KILLED")
        return [run.info.run_name or "" for run in stale]

    def tag(self, run_id: str, key: str, value: str) -> None:
        self.patiently(self.client.set_tag, run_id, key, value)

    def params(self, run_id: str, values: dict[str, Any], prefix: str = "") -> None:
        """Nested values as dotted parameters; long ones are cut, the recipe artifact has them whole."""
        flat = [Param(key, str(value)[:500]) for key, value in _flatten(values, prefix)]
        for start in range(0, len(flat), 100):
            part = flat[start : start + 100]
            self._show(lambda part=part: self.client.log_batch(run_id, params=part))

    def metrics(self, run_id: str, values: dict[str, float], step: int = 0) -> None:
        now = int(time.time() * 1000)
        batch = [
            Metric(key, float(value), now, step) for key, value in values.items() if isinstance(value, (int, float))
        ]
        self._show(lambda: self.client.log_batch(run_id, metrics=batch))

    def tags(self, run_id: str, values: dict[str, str]) -> None:
        self._show(
            lambda: self.client.log_batch(run_id, tags=[RunTag(key, str(value)) for key, value in values.items()])
        )

    def note(self, run_id: str, markdown: str) -> None:
        """The description that the UI shows on top of a run."""
        self._show(lambda: self.client.set_tag(run_id, "mlflow.note.content", markdown))

    def artifact(self, run_id: str, path: str, data: bytes) -> None:
        """Store bytes under ``path`` in the run's artifacts."""
        parent = str(Path(path).parent)

        def write() -> None:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / Path(path).name
                file.write_bytes(data)
                self.client.log_artifact(run_id, str(file), None if parent == "." else parent)

        self._show(write)

    def text(self, run_id: str, path: str) -> str:
        """A text among the run's artifacts."""
        with tempfile.TemporaryDirectory() as folder:
            return Path(self.patiently(self.client.download_artifacts, run_id, path, folder)).read_text()

    def figure(self, run_id: str, figure: Any, path: str) -> None:
        self._show(lambda: self.client.log_figure(run_id, figure, path))

    def image(self, run_id: str, png: bytes, key: str, step: int) -> None:
        """A picture at a step, for the UI's grid of images; artifacts have it too."""
        picture = Image.open(io.BytesIO(png)).convert("RGB")
        self._show(lambda: self.client.log_image(run_id, picture, key=key, step=step))

    def table(self, run_id: str, columns: dict[str, list[Any]], path: str) -> None:
        self._show(lambda: self.client.log_table(run_id, columns, path))

    def dataset(self, run_id: str, *, uri: str, name: str, digest: str, context: str) -> None:
        """Lineage: what data a run read or wrote."""

        def write() -> None:
            source = mlflow.data.dataset_source_registry.resolve_dataset_source(uri)
            data = MetaDataset(source, name=name, digest=digest[:36])
            entity = mlflow.entities.DatasetInput(
                dataset=data._to_mlflow_entity(), tags=[mlflow.entities.InputTag("mlflow.data.context", context)]
            )
            self.client.log_inputs(run_id, datasets=[entity])

        self._show(write)

    def _show(self, write: Callable[[], Any]) -> None:
        """A write of what people look at. While the server is away it waits in line; what it refuses is a warning."""
        self._late.append(write)
        try:
            self._catch_up()
        except ERRORS as error:
            if len(self._late) == 1:  # the others wait behind it
                log.warning("MLflow is away, its curves and pictures wait for it: %s", str(error).splitlines()[0][:200])

    def _catch_up(self) -> None:
        while self._late:
            write = self._late.popleft()
            try:
                write()
            except ERRORS as error:
                if away(error):
                    self._late.appendleft(write)
                    raise
                log.warning("MLflow did not take a write: %s", str(error).splitlines()[0])

    def page(self, server: str) -> str:
        """The experiment's runs on the MLflow server at ``server``."""
        return f"{server.rstrip('/')}/#/experiments/{self.experiment_id}/runs?workflowType=machine_learning"

    def run_page(self, run_id: str) -> str:
        """A run on the MLflow server that this is, without the password that its address may hold."""
        return f"{self.server}/#/experiments/{self.experiment_id}/runs/{run_id}"


@dataclass(frozen=True)
class Version:
    """A registered model version."""

    version: str
    tags: dict[str, str]


class Registry:
    """One registered model: versions are found by digest tag, aliases move between them."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self.client, self.patiently, self.name = tracker.client, tracker.patiently, name

    def by_digest(self, digest: str) -> Version | None:
        return next((v for v in self.versions() if v.tags.get(DIGEST) == digest), None)

    def versions(self) -> list[Version]:
        """All versions, oldest first; none where the model was never registered."""
        found = self.patiently(self.client.search_model_versions, f"name='{self.name}'")
        return sorted((Version(str(v.version), dict(v.tags)) for v in found), key=lambda v: int(v.version))

    def alias(self, alias: str) -> Version | None:
        try:
            found = self.patiently(self.client.get_model_version_by_alias, self.name, alias)
        except MlflowException as error:
            if away(error):  # that it is not known is not that there is none
                raise
            return None
        return Version(str(found.version), dict(found.tags))

    def set_alias(self, alias: str, version: str) -> None:
        self.patiently(self.client.set_registered_model_alias, self.name, alias, version)

    def crown(self, version: str) -> None:
        """Make a version the champion, and keep in mind which one was."""
        before = self.alias(CHAMPION)
        if before is not None and before.version != version:
            self.set_alias(PREVIOUS, before.version)
        self.set_alias(CHAMPION, version)

    def add(self, run_id: str, bundle_folder: str, name: str, sampling: dict[str, Any], tags: dict[str, str]) -> str:
        """Log the bundle as a model of ``run_id``, register it with its tags, and return the version."""
        return self.patiently(self._add, run_id, bundle_folder, name, sampling, tags)

    def _add(self, run_id: str, bundle_folder: str, name: str, sampling: dict[str, Any], tags: dict[str, str]) -> str:
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
