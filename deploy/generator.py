"""Reads a bundle (of a model version in MLflow, or a path), draws images: the Serve deployment that holds a model."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

from cca_core.bundle import read_info
from cca_core.config import ConfigError
from cca_core.generate import Sampling, calls_per_image, decode_images, generate
from cca_core.models import ARImageModel, ImageTokenizer, load_model, load_tokenizer, to_uint8
from deploy.api import ApiError, ImageRequest, class_index, enlargement
from deploy.versions import fetched

log = logging.getLogger("ray.serve")
#: Rows of one padded batch: requests are batched up to this, and every batch has this shape.
BATCH_SIZE = 16
#: How long the first row of a batch waits for others.
BATCH_WAIT_S = 0.01


@dataclass(frozen=True)
class Loaded:
    """One model version, ready to draw."""

    version: str
    model: ARImageModel
    tokenizer: ImageTokenizer
    class_names: tuple[str, ...]
    image_size: int
    sampling: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One image to draw. It carries its model: all images of a request come from one version, whatever is loaded
    meanwhile."""

    loaded: Loaded
    class_id: int
    seed: int
    sampling: Sampling


@dataclass(frozen=True)
class Drawn:
    """The images of one request, uint8 [n, H, W, 3], and where they come from."""

    version: str
    class_name: str
    sampling: dict[str, Any]
    enlarge: int
    pixels_BHW3: np.ndarray


def load(model: str, tracking_uri: str, device: str) -> Loaded:
    """Load a pinned version and draw one batch with it, so that the first request does not pay for the warm-up."""
    with fetched(model, tracking_uri) as bundle:
        # Weights are read into memory: the folder is not needed afterwards.
        network, tokenizer = load_model(bundle.uri, device=device), load_tokenizer(bundle.uri, device=device)
        info = load_info(bundle.uri, network.spec.num_classes)
    loaded = Loaded(bundle.version, network, tokenizer, *info)
    draw_rows([Row(loaded, 0, 0, Sampling(**loaded.sampling))])
    return loaded


def load_info(uri: str, num_classes: int) -> tuple[tuple[str, ...], int, dict[str, Any]]:
    """(class names, image size, sampling defaults) of a bundle; classes without names are called by their index."""
    info = read_info(uri)
    names = info.class_names or tuple(str(index) for index in range(num_classes))
    if len(names) != num_classes:
        raise ConfigError(f"the bundle has {len(names)} class names for {num_classes} classes: convert it again")
    return names, info.image_size, asdict(Sampling(**info.sampling))


def draw_rows(rows: list[Row]) -> list[np.ndarray]:
    """One uint8 image [H, W, 3] per row. Rows of one version and sampling are one padded batch."""
    pixels: dict[int, np.ndarray] = {}
    groups: dict[tuple[str, Sampling], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((row.loaded.version, row.sampling), []).append(index)
    for (_, sampling), members in groups.items():
        loaded = rows[members[0]].loaded
        classes = torch.tensor([rows[index].class_id for index in members])
        seeds = torch.tensor([rows[index].seed for index in members])
        tokens = generate(loaded.model, classes, sampling, seeds, batch_size=BATCH_SIZE)
        images = to_uint8(decode_images(loaded.tokenizer, tokens, batch_size=BATCH_SIZE)).numpy()
        pixels.update(zip(members, images, strict=True))
    return [pixels[index] for index in range(len(rows))]


@serve.deployment
class Generator:
    """Draws images of one model version, whatever arrives together in one padded batch."""

    def __init__(self) -> None:
        # The replica's own share: neighbours are not slowed down, and every replica rounds alike.
        cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
        torch.set_num_threads(max(1, int(cpus)))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.loaded: Loaded | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the version that the configuration names, whole, before it replaces the present one."""
        # In a thread, so that the present version draws and health checks are answered meanwhile.
        self.loaded = await asyncio.to_thread(
            load, user_config["model"], user_config.get("tracking_uri", ""), self.device
        )
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
        }

    async def draw(self, asked: ImageRequest) -> Drawn | ApiError:
        """All images of one request. What is wrong with a request is returned: a replica does not fail of it."""
        loaded = self._loaded()
        try:
            check_model(asked.model, loaded.version)
            class_id = class_index(asked.prompt, loaded.class_names)
            enlarge = enlargement(asked.size, loaded.image_size)
            sampling = Sampling(**asked.sampling(loaded.sampling))
        except ApiError as error:
            return error
        except ConfigError as error:
            return ApiError(400, str(error), None, "invalid_value")
        rows = [Row(loaded, class_id, asked.seed + index, sampling) for index in range(asked.n)]
        images = await asyncio.gather(*(self._draw(row) for row in rows))
        return Drawn(loaded.version, loaded.class_names[class_id], asdict(sampling), enlarge, np.stack(images))

    @serve.batch(max_batch_size=BATCH_SIZE, batch_wait_timeout_s=BATCH_WAIT_S)
    async def _draw(self, rows: list[Row]) -> list[np.ndarray]:
        return await asyncio.to_thread(draw_rows, rows)

    def _loaded(self) -> Loaded:
        assert self.loaded is not None, "Serve configures a replica before it sends requests"
        return self.loaded


def check_model(asked: str | None, version: str) -> None:
    """A request may name the model, with or without its version; no other is here."""
    if asked is not None and asked not in (version, version.split("/")[0]):
        raise ApiError(404, f"unknown model {asked[:100]!r}: this service has {version}", "model", "model_not_found")
