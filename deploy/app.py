"""Reads a bundle (of a model version in MLflow, or a path), writes images over HTTP: the Ray Serve application.

Two deployments: Ingress speaks HTTP, Generator draws. A generator pins an immutable model version; a new one comes in
place through ``user_config``. Ray's own /metrics port carries the metrics.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from mlflow.tracking import MlflowClient
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from cca_core.bundle import INFO_NAME, read_info
from cca_core.generate import Sampling, calls_per_image, decode_images, generate
from cca_core.models import ARImageModel, ImageTokenizer, load_model, load_tokenizer, to_uint8
from deploy.api import IGNORED, ApiError, ImageRequest, class_index, enlargement, png_base64

log = logging.getLogger("ray.serve")
#: Rows of one padded batch: requests are batched up to this, and every batch has this shape.
BATCH_SIZE = 16
#: A lost replica is noticed when its answer fails; the request is drawn again with the same seed.
ATTEMPTS = 4


@dataclass(frozen=True)
class Loaded:
    """One model version, ready to draw."""

    version: str
    model: ARImageModel
    tokenizer: ImageTokenizer
    info: dict[str, Any]


def resolve(model: str) -> tuple[str, str]:
    """(version, where its bundle lies) of ``models:/NAME@alias``, ``models:/NAME/VERSION`` or a bundle's path or URI.

    An alias is resolved here, once: a replica never follows it afterwards.
    """
    if not model.startswith("models:/"):
        return Path(model.rstrip("/")).name, model
    name, _, alias = model.removeprefix("models:/").partition("@")
    if alias:
        name = f"{name}/{MlflowClient().get_model_version_by_alias(name, alias).version}"
    folder = mlflow.artifacts.download_artifacts(f"models:/{name}", dst_path=tempfile.mkdtemp(prefix="cca-model-"))
    found = sorted(Path(folder).rglob(INFO_NAME))
    if not found:
        raise FileNotFoundError(f"models:/{name} holds no bundle: register it with `cca run`")
    return name, str(found[0].parent)


def load(model: str, device: str) -> Loaded:
    """Load a version and draw one batch with it, so that the first request does not pay for the warm-up."""
    version, uri = resolve(model)
    info = read_info(uri)
    loaded, tokenizer = load_model(uri, device=device), load_tokenizer(uri, device=device)
    defaults = Sampling(**info.sampling)
    tokens = generate(loaded, torch.zeros(1, dtype=torch.int64), defaults, torch.zeros(1), batch_size=BATCH_SIZE)
    decode_images(tokenizer, tokens, batch_size=BATCH_SIZE)
    facts = {
        "id": version,
        "class_names": info.class_names or tuple(str(k) for k in range(loaded.spec.num_classes)),
        "image_size": info.image_size,
        "sampling": info.sampling,
        "calls_per_image": calls_per_image(loaded, defaults),
    }
    return Loaded(version, loaded, tokenizer, facts)


@serve.deployment
class Generator:
    """Draws images of one model version, whatever arrives together in one padded batch."""

    def __init__(self) -> None:
        torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.loaded: Loaded | None = None

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the version that the configuration names, whole, before it replaces the present one."""
        if user_config.get("tracking_uri"):
            mlflow.set_tracking_uri(user_config["tracking_uri"])
            mlflow.set_registry_uri(user_config["tracking_uri"])
        self.loaded = load(user_config["model"], self.device)
        log.info("serving %s", self.loaded.version)

    def info(self) -> dict[str, Any]:
        """Version, classes, size and sampling defaults."""
        assert self.loaded is not None
        return {**self.loaded.info, "pid": os.getpid()}

    async def draw(self, prompt: str, seed: int, sampling: dict[str, Any]) -> tuple[str, int, np.ndarray]:
        """(version, class, uint8 [H, W, 3]) of one image."""
        return await self._draw_batch((prompt, seed, sampling))

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=0.01)
    async def _draw_batch(self, items: list[tuple[str, int, dict[str, Any]]]) -> list[Any]:
        # In a thread, so that health checks are answered meanwhile.
        return await asyncio.get_running_loop().run_in_executor(None, self._draw, items)

    def _draw(self, items: list[tuple[str, int, dict[str, Any]]]) -> list[Any]:
        loaded = self.loaded
        assert loaded is not None
        results: list[Any] = [None] * len(items)
        groups: dict[Sampling, list[int]] = {}
        for index, (_, _, asked) in enumerate(items):
            groups.setdefault(Sampling(**{**loaded.info["sampling"], **asked}), []).append(index)
        for sampling, members in groups.items():
            classes = [int(class_index(items[i][0], loaded.info["class_names"])) for i in members]
            seeds = torch.tensor([items[i][1] for i in members])
            tokens = generate(loaded.model, torch.tensor(classes), sampling, seeds, batch_size=BATCH_SIZE)
            pixels = to_uint8(decode_images(loaded.tokenizer, tokens, batch_size=BATCH_SIZE)).numpy()
            for i, class_, image in zip(members, classes, pixels, strict=True):
                results[i] = (loaded.version, class_, image)
        return results


