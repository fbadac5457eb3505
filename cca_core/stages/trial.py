"""Reads tokens/, the base, its reference and the features; writes one evaluation of one trial of a sweep, with a
picture."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cca_core.config import ConfigError, Recipe
from cca_core.dataset import TokenDataset
from cca_core.manifest import stage_digest
from cca_core.models import ARImageModel, load_model
from cca_core.stages.grid import Settings, with_settings
from cca_core.stages.judge import Judge
from cca_core.store import StageDirectory
from cca_core.train.distributed import pick_device, world
from cca_core.train.errors import NonFiniteError
from cca_core.train.fit import Hooks
from cca_core.train.jobs import alignment_batches, fit_aligned
from cca_core.train.train_state import TrainStates


def trial_file(key: str, evaluation: int, extension: str = "json") -> str:
    """The result of a trial's n-th evaluation, or its picture; below the sweep's directory."""
    return f"trials/{key}-e{evaluation}.{extension}"


def trial_states(sweep: StageDirectory, key: str) -> TrainStates:
    """What a trial goes on from after an evaluation, for as long as the sweep lasts."""
    digest = stage_digest("trial", 1, {"key": key}, {"sweep": sweep.digest})
    return TrainStates(sweep.store.directory("sweep", digest))


def run_trial(
    *,
    settings: Settings,
    evaluation: int,
    directory: StageDirectory,
    recipe: Recipe,
    tokens: StageDirectory,
    base: StageDirectory,
    reference: StageDirectory | None,
    features: StageDirectory,
    classes: Sequence[int],
    cfg_scale: float,
) -> dict[str, Any]:
    """Train one trial on from its last evaluation up to this one, measure it, and write what was found.

    Args:
        evaluation: counts from 1; the last of ``sweep.evaluations`` is at the end of training.
        classes: those that have images.
        cfg_scale: of the guided evaluation: the base's best.

    Returns:
        What the file holds: the record of that evaluation. Where these settings do not work (a gradient that is not
        finite, a ConfigError), ``error`` says why and ``metrics`` is empty.

    Raises ConfigError for a sweep whose trials have fewer steps than evaluations.
    """
    started = time.perf_counter()
    result: dict[str, Any] = {"evaluation": evaluation, "step": 0, "metrics": {}, "curve": [], "error": ""}
    device = pick_device(recipe.execution.device)
    seeds, count, real = recipe.sweep.seeds, recipe.sweep.num_samples, recipe.evaluate.real_set
    judge = Judge(recipe, base, features, classes, seeds, count, device, real=real, cfg_scale=cfg_scale)
    epochs, evaluations = recipe.sweep.epochs or recipe.align.epochs, recipe.sweep.evaluations
    with world(device) as group:
        model = load_model(base.uri)
        dataset = TokenDataset(tokens, fraction=recipe.sweep.fraction)
        chosen = with_settings(recipe, settings)
        batches = alignment_batches(chosen, dataset, base, reference, model.spec.null_label, group)
        steps = epochs * batches.steps_per_epoch
        if steps < evaluations:
            raise ConfigError(
                f"a trial has {steps} steps, fewer than sweep.evaluations={evaluations}: lower it, or raise "
                "sweep.fraction or sweep.epochs"
            )
        target = math.ceil(steps * evaluation / evaluations)
        states = trial_states(directory, settings.key)
        if max(states.steps(), default=0) >= target:  # of a result that is no longer there
            states.remove()
        chosen = replace(
            chosen,
            align=replace(chosen.align, epochs=epochs),
            # One process, and a train state where it is measured.
            execution=replace(recipe.execution, sharding="ddp", checkpoint_every_steps=target),
        )

        def on_evaluate(step: int, plain: ARImageModel) -> bool:
            result["step"], result["metrics"], picture = step, *judge(plain)
            directory.write_bytes(trial_file(settings.key, evaluation, "png"), picture)
            result["seconds"] = time.perf_counter() - started
            # Before the train state of this step, from which the next evaluation goes on.
            directory.write_json(trial_file(settings.key, evaluation), result)
            return True

        hooks = Hooks(on_log=result["curve"].append, evaluate_every_steps=target, on_evaluate=on_evaluate)
        try:
            fit_aligned(model, chosen, batches, group, states, hooks)
        except (ConfigError, NonFiniteError) as error:
            result |= {"metrics": {}, "error": str(error), "seconds": time.perf_counter() - started}
            directory.write_json(trial_file(settings.key, evaluation), result)
    return result
