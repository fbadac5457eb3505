"""Reads drawn images, writes what leaves: OpenAI's answer with all images, or its server-sent events one by one."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import ExitStack, aclosing
from typing import Any

from fastapi.responses import StreamingResponse

from deploy.access import Record
from deploy.api import INTERNAL, ApiError, ImageRequest
from deploy.generator import Drawn
from deploy.pictures import picture

log = logging.getLogger("ray.serve")
Images = AsyncGenerator[tuple[int, Drawn]]


async def whole(asked: ImageRequest, drawn: Drawn) -> dict[str, Any]:
    """The answer with all images of a request."""
    return {"created": int(time.time()), "data": await _encoded(asked, drawn, 0), **_about(asked, drawn)}


async def events(record: Record, asked: ImageRequest, first: tuple[int, Drawn], images: Images) -> AsyncIterator[str]:
    """An event per image, in the order in which they are finished; one error event ends them where the rest fails."""
    try:
        async with aclosing(images):
            yield await _completed(record, asked, *first)
            async for index, drawn in images:
                yield await _completed(record, asked, index, drawn)
        record.outcome = "ok"
    except ApiError as error:
        record.fail(error)
        yield _event("error", error.body())
    except Exception as error:
        log.error("stream failed", exc_info=error)
        record.outcome = "internal_error"
        yield _event("error", INTERNAL.body())


class Streamed(StreamingResponse):
    """An answer in parts. What ``stack`` holds ends with them, however they end."""

    def __init__(self, sent: AsyncIterator[str], media_type: str, stack: ExitStack) -> None:
        # Proxies that collect answers would hold images back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(sent, media_type=media_type, headers=headers)
        self.stack = stack

    async def __call__(self, *arguments: Any) -> None:
        try:
            async with aclosing(self.body_iterator):
                await super().__call__(*arguments)
        finally:
            self.stack.close()


async def _completed(record: Record, asked: ImageRequest, index: int, drawn: Drawn) -> str:
    record.drew(drawn)
    (image,) = await _encoded(asked, drawn, index)
    about = {**_about(asked, drawn), "created_at": int(time.time()), "index": index, "background": "opaque"}
    return _event("image_generation.completed", {**image, **about})


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


async def _encoded(asked: ImageRequest, drawn: Drawn, first: int) -> list[dict[str, Any]]:
    """The images of ``drawn``, whose first is image ``first`` of the request."""

    def encode() -> list[dict[str, Any]]:
        return [
            {
                "b64_json": base64.b64encode(
                    picture(
                        pixels,
                        enlarge=drawn.enlarge,
                        file_format=asked.output_format,
                        compression=asked.output_compression,
                        model=drawn.version,
                        name=drawn.class_name,
                        seed=seed,
                        sampling=drawn.sampling,
                    )
                ).decode(),
                "seed": seed,
                "model": drawn.version,
            }
            for seed, pixels in enumerate(drawn.pixels_BHW3, asked.seed + first)
        ]

    return await asyncio.to_thread(encode)  # encoding takes long enough to hold up other requests


def _about(asked: ImageRequest, drawn: Drawn) -> dict[str, Any]:
    _, height, width, _ = drawn.pixels_BHW3.shape
    return {
        "model": drawn.version,
        "size": f"{width * drawn.enlarge}x{height * drawn.enlarge}",
        "quality": "auto",
        "output_format": asked.output_format,
        "calls_per_image": drawn.calls_per_image,
    }