http = FastAPI(title="CCA image generation", docs_url="/docs")


@http.exception_handler(ApiError)
async def _api_error(_: Request, error: ApiError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error.body(), error.status, headers)


@http.exception_handler(RequestValidationError)
async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    if first["type"] == "json_invalid":
        return JSONResponse(ApiError(400, "the body is not JSON", None, "invalid_json").body(), 400)
    return JSONResponse(ApiError(400, f"{where or 'body'}: {first['msg']}", where or None).body(), 400)


@http.exception_handler(HTTPException)
async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    return JSONResponse(ApiError(error.status_code, str(error.detail)).body(), error.status_code)


@http.exception_handler(Exception)
async def _unexpected(_: Request, error: Exception) -> JSONResponse:
    log.exception("request failed", exc_info=error)
    return JSONResponse(ApiError(500, "internal error; the service's log has the reason").body(), 500)


@serve.deployment
@serve.ingress(http)
class Ingress:
    """The HTTP API. It knows no model: the generator's answer says which version drew an image."""

    def __init__(self, generator: DeploymentHandle) -> None:
        self.generator = generator

    @http.post("/v1/images/generations")
    async def generations(self, request: Request) -> dict[str, Any]:
        """Draw n images of one class."""
        asked = await _parse(request)
        info = await self._call("info")
        if asked.model is not None and asked.model not in (info["id"], info["id"].split("/")[0]):
            raise ApiError(
                404, f"unknown model {asked.model[:100]!r}: this service has {info['id']}", "model", "model_not_found"
            )
        name = info["class_names"][class_index(asked.prompt, info["class_names"])]
        enlarge = enlargement(asked.size, info["image_size"])
        sampling, seed = asked.sampling(info["sampling"]), asked.first_seed()
        drawn = await asyncio.gather(*(self._call("draw", name, seed + i, asdict(sampling)) for i in range(asked.n)))
        data = []
        for i, (version, _, pixels) in enumerate(drawn):
            image = png_base64(pixels, enlarge=enlarge, model=version, name=name, seed=seed + i, sampling=sampling)
            data.append({"b64_json": image, "seed": seed + i, "model": version})
        return {"created": int(time.time()), "data": data, "model": drawn[0][0]}

    @http.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The version that is served, its classes and what an image costs."""
        info = await self._call("info")
        return {"object": "list", "data": [{"object": "model", "created": 0, "owned_by": "cca", **info}]}

    @http.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        """The HTTP process lives."""
        return {"status": "ok"}

    @http.get("/readyz")
    async def readyz(self) -> dict[str, str]:
        """A generator answers."""
        info = await asyncio.wait_for(self._call("info"), 5)
        return {"status": "ready", "model": info["id"]}

    async def _call(self, method: str, *arguments: Any) -> Any:
        """Call a generator; a lost replica is tried again, a full queue is told to the client."""
        for attempt in range(ATTEMPTS):
            try:
                return await getattr(self.generator, method).remote(*arguments)
            except BackPressureError as error:
                raise ApiError(503, "the service is busy: try again shortly", None, "busy") from error
            except RayActorError as error:
                if attempt + 1 == ATTEMPTS:
                    raise ApiError(503, "no generator answers: try again shortly", None, "unavailable") from error
        raise AssertionError("unreachable")


async def _parse(request: Request) -> ImageRequest:
    try:
        body = await request.json()
    except ValueError as error:
        raise ApiError(400, "the body is not JSON", None, "invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object", None, "invalid_json")
    known = {key: value for key, value in body.items() if key not in IGNORED}
    try:
        return ImageRequest.model_validate(known)
    except ValueError as error:
        first = error.errors()[0]  # type: ignore[attr-defined]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{where}: {first['msg']}", where) from error


def build(args: dict[str, Any]) -> serve.Application:
    """The application of deploy/serve.yaml; everything configurable stands there."""
    del args
    return Ingress.bind(Generator.bind())
