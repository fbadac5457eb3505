"""Reads the feature network of a features/ directory: the embedded classifier, or a TorchScript file; writes nothing.

A TorchScript file is code, so it is pinned by its sha256 and checked before a byte of it is interpreted. What it takes
and gives:

- in: images as they would be saved, uint8 RGB [B, 3, H, W], in the size and range that the recipe names;
- out: features float [B, D] (any further axes are flattened), or a tuple (features, class logits [B, C]) or (features,
  class logits, spatial features). Without logits there is no inception score, without spatial features (the ADM
  evaluator's: the first 7 channels of mixed_6/conv, 17 x 17, so 2023 of them) no spatial distance.

The published Inception (``PUBLISHED_INCEPTION``) resizes uint8 images to 299 x 299 inside, as TensorFlow did, and is
called twice: features with ``return_features=True``, and class probabilities without the bias of the last layer, of
which published inception scores are made (1008 classes of its own, which no data set's labels are).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cca_core.config import ConfigError, FeaturesConfig
from cca_core.metrics.features import Classifier, load_classifier
from cca_core.metrics.torchscript import load_torchscript, network_input
from cca_core.store import StageDirectory

NETWORK_NAME = "network.pt"


@dataclass(frozen=True)
class Outputs:
    """Float32 rows, one per image; None where there are none."""

    features: Tensor
    #: Of the data's classes: what class consistency is by.
    logits: Tensor | None
    #: Of whatever classes the inception score is over; the same tensor as ``logits`` where it is over those.
    score_logits: Tensor | None
    spatial: Tensor | None

    def columns(self) -> dict[str, Tensor]:
        """Name -> rows, of those there are."""
        return {name: rows for name, rows in vars(self).items() if rows is not None}


class FeatureNetwork:
    """The embedded classifier, or a scripted network beside it."""

    def __init__(
        self, config: FeaturesConfig, classifier: Classifier | None, scripted: torch.jit.ScriptModule | None
    ) -> None:
        self.config, self.classifier, self.scripted = config, classifier, scripted
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> FeatureNetwork:
        for network in (self.classifier, self.scripted):
            if network is not None:
                network.to(device)
        self.device = device
        return self

    @torch.inference_mode()
    def __call__(self, images_BCHW: Tensor) -> Outputs:
        """What the network says of images in [-1, 1]."""
        images_BCHW = images_BCHW.to(self.device)
        features, logits = self.classifier(images_BCHW) if self.classifier is not None else (None, None)
        if self.scripted is None:
            return Outputs(features, logits, score_logits=logits, spatial=None)
        features, score_logits, spatial = self._scripted(network_input(images_BCHW, self.config))
        if self.config.class_logits:
            if score_logits is None:
                raise ConfigError(
                    "features.class_logits=true, but the network gives no logits: set it to false, and a classifier "
                    "is trained for class consistency"
                )
            logits = score_logits
        return Outputs(features, logits, score_logits, spatial)

    def _scripted(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if self.config.published:
            probabilities = self.scripted(images_BCHW, no_output_bias=True).float()
            features = self.scripted(images_BCHW, return_features=True)
            return _rows(features), probabilities.clamp(min=torch.finfo(torch.float32).tiny).log(), None
        found = self.scripted(images_BCHW)
        parts = found if isinstance(found, tuple) else (found,)
        if not 0 < len(parts) <= 3 or not all(isinstance(part, Tensor) for part in parts):
            raise ConfigError(
                f"{self.config.network} gives {type(found).__name__}, not features, (features, logits) or (features, "
                "logits, spatial features): script it so that it does"
            )
        return tuple(_rows(part) for part in parts) + (None,) * (3 - len(parts))


def _rows(values: Tensor) -> Tensor:
    return values.float().flatten(1)


def load_network(directory: StageDirectory, config: FeaturesConfig) -> FeatureNetwork:
    """The network of a features/ directory, on the CPU, in eval mode."""
    classifier = None if config.class_logits else load_classifier(directory)
    if not config.network:
        return FeatureNetwork(config, classifier, None)
    return FeatureNetwork(config, classifier, scripted_network(directory.read_bytes(NETWORK_NAME), config))


def scripted_network(data: bytes, config: FeaturesConfig) -> torch.jit.ScriptModule:
    """A TorchScript file, checked against the recipe's sha256 before it is loaded."""
    return load_torchscript(data, config.sha256, name=config.network, key="features.sha256")
