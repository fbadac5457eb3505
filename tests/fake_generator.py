"""Reads and writes nothing: a fake of the generators' Serve handle, so that the API runs without Ray and models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

import httpx
import numpy as np
from fastapi import FastAPI

from cca_core.generate import Sampling
from deploy.access import Access
from deploy.api import ApiError, ImageRequest, class_index, enlargement
from deploy.fleet import Fleet
from deploy.generator import Drawn, check_model
from deploy.routes import http_api

VERSION = "fake/1"
CLASSES = ("ant", "bee", "3")
SIDE = 8
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_scale": 1.5, "cfg_interval": -1}


class FakeResponse:
    """What calling a handle gives: it can be awaited, or iterated over, and cancelled."""

    def __init__(self, awaited: Any) -> None:
        self.awaited, self.cancelled = awaited, False

    def __await__(self) -> Generator[Any, None, Any]:
        return self.awaited.__await__()

    def __anext__(self) -> Awaitable[Any]:
        return self.awaited.__anext__()

    def cancel(self) -> None:
        self.cancelled = True


class FakeGenerator:
    """A handle whose images are flat: their colour is the seed's. ``gate`` holds drawing back until it is set."""

    def __init__(self, version: str = VERSION) -> None:
        self.version = version
        #: Set it from another thread through ``loop``.
        self.loop: asyncio.AbstractEventLoop | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[ImageRequest] = []
        self.responses: list[FakeResponse] = []
        #: Called before an image is drawn; what it raises, drawing raises.
        self.before: Callable[[], None] = lambda: None

    def options(self, *, stream: bool) -> FakeGenerator:
        assert stream
        return self

    @property
    def draw_each(self) -> FakeMethod:
        return FakeMethod(self, self._draw_each)

    @property
    def draw(self) -> FakeMethod:
        return FakeMethod(self, self._draw)

    @property
    def info(self) -> FakeMethod:
        return FakeMethod(self, self._info)

    async def _info(self) -> dict[str, Any]:
        return {
            "id": self.version,
            "class_names": CLASSES,
            "image_size": SIDE,
            "sampling": DEFAULTS,
            "calls_per_image": 32,
            "content_filter": None,
        }

    async def _draw(self, asked: ImageRequest) -> Drawn | ApiError:
        self.asked.append(asked)
        self.loop = asyncio.get_running_loop()
        await self.gate.wait()
        self.before()
        try:
            check_model(asked.model, self.version)
            class_id = class_index(asked.prompt, CLASSES)
            enlarge = enlargement(asked.size, SIDE)
            sampling = asked.sampling(DEFAULTS)
            Sampling(**sampling)
        except ApiError as error:
            return error
        pixels = np.stack([np.full((SIDE, SIDE, 3), (asked.seed + i) % 256, np.uint8) for i in range(asked.n)])
        calls = 32 if sampling["cfg_scale"] > 1 else 16
        return Drawn(self.version, CLASSES[class_id], sampling, enlarge, calls, pixels)

    async def _draw_each(self, asked: ImageRequest) -> AsyncIterator[tuple[int, Drawn | ApiError]]:
        """The last image is finished first."""
        for index in reversed(range(asked.n)):
            one = await self._draw(asked.model_copy(update={"n": 1, "seed": asked.seed + index}))
            yield index, one


class FakeMethod:
    def __init__(self, generator: FakeGenerator, method: Callable[..., Any]) -> None:
        self.generator, self.method = generator, method

    def remote(self, *arguments: Any) -> FakeResponse:
        response = FakeResponse(self.method(*arguments))
        self.generator.responses.append(response)
        return response


def fleet(generator: FakeGenerator | None = None) -> Fleet:
    """The API's generators, without a canary."""
    return Fleet(generator or FakeGenerator(), FakeGenerator, lambda version, worse: None)


def client(generator: FakeGenerator | None = None, access: Access | None = None) -> httpx.AsyncClient:
    """A client of the API in this process; errors inside come back as the answers that a client would see."""
    return asking_of(http_api(fleet(generator), access or Access(), list))


def asking_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://fake")
