"""Reads and writes the environment: settings and secrets of a run on their way through a Ray cluster.

Ray's nodes write the environment of a job into their logs, and its dashboard shows it. So what travels is encrypted
with the cluster's token, which every process of the cluster has and no log.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from typing import Any

from cryptography.fernet import Fernet, InvalidToken

from cca_core.config import ConfigError
from deploy.cluster_token import cluster_token

SEALED = "CCA_SEALED"
#: What a run reads of its environment: the storage's and MLflow's credentials, and its own settings.
PREFIXES = ("AWS_", "CCA_", "MLFLOW_")


def environment() -> dict[str, str]:
    """Settings, addresses and credentials of this process that a run needs wherever it is."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIXES) and name != SEALED}


def seal(values: dict[str, str], token: str) -> str:
    return _box(token).encrypt(json.dumps(values).encode()).decode()


def runtime_env(values: dict[str, str], token: str) -> dict[str, Any]:
    """Ray's runtime environment, whose processes have ``values`` in their environment, and nobody else."""
    return {
        "worker_process_setup_hook": f"{unseal.__module__}.{unseal.__name__}",
        "env_vars": {SEALED: seal(values, token)},
    }


def is_sealed() -> bool:
    """Whether this process belongs to a run that was given its environment in this way."""
    return SEALED in os.environ


def unseal() -> None:
    """Put what was sealed into this process's environment: at the start of the run, and of each of its workers."""
    if not is_sealed():
        return
    try:
        values = _box(cluster_token()).decrypt(os.environ[SEALED])
    except InvalidToken:
        raise ConfigError(
            "this node's Ray token is not the one that the run was submitted with: give all nodes the same "
            "RAY_AUTH_TOKEN"
        ) from None
    os.environ.update(json.loads(values))


def _box(token: str) -> Fernet:
    return Fernet(base64.urlsafe_b64encode(hashlib.sha256(b"cca sealed environment:" + token.encode()).digest()))
