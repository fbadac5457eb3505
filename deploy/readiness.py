"""Reads Serve's status or a generator's answer, writes nothing: whether the service can take requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus

from deploy.api import ApiError
from deploy.calls import info

READY_S = 3.0
FAILED = (DeploymentStatus.UNHEALTHY, DeploymentStatus.DEPLOY_FAILED)


def generators_status() -> DeploymentStatus:
    """Serve's word for the generators of this replica's application, from its controller."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return application.deployments["Generator"].status


class Readiness:
    """What /readyz says."""

    def __init__(self, generator: DeploymentHandle, status: Callable[[], DeploymentStatus] = generators_status) -> None:
        self.generator, self.status = generator, status
        #: Generators may all be away, and are started for a request. Probes then ask none: they would keep one awake.
        self.scale_to_zero = False
        # A thread of its own: a controller that does not answer must not take those that encode images.
        self._thread = ThreadPoolExecutor(1)

    async def check(self) -> dict[str, str]:
        """The answer where the service is ready; ApiError 503 where it is not."""
        if not self.scale_to_zero:
            return {"status": "ready", "model": (await info(self.generator, READY_S))["id"]}
        try:
            async with asyncio.timeout(READY_S):
                status = await asyncio.get_running_loop().run_in_executor(self._thread, self.status)
        except TimeoutError as error:
            raise ApiError(503, "Serve's controller does not answer: try again shortly", None, "unavailable") from error
        if status in FAILED:
            raise ApiError(503, "generators cannot be started: try again shortly", None, "unavailable")
        return {"status": "ready"}
