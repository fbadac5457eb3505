"""Reads images; reads and writes classifier.json and classifier.safetensors: the embedded feature network.

A distance in the features of this small classifier compares samplers of one project with each
other. It is not FID, which is defined by the published Inception network, and must never be
reported as such.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

import torch.nn.functional as F
from safetensors.torch import load
from torch import Tensor, nn

from cca_core.bundle import encode_tensors
from cca_core.config import ConfigError
from cca_core.store import StageDirectory

FORMAT_VERSION = 1
SPEC_NAME = "classifier.json"
WEIGHTS_NAME = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class ClassifierSpec:
    """What the tensors of a classifier cannot tell, and what its features may be compared with."""

    width: int
    feature_dim: int
    num_classes: int
    #: Side in pixels of the images it was trained on, the only ones it accepts.
    image_size: int


class Classifier(nn.Module):
    """A small convolutional network: two halvings, a 2x2 pool, the features, the class logits.

    About 130 k parameters at width 32. Larger images leave a larger map, which the pool averages
    down; at 2x2 it keeps above and below, left and right apart.
    """

    def __init__(self, spec: ClassifierSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.width
        self.stem = nn.Sequential(
            *_conv(3, width, stride=1),
            *_conv(width, 2 * width, stride=2),
            *_conv(2 * width, 2 * width, stride=1),
            *_conv(2 * width, 3 * width, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.features = nn.Linear(4 * 3 * width, spec.feature_dim)
        self.head = nn.Linear(spec.feature_dim, spec.num_classes)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Float32 features [B, feature_dim] and logits [B, num_classes] of images in [-1, 1]."""
        expected = (3, self.spec.image_size, self.spec.image_size)
        if tuple(images_BCHW.shape[1:]) != expected:
            raise ValueError(f"the classifier takes images {expected}, not {tuple(images_BCHW.shape[1:])}")
        features_BD = self.features(self.pool(self.stem(images_BCHW)).flatten(1))
        logits_BK = self.head(F.gelu(features_BD))
        return features_BD.float(), logits_BK.float()


def _conv(in_channels: int, out_channels: int, *, stride: int) -> tuple[nn.Module, ...]:
    # Group norm, not batch norm: the features of an image must not depend on the images beside it.
    return (
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(math.gcd(8, out_channels), out_channels),
        nn.GELU(),
    )


def classifier_files(model: Classifier) -> dict[str, bytes]:
    """Spec and weights as files by name, for a stage directory."""
    spec = {"format_version": FORMAT_VERSION, "spec": asdict(model.spec)}
    return {
        SPEC_NAME: json.dumps(spec, indent=1, sort_keys=True).encode(),
        WEIGHTS_NAME: encode_tensors(model.state_dict()),
    }


def load_classifier(directory: StageDirectory) -> Classifier:
    """The classifier in a stage directory, on the CPU, in eval mode."""
    raw = directory.read_json(SPEC_NAME)
    if raw["format_version"] != FORMAT_VERSION:
        raise ConfigError(
            f"classifier format {raw['format_version']} is not the format {FORMAT_VERSION} "
            "of this release: train it again, or run the release that wrote it"
        )
    model = Classifier(ClassifierSpec(**raw["spec"]))
    model.load_state_dict(load(directory.read_bytes(WEIGHTS_NAME)), strict=True)
    return model.eval()
