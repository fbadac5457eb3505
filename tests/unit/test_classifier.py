"""Writes to a temporary folder: the embedded classifier learns, repeats itself, can be saved."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from cca_core.config import ConfigError, FeaturesConfig, OptimConfig
from cca_core.metrics.features import (
    Classifier,
    ClassifierSpec,
    classifier_files,
    load_classifier,
)
from cca_core.store import Store
from cca_core.train.augment import shifted
from cca_core.train.classifier import train_classifier
from cca_core.train.optim import build_optimizer, set_learning_rate


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Exact values depend on the number of threads, and a busy machine slows several threads most."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    data = load_digits()
    images = (torch.tensor(data.images) * 255 / 16).round().to(torch.uint8)[:, None].repeat(1, 3, 1, 1)
    held_out = torch.rand(len(images), generator=torch.Generator().manual_seed(0)) < 0.2
    return images, torch.tensor(data.target), held_out


def as_float(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def train(digits, *, epochs: int, seed: int = 0, rows: int = 1797):
    images, labels, held_out = (x[:rows] for x in digits)
    epochs_seen: list[dict] = []
    config = dataclasses.replace(FeaturesConfig(), epochs=epochs)
    model, facts = train_classifier(
        images, labels, held_out, config, num_classes=10, seed=seed, on_epoch=epochs_seen.append
    )
    return model, facts, epochs_seen


def test_learns_the_digits(digits):
    started = time.process_time()
    model, facts, epochs_seen = train(digits, epochs=12)
    # Processor time: the wall clock is at the mercy of whatever else runs.
    assert time.process_time() - started <= 15
    assert facts["held_out_accuracy"] >= 0.97
    assert facts["seconds"] > 0
    assert 120_000 <= facts["parameters"] <= 145_000
    assert not model.training
    assert [x["epoch"] for x in epochs_seen] == list(range(1, 13))
    assert epochs_seen[-1]["held_out_accuracy"] == facts["held_out_accuracy"]
    assert epochs_seen[-1]["loss"] < 0.1 < epochs_seen[0]["loss"]

    images, labels, held_out = digits
    with torch.no_grad():
        features, logits = model(as_float(images[held_out]))
    assert features.shape == (int(held_out.sum()), 64)
    assert (logits.argmax(1) == labels[held_out]).double().mean() == facts["held_out_accuracy"]


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone(digits):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, _, _ = train(digits, epochs=1, rows=400)
    assert torch.equal(torch.rand(3), expected)
    second, _, _ = train(digits, epochs=1, rows=400)
    other, _, _ = train(digits, epochs=1, rows=400, seed=1)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.dim() < 2 or not torch.equal(a, c)


def test_the_seed_draws_the_first_weights(digits):
    first, second = (train(digits, epochs=0, seed=seed)[0] for seed in (0, 1))
    assert not torch.equal(first.head.weight, second.head.weight)


def test_two_steps_equal_a_plain_loop(digits):
    images, labels, held_out = (x[:60] for x in digits)
    # One batch per epoch without shifts, so that only the order of a sum differs; a large eps keeps Adam from
    # blowing that rounding up.
    optim = OptimConfig(lr=1e-2, eps=1e-2, warmup_steps=2, clip_norm=0.5, weight_decay=0.1)
    config = FeaturesConfig(max_shift=0, batch_size=60, optim=optim, epochs=2)
    start, _, _ = train(digits, epochs=0)
    model, _ = train_classifier(images, labels, held_out, config, num_classes=10, seed=0, on_epoch=lambda _: None)
    plain = build_optimizer(start, optim)
    for lr in (0.5e-2, 1e-2):
        plain.zero_grad()
        F.cross_entropy(start(as_float(images[~held_out]))[1], labels[~held_out]).backward()
        torch.nn.utils.clip_grad_norm_(start.parameters(), 0.5)
        set_learning_rate(plain, lr)
        plain.step()
    for expected, trained in zip(start.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=0, atol=1e-6)


def test_held_out_images_are_not_trained_on(digits):
    images, labels, held_out = digits
    spoiled = torch.where(held_out[:, None, None, None], torch.zeros((), dtype=torch.uint8), images)
    first, _, _ = train(digits, epochs=1, rows=400)
    second, _, _ = train((spoiled, labels, held_out), epochs=1, rows=400)
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.parametrize("fill", [True, False])
def test_a_split_with_one_side_empty_is_refused(digits, fill):
    images, labels, held_out = digits
    with pytest.raises(ConfigError, match="held_out_fraction"):
        train((images, labels, torch.full_like(held_out, fill)), epochs=1)


def test_shifts_stay_within_the_limit_and_repeat_the_edge():
    image_HW = torch.arange(16.0).view(4, 4)
    images = image_HW.expand(300, 3, 4, 4)
    moved = shifted(images, 1, torch.Generator().manual_seed(0))
    rows, columns = torch.arange(4), torch.arange(4)
    allowed = {
        tuple(image_HW[(rows + dy).clamp(0, 3)][:, (columns + dx).clamp(0, 3)].flatten().tolist())
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert {tuple(x[2].flatten().tolist()) for x in moved} == allowed
    assert torch.equal(shifted(images, 0, torch.Generator()), images)


def saved(model, tmp_path):
    directory = Store(str(tmp_path)).directory("features", "0" * 64)
    for name, data in classifier_files(model).items():
        directory.write_bytes(name, data)
    return directory


@pytest.mark.parametrize(("image_size", "width"), [(8, 32), (32, 12)])
def test_save_and_load_give_identical_outputs(tmp_path, image_size, width):
    spec = ClassifierSpec(width=width, feature_dim=24, num_classes=7, image_size=image_size)
    model = Classifier(spec).eval()
    directory = saved(model, tmp_path)
    loaded = load_classifier(directory)
    assert loaded.spec == spec
    assert not loaded.training
    images = torch.rand(5, 3, image_size, image_size) * 2 - 1
    features, logits = loaded(images)
    assert (features.shape, logits.shape) == ((5, 24), (5, 7))
    assert features.dtype == logits.dtype == torch.float32
    assert torch.equal(features, model(images)[0])
    assert torch.equal(logits, model(images)[1])


def test_another_format_version_is_refused(tmp_path):
    spec = ClassifierSpec(width=8, feature_dim=4, num_classes=2, image_size=8)
    directory = saved(Classifier(spec), tmp_path)
    directory.write_json("classifier.json", directory.read_json("classifier.json") | {"format_version": 99})
    with pytest.raises(ConfigError, match="format 99"):
        load_classifier(directory)


def test_images_of_another_size_are_refused():
    model = Classifier(ClassifierSpec(width=8, feature_dim=4, num_classes=2, image_size=8))
    with pytest.raises(ValueError, match="takes images"):
        model(torch.zeros(1, 3, 16, 16))
