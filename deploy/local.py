"""Reads a model, serves it: Ray and Serve on this machine until Ctrl-C or SIGTERM."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import psutil
import ray
from ray import serve

from cca_core.config import ConfigError
from deploy import proxy, tracing
from deploy.access import OPEN
from deploy.audit import AuditLog
from deploy.keys import VARIABLE, KeyRing
from deploy.release import EVERYWHERE, ServiceConfig, deploy, serve_config, wait_running
from deploy.versions import pin

START_S = 240.0
POLL_S = 0.1
#: Seconds that Ray's processes have to end, once Ray says that it is shut down.
LEFT_S = 5.0
#: Requests and pixels are small; Ray would take a third of the machine's memory.
OBJECT_STORE_BYTES = 256 * 1024**2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)  # the last is interrupt's own


def serve_here(model: str, service: ServiceConfig, say: Callable[[str], None]) -> None:
    """Pin the model, start Ray with its dashboard, deploy, and stay until a signal ends it.

    ConfigError, before Ray starts, where the port is taken, a file cannot be used or there is no such model.
    """
    check_port(service.host, service.port)
    # Replicas run elsewhere.
    keys, audit = (str(Path(file).absolute()) if file else "" for file in (service.keys, service.audit))
    service = replace(service, keys=keys, audit=audit)
    ring = KeyRing(keys)
    AuditLog(audit)
    pinned = pin(model, service.tracking_uri)
    # Workers import this package from where the command runs, installed or not.
    root = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    os.environ.setdefault(proxy.VARIABLE, proxy.CALLBACK)
    tracing.switch_on()
    cpus_per_replica = max(1, (os.cpu_count() or 1) // service.max_replicas)
    cpus = cpus_per_replica * (service.max_replicas + 1) + 1  # as Ray counts: with a canary, and the ingress
    try:
        on_signals(interrupt)
        context = ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        on_signals(interrupt)  # Ray has put its own in place
        address = f"http://{context.dashboard_url}"
        say(OPEN if ring.open else f"keys: {keys or VARIABLE}")
        say(f"starting {pinned} (Ray dashboard {address})")
        deploy(address, serve_config(pinned, service, cpus_per_replica=cpus_per_replica))
        wait_running(address, timeout_s=START_S, say=say)
        host = "127.0.0.1" if service.host in EVERYWHERE else service.host
        api = f"http://{host}:{service.port}"
        served = first_answer(f"{api}/readyz", timeout_s=START_S).get("model", pinned)
        say(f"ready: {api}/v1 serves {served}  (Ctrl-C ends it). Try:")
        headers = "-H 'content-type: application/json'" + ("" if ring.open else " -H 'authorization: Bearer KEY'")
        asked = {"prompt": "0", "n": 4, "seed": 1}  # a class that every model has
        say(f"  curl -s {api}/v1/images/generations {headers} -d '{json.dumps(asked)}'")
        say(f"  CCA_SERVE_ADDRESS={address} cca promote VERSION    changes the model in place")
        threading.Event().wait()
    except (KeyboardInterrupt, SystemExit):  # Ray's own handler of SIGTERM, while it starts, raises SystemExit
        say("stopping")
    finally:
        on_signals(signal.SIG_IGN)
        if ray.is_initialized():
            _shut_down()


def check_port(host: str, port: int) -> None:
    """ConfigError where nothing can listen on ``host:port``."""
    if not 0 < port < 2**16:
        raise ConfigError(f"--port {port} is no port: choose one from 1 to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"nothing can listen on {host}:{port} ({reason.lower()}): choose with --host and --port"
        ) from error


def first_answer(url: str, *, timeout_s: float) -> dict[str, Any]:
    """The API's first answer: Serve calls an application running a little before its proxy knows the way."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  (our own address)
                return json.load(answer)
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"{url} does not answer ({error}): see the Ray logs") from error
        time.sleep(POLL_S)


def _shut_down() -> None:
    """End Serve, Ray and what Ray leaves: a part of its dashboard that was starting waits a minute for the cluster."""
    started = psutil.Process().children(recursive=True)
    serve.shutdown()
    ray.shutdown()
    _, left = psutil.wait_procs(started, timeout=LEFT_S)
    for process in left:
        process.kill()


def on_signals(handler: Any) -> None:
    """What Ctrl-C and SIGTERM do from now on."""
    for number in SIGNALS:
        signal.signal(number, handler)


def interrupt(*_: Any) -> NoReturn:
    """KeyboardInterrupt, and again in a second: where it falls into a destructor or a callback, Python drops it."""
    signal.alarm(1)
    raise KeyboardInterrupt
