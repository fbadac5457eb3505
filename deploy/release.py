"""Reads and writes the Serve configuration of a Ray cluster through its REST API: rollout and change of version."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import AuthenticationError

from cca_core.config import ConfigError
from deploy.cluster_token import cluster_token

APPLICATION = "cca"
POLL_S = 0.2


def serve_config(
    model: str,
    *,
    tracking_uri: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_replicas: int = 2,
    cpus_per_replica: int = 1,
    keys: str = "",
    audit: str = "",
) -> dict[str, Any]:
    """deploy/serve.yaml with the pinned model, the address, the replicas and the ingress's files filled in."""
    config = yaml.safe_load((files("deploy") / "serve.yaml").read_text())
    config["http_options"] |= {"host": host, "port": port}
    _deployment(config["applications"], "Ingress")["user_config"] = {"keys": keys, "audit": audit}
    generator = _generator(config["applications"])
    generator["user_config"] = {"model": model, "tracking_uri": tracking_uri}
    generator["autoscaling_config"]["max_replicas"] = max_replicas
    generator["ray_actor_options"]["num_cpus"] = cpus_per_replica
    return config


def deploy(address: str, config: dict[str, Any]) -> None:
    """Make the cluster at the dashboard ``address`` serve ``config``; returns before replicas run."""
    _client(address).deploy_applications(config)


def details(address: str) -> dict[str, Any]:
    """What the cluster serves now, with the status of every deployment and replica."""
    return _client(address).get_serve_details()


def set_model(address: str, model: str, *, timeout_s: float = 180) -> None:
    """Change the generator's pinned version in place, and return once every replica serves it.

    Same replicas, no request lost. Where the new version does not come up, the one before is put back and ConfigError
    says why.
    """
    found = details(address)
    if APPLICATION not in found["applications"]:
        raise ConfigError(f"no service named {APPLICATION} at {address}: start one with `cca serve`")
    # A configuration is whole: an application that it leaves out would be deleted.
    config = {
        "proxy_location": found["proxy_location"],
        "http_options": found["http_options"],
        "applications": [
            application["deployed_app_config"]
            for application in found["applications"].values()
            if application["deployed_app_config"]
        ],
    }
    generator = _generator(config["applications"])
    before = generator["user_config"]
    try:
        generator["user_config"] = {**before, "model": model}
        deploy(address, config)
        wait_running(address, timeout_s=timeout_s)
    except ConfigError as error:
        generator["user_config"] = before
        deploy(address, config)
        wait_running(address, timeout_s=timeout_s)
        raise ConfigError(f"{model} was not rolled out, {before['model']} is served again: {error}") from error


def wait_running(address: str, *, timeout_s: float, say: Callable[[str], None] = lambda _: None) -> None:
    """Poll until the application runs; ConfigError with its own message where it fails or takes too long."""
    deadline = time.monotonic() + timeout_s
    told = ""
    while True:
        application = details(address)["applications"].get(APPLICATION, {"status": "DEPLOYING", "message": ""})
        status, message = application["status"], application.get("message", "")
        if status == "RUNNING":
            return
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reasons = [d.get("message", "") for d in application.get("deployments", {}).values() if d.get("message")]
            last = (reasons or [message])[0].strip().splitlines()
            raise ConfigError(f"the service did not start: {last[-1] if last else status}")
        if status != told:
            say(f"service: {status.lower()}")
            told = status
        if time.monotonic() > deadline:
            raise ConfigError(f"the service did not run after {timeout_s:.0f} s (status {status}): see the Ray logs")
        time.sleep(POLL_S)


def _client(address: str) -> ServeSubmissionClient:
    try:
        return ServeSubmissionClient(address, headers=token_header())
    except AuthenticationError as error:
        raise ConfigError(
            f"the Ray dashboard at {address} asks for another token: put its token into RAY_AUTH_TOKEN"
        ) from error
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"no Ray dashboard answers at {address}: correct CCA_SERVE_ADDRESS") from error


def token_header() -> dict[str, str] | None:
    """What opens a guarded dashboard: clusters that Ray starts itself have one.

    Ray's client sends its token only in a process that has started or joined a cluster, or where RAY_AUTH_MODE says so.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return None
    token = cluster_token()
    return {"Authorization": f"Bearer {token}"} if token else None


def _generator(applications: list[dict[str, Any]]) -> dict[str, Any]:
    return _deployment(applications, "Generator")


def _deployment(applications: list[dict[str, Any]], name: str) -> dict[str, Any]:
    application = next(a for a in applications if a["name"] == APPLICATION)
    return next(d for d in application["deployments"] if d["name"] == name)
