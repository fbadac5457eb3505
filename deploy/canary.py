"""Reads and writes the Serve configuration of a Ray cluster, reads the service: begins a canary, watches it, ends it.

A canary is an application of its own with the generators of another version. The service's ingress sends it a share of
the requests, judges it (``deploy.fleet``) and stops by itself; whoever began it is told, and takes it away.
"""

from __future__ import annotations

import copy
import json
import math
import time
import urllib.request
from collections.abc import Callable
from typing import Any

from cca_core.config import ConfigError
from deploy.release import APPLICATION, CANARY, POLL_S, api_of, deploy, deployment, details, present, wait_running

START_S = 180.0
#: Without a word from the service for that long, a canary is taken back.
SILENT_S = 30.0
WATCH_S = 1.0


def begin(address: str, model: str, share: float) -> None:
    """Start generators of ``model`` (models:/NAME/VERSION) beside the champion's, and give them their share.

    Returns once they run. ConfigError, with nothing changed, where a canary runs already or its model does not come up.
    """
    config = present(address)
    if any(application["name"] == CANARY for application in config["applications"]):
        raise ConfigError("a canary runs already: end it with `cca rollback`, or promote its version")
    before = copy.deepcopy(config)
    application = next(a for a in config["applications"] if a["name"] == APPLICATION)
    generator = copy.deepcopy(deployment(config, "Generator"))
    generator["user_config"]["model"] = model
    if scaling := generator.get("autoscaling_config"):
        # It does not go to sleep on trial, and takes no generator's place: where one is lost, the freed room would be
        # the canary's.
        most = max(1, math.ceil(share * scaling["max_replicas"]))
        scaling |= {"min_replicas": 1, "initial_replicas": 1, "max_replicas": most}
    trial = {**copy.deepcopy(application), "name": CANARY, "route_prefix": None, "deployments": [generator]}
    config["applications"].append({**trial, "import_path": "deploy.app:build_canary"})
    try:
        deploy(address, config)
        wait_running(address, CANARY, timeout_s=START_S)
    except (ConfigError, KeyboardInterrupt) as error:
        deploy(address, before)
        if isinstance(error, ConfigError):
            raise ConfigError(f"{model} got no request, nothing was changed: {error}") from error
        raise
    _share(config, {"version": model.removeprefix("models:/"), "share": share})
    deploy(address, config)
    wait_running(address, timeout_s=START_S)


def watch(address: str, requests: int, say: Callable[[dict[str, Any]], None]) -> str:
    """Wait until the canary has answered that many requests; why it was rolled back, or an empty string.

    Args:
        say: is given the state of GET /canary when it has changed.
    """
    url = api_of(details(address)["http_options"], address) + "/canary"
    heard, told = time.monotonic(), None
    while True:
        try:
            with urllib.request.urlopen(url, timeout=SILENT_S) as answer:  # noqa: S310  (the service that we deployed)
                state = json.load(answer)["canary"]
            heard = time.monotonic()
        except (OSError, ValueError) as error:
            if time.monotonic() - heard > SILENT_S:
                return f"{url} says nothing ({error})"
        else:
            if state is None:
                return "somebody else has ended it"
            if state["ended"]:
                return state["ended"]
            if state != told:
                say(state)
                told = state
            if state["canary"]["requests"] >= requests:
                return ""
        time.sleep(WATCH_S)


def end(address: str) -> bool:
    """Take the canary's share, and then its generators, away; False where there is none.

    No request is lost: those that it has are answered before its generators end.
    """
    config = present(address)
    if not any(application["name"] == CANARY for application in config["applications"]):
        return False
    _share(config, {})
    deploy(address, config)
    wait_running(address, timeout_s=START_S)
    config["applications"] = [a for a in config["applications"] if a["name"] != CANARY]
    deploy(address, config)
    deadline = time.monotonic() + START_S
    while CANARY in details(address)["applications"]:
        if time.monotonic() > deadline:
            raise ConfigError(f"the canary did not end within {START_S:.0f} s: see the Ray logs")
        time.sleep(POLL_S)
    return True


def _share(config: dict[str, Any], canary: dict[str, Any]) -> None:
    deployment(config, "Ingress")["user_config"]["canary"] = canary
