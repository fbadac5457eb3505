"""Reads tokens/, the base and its reference (and sweep/, for the settings; features/, to measure on the way), writes
align/: the aligned bundle and its curve."""

from __future__ import annotations

from dataclasses import asdict

from cca_core.bundle import INFO_NAME, MODEL_NAME, TOKENIZER_NAME
from cca_core.dataset import classes_with_images
from cca_core.manifest import Manifest
from cca_core.stages.base import training_facts
from cca_core.stages.early_stop import EVALUATIONS_NAME, best_step, best_weights, train_aligned_watched
from cca_core.stages.graph import rank_of
from cca_core.stages.grid import with_settings
from cca_core.stages.run import Context
from cca_core.stages.sweep import chosen
from cca_core.train.jobs import CURVE_NAME, train_aligned
from cca_core.train.train_state import TrainStates


def run(stage: str, context: Context) -> Manifest:
    directory, recipe, facts = context.directory(stage), context.recipe, {}
    if recipe.sweep.enabled:
        settings = chosen(context.directory("sweep"), rank_of(stage))
        recipe, facts = with_settings(recipe, settings), {"settings": asdict(settings)}
    arguments = {
        "directory": directory,
        "recipe": recipe,
        "tokens": context.directory("tokens"),
        "base": context.directory("base"),
        "reference": context.directory("reference") if recipe.reference.mode == "cached" else None,
    }
    names = [INFO_NAME, MODEL_NAME, TOKENIZER_NAME, CURVE_NAME]
    if recipe.align.evaluations:
        classes = classes_with_images(context.directory("tokens"))
        arguments |= {"features": context.directory("features"), "classes": classes}
        context.executor.train(train_aligned_watched, arguments)
        names.append(EVALUATIONS_NAME)
        facts["best_step"] = best_step(directory.read_json(EVALUATIONS_NAME))
    else:
        context.executor.train(train_aligned, arguments)
    manifest = context.commit(stage, context.entries(stage, names), facts=training_facts(directory) | facts)
    TrainStates(directory).remove()
    best_weights(directory).remove()
    return manifest
