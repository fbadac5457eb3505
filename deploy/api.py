"""Reads and writes nothing: requests, answers and errors of the OpenAI Images API, and the PNG that leaves."""

from __future__ import annotations

import base64
import io
import secrets
from typing import Any, Literal

import numpy as np
from PIL import Image, PngImagePlugin
from pydantic import BaseModel, ConfigDict, Field

from cca_core.generate import Sampling

MAX_IMAGES = 16
MAX_SEED = 2**31 - 1
MAX_SIDE = 1024
#: Fields of the OpenAI request that choose nothing here; named, so that a misspelt one is still refused.
IGNORED = ("quality", "style", "background", "moderation", "user", "output_compression", "partial_images")


class ApiError(Exception):
    """An answer other than 200, in OpenAI's error body."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
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
    #: Image i of a request is drawn with seed + i; without one, a random seed is drawn and told.
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, ge=0, le=1)
    #: 1.0 draws without guidance, at half the calls.
    cfg_scale: float | None = Field(default=None, ge=1, le=20)

    def sampling(self, defaults: dict[str, Any]) -> Sampling:
        """The model's defaults with what the request says on top."""
        asked = {name: getattr(self, name) for name in ("temperature", "top_k", "top_p", "cfg_scale")}
        return Sampling(**{**defaults, **{name: value for name, value in asked.items() if value is not None}})

    def first_seed(self) -> int:
        return self.seed if self.seed is not None else secrets.randbelow(MAX_SEED - MAX_IMAGES)


def class_index(prompt: str, names: tuple[str, ...]) -> int:
    """The class that a prompt names. A name wins over an index, so that a class called "3" is that class."""
    if prompt in names:
        return names.index(prompt)
    if prompt.isdecimal() and int(prompt) < len(names):
        return int(prompt)
    some = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    raise ApiError(400, f"unknown class {prompt[:100]!r}: this model draws {some}", "prompt", "unknown_class")


def enlargement(size: str, image_size: int) -> int:
    """The whole factor between the model's own size and the size asked for."""
    if size == "auto":
        return 1
    width, _, height = size.partition("x")
    if width == height and width.isdecimal() and 0 < int(width) <= MAX_SIDE and int(width) % image_size == 0:
        return int(width) // image_size
    own = f"{image_size}x{image_size}"
    raise ApiError(400, f"size {size[:40]!r}: use auto, {own}, or a square multiple of it up to {MAX_SIDE}", "size")


def png_base64(pixels_HW3: np.ndarray, *, enlarge: int, model: str, name: str, seed: int, sampling: Sampling) -> str:
    """The image as PNG in base64; its metadata says that it is AI-generated, by what, and how to draw it again."""
    origin = PngImagePlugin.PngInfo()
    for key, value in (
        ("Source", "AI-generated"),
        ("Software", model),
        ("Title", name),
        ("cca.seed", str(seed)),
        ("cca.sampling", str(sampling)),
    ):
        origin.add_text(key, value)
    out = io.BytesIO()
    Image.fromarray(pixels_HW3.repeat(enlarge, 0).repeat(enlarge, 1)).save(out, format="PNG", pnginfo=origin)
    return base64.b64encode(out.getvalue()).decode()
