"""Reads tokens/ (and the reference), writes bundles: the two distributed training jobs, run by every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from cca_core import pairs
from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.config import Recipe
from cca_core.dataset import ReferenceColumns, TokenDataset, class_names
from cca_core.models import ARImageModel, ImageTokenizer, family, load_model, load_tokenizer
from cca_core.objectives import Likelihood, alignment_objective
from cca_core.store import StageDirectory
from cca_core.train.adaptive import controls
from cca_core.train.batches import BatchSource, CachedReference, OnlineReference, Reference
from cca_core.train.checks import check_reference
from cca_core.train.distributed import World, full_state_dict
from cca_core.train.fit import FitResult, Hooks, fit
from cca_core.train.train_state import TrainStates

CURVE_NAME = "curve.json"


def train_base(
    *,
    world: World,
    hooks: Hooks,
    directory: StageDirectory,
    recipe: Recipe,
    tokens: StageDirectory,
    tokenizer_uri: str,
) -> None:
    """Train the base by maximum likelihood and write its bundle (rank 0)."""
    dataset = TokenDataset(tokens)
    tokenizer = load_tokenizer(tokenizer_uri)
    chosen = family(tokenizer.family)
    model = chosen.build_model(
        chosen.small_model_spec(
            recipe.base, tokenizer.spec, num_tokens=dataset.num_tokens, num_classes=dataset.num_classes
        )
    )
    model.attach_tokenizer(tokenizer)
    model.init_weights(torch.Generator().manual_seed(recipe.seed))
    batches = BatchSource(
        dataset,
        seed=recipe.seed,
        global_batch_size=recipe.base.global_batch_size,
        micro_batch_size=recipe.execution.micro_batch_size,
        null_label=model.spec.null_label,
        null_share=recipe.base.label_dropout,
        null_purpose=pairs.Purpose.LABEL_DROPOUT,
    )
    result = fit(
        model,
        Likelihood(),
        batches,
        recipe.base.optim,
        epochs=recipe.base.epochs,
        dropout=recipe.base.dropout,
        world=world,
        execution=recipe.execution,
        precision=recipe.precision,
        states=TrainStates(directory),
        hooks=hooks,
    )
    weights = full_state_dict(model)
    if world.rank == 0:
        info = bundle_info(model, tokenizer, recipe, class_names(tokens), {"base": directory.digest})
        write_bundle(directory, info, weights, tokenizer, result)


def train_aligned(
    *,
    world: World,
    hooks: Hooks,
    directory: StageDirectory,
    recipe: Recipe,
    tokens: StageDirectory,
    base: StageDirectory,
    reference: StageDirectory | None,
    chosen_weights: Callable[[], dict[str, Tensor]] | None = None,
) -> None:
    """Align the base guidance-free and write the aligned bundle (rank 0). Without a reference directory the frozen
    model runs in the loop. ``chosen_weights`` (called on rank 0) gives weights in the place of the last ones."""
    model = load_model(base.uri)
    batches = alignment_batches(recipe, TokenDataset(tokens), base, reference, model.spec.null_label, world)
    result = fit_aligned(model, recipe, batches, world, TrainStates(directory), hooks)
    weights = full_state_dict(model)
    if world.rank == 0:
        digests = {"base": base.digest, "align": directory.digest, "tokens": tokens.digest}
        tokenizer = load_tokenizer(base.uri)
        info = bundle_info(model, tokenizer, recipe, class_names(tokens), digests)
        write_bundle(directory, info, chosen_weights() if chosen_weights else weights, tokenizer, result)


def fit_aligned(
    model: ARImageModel, recipe: Recipe, batches: BatchSource, world: World, states: TrainStates, hooks: Hooks
) -> FitResult:
    """Align ``model``, which is the base, in place as the recipe says: at full scale, or a trial of a sweep."""
    check_reference(model, batches, world, recipe.precision)
    return fit(
        model,
        alignment_objective(recipe.align),
        batches,
        recipe.align.optim,
        epochs=recipe.align.epochs,
        dropout=recipe.align.dropout,
        world=world,
        execution=recipe.execution,
        precision=recipe.precision,
        non_finite=recipe.align.non_finite,
        controls=controls(recipe),
        states=states,
        hooks=hooks,
    )


def alignment_batches(
    recipe: Recipe,
    dataset: TokenDataset,
    base: StageDirectory,
    reference: StageDirectory | None,
    null_label: int,
    world: World,
) -> BatchSource:
    """The batches of an alignment with their reference log-probs: cached, or of the frozen base in the loop."""
    source: Reference
    if reference is not None:
        source = CachedReference(ReferenceColumns(reference))
    else:
        source = OnlineReference(load_model(base.uri, device=str(world.device)), precision=recipe.precision)
    return BatchSource(
        dataset,
        seed=recipe.seed,
        global_batch_size=recipe.align.global_batch_size,
        micro_batch_size=recipe.execution.micro_batch_size,
        null_label=null_label,
        # Where it is adaptive, the loop sets it.
        null_share=0.0 if recipe.align.null_share == "auto" else recipe.align.null_share,
        null_purpose=pairs.Purpose.NULL,
        reference=source,
    )


def bundle_info(
    model: ARImageModel | None,
    tokenizer: ImageTokenizer,
    recipe: Recipe,
    names: tuple[str, ...],
    digests: dict[str, str],
) -> BundleInfo:
    """bundle.json of what a stage trained or imported; served guidance-free unless registration says otherwise."""
    return BundleInfo(
        model=Part(model.family, asdict(model.spec)) if model is not None else None,
        tokenizer=Part(tokenizer.family, asdict(tokenizer.spec)),
        image_size=recipe.tokens.image_size,
        class_names=names,
        sampling={"temperature": 1.0, "top_k": 0, "top_p": 1.0, "cfg_scale": 1.0},
        digests=digests,
        precision=recipe.precision,
    )


def write_bundle(
    directory: StageDirectory,
    info: BundleInfo,
    weights: dict[str, Tensor] | None,
    tokenizer: ImageTokenizer,
    result: FitResult | None = None,
) -> None:
    """Write a bundle and the training curve into a stage directory; ``weights`` are the model's, None without one."""
    if result is not None:
        directory.write_json(CURVE_NAME, result.curve)
    for name, data in bundle_files(info, weights, tokenizer.state_dict()).items():
        directory.write_bytes(name, data)
