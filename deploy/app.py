"""Reads the Serve configuration ``deploy/serve.yaml``, which names this module: the Ray Serve application.

Two deployments: Ingress speaks HTTP, Generator draws. A generator pins an immutable model version; a new one comes in
place through ``user_config``, and so do the ingress's files and the share of a canary, whose generators are an
application of their own beside this one. Ray's own metrics port carries the metrics.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deploy.access import Access
from deploy.fleet import Fleet
from deploy.generator import Generator
from deploy.metrics import targets
from deploy.readiness import Readiness
from deploy.release import CANARY
from deploy.routes import http_api


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    """Answers HTTP requests with what generators draw."""

    def __init__(self, generator: DeploymentHandle) -> None:
        self.access = Access()
        self.fleet = Fleet(generator, lambda: serve.get_app_handle(CANARY), self.access.metrics.on_trial)
        self.readiness = Readiness(generator)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return http_api(self.fleet, self.access, targets, self.readiness)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take what the configuration says of keys, the audit log, scaling to zero and a canary."""
        self.access.configure(keys=user_config.get("keys", ""), audit=user_config.get("audit", ""))
        self.readiness.scale_to_zero = user_config.get("scale_to_zero", False)
        self.fleet.configure(**user_config.get("canary", {}))


def build(args: dict[str, Any]) -> serve.Application:
    """The application of deploy/serve.yaml; everything configurable stands there."""
    del args
    return Ingress.bind(Generator.bind())


def build_canary(args: dict[str, Any]) -> serve.Application:
    """Generators of another version, without an address of their own."""
    del args
    return Generator.bind()
