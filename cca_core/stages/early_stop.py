"""Reads tokens/, the base, its reference and the features; writes an aligned bundle that was measured on the way, and
evaluations.json: alignment turns bad after too many steps, so it ends there, with the best weights it had."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from safetensors.torch import load
from torch import Tensor

from cca_core.bundle import encode_tensors
from cca_core.config import Recipe
from cca_core.dataset import TokenDataset
from cca_core.models import ARImageModel, load_model
from cca_core.stages.judge import Judge
from cca_core.store import StageDirectory
from cca_core.train.distributed import World, full_state_dict
from cca_core.train.fit import Hooks
from cca_core.train.jobs import train_aligned

EVALUATIONS_NAME = "evaluations.json"
#: What the best weights are chosen by: lower is better.
METRIC = "distance"
#: Evaluations in a row without a new best that end the training.
PATIENCE = 2
#: Sampling seed of the small evaluations: none of those of the final one, which the choice must not have seen.
SEED = 1_000_003


class EarlyStop:
    """The hook of the training loop. All ranks call it; rank 0 samples from a whole copy of the model.

    The best weights wait beside the train states until training ends. What an attempt found after the state from which
    the next one goes on is found again, from the same weights.
    """

    def __init__(
        self, judge: Judge | None, directory: StageDirectory, base: StageDirectory, world: World, hooks: Hooks
    ):
        self.judge, self.directory, self.base, self.world, self.hooks = judge, directory, base, world, hooks

    def __call__(self, step: int, model: ARImageModel) -> bool:
        weights = full_state_dict(model)
        end = [False]
        if self.judge is not None:
            end = [self._measure(step, weights)]
        dist.broadcast_object_list(end, src=0)
        return end[0]

    def _measure(self, step: int, weights: dict[str, Tensor]) -> bool:
        model = load_model(self.base.uri, device=str(self.world.device))
        model.load_state_dict(weights)
        metrics, _ = self.judge(model)
        records = [record for record in self.records() if record["step"] < step]
        records.append({"step": step, **metrics})
        best = min(records, key=lambda record: record[METRIC])
        if best["step"] == step:
            best_weights(self.directory).write_bytes(best_name(step), encode_tensors(weights))
        self.directory.write_json(EVALUATIONS_NAME, records)
        self.hooks.on_log(small_metrics(records[-1]))
        return sum(record["step"] > best["step"] for record in records) >= PATIENCE

    def records(self) -> list[dict[str, Any]]:
        """All evaluations so far, in order of their steps."""
        return self.directory.read_json(EVALUATIONS_NAME) if self.directory.exists(EVALUATIONS_NAME) else []

    def best(self) -> dict[str, Tensor]:
        """The weights of the best evaluation; rank 0 only."""
        step = best_step(self.records())
        return load(best_weights(self.directory).read_bytes(best_name(step)))


def small_metrics(record: dict[str, Any]) -> dict[str, float]:
    """A record of evaluations.json under names that no other evaluation has."""
    return {name if name == "step" else f"small_{name}": float(value) for name, value in record.items()}


def best_step(records: Sequence[dict[str, Any]]) -> int:
    return int(min(records, key=lambda record: record[METRIC])["step"])


def best_name(step: int) -> str:
    return f"step-{step:08d}.safetensors"


def best_weights(directory: StageDirectory) -> StageDirectory:
    """Where the weights wait until the stage has ended."""
    return directory.sibling("best_weights")


def train_aligned_watched(
    *,
    world: World,
    hooks: Hooks,
    directory: StageDirectory,
    recipe: Recipe,
    tokens: StageDirectory,
    base: StageDirectory,
    reference: StageDirectory | None,
    features: StageDirectory,
    classes: Sequence[int],
) -> None:
    """Align the base as ``train_aligned`` does, measured ``align.evaluations`` times, or after every step where
    there are fewer; write the best weights."""
    steps = recipe.align.epochs * -(-len(TokenDataset(tokens).train_images) // recipe.align.global_batch_size)
    judge = None
    if world.rank == 0:
        count = recipe.align.evaluation_samples
        # Against images that training never saw: those it did would praise a model that learns them by heart.
        judge = Judge(recipe, base, features, classes, [SEED], count, world.device, real="held_out")
    stop = EarlyStop(judge, directory, base, world, hooks)
    hooks = replace(hooks, evaluate_every_steps=math.ceil(steps / recipe.align.evaluations), on_evaluate=stop)
    train_aligned(
        world=world,
        hooks=hooks,
        directory=directory,
        recipe=recipe,
        tokens=tokens,
        base=base,
        reference=reference,
        chosen_weights=stop.best,
    )
