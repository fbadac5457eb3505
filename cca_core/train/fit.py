"""Reads batches, writes train states: the one training loop, for the base model (likelihood) and for alignment."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cca_core.config import ExecutionConfig, OptimConfig
from cca_core.models import ARImageModel
from cca_core.models.conditions import ClassConditions, Conditions, scorer
from cca_core.objectives.base import LossOutput, Objective
from cca_core.train.adaptive import OFFSET_IMAGES, Control
from cca_core.train.batches import BatchSource, ahead, to_device
from cca_core.train.distributed import Parallel, World, autocast, sum_over_ranks
from cca_core.train.errors import NonFiniteError
from cca_core.train.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from cca_core.train.train_state import TrainStates

#: Metrics that are means over rows with a true negative, and over null rows; the rest are means over all rows.
_CONTRAST = ("log_ratio_pos", "log_ratio_neg", "margin", "accuracy")
#: More steps in a row than this are not skipped: the weights themselves are spoilt.
MOST_SKIPPED = 10


@dataclass(frozen=True)
class FitResult:
    steps: int
    #: The step this call started from: 0, or that of the train state it resumed.
    resumed_from: int
    #: What ``on_log`` was given, in order, earlier attempts included.
    curve: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop calls on every rank; each of them the same number of times.

    Attributes:
        on_log: gets means over the global batch (step counts finished steps).
        on_evaluate: gets the finished steps and the model, in eval mode; True ends training.
        preempted: asked where a record is logged; the first time it says so, a train state is saved, since a machine
            will soon be taken away.
    """

    on_log: Callable[[dict[str, float]], None] = lambda _: None
    evaluate_every_steps: int = 0
    on_evaluate: Callable[[int, ARImageModel], bool] = lambda step, model: False
    preempted: Callable[[], bool] = lambda: False


def fit(
    model: ARImageModel,
    objective: Objective,
    batches: BatchSource,
    optim: OptimConfig,
    *,
    epochs: int,
    dropout: float,
    world: World,
    execution: ExecutionConfig,
    precision: str = "float32",
    non_finite: str = "stop",
    states: TrainStates | None = None,
    hooks: Hooks | None = None,
    conditions: Conditions | None = None,
    controls: Sequence[Control] = (),
) -> FitResult:
    """Train ``model`` in place for ``epochs`` epochs of ``batches``.

    The gradient is that of the mean loss over the global batch: sums over micro-batches and ranks, divided by the
    global row count. ``conditions`` is what the batches' condition indices point into: classes, unless given. With
    ``precision`` bfloat16 the networks compute in it (autocast); weights, their updates and log-probs stay float32.
    ``controls`` are weights of the objective and of the batches that follow the training; they are part of a train
    state.

    Raises:
        NonFiniteError: at the first step whose gradient norm is not finite, or after ``MOST_SKIPPED`` in a row where
            ``non_finite`` is ``skip``.
    """
    with torch.random.fork_rng():
        model.set_dropout(dropout)
        parallel = Parallel(model, world, execution)
        try:
            found = conditions or ClassConditions()
            loop = _Loop(parallel, objective, batches, optim, world, precision, non_finite, found, controls)
            return loop.run(epochs * batches.steps_per_epoch, execution, states, hooks or Hooks())
        finally:
            if states:
                states.wait()
            parallel.close()
            model.set_dropout(0.0)
            model.eval()


