"""Writes a registry to a temporary folder: `cca serve --min-replicas 0` on real Ray, whose generators go and come."""

from __future__ import annotations

import httpx
import pytest

from cca_core.config import ConfigError
from deploy.release import APPLICATION, deploy, details, set_model
from tests.driver import until
from tests.service import ANSWER_S, NAME, Service


@pytest.fixture(scope="module")
def service(start_service) -> Service:
    """Its generator ends after a second without requests."""
    service = start_service("--min-replicas", "0")
    found = details(service.dashboard)
    application = found["applications"][APPLICATION]["deployed_app_config"]
    generator = next(one for one in application["deployments"] if one["name"] == "Generator")
    assert generator["autoscaling_config"]["downscale_delay_s"] == 300
    generator["autoscaling_config"] |= {"downscale_delay_s": 1, "look_back_period_s": 1}
    kept = {key: found[key] for key in ("proxy_location", "http_options")}
    deploy(service.dashboard, {**kept, "applications": [application]})
    return service


def asleep(service: Service) -> bool:
    """Whether all generators have gone; probes go on meanwhile, as a cluster's do."""
    answer = httpx.get(f"{service.address}/readyz", timeout=ANSWER_S)
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})
    deployment = details(service.dashboard)["applications"][APPLICATION]["deployments"]["Generator"]
    return not deployment["replicas"]


def test_the_first_request_after_idle_times_waits_and_is_answered(service):
    image = service.draw("ant", seed=1)
    until(lambda: asleep(service))
    assert service.draw("ant", seed=1) == image


def test_a_promotion_while_none_runs_loads_the_version(service):
    image = service.draw("ant", seed=1)
    until(lambda: asleep(service))
    with pytest.raises(ConfigError, match=f"models:/{NAME}/1 is served again: .*bundle format 99"):
        set_model(service.dashboard, f"models:/{NAME}/3")
    assert service.draw("ant", seed=1) == image
    until(lambda: asleep(service))
    set_model(service.dashboard, f"models:/{NAME}/2")
    assert service.served() == f"{NAME}/2"
    assert service.draw("ant", seed=1) != image
