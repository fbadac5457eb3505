"""Reads a model, serves it: Ray and Serve on this machine until Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import ray
from ray import serve

from deploy.release import deploy, serve_config, wait_running

START_S = 240.0


def serve_here(
    model: str, *, host: str, port: int, max_replicas: int, tracking_uri: str, say: Callable[[str], None]
) -> None:
    """Start Ray with its dashboard, deploy, and stay until a signal ends it."""
    # Workers import this package from where the command runs, installed or not.
    root = str(Path(__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    context = ray.init(
        address="local",
        num_cpus=max(4, os.cpu_count() or 1),
        include_dashboard=True,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    address = f"http://{context.dashboard_url}"
    try:
        say(f"starting {model} (Ray dashboard {address})")
        config = serve_config(model, tracking_uri=tracking_uri, host=host, port=port, max_replicas=max_replicas)
        deploy(address, config)
        wait_running(address, timeout_s=START_S, say=say)
        say(f"ready: http://{host}:{port}/v1  (Ctrl-C ends it). Try:")
        say(
            f"  curl -s http://{host}:{port}/v1/images/generations -H 'content-type: application/json' "
            """-d '{"prompt": "3", "n": 4, "size": "128x128", "seed": 1}'"""
        )
        say(f"  CCA_SERVE_ADDRESS={address} cca promote VERSION    changes the model in place")
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        say("stopping")
    finally:
        serve.shutdown()
        ray.shutdown()
