"""Writes to temporary folders: versions of a running service change under load: promote, canary, rollback, follow."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import httpx

from deploy.release import APPLICATION, details, set_model
from tests.driver import Driver, cca, until
from tests.service import ANSWER_S, BRIGHT, NAME, Asking, Service, brightness, pixels


def command(service: Service, folder: Path, *arguments: str) -> Any:
    return cca(folder, *arguments, env={"CCA_SERVE_ADDRESS": service.dashboard, "CCA_MODEL_NAME": NAME})


def promote(service: Service, folder: Path, version: str, *options: str) -> Any:
    return command(service, folder, "promote", version, *options)


def test_promote_changes_the_version_in_place_without_a_failed_request(service, folder, registry):
    before, images = service.generators(), service.draw("ant", seed=9)
    with Asking(service) as asking:
        result = promote(service, folder, "2")
        after = service.served()
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{NAME} version 2 is the champion" in result.stdout
    assert f"models:/{NAME}/2 rolled out" in result.stdout
    assert after == f"{NAME}/2"
    assert not asking.failures
    assert sorted(set(asking.models)) == [f"{NAME}/1", f"{NAME}/2"]
    assert asking.models == sorted(asking.models), "no request goes back to the version before"
    assert service.generators() == before, "the same processes"
    assert pixels(service.draw("ant", seed=9)[0]).tobytes() != pixels(images[0]).tobytes()
    assert registry.alias("champion").version == "2"
    set_model(service.dashboard, f"models:/{NAME}/1")
    registry.set_alias("champion", "1")
    assert service.draw("ant", seed=9) == images


def test_a_version_that_does_not_load_is_rolled_back_and_never_champion(service, folder, registry):
    images = service.draw("ant", seed=9)
    with Asking(service) as asking:
        result = promote(service, folder, "3")
    assert result.returncode == 2, result.stdout + result.stderr
    assert re.match(rf"error: models:/{NAME}/3 was not rolled out, models:/{NAME}/1 is served again: ", result.stderr)
    assert "bundle format 99" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not asking.failures
    assert service.draw("ant", seed=9) == images
    assert registry.alias("champion").version == "1"


def test_a_canary_that_passes_is_promoted_and_a_rollback_goes_back(service, folder, registry):
    images = service.draw("ant", seed=9)
    with Asking(service) as asking:
        result = promote(service, folder, "2", "--canary", "50%", "--canary-requests", "8")
        assert result.returncode == 0, result.stdout + result.stderr
        assert "no worse than the champion" in result.stdout
        assert service.served() == f"{NAME}/2"
        assert registry.alias("champion").version == "2"
        back = command(service, folder, "rollback")
        assert back.returncode == 0, back.stdout + back.stderr
        assert f"{NAME} version 1 is the champion again, instead of 2" in back.stdout
    assert not asking.failures
    assert {f"{NAME}/1", f"{NAME}/2"} == set(asking.models)
    assert set(details(service.dashboard)["applications"]) == {APPLICATION}, "the canary's generators are away"
    assert service.draw("ant", seed=9) == images
    assert registry.alias("champion").version == "1"


def test_who_follows_the_registry_rolls_out_what_becomes_champion_there(service, folder, registry):
    env = {"CCA_SERVE_ADDRESS": service.dashboard, "CCA_MODEL_NAME": NAME}
    follower = Driver(folder, "--every-s", "0.5", verb=("follow",), env=env)
    try:
        follower.wait_line("following the champion")
        registry.set_alias("champion", "3")
        follower.wait_line(f"the registry's champion is not served: models:/{NAME}/3 was not rolled out")
        assert service.served() == f"{NAME}/1"
        registry.set_alias("champion", "2")  # as the MLflow UI does
        follower.wait_line(f"models:/{NAME}/2 rolled out")
        assert service.served() == f"{NAME}/2"
        assert until(lambda: registry.alias("previous").version == "1"), "not 3, which was never served"
        registry.set_alias("champion", "1")
        follower.wait_line(f"models:/{NAME}/1 rolled out")
        assert service.served() == f"{NAME}/1"
        assert until(lambda: registry.alias("previous").version == "2")
    finally:
        follower.process.send_signal(signal.SIGINT)
        assert follower.finish(60) == 0, follower.output
        registry.set_alias("champion", "1")
        set_model(service.dashboard, f"models:/{NAME}/1")


def test_a_canary_that_is_worse_is_rolled_back_without_a_failed_request(service, folder, registry):
    with Asking(service, {"seed": blocked_seed(service)}) as asking:
        result = promote(service, folder, "4", "--canary", "50%")
    assert result.returncode == 2, result.stdout + result.stderr
    assert re.search(rf"models:/{NAME}/4 was not promoted, .*: its content filter blocked 3 of 3", result.stderr)
    assert not asking.failures, "the champion draws what a canary does not"
    assert set(asking.models) == {f"{NAME}/1"}
    assert httpx.get(f"{service.address}/canary", timeout=ANSWER_S).json() == {"canary": None}
    assert set(details(service.dashboard)["applications"]) == {APPLICATION}
    assert registry.alias("champion").version == "1"


def blocked_seed(service: Service) -> int:
    """One that the filter of version 4 blocks."""
    images = [pixels(service.draw("ant", seed=seed)[0]) for seed in range(8)]
    return next(seed for seed, image in enumerate(images) if brightness(image) >= BRIGHT)
