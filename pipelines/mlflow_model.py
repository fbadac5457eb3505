"""Reads the bundle of a model version, writes nothing: the pyfunc that draws images (models-from-code, no pickle)."""

from __future__ import annotations

import base64
import io
import zlib
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.models import ModelSignature
from mlflow.types.schema import ColSpec, ParamSchema, ParamSpec, Schema
from PIL import Image

from cca_core.bundle import read_info
from cca_core.config import ConfigError
from cca_core.generate import Sampling, decode_images, generate
from cca_core.metrics.content_filter import load_filter
from cca_core.models import load_to_draw, load_tokenizer, to_uint8

BUNDLE = "bundle"
#: Images that the content filter scores at once; the last batch is padded.
FILTER_BATCH = 16


def signature(sampling: dict[str, Any]) -> ModelSignature:
    """Rows of (class, seed) in, PNG images as base64 text out (null where the content filter blocks one); sampling as
    parameters with the bundle's defaults."""
    types = {"temperature": "double", "top_k": "long", "top_p": "double", "cfg_scale": "double"}
    return ModelSignature(
        inputs=Schema([ColSpec("string", "class"), ColSpec("long", "seed")]),
        outputs=Schema([ColSpec("string", "image_png_base64", required=False)]),
        params=ParamSchema([ParamSpec(name, types[name], sampling[name]) for name in types]),
    )


class ImageModel(mlflow.pyfunc.PythonModel):
    """``predict(DataFrame[class, seed])`` gives one PNG per row, none where the bundle's content filter blocks it;
    ``class`` is a name."""

    def load_context(self, context: Any) -> None:
        path = context.artifacts[BUNDLE]
        self.info = read_info(path)
        self.model, self.tokenizer, self.filter = load_to_draw(path), load_tokenizer(path), load_filter(path)

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        sampling = Sampling(**{**self.info.sampling, **(params or {})})
        classes = torch.tensor([self._class(name) for name in model_input["class"]])
        seeds = torch.tensor(np.asarray(model_input["seed"], np.int64))
        decoded = decode_images(self.tokenizer, generate(self.model, classes, sampling, seeds))
        blocked = self.filter.blocked(decoded, FILTER_BATCH) if self.filter else [False] * len(decoded)
        images = zip(to_uint8(decoded).numpy(), blocked, strict=True)
        return pd.DataFrame({"image_png_base64": [None if bad else _png(image) for image, bad in images]})

    def _class(self, name: Any) -> int:
        names = self.info.class_names
        if str(name) in names:
            return names.index(str(name))
        raise ConfigError(f"unknown class {name!r}: this model draws {', '.join(names[:20])}")


def _png(image: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG", compress_level=zlib.Z_BEST_SPEED)
    return base64.b64encode(out.getvalue()).decode()


mlflow.models.set_model(ImageModel())
