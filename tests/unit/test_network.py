"""Writes to a temporary folder: feature networks from TorchScript files, pinned, with and without logits."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cca_core import evaluate_config
from cca_core.config import ConfigError, FeaturesConfig
from cca_core.metrics.features import Classifier, ClassifierSpec
from cca_core.metrics.network import FeatureNetwork, scripted_network
from cca_core.metrics.torchscript import network_input
from cca_core.stages.evaluate import described_network, distance_name

from cca_core.config import Recipe  # isort: skip


class FeaturesOnly(nn.Module):
    """Like DINO: features, no classes."""

    def forward(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=3)


class WithLogits(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.float().mean(dim=[2, 3])
        return features, features[:, :2] * 3


class ThreeClasses(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.float().mean(dim=[2, 3])
        return features, features


class WithSpatial(nn.Module):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = images.float().mean(dim=[2, 3])
        return features, features[:, :2], images[:, :, :2, :2].float()


class Published(nn.Module):
    """The calls that NVIDIA's file of the published Inception has."""

    def forward(self, images: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        assert images.dtype == torch.uint8
        features = images.float().mean(dim=[2, 3])
        if return_features:
            return features
        return torch.softmax(features / 100 + (0.0 if no_output_bias else 5.0) * torch.arange(3), dim=1)


def saved(module: nn.Module, folder: Path, **config) -> FeaturesConfig:
    path = folder / "network.pt"
    torch.jit.script(module).save(str(path))
    return FeaturesConfig(network=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest(), **config)


def network(config: FeaturesConfig, *, classifier: bool = True) -> FeatureNetwork:
    embedded = Classifier(ClassifierSpec(width=8, feature_dim=4, num_classes=2, image_size=8)).eval()
    scripted = scripted_network(Path(config.network).read_bytes(), config)
    return FeatureNetwork(config, embedded if classifier else None, scripted)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_features_alone_have_no_score_and_classes_by_the_embedded_classifier(tmp_path, images):
    made = network(saved(FeaturesOnly(), tmp_path))
    outputs = made(images)
    assert outputs.features.shape == (5, 24), "further axes are flattened"
    assert outputs.score_logits is None
    assert outputs.spatial is None
    assert torch.equal(outputs.logits, made.classifier(images)[1])
    assert set(outputs.columns()) == {"features", "logits"}


def test_logits_are_of_the_score_and_of_the_classes_only_where_the_recipe_says_so(tmp_path, images):
    config = saved(WithLogits(), tmp_path)
    outputs = network(config)(images)
    assert torch.equal(outputs.score_logits, outputs.features[:, :2] * 3)
    assert not torch.equal(outputs.logits, outputs.score_logits)
    outputs = network(dataclasses.replace(config, class_logits=True), classifier=False)(images)
    assert torch.equal(outputs.logits, outputs.score_logits)


def test_spatial_features_are_the_third_output(tmp_path, images):
    outputs = network(saved(WithSpatial(), tmp_path))(images)
    assert outputs.spatial.shape == (5, 12)
    assert outputs.spatial.dtype == torch.float32


def test_class_logits_without_logits_are_refused(tmp_path, images):
    config = saved(FeaturesOnly(), tmp_path, class_logits=True)
    with pytest.raises(ConfigError, match="gives no logits"):
        network(config, classifier=False)(images)


def test_a_file_of_another_hash_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    config = saved(WithLogits(), tmp_path)
    found = config.sha256
    monkeypatch.setattr("torch.jit.load", lambda *args, **kwargs: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=f"has sha256 {found}, not {'0' * 64}"):
        network(dataclasses.replace(config, sha256="0" * 64))


def test_what_is_no_torchscript_is_refused(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1)}, path)
    config = FeaturesConfig(network=str(path), sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ConfigError, match="is no TorchScript file"):
        network(config)


def test_inputs_have_the_range_and_size_that_the_recipe_names(images):
    pixels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    pinned = {"network": "n.pt", "sha256": "0" * 64}
    assert torch.equal(network_input(images, FeaturesConfig(**pinned)), pixels)
    unit = network_input(images, FeaturesConfig(**pinned, input_range="unit"))
    assert torch.equal(unit, pixels.float() / 255)
    symmetric = network_input(images, FeaturesConfig(**pinned, input_range="symmetric"))
    torch.testing.assert_close(symmetric, unit * 2 - 1)
    normal = network_input(images, FeaturesConfig(**pinned, input_range="imagenet"))
    torch.testing.assert_close(normal[:, 1], (unit[:, 1] - 0.456) / 0.224)
    larger = network_input(images, FeaturesConfig(**pinned, input_size=16))
    assert larger.shape == (5, 3, 16, 16)
    assert larger.dtype == torch.uint8
    flat = network_input(torch.zeros(1, 3, 8, 8), FeaturesConfig(**pinned, input_size=12))
    assert (flat == 128).all()


def test_only_the_published_hash_is_called_fid(tmp_path, images, monkeypatch):
    config = saved(Published(), tmp_path)
    assert distance_name(Recipe(features=config)) == "distance"
    assert described_network(Recipe(features=config)).endswith("is not FID")
    assert described_network(Recipe()).endswith("is not FID")
    monkeypatch.setitem(evaluate_config.PUBLISHED_INCEPTION, config.sha256, "the published network")
    assert distance_name(Recipe(features=config)) == "FID"
    assert described_network(Recipe(features=config)).endswith(": it is FID")
    outputs = network(config)(images)
    pixels = (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    assert torch.equal(outputs.features, pixels.float().mean(dim=(2, 3)))
    # Probabilities without the bias of the last layer, as logarithms.
    torch.testing.assert_close(outputs.score_logits.exp(), torch.softmax(outputs.features / 100, dim=1))
    with pytest.raises(ConfigError, match="resizes them itself"):
        dataclasses.replace(config, input_size=299)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"network": "a.pt"}, "belong together"),
        ({"sha256": "0" * 64}, "belong together"),
        ({"network": "a.pt", "sha256": "abc"}, "is no sha256"),
        ({"network": "a.pt", "sha256": "0" * 64, "input_size": -1}, "must not be negative"),
        ({"class_logits": True}, "are of features.network"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        FeaturesConfig(**settings)


def test_real_statistics_need_a_network():
    with pytest.raises(ConfigError, match=r"name it in features\.network"):
        Recipe(evaluate=evaluate_config.EvaluateConfig(real_statistics="reference.npz"))
