"""Reads the Serve configuration ``deploy/serve.yaml``, which names this module: the Ray Serve application.

Two deployments: Ingress speaks HTTP, Generator draws. A generator pins an immutable model version; a new one comes in
place through ``user_config``, and so do the ingress's files. Ray's own metrics port carries the metrics.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deploy.access import Access
from deploy.generator import Generator
from deploy.metrics import targets
from deploy.readiness import Readiness
from deploy.routes import http_api


@serve.deployment(name="Ingress")
@serve.ingress()
class Ingress:
    """Answers HTTP requests with what generators draw."""

    def __init__(self, generator: DeploymentHandle) -> None:
        self.generator, self.access, self.readiness = generator, Access(), Readiness(generator)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return http_api(self.generator, self.access, targets, self.readiness)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the keys file and the audit log that the configuration names, and whether generators may all be away."""
        files = dict(user_config)
        self.readiness.scale_to_zero = files.pop("scale_to_zero", False)
        self.access.configure(**files)


def build(args: dict[str, Any]) -> serve.Application:
    """The application of deploy/serve.yaml; everything configurable stands there."""
    del args
    return Ingress.bind(Generator.bind())
