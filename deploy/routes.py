"""Reads requests, writes images over HTTP: the routes of the service and the form of its errors."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deploy.access import Access
from deploy.answers import Streamed, events, whole
from deploy.api import (
    BATCHES,
    GENERATIONS,
    INTERNAL,
    MAX_BODY_BYTES,
    ApiError,
    ErrorBody,
    ImageRequest,
    parse,
    plain,
)
from deploy.batch import MAX_BATCH_BYTES, Batches, parse_batch
from deploy.calls import draw, draw_each, info
from deploy.generator import check_model
from deploy.metrics import joined_page
from deploy.playground import playground
from deploy.readiness import Readiness

log = logging.getLogger("ray.serve")
#: What the OpenAPI document says of errors and of keys; ``Access`` asks for the key.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": said}
    for status, said in (
        (400, "The request is wrong, or the content filter blocks an image"),
        (401, "No good key, where keys are on"),
        (404, "No such model or address"),
        (408, "The deadline of the request is over"),
        (413, "The body is too large"),
        (429, "The limit of the key is reached: Retry-After says when to come back"),
        (503, "Generators are busy or away: Retry-After says when to come back"),
    )
}
KEYED = [Depends(HTTPBearer(auto_error=False, description="A key of `cca key`, where the service asks for one"))]
OR_OPEN = {"security": [{}]}  # beside the key: none
ANSWERS: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}
#: Longest wait for a request's body.
BODY_S = 20.0


def http_api(
    generator: DeploymentHandle,
    access: Access,
    targets: Callable[[], Sequence[str]],
    readiness: Readiness | None = None,
) -> FastAPI:
    """The HTTP API. It knows no model: a generator's answer says which version drew.

    Args:
        targets: finds the pages that /metrics joins.
        readiness: what /readyz says; by default, whether a generator answers.
    """
    readiness = readiness or Readiness(generator)
    # Serve and deploy.tracing make the spans: FastAPI's own would not join the trace of a caller that has none.
    untraced: Any = {"telemetry": {"tracing": False}}
    app = FastAPI(title="CCA image generation", docs_url="/docs", redirect_slashes=False, responses=ERRORS, **untraced)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)

    # /docs shows what a body may hold; ``parse`` reads it, for OpenAI's errors.
    schema = {"application/json": {"schema": ImageRequest.model_json_schema()}}

    @app.post(
        GENERATIONS,
        response_model=None,
        responses=ANSWERS,
        dependencies=KEYED,
        openapi_extra={**OR_OPEN, "requestBody": {"required": True, "content": schema}},
    )
    async def generations(request: Request) -> dict[str, Any] | Response:
        """Draw n images of one class; with stream, as server-sent events."""
        with ExitStack() as stack:
            record = stack.enter_context(access.recorded(request_id(request)))
            found = access.holder(request.headers.get("authorization"))
            record.key = found[0] if found else None
            record.asked = asked = parse(await body(request))
            stack.enter_context(access.admitted(found, asked.n))
            if asked.stream:
                images = draw_each(generator, asked)
                first = await anext(images)  # what is wrong with a request is an answer of its own, not an event
                return Streamed(events(record, asked, first, images), "text/event-stream", stack.pop_all())
            drawn = await draw(generator, asked)
            record.drew(drawn)
            answer = await whole(asked, drawn)
            record.outcome = "ok"
        return answer

    batches = Batches(generator, access)
    lines: dict[str, Any] = {"application/x-ndjson": {"schema": {"type": "string"}}}

    @app.post(
        BATCHES,
        response_class=Response,
        responses={200: {"content": lines}},
        dependencies=KEYED,
        openapi_extra={**OR_OPEN, "requestBody": {"required": True, "content": lines}},
    )
    async def batch(request: Request) -> Response:
        """Draw many requests, one per line in the form of OpenAI's batches; a line is answered when it is done."""
        key = request.headers.get("authorization")
        try:
            access.holder(key)
            asked = await asyncio.to_thread(parse_batch, await body(request, MAX_BATCH_BYTES))
        except ApiError:
            with access.recorded(request_id(request)):  # it is a request as a whole; else its lines are
                raise
        return Streamed(batches.answers(request_id(request), key, asked), "application/x-ndjson", ExitStack())

    @app.get("/v1/models", dependencies=KEYED, openapi_extra=OR_OPEN)
    async def models(request: Request) -> dict[str, Any]:
        """The version that is served, its classes and what an image costs."""
        access.holder(request.headers.get("authorization"))
        return {"object": "list", "data": [_model(await info(generator))]}

    @app.get("/v1/models/{model:path}", dependencies=KEYED, openapi_extra=OR_OPEN)
    async def model(request: Request, model: str) -> dict[str, Any]:
        """The served version by its name, with or without the version's number."""
        access.holder(request.headers.get("authorization"))
        served = await info(generator)
        check_model(model, served["id"])
        return _model(served)

    page, page_headers = playground()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers=page_headers)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The HTTP process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """A generator answers, or is started for the next request where the service scales to zero."""
        return await readiness.check()

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus metrics of the service, of all nodes."""
        return PlainTextResponse(await joined_page(targets), media_type="text/plain; version=0.0.4")

    return app


def request_id(request: Request) -> str:
    """The caller's word for its request (X-Request-Id), short and safe to write down. Serve's proxy sends it back, and
    makes one where there is none."""
    return plain(request.headers.get("x-request-id", ""))[:128] or str(uuid.uuid4())


async def body(request: Request, most: int = MAX_BODY_BYTES) -> bytes:
    """The request's body, of which no more is read than a request may have."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                read += chunk
                if len(read) > most:
                    message = f"the body has more than the {most} bytes that a request may have"
                    raise ApiError(413, message, None, "too_large")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_S:.0f} s", None, "body_timeout") from None
    except ClientDisconnect:
        raise asyncio.CancelledError from None  # nobody waits for an answer
    return bytes(read)


async def _api_error(_: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    asked = f"{request.method} {request.url.path[:200]}"
    what = {404: f"there is no {asked}", 405: f"{asked}: wrong method"}.get(error.status_code, str(error.detail))
    body = ApiError(error.status_code, f"{what}; /docs lists what there is", None, "unknown_url").body()
    return JSONResponse(body, error.status_code, error.headers)


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    log.error("request failed", exc_info=error)
    return JSONResponse(INTERNAL.body(), 500)


def _model(info: dict[str, Any]) -> dict[str, Any]:
    return {"object": "model", "created": 0, "owned_by": "cca", **info}
