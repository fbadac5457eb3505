"""Reads images and labels in memory, writes nothing: trains the classifier behind the metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from cca_core.config import ConfigError, FeaturesConfig
from cca_core.metrics.features import Classifier, ClassifierSpec
from cca_core.train.augment import shifted
from cca_core.train.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate


def train_classifier(
    images_NCHW: Tensor,
    labels_N: Tensor,
    held_out_N: Tensor,
    config: FeaturesConfig,
    *,
    num_classes: int,
    seed: int,
    device: str = "cpu",
    on_epoch: Callable[[dict[str, float]], None],
) -> tuple[Classifier, dict[str, float]]:
    """Train on the rows outside ``held_out_N`` and measure on the others.

    The same seed and number of CPU threads give the same weights bit by bit; the global generators
    stay as they are.

    Args:
        images_NCHW: uint8 [N, 3, S, S]; they stay where they are, and batches go to ``device``.
        labels_N: class ids, integers [N].
        held_out_N: bool [N].
        on_epoch: called after each epoch with epoch (from 1), loss (mean, nats), lr and
            held_out_accuracy.

    Returns:
        The classifier in eval mode on ``device``, and held_out_accuracy, seconds and parameters.
    """
    if held_out_N.all() or not held_out_N.any():
        raise ConfigError("the classifier needs training and held-out images: change source.held_out_fraction")
    started = time.perf_counter()
    labels_N = labels_N.to(torch.int64)
    held_out_rows_H, train_rows_M = (mask.nonzero()[:, 0] for mask in (held_out_N, ~held_out_N))

    def batch(rows_B: Tensor) -> tuple[Tensor, Tensor]:
        return images_NCHW[rows_B].to(device).float() / 127.5 - 1, labels_N[rows_B].to(device)

    spec = ClassifierSpec(
        width=config.width,
        feature_dim=config.feature_dim,
        num_classes=num_classes,
        image_size=images_NCHW.shape[-1],
    )
    model = _seeded_classifier(spec, seed).to(device)
    optimizer = build_optimizer(model, config.optim)
    generator = torch.Generator().manual_seed(seed)
    total_steps = config.epochs * math.ceil(len(train_rows_M) / config.batch_size)
    step, accuracy = 0, 0.0
    for epoch in range(1, config.epochs + 1):
        model.train()
        loss_sum = torch.zeros((), device=device)
        order_M = train_rows_M[torch.randperm(len(train_rows_M), generator=generator)]
        for rows_B in order_M.split(config.batch_size):
            lr = learning_rate(config.optim, step, total_steps)
            set_learning_rate(optimizer, lr)
            images_BCHW, labels_B = batch(rows_B)
            _, logits_BK = model(shifted(images_BCHW, config.max_shift, generator))
            loss = F.cross_entropy(logits_BK, labels_B)
            optimizer.zero_grad()
            loss.backward()
            clip_gradients(model, config.optim)
            optimizer.step()
            loss_sum += loss.detach() * len(rows_B)
            step += 1
        accuracy = _accuracy(model, map(batch, held_out_rows_H.split(config.batch_size)))
        loss_mean = loss_sum.item() / len(train_rows_M)
        on_epoch({"epoch": epoch, "loss": loss_mean, "lr": lr, "held_out_accuracy": accuracy})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - started
    return model.eval(), {
        "held_out_accuracy": accuracy,
        "seconds": seconds,
        "parameters": parameters,
    }


def _seeded_classifier(spec: ClassifierSpec, seed: int) -> Classifier:
    # The CPU generator alone: torch.manual_seed would also reseed every accelerator.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Classifier(spec)


@torch.no_grad()
def _accuracy(model: Classifier, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    right, count = 0, 0
    for images_BCHW, labels_B in batches:
        right += int((model(images_BCHW)[1].argmax(dim=1) == labels_B).sum())
        count += len(labels_B)
    return right / count
