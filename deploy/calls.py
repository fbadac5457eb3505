"""Reads generators' answers through a Serve handle: retries of a lost one, deadlines, cancellation, plain refusals."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from deploy.api import ApiError, ImageRequest
from deploy.generator import Drawn

log = logging.getLogger("ray.serve")
#: A lost replica is noticed when its answer fails; the request is drawn again with the same seed. While a version that
#: does not load is taken back, Serve calls the generators unavailable for a moment.
LOST = (RayActorError, DeploymentUnavailableError)
ATTEMPTS = 6
RETRY_S = 0.1
DEADLINE = "deadline_exceeded"


async def info(generator: DeploymentHandle, within_s: float) -> dict[str, Any]:
    """What a generator serves."""
    return await _answer(generator, "info", within_s=within_s)


async def draw(generator: DeploymentHandle, asked: ImageRequest, within_s: float) -> Drawn:
    """All images of a request; ApiError where it is refused or its time is over."""
    with _deadline(asked.timeout_s):
        return await _answer(generator, "draw", asked, within_s=within_s)


async def draw_each(
    generator: DeploymentHandle, asked: ImageRequest, within_s: float
) -> AsyncGenerator[tuple[int, Drawn]]:
    """The images of a request with their indices, each as soon as it is finished.

    Where a replica is lost, another of the same version draws what is missing.
    """
    until = asyncio.get_running_loop().time() + within_s
    missing = set(range(asked.n))
    with _deadline(asked.timeout_s), _in_words("draw_each"):
        for attempt in range(ATTEMPTS):
            response = generator.options(stream=True).draw_each.remote(asked)
            try:
                while missing:
                    async with asyncio.timeout_at(until):
                        index, one = await anext(response)
                    if isinstance(one, ApiError):
                        raise one
                    if index in missing:
                        missing.remove(index)
                        asked = asked.model_copy(update={"model": one.version})
                        yield index, one
                return
            except LOST:
                if attempt + 1 == ATTEMPTS:
                    raise
            finally:
                # Whoever stops listening, or listens no longer, leaves nothing being drawn.
                if missing:
                    response.cancel()
            await asyncio.sleep(RETRY_S * 2**attempt)


async def _answer(generator: DeploymentHandle, method: str, *arguments: Any, within_s: float) -> Any:
    """A generator's answer. A lost replica's request goes to another; 503 says that none can answer now."""
    with _in_words(method):
        async with asyncio.timeout(within_s):
            for attempt in range(ATTEMPTS):
                try:
                    answered = await _awaited(getattr(generator, method).remote(*arguments))
                    break
                except LOST:
                    if attempt + 1 == ATTEMPTS:
                        raise
                    await asyncio.sleep(RETRY_S * 2**attempt)
    if isinstance(answered, ApiError):
        raise answered
    return answered


async def _awaited(response: DeploymentResponse) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()  # the client has gone or its time is over: nobody needs what is being drawn
        raise


@contextmanager
def _in_words(method: str) -> Iterator[None]:
    try:
        yield
    except BackPressureError:
        raise ApiError(503, "the service is busy: try again shortly", None, "busy") from None
    except (*LOST, TimeoutError) as error:
        log.warning("no generator answers %s: %s", method, type(error).__name__)
        raise ApiError(503, "no generator answers: try again shortly", None, "unavailable") from error


@contextmanager
def _deadline(timeout_s: float | None) -> Iterator[None]:
    """A time that the request itself has set is no fault of the service."""
    try:
        yield
    except ApiError as error:
        if timeout_s is None or not isinstance(error.__cause__, TimeoutError):
            raise
        message = f"the images were not drawn within the {timeout_s:g} s of timeout_s: allow more, or ask for fewer"
        raise ApiError(408, message, "timeout_s", DEADLINE) from None
