"""Reads a bundle (of a model version in MLflow, or a path), draws images: the Serve deployment that holds a model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from ray.serve.metrics import Counter

from cca_core.bundle import read_info
from cca_core.config import ConfigError
from cca_core.generate import Sampling, calls_per_image
from cca_core.metrics.content_filter import ContentFilter, load_filter
from cca_core.models import ARImageModel, load_to_draw, load_tokenizer
from deploy.api import ApiError, ImageRequest, class_index, enlargement
from deploy.drawing import SLOTS, Drawing
from deploy.metrics import SlotMetrics
from deploy.tracing import span
from deploy.versions import fetched

log = logging.getLogger("ray.serve")
#: The code of what the content filter blocks.
BLOCKED = "content_policy_violation"


@dataclass(frozen=True)
class Loaded:
    """One model version, ready to draw. A request keeps the one it began with, whatever is loaded meanwhile: all its
    images come from it."""

    version: str
    model: ARImageModel
    class_names: tuple[str, ...]
    image_size: int
    sampling: dict[str, Any]
    filter: ContentFilter | None
    drawing: Drawing


@dataclass(frozen=True)
class Drawn:
    """The images of one request, uint8 [n, H, W, 3], and where they come from."""

    version: str
    class_name: str
    sampling: dict[str, Any]
    enlarge: int
    calls_per_image: int
    pixels_BHW3: np.ndarray


def load(model: str, tracking_uri: str, device: str) -> Loaded:
    """Load a pinned version and draw one image with it, so that the first request does not pay for the warm-up."""
    with fetched(model, tracking_uri) as bundle:
        # Weights are read into memory: the folder is not needed afterwards.
        network, tokenizer = load_to_draw(bundle.uri, device=device), load_tokenizer(bundle.uri, device=device)
        content_filter = load_filter(bundle.uri, device)
        info = load_info(bundle.uri, network.spec.num_classes)
    drawing = Drawing(network, tokenizer, content_filter, device)
    loaded = Loaded(bundle.version, network, *info, content_filter, drawing)
    asyncio.run(drawing.draw(0, 0, Sampling(**loaded.sampling)))
    return loaded


def load_info(uri: str, num_classes: int) -> tuple[tuple[str, ...], int, dict[str, Any]]:
    """(class names, image size, sampling defaults) of a bundle; classes without names are called by their index."""
    info = read_info(uri)
    names = info.class_names or tuple(str(index) for index in range(num_classes))
    if len(names) != num_classes:
        raise ConfigError(f"the bundle has {len(names)} class names for {num_classes} classes: convert it again")
    return names, info.image_size, asdict(Sampling(**info.sampling))


@serve.deployment
class Generator:
    """Draws images of one model version; those that are asked for meanwhile join in."""

    def __init__(self) -> None:
        # The replica's own share: neighbours are not slowed down, and every replica rounds alike.
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        torch.set_num_threads(max(1, int(cpus)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.loaded: Loaded | None = None
        self.filtered = Counter("cca_filtered_images", "Images that the content filter blocked.", ("model",))
        self.slots = SlotMetrics()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the version that the configuration names, whole, before it replaces the present one."""
        # In a thread, so that the present version draws and health checks are answered meanwhile.
        loaded = await asyncio.to_thread(load, user_config["model"], user_config.get("tracking_uri", ""), self.device)
        self.slots.serve(loaded.version, SLOTS)
        loaded.drawing.report = partial(self.slots.fill, loaded.version)
        self.loaded = loaded
        log.info("serving %s on %s, %d threads", self.loaded.version, self.device, torch.get_num_threads())

    def info(self) -> dict[str, Any]:
        """Version, classes, size, sampling defaults and what an image costs."""
        loaded = self._loaded()
        return {
            "id": loaded.version,
            "class_names": loaded.class_names,
            "image_size": loaded.image_size,
            "sampling": loaded.sampling,
            "calls_per_image": calls_per_image(loaded.model, Sampling(**loaded.sampling)),
            "content_filter": asdict(loaded.filter.spec) if loaded.filter else None,
        }

    async def draw(self, asked: ImageRequest) -> Drawn | ApiError:
        """All images of one request. What is wrong with a request is returned: a replica does not fail of it."""
        return await self._drawn(self._loaded(), asked)

    async def draw_each(self, asked: ImageRequest) -> AsyncIterator[tuple[int, Drawn | ApiError]]:
        """The images of one request with their indices, each as soon as it is finished, all of one version."""
        loaded = self._loaded()

        async def one(index: int) -> tuple[int, Drawn | ApiError]:
            return index, await self._drawn(loaded, asked.model_copy(update={"n": 1, "seed": asked.seed + index}))

        tasks = [asyncio.create_task(one(index)) for index in range(asked.n)]
        try:
            for done in asyncio.as_completed(tasks):
                yield await done
        finally:
            for task in tasks:
                task.cancel()

    async def _drawn(self, loaded: Loaded, asked: ImageRequest) -> Drawn | ApiError:
        try:
            check_model(asked.model, loaded.version)
            class_id = class_index(asked.prompt, loaded.class_names)
            enlarge = enlargement(asked.size, loaded.image_size)
            sampling = Sampling(**asked.sampling(loaded.sampling))
        except ApiError as error:
            return error
        except ConfigError as error:
            return ApiError(400, str(error), None, "invalid_value")
        seeds = range(asked.seed, asked.seed + asked.n)
        calls = calls_per_image(loaded.model, sampling)
        with span("draw", model=loaded.version, calls_per_image=calls, n=asked.n):
            drawn = await asyncio.gather(*(loaded.drawing.draw(class_id, seed, sampling) for seed in seeds))
        images = [image for image in drawn if image is not None]
        if len(images) < asked.n:
            self.filtered.inc(asked.n - len(images), {"model": loaded.version})
            return filtered(asked.n - len(images), asked.n)
        return Drawn(loaded.version, loaded.class_names[class_id], asdict(sampling), enlarge, calls, np.stack(images))

    def _loaded(self) -> Loaded:
        assert self.loaded is not None, "Serve configures a replica before it sends requests"
        return self.loaded


def filtered(blocked: int, n: int) -> ApiError:
    """The answer where images are blocked: no image of the request leaves, so that nobody takes fewer for all."""
    return ApiError(
        400,
        f"the content filter blocks {blocked} of the {n} images, so none is returned: ask again with another seed",
        None,
        BLOCKED,
    )


def check_model(asked: str | None, version: str) -> None:
    """A request may name the model, with or without its version; no other is here."""
    if asked is not None and asked not in (version, version.split("/")[0]):
        raise ApiError(404, f"unknown model {asked[:100]!r}: this service has {version}", "model", "model_not_found")
