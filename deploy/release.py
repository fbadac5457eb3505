"""Reads and writes the Serve configuration of a Ray cluster through its REST API: rollout and change of version."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import yaml
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient
from ray.exceptions import AuthenticationError

from cca_core.config import ConfigError
from deploy.cluster_token import cluster_token

APPLICATION = "cca"
#: The application with the generators of a canary.
CANARY = "cca-canary"
POLL_S = 0.2
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """How a model is served: where it listens, with how many generators, and the files of its ingress.

    ConfigError where there cannot be so many generators.
    """

    #: MLflow's store, for a registered model.
    tracking_uri: str
    host: str = "127.0.0.1"
    port: int = 8000
    min_replicas: int = 1
    max_replicas: int = 2
    keys: str = ""
    audit: str = ""

    def __post_init__(self) -> None:
        low, high = self.min_replicas, self.max_replicas
        if not 0 <= low <= high or high < 1:
            raise ConfigError(
                f"--min-replicas {low} to --max-replicas {high} is no range: the first is 0 or more, the second at "
                "least 1 and at least the first"
            )


def serve_config(model: str, service: ServiceConfig, *, cpus_per_replica: int = 1) -> dict[str, Any]:
    """deploy/serve.yaml with the pinned model, the address, the replicas and the ingress's files filled in."""
    config = yaml.safe_load((files("deploy") / "serve.yaml").read_text())
    config["http_options"] |= {"host": service.host, "port": service.port}
    ingress = {"keys": service.keys, "audit": service.audit, "scale_to_zero": service.min_replicas == 0}
    deployment(config, "Ingress")["user_config"] = ingress
    generator = deployment(config, "Generator")
    generator["user_config"] = {"model": model, "tracking_uri": service.tracking_uri}
    generator["autoscaling_config"] |= {"min_replicas": service.min_replicas, "max_replicas": service.max_replicas}
    if service.min_replicas == 0:
        generator["autoscaling_config"]["initial_replicas"] = 1  # whether the model loads is known at the start
    generator["ray_actor_options"]["num_cpus"] = cpus_per_replica
    return config


def deploy(address: str, config: dict[str, Any]) -> None:
    """Make the cluster at the dashboard ``address`` serve ``config``; returns before replicas run."""
    _client(address).deploy_applications(config)


def details(address: str) -> dict[str, Any]:
    """What the cluster serves now, with the status of every deployment and replica."""
    return _client(address).get_serve_details()


def present(address: str) -> dict[str, Any]:
    """The configuration of all that the cluster serves. It is always whole: what one leaves out would be deleted."""
    found = details(address)
    if APPLICATION not in found["applications"]:
        raise ConfigError(f"no service named {APPLICATION} at {address}: start one with `cca serve`")
    return {
        "proxy_location": found["proxy_location"],
        "http_options": found["http_options"],
        "applications": [
            application["deployed_app_config"]
            for application in found["applications"].values()
            if application["deployed_app_config"]
        ],
    }


def deployment(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of a configuration that is about a deployment of the service."""
    application = next(a for a in config["applications"] if a["name"] == APPLICATION)
    return next(d for d in application["deployments"] if d["name"] == name)


def api_of(http: dict[str, Any], address: str) -> str:
    """Where a service with these http_options answers: on the host that it listens on, or that of the dashboard
    ``address`` where it listens on all."""
    host = http["host"]
    if host in (*LOOPBACK, *EVERYWHERE):
        host = urlsplit(address).hostname
    return f"http://{f'[{host}]' if ':' in str(host) else host}:{http['port']}"


def set_model(address: str, model: str, *, timeout_s: float = 180) -> None:
    """Change the generator's pinned version in place, and return once every replica serves it.

    Same replicas, no request lost. Where the new version does not come up, the one before is put back and ConfigError
    says why.
    """
    config = present(address)
    generator = deployment(config, "Generator")
    before = generator["user_config"]
    scaling = generator.get("autoscaling_config") or {}
    if scaling.get("min_replicas") == 0:
        # A changed configuration begins with these: as many as now, and at least one, which loads the version.
        replicas = details(address)["applications"][APPLICATION]["deployments"]["Generator"]["replicas"]
        running = sum(replica["state"] == "RUNNING" for replica in replicas)
        scaling["initial_replicas"] = min(max(1, running), scaling["max_replicas"])
    try:
        generator["user_config"] = {**before, "model": model}
        deploy(address, config)
        wait_running(address, timeout_s=timeout_s)
    except ConfigError as error:
        generator["user_config"] = before
        deploy(address, config)
        wait_running(address, timeout_s=timeout_s)
        raise ConfigError(f"{model} was not rolled out, {before['model']} is served again: {error}") from error


def wait_running(
    address: str, application: str = APPLICATION, *, timeout_s: float, say: Callable[[str], None] = lambda _: None
) -> None:
    """Poll until an application runs; ConfigError with its own message where it fails or takes too long.

    An unhealthy one has lost a replica, which Serve replaces: that alone is no failure.
    """
    deadline = time.monotonic() + timeout_s
    told = ""
    while True:
        found = details(address)["applications"].get(application, {"status": "DEPLOYING", "message": ""})
        status, message = found["status"], found.get("message", "")
        if status == "RUNNING":
            return
        reasons = [d.get("message", "") for d in found.get("deployments", {}).values() if d.get("message")]
        last = (reasons or [message])[0].strip().splitlines()
        if status == "DEPLOY_FAILED":
            raise ConfigError(f"the service did not start: {last[-1] if last else status}")
        if status != told:
            say(f"service: {status.lower()}")
            told = status
        if time.monotonic() > deadline:
            why = f": {last[-1]}" if last else ""
            raise ConfigError(f"it did not run after {timeout_s:.0f} s (status {status}){why}; see the Ray logs")
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
