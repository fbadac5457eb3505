"""Reads and writes nothing: requests and errors of the OpenAI Images API."""

from __future__ import annotations

import difflib
import json
import re
import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_IMAGES = 16
MAX_SEED = 2**31 - 1
MAX_SIDE = 1024
MAX_BODY_BYTES = 64 * 1024
#: Longest wait for the images of one request; Serve's own limit (request_timeout_s) lies above it.
ANSWER_S = 100.0
GENERATIONS = "/v1/images/generations"
BATCHES = "/v1/images/batches"
#: Longest time for a batch; ``deploy.proxy`` moves Serve's own limit above it.
BATCH_S = 3600.0
#: OpenAI's fields that choose nothing here, and the values that ask for nothing; any other value is refused.
NO_CHOICE = {
    "quality": ("auto", "standard"),
    "style": ("auto",),
    "background": ("auto",),
    "moderation": ("auto",),
    "partial_images": (0,),
}
#: OpenAI's error types, by code, where they are no question of the status.
TYPES = {"rate_limit_exceeded": "requests", "insufficient_quota": "insufficient_quota"}


class ApiError(Exception):
    """An answer other than 200, in OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(status, message, param, code, retry_after_s)  # all of them: it travels between processes
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = 1 if status == 503 and retry_after_s is None else retry_after_s

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.code or "", "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return {**found, "WWW-Authenticate": "Bearer"} if self.status == 401 else found


#: What of a fault inside leaves the service.
INTERNAL = ApiError(500, "internal error; the service's log has the reason")


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer from 400 on."""

    error: ErrorDetail


class ImageRequest(BaseModel):
    """POST /v1/images/generations: OpenAI's fields, and the sampling of autoregressive models."""

    model_config = ConfigDict(extra="forbid", strict=True)

    #: The class to draw: its name, or its index.
    prompt: str = Field(min_length=1, max_length=1000)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_IMAGES)
    #: "auto", or WxH: a multiple of the model's own size, enlarged without smoothing.
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "webp", "jpeg"] = "png"
    #: Quality of webp and jpeg, in percent.
    output_compression: int | None = Field(default=None, ge=0, le=100)
    #: Server-sent events: each image as soon as it is finished.
    stream: bool = False
    #: The answer is of no use after that many seconds; the images are then not drawn to the end.
    timeout_s: float | None = Field(default=None, gt=0, le=ANSWER_S)
    #: The caller's own word for its user; it changes nothing.
    user: str | None = None
    #: Image i of a request is drawn with seed + i; without one, a random seed is drawn and told.
    seed: int = Field(default_factory=lambda: secrets.randbelow(MAX_SEED - MAX_IMAGES), ge=0, le=MAX_SEED)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    #: 1.0 draws without guidance, at half the calls.
    cfg_scale: float | None = Field(default=None, ge=1, le=20)

    def sampling(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """The model's defaults with what the request says on top."""
        asked = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "cfg_scale")}
        return {**defaults, **{name: value for name, value in asked.items() if value is not None}}


def parse(body: bytes) -> ImageRequest:
    """The request in ``body``, or an ApiError that names the first thing wrong with it."""
    return requested(json_object(body, "body"))


def json_object(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in ``text``, or an ApiError that calls it ``what``."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ApiError(400, f"the {what} is not JSON", None, "invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the {what} is no JSON object", None, "invalid_json")
    return found


def requested(asked: dict[str, Any]) -> ImageRequest:
    """The request with these fields, or an ApiError that names the first thing wrong with them."""
    # OpenAI's clients may send null for what they leave open.
    asked = {key: value for key, value in asked.items() if value is not None or key not in ImageRequest.model_fields}
    for name, values in NO_CHOICE.items():
        if name in asked and asked.pop(name) not in (None, *values):
            raise ApiError(400, f"{name}: there is nothing to choose here, leave it out", name, "unsupported_value")
    try:
        request = ImageRequest.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        where = plain(".".join(str(part) for part in first["loc"])) or "body"
        if first["type"] == "extra_forbidden":
            raise ApiError(400, f"{where}: unknown{_suggestion(where)}", where, "unknown_parameter") from None
        raise ApiError(400, f"{where}: {plain(first['msg'])}", where, "invalid_value") from None
    if request.output_compression is not None and request.output_format == "png":
        message = "output_compression: png loses nothing; leave it out, or take output_format webp or jpeg"
        raise ApiError(400, message, "output_compression", "unsupported_value")
    if request.seed + request.n - 1 > MAX_SEED:
        raise ApiError(400, f"seed: seed + n - 1 is more than {MAX_SEED}, the last seed", "seed", "invalid_value")
    return request


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name, ImageRequest.model_fields, 1)
    return f"; did you mean {near[0]}?" if near else f"; a request has {', '.join(ImageRequest.model_fields)}"


def plain(text: str) -> str:
    """Text of a client, short and safe to send back."""
    return text[:200].encode("ascii", "backslashreplace").decode()


def class_index(prompt: str, names: tuple[str, ...]) -> int:
    """The class that a prompt names. A name wins over an index, so that a class called "3" is that class."""
    if prompt in names:
        return names.index(prompt)
    if prompt.isascii() and prompt.isdecimal() and int(prompt) < len(names):
        return int(prompt)
    some = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise ApiError(400, f"unknown class {prompt[:100]!r}: this model draws {some}", "prompt", "unknown_class")


def enlargement(size: str, image_size: int) -> int:
    """The whole factor between the model's own size and the size asked for."""
    if size == "auto":
        return 1
    square = re.fullmatch(r"([1-9][0-9]{0,3})x\1", size)
    if square and int(square[1]) % image_size == 0 and int(square[1]) <= max(MAX_SIDE, image_size):
        return int(square[1]) // image_size
    own = f"{image_size}x{image_size}"
    message = f"size {size[:40]!r}: use auto, {own}, or a square multiple of it up to {MAX_SIDE}"
    raise ApiError(400, message, "size", "invalid_value")
