"""Reads the environment, writes nothing: addresses, names and secrets, which never stand in a recipe."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

#: Where everything goes unless the environment says otherwise.
HOME = Path(".cca")


class Settings(BaseSettings):
    """Team and place. Experiment, model name and storage keep teams apart; each has a variable of its own."""

    model_config = SettingsConfigDict(env_prefix="CCA_", extra="ignore")

    #: CCA_STORAGE: folder or s3:// prefix of all stage directories.
    storage: str = str(HOME / "storage")
    #: CCA_EXPERIMENT: MLflow experiment.
    experiment: str = "cca"
    #: CCA_MODEL_NAME: registered model; empty takes cca-<recipe name>.
    model_name: str = ""
    #: CCA_SERVE_ADDRESS: dashboard of the Ray cluster that serves, such as http://127.0.0.1:8265; empty: no rollout.
    serve_address: str = ""
    #: CCA_SUBMISSION: what `cca submit` calls this run on its cluster; it sets it itself.
    submission: str = ""
    #: MLFLOW_TRACKING_URI: empty takes a SQLite file below .cca.
    tracking_uri: str = Field(default="", validation_alias="MLFLOW_TRACKING_URI")
    #: RAY_ADDRESS: empty starts Ray on this machine for as long as the run takes.
    ray_address: str = Field(default="", validation_alias="RAY_ADDRESS")

    def registered_model(self, recipe_name: str) -> str:
        return self.model_name or f"cca-{recipe_name}"

    @property
    def local_tracking(self) -> bool:
        return not self.tracking_uri

    @property
    def resolved_tracking_uri(self) -> str:
        """The tracking store; a local one is a SQLite file, which MLflow makes."""
        if self.tracking_uri:
            return self.tracking_uri
        return f"sqlite:///{(HOME / 'mlflow.db').absolute()}"

    @property
    def artifact_root(self) -> str:
        return (HOME / "mlartifacts").absolute().as_uri()


def quiet_libraries() -> None:
    """Telemetry off and pickled models refused, in this process and those it starts; the environment may say
    otherwise."""
    for name, value in (
        ("RAY_USAGE_STATS_ENABLED", "0"),
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
        ("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true"),
        # A server that does not answer is reported after seconds, not minutes.
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"),
        # A stage's thread that outlives its cluster must not start another.
        ("RAY_ENABLE_AUTO_CONNECT", "0"),
        ("MLFLOW_LOGGING_LEVEL", "ERROR"),
        ("GIT_PYTHON_REFRESH", "quiet"),
    ):
        os.environ.setdefault(name, value)
