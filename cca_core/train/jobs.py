"""Reads tokens/ (and the reference), writes bundles: the two distributed training jobs, run by every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from cca_core import pairs
from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.config import Recipe
from cca_core.dataset import ReferenceColumns, TokenDataset, class_names
from cca_core.models import ARImageModel, ImageTokenizer, family, load_model, load_tokenizer
from cca_core.objectives import Likelihood, alignment_objective
from cca_core.store import StageDirectory
from cca_core.train.batches import BatchSource, CachedReference, OnlineReference, Reference
from cca_core.train.distributed import World
from cca_core.train.fit import FitResult, fit
from cca_core.train.train_state import TrainStates

OnLog = Callable[[dict[str, float]], None]
CURVE_NAME = "curve.json"


def train_base(
    *,
    world: World,
    on_log: OnLog,
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
        states=TrainStates(directory),
        checkpoint_every_steps=recipe.execution.checkpoint_every_steps,
        log_every_steps=recipe.execution.log_every_steps,
        on_log=on_log,
    )
    if world.rank == 0:
        info = bundle_info(model, tokenizer, recipe, class_names(tokens), {"base": directory.digest})
        write_bundle(directory, info, model, tokenizer, result)


def train_aligned(
    *,
    world: World,
    on_log: OnLog,
    directory: StageDirectory,
    recipe: Recipe,
    tokens: StageDirectory,
    base: StageDirectory,
    reference: StageDirectory | None,
) -> None:
    """Align the base guidance-free and write the aligned bundle (rank 0). Without a reference directory the frozen
    model runs in the loop."""
    dataset = TokenDataset(tokens)
    model = load_model(base.uri)
    source: Reference
    if reference is not None:
        source = CachedReference(ReferenceColumns(reference))
    else:
        source = OnlineReference(load_model(base.uri, device=str(world.device)))
    batches = BatchSource(
        dataset,
        seed=recipe.seed,
        global_batch_size=recipe.align.global_batch_size,
        micro_batch_size=recipe.execution.micro_batch_size,
        null_label=model.spec.null_label,
        null_share=recipe.align.null_share,
        null_purpose=pairs.Purpose.NULL,
        reference=source,
    )
    result = fit(
        model,
        alignment_objective(recipe.align),
        batches,
        recipe.align.optim,
        epochs=recipe.align.epochs,
        dropout=recipe.align.dropout,
        world=world,
        states=TrainStates(directory),
        checkpoint_every_steps=recipe.execution.checkpoint_every_steps,
        log_every_steps=recipe.execution.log_every_steps,
        on_log=on_log,
    )
    if world.rank == 0:
        digests = {"base": base.digest, "align": directory.digest, "tokens": tokens.digest}
        tokenizer = load_tokenizer(base.uri)
        info = bundle_info(model, tokenizer, recipe, class_names(tokens), digests)
        write_bundle(directory, info, model, tokenizer, result)


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
    )


def write_bundle(
    directory: StageDirectory,
    info: BundleInfo,
    model: ARImageModel | None,
    tokenizer: ImageTokenizer,
    result: FitResult | None = None,
) -> None:
    """Write a bundle and the training curve into a stage directory."""
    if result is not None:
        directory.write_json(CURVE_NAME, result.curve)
    model_tensors: dict[str, Any] | None = model.state_dict() if model is not None else None
    for name, data in bundle_files(info, model_tensors, tokenizer.state_dict()).items():
        directory.write_bytes(name, data)
