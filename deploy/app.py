"""Reads requests, writes images over HTTP: the Ray Serve application of ``deploy/serve.yaml``.

Two deployments: Ingress speaks HTTP, Generator draws. A generator pins an immutable model version; a new one comes in
place through ``user_config``. Ray's own metrics port carries the metrics.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from deploy.api import ApiError, ImageRequest, parse, png_base64
from deploy.generator import Drawn, Generator, check_model
from deploy.release import APPLICATION

log = logging.getLogger("ray.serve")
#: A lost replica is noticed when its answer fails; the request is drawn again with the same seed.
ATTEMPTS = 4
RETRY_S = 0.1
#: Longest wait for a generator's answer; Serve's own limit (request_timeout_s) lies above it.
ANSWER_S = 100.0
READY_S = 3.0
RETRY_AFTER_S = "1"


def http_api() -> FastAPI:
    """The HTTP API, built in the ingress replica. It knows no model: a generator's answer says which version drew."""
    app = FastAPI(title="CCA image generation", docs_url="/docs", redirect_slashes=False)
    generator = serve.get_deployment_handle(Generator.name, APPLICATION)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)

    # /docs shows what a body may hold; ``parse`` reads it, for OpenAI's errors.
    schema = {"application/json": {"schema": ImageRequest.model_json_schema()}}

    @app.post("/v1/images/generations", openapi_extra={"requestBody": {"required": True, "content": schema}})
    async def generations(request: Request) -> dict[str, Any]:
        """Draw n images of one class."""
        asked = parse(await request.body())
        drawn = await answer(generator, "draw", asked, within_s=ANSWER_S)
        data = await asyncio.to_thread(_encode, drawn, asked.seed)  # PNG takes long enough to hold up other requests
        return {"created": int(time.time()), "data": data, "model": drawn.version}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The version that is served, its classes and what an image costs."""
        return {"object": "list", "data": [_model(await answer(generator, "info", within_s=ANSWER_S))]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """The served version by its name, with or without the version's number."""
        info = await answer(generator, "info", within_s=ANSWER_S)
        check_model(model, info["id"])
        return _model(info)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The HTTP process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> dict[str, str]:
        """A generator answers."""
        info = await answer(generator, "info", within_s=READY_S)
        return {"status": "ready", "model": info["id"]}

    return app


async def answer(generator: DeploymentHandle, method: str, *arguments: Any, within_s: float) -> Any:
    """A generator's answer. A lost replica's request goes to another; 503 says that none can answer now."""
    try:
        async with asyncio.timeout(within_s):
            for attempt in range(ATTEMPTS):
                try:
                    answered = await getattr(generator, method).remote(*arguments)
                    break
                except RayActorError:
                    if attempt + 1 == ATTEMPTS:
                        raise
                    await asyncio.sleep(RETRY_S * 2**attempt)
    except BackPressureError:
        raise ApiError(503, "the service is busy: try again shortly", None, "busy") from None
    except (RayActorError, DeploymentUnavailableError, TimeoutError) as error:
        log.warning("no generator answers %s: %s", method, type(error).__name__)
        raise ApiError(503, "no generator answers: try again shortly", None, "unavailable") from None
    if isinstance(answered, ApiError):
        raise answered
    return answered


async def _api_error(_: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, {"Retry-After": RETRY_AFTER_S} if error.status == 503 else None)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    asked = f"{request.method} {request.url.path[:200]}"
    what = {404: f"there is no {asked}", 405: f"{asked}: wrong method"}.get(error.status_code, str(error.detail))
    body = ApiError(error.status_code, f"{what}; /docs lists what there is", None, "unknown_url").body()
    return JSONResponse(body, error.status_code, error.headers)


async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    log.error("request failed", exc_info=error)
    return JSONResponse(ApiError(500, "internal error; the service's log has the reason").body(), 500)


def _encode(drawn: Drawn, seed: int) -> list[dict[str, Any]]:
    origin = {"model": drawn.version, "name": drawn.class_name, "sampling": drawn.sampling}
    return [
        {
            "b64_json": png_base64(pixels, enlarge=drawn.enlarge, seed=seed + index, **origin),
            "seed": seed + index,
            "model": drawn.version,
        }
        for index, pixels in enumerate(drawn.pixels_BHW3)
    ]


def _model(info: dict[str, Any]) -> dict[str, Any]:
    return {"object": "model", "created": 0, "owned_by": "cca", **info}


#: A function that makes the API, not the API itself: Serve would copy its routes apart from this module's names.
Ingress = serve.deployment(serve.ingress(http_api)(), name="Ingress")


def build(args: dict[str, Any]) -> serve.Application:
    """The application of deploy/serve.yaml; everything configurable stands there."""
    del args
    return Ingress.bind(Generator.bind())