class _Loop:
    def __init__(
        self,
        parallel: Parallel,
        objective: Objective,
        batches: BatchSource,
        optim: OptimConfig,
        world: World,
        precision: str,
        non_finite: str,
        conditions: Conditions,
        controls: Sequence[Control],
    ) -> None:
        self.parallel, self.objective, self.batches, self.optim = parallel, objective, batches, optim
        self.world, self.precision, self.non_finite = world, precision, non_finite
        self.score, self.controls = scorer(parallel, conditions), controls
        self.optimizer = build_optimizer(parallel.model, optim)
        self.skipped, self.skipped_in_a_row = 0, 0

    def run(self, total: int, execution: ExecutionConfig, states: TrainStates | None, hooks: Hooks) -> FitResult:
        batches, model = self.batches, self.parallel.model
        self.parallel.wrapped.train()
        start, curve, values = states.restore(model, self.optimizer) if states else (0, [], {})
        self.skipped = int(curve[-1].get("skipped_steps", 0)) if curve else 0
        self.prepare_controls(values)
        if start and hooks.evaluate_every_steps and start % hooks.evaluate_every_steps == 0:
            with self.parallel.plain() as plain:  # it may have said that training ends, unheard
                if hooks.on_evaluate(start, plain):
                    return FitResult(steps=start, resumed_from=start, curve=curve)
        since, rows_since, warned, done = time.perf_counter(), 0, False, start
        for step in range(start, total):
            notice = False
            lr = learning_rate(self.optim, step, total)
            set_learning_rate(self.optimizer, lr)
            used = self.apply_controls()
            sums, norm = self.step(step)
            means = _means(sum_over_ranks(sums)) if self.controls else {}
            for control in self.controls:
                control.update(means.get(control.metric, math.nan), batches.dataset.num_tokens)
            rows_since += len(batches.images(step))
            done = step + 1
            if done % execution.log_every_steps == 0 or done == total:
                now = time.perf_counter()
                record = {"step": float(done), "epoch": done / batches.steps_per_epoch, "lr": lr, "grad_norm": norm}
                record |= (means or _means(sum_over_ranks(sums))) | used
                record["images_per_s"] = rows_since / (now - since)
                if self.skipped:
                    record["skipped_steps"] = float(self.skipped)
                since, rows_since = now, 0
                curve.append(record)
                hooks.on_log(record)
                notice = not warned and hooks.preempted()
                warned = warned or notice
            last = done == total
            if hooks.evaluate_every_steps and (done % hooks.evaluate_every_steps == 0 or last):
                with self.parallel.plain() as plain:
                    last = hooks.on_evaluate(done, plain) or last
            every = execution.checkpoint_every_steps
            if states and (notice or (every and (done % every == 0 or last))):
                states.save(model, self.optimizer, done, curve, {c.weight: c.state() for c in self.controls})
            if last:
                break
        return FitResult(steps=done, resumed_from=start, curve=curve)

    @torch.no_grad()
    def prepare_controls(self, values: dict[str, list[float]]) -> None:
        """Give controlled weights what the train state has of them; before the first step, their offset."""
        if values or not self.controls:
            for control in self.controls:
                control.restore(values[control.weight])
            return
        self.apply_controls()
        count = min(self.batches.steps_per_epoch, max(1, OFFSET_IMAGES // self.batches.global_batch_size))
        totals: dict[str, float] = {}
        for step in range(count):
            for name, value in sum_over_ranks(self.accumulate(step, backward=False)).items():
                totals[name] = totals.get(name, 0.0) + value
        means = _means(totals)
        for control in self.controls:
            control.offset = means[control.metric] / self.batches.dataset.num_tokens

    def apply_controls(self) -> dict[str, float]:
        """Take over the present values of controlled weights; what they are."""
        values = {control.weight: control.value for control in self.controls}
        if "lambda_" in values:
            self.objective = replace(self.objective, lambda_=values["lambda_"])
        if "null_share" in values:
            self.batches.null_share = values["null_share"]
        return values

    def step(self, step: int) -> tuple[dict[str, Tensor], float]:
        """One step of the optimiser: this rank's sums of loss, rows and metrics, and the norm of the gradient."""
        sums = self.accumulate(step)
        try:
            # Gradients are the same on all ranks by now, so all of them stop, or none.
            norm = clip_gradients(self.parallel.model, self.optim)
        except NonFiniteError as error:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
            if self.non_finite == "stop" or self.skipped_in_a_row > MOST_SKIPPED:
                raise NonFiniteError(
                    f"the gradient is not finite at step {step + 1}: lower optim.lr, or look at the data of that step"
                ) from error
            norm = torch.tensor(torch.nan)
        else:
            self.optimizer.step()
            self.skipped_in_a_row = 0
        # Zeros, not None: gradients stay in DDP's buckets. Otherwise all but the last micro-batch would make a second
        # copy of them.
        self.optimizer.zero_grad(set_to_none=False)
        return sums, float(norm)

    def accumulate(self, step: int, *, backward: bool = True) -> dict[str, Tensor]:
        """Forward and backward of all micro-batches of this rank; sums of loss, rows and metrics."""
        global_rows = len(self.batches.images(step))
        count = self.batches.num_micro_batches(step, self.world.size)
        mine = self.batches.micro_batches(step, rank=self.world.rank, world_size=self.world.size)
        sums: dict[str, Tensor] = {}
        on_gpu = self.world.device.type == "cuda"  # on a CPU there is nothing that would run meanwhile
        for index, (number, batch) in enumerate(ahead(mine) if on_gpu else mine):
            # Dropout masks belong to the micro-batch, not to the rank that happens to run it.
            torch.manual_seed(((self.batches.seed * 1_000_003 + step) * 65_537 + number) % (1 << 63))
            with self.parallel.synchronising(index == count - 1):
                with autocast(self.world.device, self.precision):
                    output: LossOutput = self.objective.step(self.score, to_device(batch, self.world.device))
                if backward:
                    # DDP averages over ranks; the loss is a sum over rows divided by the global count.
                    (output.loss_sum * (self.world.size / global_rows)).backward()
            for name, value in {"loss": output.loss_sum, "rows": output.rows, **output.metrics}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
        return sums


def _means(sums: dict[str, float]) -> dict[str, float]:
    rows = sums["rows"]
    means = {"rows": rows, "loss": sums["loss"] / rows}  # what the step computed, not what it was meant to
    if "contrast_rows" in sums:
        means |= {name: sums[name] / max(sums["contrast_rows"], 1.0) for name in _CONTRAST}
        means["log_ratio_null"] = sums["log_ratio_null"] / max(sums["null_rows"], 1.0)
        means["contrast_share"] = sums["contrast_rows"] / rows
    return means
