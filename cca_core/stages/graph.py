"""Reads nothing, writes nothing: the stages that compute, what each depends on, and the digests that follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cca_core.config import Recipe
from cca_core.manifest import stage_digest
from cca_core.parse import as_dict
from cca_core.stages.grid import shared, trials

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

    @property
    def folder(self) -> str:
        """Where its directories lie, and the stage that their manifests name."""
        return folder_of(self.name)


#: Stages that a sweep runs once for each candidate that it keeps.
PER_CANDIDATE = ("align", "evaluate", "safety")


def folder_of(stage: str) -> str:
    """Candidates of a sweep's lower ranks (align-2, evaluate-2) are directories beside the first's."""
    return stage.partition("-")[0]


def ranked(stage: str, rank: int) -> str:
    """The stage of the candidate with that rank in the sweep; without one there is only the first."""
    return stage if rank == 1 else f"{stage}-{rank}"


def candidates(recipe: Recipe, stage: str) -> list[str]:
    """The stages (one of ``PER_CANDIDATE``) of all candidates of a recipe, by rank."""
    return [ranked(stage, rank) for rank in range(1, (recipe.sweep.keep if recipe.sweep.enabled else 1) + 1)]


def rank_of(stage: str) -> int:
    return int(stage.partition("-")[2] or 1)


def _pick(config: Any, *names: str) -> Section:
    values = as_dict(config)
    return {name: values[name] for name in names}


# A feature network counts by its sha256, not by where it lies.
def _features_section(recipe: Recipe) -> Section:
    features = {name: value for name, value in as_dict(recipe.features).items() if name != "network"}
    return {"features": features} | _image_section(recipe)


def _evaluate(recipe: Recipe, *names: str) -> Section:
    common = ("num_samples", "seeds", "real", "batch_size", "neighbour", "cost_images")
    return _pick(recipe.evaluate, *common, *names)


def _run(recipe: Recipe) -> Section:
    return {"seed": recipe.seed, "precision": recipe.precision}


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
    return {"family": recipe.family, "base": as_dict(recipe.base), "seed": recipe.seed, "precision": recipe.precision}


# Limits compute nothing, and a filter counts by its sha256, not by where it lies.
def _safety_section(recipe: Recipe) -> Section:
    spec = recipe.safety.filter_spec
    return {"filter": as_dict(spec)} if spec else {}


#: In the order in which they run. ``source``, ``tokenizer_checkpoint``, ``base_checkpoint`` and ``real_statistics`` are
#: outside: the digest of the source's listing, the sha256 of a file. ``active`` adds
#: sweep before align.
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
        2,
        ("source", "real_statistics"),
        _features_section,
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
        2,
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
            **_run(r),
        },
        "log-probs of the frozen base, cached as columns",
    ),
    StageSpec(
        "align",
        1,
        ("base", "tokens", "reference"),
        lambda r: {"align": as_dict(r.align), **_run(r)},
        "the aligned candidate",
    ),
    StageSpec(
        "evaluate",
        2,
        ("align", "features", "baseline"),
        lambda r: _evaluate(r, "aligned_temperatures"),
        "the candidate measured, and its cost beside the base's",
    ),
    StageSpec(
        "safety",
        1,
        ("evaluate",),
        _safety_section,
        "variety, copies of training images and mixed-up classes, with pictures of the worst cases",
    ),
)


def _sweep(recipe: Recipe) -> StageSpec:
    config, chosen = recipe.sweep, trials(recipe)
    return StageSpec(
        "sweep",
        2,
        ("base", "tokens", "reference", "features", "baseline"),
        # What the trials are, not the lists they come from; keep chooses among their results.
        lambda r: {
            "trials": [as_dict(settings) for settings in chosen],
            "align": shared(r.align),
            "epochs": config.epochs or r.align.epochs,
            **_pick(config, "fraction", "evaluations", "num_samples", "seeds"),
            **_pick(r.evaluate, "real", "batch_size", "neighbour"),
            **_run(r),
        },
        f"{len(chosen)} settings of align, tried on {config.fraction:.0%} of the training images",
    )


def _with_sweep(stages: list[StageSpec], recipe: Recipe) -> list[StageSpec]:
    """The sweep before the candidates that it chooses, one for each rank that is kept."""
    found: list[StageSpec] = []
    for spec in stages:
        if spec.name not in PER_CANDIDATE:
            found.append(spec)
            continue
        if spec.name == "align":
            found.append(_sweep(recipe))
        found += [_candidate(spec, name) for name in candidates(recipe, spec.name)]
    return found


def _candidate(spec: StageSpec, name: str) -> StageSpec:
    rank = rank_of(name)
    upstream = tuple(ranked(part, rank) if part in PER_CANDIDATE else part for part in spec.upstream)
    spec = replace(spec, name=name, upstream=upstream)
    if spec.folder != "align":
        return spec
    return replace(
        spec,
        upstream=(*upstream, "sweep"),
        section=lambda r: {"align": shared(r.align), "epochs": r.align.epochs, "rank": rank, **_run(r)},
        makes=f"the candidate aligned with the settings of rank {rank} in the sweep",
    )


def active(recipe: Recipe) -> tuple[StageSpec, ...]:
    """The stages of this recipe, each with what it really depends on: no reference columns where the frozen model runs
    in the loop; a tokenizer that is imported owes nothing to the images; features of reconstructions, where the source
    has codes and no images, depend on the tokenizer; an alignment that is measured on the way needs features; a sweep,
    where it is on, chooses what is aligned.

    Raises ConfigError for a sweep with fewer trials than it should keep.
    """
    stages = [s for s in STAGES if s.name != "reference" or recipe.reference.mode == "cached"]
    upstream = {}
    if recipe.tokenizer.checkpoint:
        upstream["tokenizer"] = ("tokenizer_checkpoint",)
    if recipe.source.kind == "codes":
        upstream["features"] = ("source", "tokenizer", "real_statistics")
    if recipe.align.evaluations:
        upstream["align"] = ("base", "tokens", "reference", "features")
    stages = [replace(s, upstream=upstream.get(s.name, s.upstream)) for s in stages]
    return tuple(_with_sweep(stages, recipe) if recipe.sweep.enabled else stages)


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
