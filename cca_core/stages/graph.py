"""Reads nothing, writes nothing: the stages that compute, what each depends on, and the digests that follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cca_core.config import Recipe
from cca_core.manifest import stage_digest
from cca_core.parse import as_dict

#: Sections are JSON-ready: they enter digests and manifests.
Section = dict[str, Any]


@dataclass(frozen=True)
class StageSpec:
    """One stage. ``code_version`` goes up when its code computes something else from the same input."""

    name: str
    code_version: int
    upstream: tuple[str, ...]
    section: Callable[[Recipe], Section]
    #: One line for people: what it makes.
    makes: str


def _pick(config: Any, *names: str) -> Section:
    values = as_dict(config)
    return {name: values[name] for name in names}


def _evaluate(recipe: Recipe, *names: str) -> Section:
    common = ("num_samples", "seeds", "real", "batch_size", "neighbour", "cost_images")
    return _pick(recipe.evaluate, *common, *names)


def _image_section(recipe: Recipe) -> Section:
    return {
        "image_size": recipe.tokens.image_size,
        "views": recipe.tokens.views,
        "crop_range": recipe.tokens.crop_range,
        "held_out_fraction": recipe.source.held_out_fraction,
        "seed": recipe.seed,
    }


# An imported file counts by its content (the input's sha256), not by where it lies.
def _tokenizer_section(recipe: Recipe) -> Section:
    if recipe.tokenizer.checkpoint:
        return _pick(recipe.tokenizer, "patch_nums")
    return {"family": recipe.family, "tokenizer": as_dict(recipe.tokenizer)} | _image_section(recipe)


def _base_section(recipe: Recipe) -> Section:
    if recipe.base.checkpoint:
        return _pick(recipe.base, "weights")
    return {"family": recipe.family, "base": as_dict(recipe.base), "seed": recipe.seed}


#: In the order in which they run. ``source``, ``tokenizer_checkpoint`` and ``base_checkpoint`` are outside: the digest
#: of the source's listing, the sha256 of a file. sweep and safety will stand before align and decide.
STAGES: tuple[StageSpec, ...] = (
    StageSpec(
        "tokenizer",
        1,
        ("source", "tokenizer_checkpoint"),
        _tokenizer_section,
        "image <-> tokens, trained on the images or imported",
    ),
    StageSpec(
        "tokens",
        2,
        ("source", "tokenizer"),
        lambda r: {"tokens": as_dict(r.tokens), "held_out_fraction": r.source.held_out_fraction},
        "tokens/, images/, conditions/ and quarantine/ as Arrow shards",
    ),
    StageSpec(
        "features",
        1,
        ("source",),
        lambda r: {"features": as_dict(r.features)} | _image_section(r),
        "the feature network and the features of the real images",
    ),
    StageSpec(
        "base",
        1,
        ("tokens", "tokenizer", "base_checkpoint"),
        _base_section,
        "the pretrained model, trained or imported",
    ),
    StageSpec(
        "baseline",
        1,
        ("base", "features"),
        lambda r: _evaluate(r, "cfg_scales", "temperatures"),
        "the base measured: guidance-free, over CFG scales, over temperatures",
    ),
    StageSpec(
        "reference",
        1,
        ("base", "tokens"),
        lambda r: {
            "null_share_max": r.reference.null_share_max,
            "epochs": r.align.epochs,
            "seed": r.seed,
        },
        "log-probs of the frozen base, cached as columns",
    ),
    StageSpec(
        "align",
        1,
        ("base", "tokens", "reference"),
        lambda r: {"align": as_dict(r.align), "seed": r.seed},
        "the aligned candidate",
    ),
    StageSpec(
        "evaluate",
        1,
        ("align", "features", "baseline"),
        lambda r: _evaluate(r, "aligned_temperatures"),
        "the candidate measured, and its cost beside the base's",
    ),
)


def active(recipe: Recipe) -> tuple[StageSpec, ...]:
    """The stages of this recipe, each with what it really depends on: no reference columns where the frozen model runs
    in the loop; a tokenizer that is imported owes nothing to the images; features of reconstructions, where the source
    has codes and no images, depend on the tokenizer."""
    stages = [s for s in STAGES if s.name != "reference" or recipe.reference.mode == "cached"]
    upstream = {}
    if recipe.tokenizer.checkpoint:
        upstream["tokenizer"] = ("tokenizer_checkpoint",)
    if recipe.source.kind == "codes":
        upstream["features"] = ("source", "tokenizer")
    return tuple(replace(s, upstream=upstream.get(s.name, s.upstream)) for s in stages)


def upstream_of(spec: StageSpec, digests: dict[str, str]) -> dict[str, str]:
    """The digests a stage depends on; an absent one (no checkpoint, no cached reference) is left out."""
    return {name: digests[name] for name in spec.upstream if name in digests}


def plan(recipe: Recipe, inputs: dict[str, str]) -> dict[str, str]:
    """The digest of every active stage, and the inputs': known before anything runs.

    Args:
        inputs: digest of the source's listing, and sha256 of the checkpoints that the recipe names.
    """
    digests = dict(inputs)
    for spec in active(recipe):
        digests[spec.name] = stage_digest(
            spec.name, spec.code_version, spec.section(recipe), upstream_of(spec, digests)
        )
    return digests
