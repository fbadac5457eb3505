"""Reads a model's name, writes to a running Ray cluster: serves there, and leaves it serving."""

from __future__ import annotations

from collections.abc import Callable

from cca_core.config import ConfigError
from deploy.local import START_S, first_answer
from deploy.release import ServiceConfig, api_of, deploy, serve_config, wait_running
from deploy.versions import REGISTERED, pin


def serve_there(model: str, service: ServiceConfig, say: Callable[[str], None], *, address: str) -> None:
    """Pin the model and deploy it to the cluster whose dashboard is at ``address``; return once it answers.

    The nodes have this project installed, reach the tracking URI, and hold the files that are named.
    """
    if model.startswith(REGISTERED) and not service.tracking_uri.startswith(("http://", "https://")):
        raise ConfigError(
            "generators of a cluster read the model from an MLflow server: set MLFLOW_TRACKING_URI to its address, "
            "such as http://HOST:5000"
        )
    pinned = pin(model, service.tracking_uri)
    config = serve_config(pinned, service)
    say(f"starting {pinned} on {address}")
    deploy(address, config)
    wait_running(address, timeout_s=START_S, say=say)
    api = api_of(config["http_options"], address)
    served = first_answer(f"{api}/readyz", timeout_s=START_S).get("model", pinned)
    say(f"ready: {api}/v1 serves {served}, with or without this terminal")
    say(f"  CCA_SERVE_ADDRESS={address} cca promote VERSION    changes the model in place")
