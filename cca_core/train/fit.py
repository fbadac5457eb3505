"""Reads batches, writes train states: the one training loop, for the base model (likelihood) and for alignment."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

from cca_core.config import OptimConfig
from cca_core.models import ARImageModel
from cca_core.models.conditions import ClassConditions, Conditions, scorer
from cca_core.objectives.base import LossOutput, Objective
from cca_core.train.batches import BatchSource, to_device
from cca_core.train.distributed import World, parallelize, sum_over_ranks
from cca_core.train.errors import NonFiniteError
from cca_core.train.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from cca_core.train.train_state import TrainStates

#: Metrics that are means over rows with a true negative, and over null rows; the rest are means over all rows.
_CONTRAST = ("log_ratio_pos", "log_ratio_neg", "margin", "accuracy")


@dataclass(frozen=True)
class FitResult:
    steps: int
    #: The step this call started from: 0, or that of the train state it resumed.
    resumed_from: int
    #: What ``on_log`` was given, in order, earlier attempts included.
    curve: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: ARImageModel,
    objective: Objective,
    batches: BatchSource,
    optim: OptimConfig,
    *,
    epochs: int,
    dropout: float,
    world: World,
    states: TrainStates | None = None,
    checkpoint_every_steps: int = 0,
    log_every_steps: int = 1,
    on_log: Callable[[dict[str, float]], None] | None = None,
    conditions: Conditions | None = None,
) -> FitResult:
    """Train ``model`` in place for ``epochs`` epochs of ``batches``.

    The gradient is that of the mean loss over the global batch: sums over micro-batches and ranks, divided by the
    global row count. ``on_log`` is called on every rank with means over the global batch (step counts finished steps).
    ``conditions`` is what the batches' condition indices point into: classes, unless given.

    Raises:
        NonFiniteError: at the first step whose gradient norm is not finite.
    """
    with torch.random.fork_rng():
        return _fit(
            model,
            objective,
            batches,
            optim,
            epochs,
            dropout,
            world,
            states,
            checkpoint_every_steps,
            log_every_steps,
            on_log or (lambda _: None),
            conditions or ClassConditions(),
        )


def _fit(
    model: ARImageModel,
    objective: Objective,
    batches: BatchSource,
    optim: OptimConfig,
    epochs: int,
    dropout: float,
    world: World,
    states: TrainStates | None,
    checkpoint_every_steps: int,
    log_every_steps: int,
    on_log: Callable[[dict[str, float]], None],
    conditions: Conditions,
) -> FitResult:
    model.set_dropout(dropout)
    wrapped = parallelize(model, world).train()
    optimizer = build_optimizer(model, optim)
    total = epochs * batches.steps_per_epoch
    start, curve = states.restore(model, optimizer) if states else (0, [])
    since, rows_since = time.perf_counter(), 0
    for step in range(start, total):
        lr = learning_rate(optim, step, total)
        set_learning_rate(optimizer, lr)
        sums = _accumulate(wrapped, objective, batches, step, world, conditions)
        try:
            # Gradients are the same on all ranks by now, so all of them stop, or none.
            norm = clip_gradients(model, optim)
        except RuntimeError as error:
            raise NonFiniteError(
                f"the gradient is not finite at step {step + 1}: lower optim.lr, or look at the data of that step"
            ) from error
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows_since += len(batches.images(step))
        done = step + 1
        if done % log_every_steps == 0 or done == total:
            now = time.perf_counter()
            record = {
                "step": float(done),
                "epoch": done / batches.steps_per_epoch,
                "lr": lr,
                "grad_norm": float(norm),
            }
            record |= _means(sum_over_ranks(sums)) | {"images_per_s": rows_since / (now - since)}
            since, rows_since = now, 0
            curve.append(record)
            on_log(record)
        if states and checkpoint_every_steps and (done % checkpoint_every_steps == 0 or done == total):
            states.save(model, optimizer, done, curve)
    model.set_dropout(0.0)
    model.eval()
    return FitResult(steps=total, resumed_from=start, curve=curve)


def _accumulate(
    wrapped: DistributedDataParallel,
    objective: Objective,
    batches: BatchSource,
    step: int,
    world: World,
    conditions: Conditions,
) -> dict[str, torch.Tensor]:
    """Forward and backward of all micro-batches of this rank; sums of loss, rows and metrics."""
    global_rows = len(batches.images(step))
    mine = list(batches.micro_batches(step, rank=world.rank, world_size=world.size))
    sums: dict[str, torch.Tensor] = {}
    for index, (number, batch) in enumerate(mine):
        # Dropout masks belong to the micro-batch, not to the rank that happens to run it.
        torch.manual_seed(((batches.seed * 1_000_003 + step) * 65_537 + number) % (1 << 63))
        with nullcontext() if index == len(mine) - 1 else wrapped.no_sync():
            output: LossOutput = objective.step(scorer(wrapped, conditions), to_device(batch, world.device))
            # DDP averages over ranks; the loss is a sum over rows divided by the global count.
            (output.loss_sum * (world.size / global_rows)).backward()
        values = {"loss": output.loss_sum, "rows": output.rows, **output.metrics}
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    return sums


def _means(sums: dict[str, float]) -> dict[str, float]:
    rows = sums["rows"]
    means = {"loss": sums["loss"] / rows}
    if "contrast_rows" in sums:
        means |= {name: sums[name] / max(sums["contrast_rows"], 1.0) for name in _CONTRAST}
        means["log_ratio_null"] = sums["log_ratio_null"] / max(sums["null_rows"], 1.0)
        means["contrast_share"] = sums["contrast_rows"] / rows
    return means
