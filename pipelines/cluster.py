"""Reads a Ray cluster through its dashboard, writes nothing: whether it answers, its size, logs of submitted runs."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cca_core.config import ConfigError, ExecutionConfig
from deploy.cluster_token import cluster_token

#: What Ray's client raises where the dashboard is away, or answers with an error.
DISCONNECTED = (aiohttp.ClientError, requests.RequestException, RuntimeError)
ANSWER_S = 20.0
POLL_S = 1.0
#: A log without a new line for this long is asked for anew: a connection can die without a sign.
QUIET_S = 120.0
#: A dashboard that is away for this long while a run is followed is given up.
AWAY_S = 60.0
#: A stage of two pools (one reads, one runs a network) needs a CPU for each.
POOLS = 2
#: Loggers of Ray's client that tell what it sends.
CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
#: Key of a submission's metadata that names the recipe, and says that it is one of ours.
RECIPE = "cca.recipe"
#: The label of nodes that KubeRay or Ray's launcher starts: such a cluster may grow.
NODE_GROUP = "ray.io/node-group"


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that answers, and whose token is known."""

    address: str
    token: str
    client: JobSubmissionClient
    #: Of each node that is alive: its resources, by Ray's names.
    nodes: tuple[dict[str, float], ...]
    may_grow: bool

    def total(self, resource: str) -> int:
        return int(sum(node.get(resource, 0) for node in self.nodes))

    def submission(self, name: str) -> JobDetails:
        """ConfigError where the cluster does not know it."""
        found = next((job for job in self.submissions() if job.submission_id == name), None)
        if found is None:
            known = ", ".join(job.submission_id or "" for job in self.submissions()[:5]) or "none"
            raise ConfigError(
                f"{self.address} knows no submission {name} (newest: {known}); where its head was replaced, go on with "
                f"cca submit --resume {name} --address {self.address}"
            )
        return found

    def submissions(self) -> list[JobDetails]:
        """Our own, newest first."""
        found = [job for job in self.client.list_jobs() if RECIPE in (job.metadata or {})]
        return sorted(found, key=lambda job: job.start_time or 0, reverse=True)


def connect(address: str) -> Cluster:
    """ConfigError where nothing answers, the token is wrong or missing, or the cluster asks for none."""
    address, token = address.rstrip("/"), cluster_token()
    if not re.match(r"https?://[^/]", address):
        raise ConfigError(f"--address {address} is no Ray dashboard: give http://HEAD:8265")
    answer = _ask(address, token)
    if answer.status_code == 401:
        raise ConfigError(
            f"the Ray cluster at {address} asks for a token: put it into RAY_AUTH_TOKEN, or the path of its file into "
            "RAY_AUTH_TOKEN_PATH"
        )
    if answer.status_code == 403:
        raise ConfigError(
            f"the Ray cluster at {address} has another token: correct RAY_AUTH_TOKEN, or the file that "
            "RAY_AUTH_TOKEN_PATH names"
        )
    if not token or _ask(address, "").ok:
        raise ConfigError(
            f"the Ray cluster at {address} asks for no token, so whoever reaches it could read the keys of a run: "
            "start it with RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN"
        )
    try:
        found = [node for node in answer.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"what answers at {address} is no Ray dashboard: give http://HEAD:8265") from None
    # Ray's client takes the address from these variables before its argument.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    client = JobSubmissionClient(address, headers=_headers(token))
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    grows = any(NODE_GROUP in (node.get("labels") or {}) for node in found)
    return Cluster(address, token, client, tuple(node["resources_total"] for node in found), grows)


def check_size(execution: ExecutionConfig, cluster: Cluster) -> list[str]:
    """What the run will have less of than the recipe asks; ConfigError where it could not run at all."""
    cpus, gpus, workers = cluster.total("CPU"), cluster.total("GPU"), execution.min_workers
    missing = []
    if cpus < workers:
        missing.append(
            f"execution.num_workers={workers} asks for a CPU each, and the cluster has {cpus}: add nodes, or --set "
            f"execution.num_workers={max(cpus, 1)}"
        )
    if cpus < POOLS:
        missing.append(f"a run needs {POOLS} CPUs, to read images and to encode them, and the cluster has {cpus}")
    if execution.device == "cuda" and not gpus:
        missing.append("execution.device=cuda, and it has no GPU: add a GPU node, or --set execution.device=auto")
    if missing and not cluster.may_grow:
        raise ConfigError(f"the Ray cluster at {cluster.address} is smaller than the recipe asks: {'; '.join(missing)}")
    if missing:
        return [f"waits until the cluster has grown: {reason}" for reason in missing]
    actors = execution.num_actors + execution.num_readers
    return [f"{cpus} CPUs for {actors} actors: stages of images run on fewer"] if cpus < actors else []


def follow(cluster: Cluster, submission: str, write: Callable[[str], None]) -> JobDetails:
    """Write the log of a submission as it grows, and return how it ended; a lost connection is made again."""
    log = _Log(cluster.client, submission, write)
    while True:
        try:
            asyncio.run(log.tail())
            found = cluster.client.get_job_info(submission)
            if found.status.is_terminal():
                log.rest()
                return found
        except DISCONNECTED:
            _wait_for_answer(cluster, submission)
        time.sleep(POLL_S)


def _wait_for_answer(cluster: Cluster, submission: str) -> None:
    """Until the cluster is there again and knows the submission."""
    deadline = time.monotonic() + AWAY_S
    while True:
        try:
            cluster.submission(submission)
            return
        except DISCONNECTED as error:
            if time.monotonic() > deadline:
                options = f"{submission} --address {cluster.address}"
                raise ConfigError(
                    f"the Ray cluster at {cluster.address} no longer answers: once it does, cca logs {options}, or, "
                    f"where its head was lost, cca submit --resume {options}"
                ) from error
        time.sleep(POLL_S)


class _Log:
    """What was written of a log, so that a new connection goes on where the last one broke."""

    def __init__(self, client: JobSubmissionClient, submission: str, write: Callable[[str], None]) -> None:
        self.client, self.submission, self.write = client, submission, write
        self.written = 0

    async def tail(self) -> None:
        """Until the log ends, the connection breaks, or nothing was heard for so long that it may have."""
        seen, clock = 0, asyncio.get_running_loop().time
        with suppress(TimeoutError):
            async with (
                aclosing(self.client.tail_job_logs(self.submission)) as texts,
                asyncio.timeout(QUIET_S) as limit,
            ):
                async for text in texts:
                    limit.reschedule(clock() + QUIET_S)
                    seen += len(text)
                    self._write(text[len(text) - max(0, seen - self.written) :])

    def rest(self) -> None:
        self._write(self.client.get_job_logs(self.submission)[self.written :])

    def _write(self, text: str) -> None:
        if text:
            self.write(text)
            self.written += len(text)


def reason(found: JobDetails) -> str:
    """Why a submission ended that its own log does not explain; empty where the log does."""
    if found.status != JobStatus.FAILED or found.driver_exit_code is not None:
        return ""
    return (found.message or "").strip().splitlines()[-1] if found.message else ""


def _ask(address: str, token: str) -> requests.Response:
    """The nodes of the cluster."""
    try:
        # Its client has no time limit.
        query: dict[str, Any] = {"limit": 10_000, "timeout": int(ANSWER_S)}
        return requests.get(f"{address}/api/v0/nodes", params=query, headers=_headers(token), timeout=ANSWER_S)
    except requests.RequestException as error:
        raise ConfigError(
            f"no Ray dashboard answers at {address} ({type(error).__name__}): start the cluster, or correct --address"
        ) from None


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}
