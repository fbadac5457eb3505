"""Reads and writes nothing: requests, answers and errors of the OpenAI Images API, and the PNG that leaves."""

from __future__ import annotations

import base64
import io
import json
import re
import secrets
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_IMAGES = 16
MAX_SEED = 2**31 - 1
MAX_SIDE = 1024
MAX_BODY_BYTES = 64 * 1024
#: OpenAI's fields that choose nothing here, and the values that ask for nothing; any other value is refused.
NO_CHOICE = {
    "quality": ("auto", "standard"),
    "style": ("auto",),
    "background": ("auto",),
    "moderation": ("auto",),
    "stream": (False,),
}
#: IPTC's word for images that a model drew, which content-credential readers look for.
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)


class ApiError(Exception):
    """An answer other than 200, in OpenAI's error body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message, param, code)  # all of them: it travels between processes
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


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
    output_format: Literal["png"] = "png"
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
    if len(body) > MAX_BODY_BYTES:
        raise ApiError(413, f"the body has {len(body)} bytes, at most {MAX_BODY_BYTES} are read", None, "too_large")
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", None, "invalid_json") from None
    if not isinstance(asked, dict):
        raise ApiError(400, "the body is no JSON object", None, "invalid_json")
    # OpenAI's clients may send null for what they leave open.
    asked = {key: value for key, value in asked.items() if value is not None or key not in ImageRequest.model_fields}
    for name, values in NO_CHOICE.items():
        if name in asked and asked.pop(name) not in (None, *values):
            raise ApiError(400, f"{name}: there is nothing to choose here, leave it out", name, "unsupported_value")
    try:
        request = ImageRequest.model_validate(asked)
    except ValidationError as error:
        first = error.errors()[0]
        where = _plain(".".join(str(part) for part in first["loc"])) or "body"
        code = "unknown_parameter" if first["type"] == "extra_forbidden" else "invalid_value"
        raise ApiError(400, f"{where}: {_plain(first['msg'])}", where, code) from None
    if request.seed + request.n - 1 > MAX_SEED:
        raise ApiError(400, f"seed: seed + n - 1 is more than {MAX_SEED}, the last seed", "seed", "invalid_value")
    return request


def _plain(text: str) -> str:
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


def png_base64(
    pixels_HW3: np.ndarray, *, enlarge: int, model: str, name: str, seed: int, sampling: dict[str, Any]
) -> str:
    """The image as PNG in base64; its metadata says that it is AI-generated, by what, and how to draw it again."""
    origin = PngImagePlugin.PngInfo()
    for key, value in (
        ("Source", "AI-generated"),
        ("Software", model),
        ("Title", name),
        ("cca.seed", str(seed)),
        ("cca.sampling", json.dumps(sampling, sort_keys=True)),
    ):
        origin.add_itxt(key, value)
    origin.add_itxt("XML:com.adobe.xmp", XMP)
    out = io.BytesIO()
    Image.fromarray(pixels_HW3.repeat(enlarge, 0).repeat(enlarge, 1)).save(out, format="PNG", pnginfo=origin)
    return base64.b64encode(out.getvalue()).decode()
