"""Reads nothing: what /readyz says of generators that may all be away, and how such a service is configured."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from ray.serve.schema import DeploymentStatus, ServeDeploySchema

from cca_core.config import ConfigError
from deploy import readiness as readiness_module
from deploy.access import Access
from deploy.readiness import Readiness
from deploy.release import ServiceConfig, serve_config
from deploy.routes import http_api
from tests.fake_generator import VERSION, FakeGenerator, asking_of, fleet


def ready(
    generator: FakeGenerator, status: Callable[[], DeploymentStatus], *, scale_to_zero: bool = True
) -> httpx.Response:
    readiness = Readiness(generator, status)
    readiness.scale_to_zero = scale_to_zero

    async def use() -> httpx.Response:
        async with asking_of(http_api(fleet(generator), Access(), list, readiness)) as asking:
            return await asking.get("/readyz")

    return asyncio.run(use())


def test_a_probe_asks_no_generator_that_may_be_away():
    generator = FakeGenerator()
    answer = ready(generator, lambda: DeploymentStatus.HEALTHY)
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    assert not generator.responses, "a generator would be started, or kept awake"
    answer = ready(generator, lambda: DeploymentStatus.HEALTHY, scale_to_zero=False)
    assert answer.json() == {"status": "ready", "model": VERSION}
    assert len(generator.responses) == 1


@pytest.mark.parametrize(
    "status", [DeploymentStatus.UPSCALING, DeploymentStatus.DOWNSCALING, DeploymentStatus.UPDATING]
)
def test_a_service_whose_generators_come_or_go_is_ready(status):
    assert ready(FakeGenerator(), lambda: status).status_code == 200


@pytest.mark.parametrize("status", [DeploymentStatus.UNHEALTHY, DeploymentStatus.DEPLOY_FAILED])
def test_generators_that_cannot_be_started_are_503(status):
    answer = ready(FakeGenerator(), lambda: status)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert answer.headers["retry-after"]


def test_a_controller_that_does_not_answer_is_503_and_holds_one_thread(monkeypatch):
    monkeypatch.setattr(readiness_module, "READY_S", 0.05)
    gate = threading.Event()
    asked: list[int] = []

    def hangs() -> DeploymentStatus:
        asked.append(threading.get_ident())
        gate.wait()
        return DeploymentStatus.HEALTHY

    readiness = Readiness(FakeGenerator(), hangs)
    readiness.scale_to_zero = True

    async def use() -> list[int]:
        async with asking_of(http_api(fleet(readiness.generator), Access(), list, readiness)) as asking:
            refused = [(await asking.get("/readyz")).status_code for _ in range(3)]
            gate.set()
            return [*refused, (await asking.get("/readyz")).status_code]

    assert asyncio.run(use()) == [503, 503, 503, 200]
    assert len(asked) == 2, "those in between waited for the first, and were given up"


def deployments(**replicas: int) -> dict[str, dict[str, Any]]:
    config = serve_config("models:/a/7", ServiceConfig(tracking_uri="", **replicas))
    ServeDeploySchema.model_validate(config)
    return {one["name"]: one for one in config["applications"][0]["deployments"]}


def test_the_configuration_of_a_service_that_scales_to_zero_begins_with_one():
    made = deployments(min_replicas=0, max_replicas=3)
    scaling = made["Generator"]["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["initial_replicas"], scaling["max_replicas"]) == (0, 1, 3)
    assert made["Ingress"]["user_config"]["scale_to_zero"] is True
    made = deployments(min_replicas=2, max_replicas=3)
    assert "initial_replicas" not in made["Generator"]["autoscaling_config"], "a promotion would go back to them"
    assert made["Ingress"]["user_config"]["scale_to_zero"] is False


@pytest.mark.parametrize(("least", "most"), [(-1, 2), (3, 2), (0, 0)])
def test_replicas_that_are_no_range_are_said(least, most):
    with pytest.raises(ConfigError, match=f"--min-replicas {least} to --max-replicas {most} is no range"):
        ServiceConfig(tracking_uri="", min_replicas=least, max_replicas=most)
