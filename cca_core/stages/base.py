"""Reads tokens/ and the tokenizer (or a checkpoint), writes base/: the pretrained model as a bundle, and its curve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cca_core.bundle import INFO_NAME, MODEL_NAME, TOKENIZER_NAME, is_bundle
from cca_core.config import Recipe
from cca_core.dataset import TokenDataset, class_names
from cca_core.manifest import Manifest
from cca_core.models import load_model, load_tokenizer
from cca_core.stages.inputs import check_fit
from cca_core.stages.run import Context
from cca_core.store import StageDirectory
from cca_core.train.jobs import CURVE_NAME, bundle_info, train_base, write_bundle
from cca_core.train.train_state import TrainStates


def run(stage: str, context: Context) -> Manifest:
    directory, recipe = context.directory(stage), context.recipe
    arguments = {
        "directory": directory,
        "recipe": recipe,
        "tokens": context.directory("tokens"),
        "tokenizer_uri": context.directory("tokenizer").uri,
    }
    names = [INFO_NAME, MODEL_NAME, TOKENIZER_NAME]
    facts: dict[str, Any] = {}
    if recipe.base.checkpoint:
        facts = context.executor.call(import_base, arguments)
    else:
        context.executor.train(train_base, arguments)
        names.append(CURVE_NAME)
        facts = training_facts(directory)
    manifest = context.commit(stage, context.entries(stage, names), facts=facts)
    TrainStates(directory).remove()
    return manifest


def training_facts(directory: StageDirectory) -> dict[str, Any]:
    """The last record of the training curve."""
    curve = directory.read_json(CURVE_NAME)
    return {f"final_{name}": value for name, value in curve[-1].items()} if curve else {}


def import_base(
    *,
    on_log: Callable[..., None],
    directory: StageDirectory,
    recipe: Recipe,
    tokens: StageDirectory,
    tokenizer_uri: str,
) -> dict[str, Any]:
    """Read the recipe's checkpoint, check that it fits tokens and classes, and write it as a bundle."""
    del on_log
    uri, dataset = recipe.base.checkpoint, TokenDataset(tokens)
    tokenizer = load_tokenizer(tokenizer_uri)
    spec = {} if is_bundle(uri) else {"num_tokens": dataset.num_tokens}
    model = load_model(uri, tokenizer=tokenizer, weights=recipe.base.weights, **spec)
    check_fit(
        uri,
        model.spec,
        codebook_size=tokenizer.spec.codebook_size,
        num_tokens=dataset.num_tokens,
        num_classes=dataset.num_classes,
    )
    write_bundle(
        directory,
        bundle_info(model, tokenizer, recipe, class_names(tokens), {"base": directory.digest}),
        model.state_dict(),
        tokenizer,
    )
    return {"imported": 1}
