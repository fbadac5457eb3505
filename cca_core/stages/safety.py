"""Reads the samples that baseline/ and evaluate/ measured and the features of real images; writes safety/: what the
checks of safety found for the base, its best CFG and the candidate, and pictures of the candidate's worst cases; with a
content filter also the filter and the scores of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cca_core.config import ConfigError, Recipe
from cca_core.dataset import classes_with_images, read_source, valid_manifest
from cca_core.manifest import Manifest
from cca_core.metrics import safety
from cca_core.metrics.measure import FeatureSet
from cca_core.models import to_uint8
from cca_core.stages.evaluate import (
    baseline_samplers,
    best_cfg,
    candidate_samplers,
    load_results,
    samples_of,
)
from cca_core.stages.features import HELD_OUT, TRAIN, read_features
from cca_core.stages.filtered import FILTERED, Filtered, filtered_picture, score_samples, scores_of
from cca_core.stages.graph import rank_of, ranked
from cca_core.stages.run import Context
from cca_core.store import StageDirectory
from cca_core.workers.images import LoadedImages, grid_png, load_images
from cca_core.workers.sample import Drawer, Sampler

RESULTS = "safety.json"
COPIES, TWINS, UNIFORM, CONFUSED = "copies.png", "twins.png", "least_varied.png", "worst_class.png"
#: File -> what its rows show, from above.
PICTURES = {
    COPIES: "samples that are nearest to a training image, for how far they are from any held-out one; that training "
    "image; the nearest held-out image",
    TWINS: "the samples that are most alike; the other one of each pair",
    UNIFORM: "the class with the least variety for its real images: samples; real images",
    CONFUSED: "the class with the lowest class consistency: samples that are taken for another class first",
}
#: Cases in a picture.
SHOWN = 12


def run(stage: str, context: Context) -> Manifest:
    rank = rank_of(stage)
    baseline, evaluate = context.directory("baseline"), context.directory(ranked("evaluate", rank))
    rows = load_results(baseline)["rows"]
    guided = rows.index(best_cfg(rows))
    samplers = baseline_samplers(context)
    directory, classes = context.directory(stage), classes_with_images(context.directory("tokens"))
    measured = [
        (samplers[0], baseline, 0),
        (samplers[guided], baseline, guided),
        (candidate_samplers(context, rank)[0], evaluate, 0),
    ]
    samples = context.recipe.evaluate.num_samples
    if samples <= len(classes):
        raise ConfigError(
            f"variety within a class needs two samples of one: evaluate.num_samples={samples} are too few for "
            f"{len(classes)} classes, raise it"
        )
    names = [RESULTS, *PICTURES]
    if context.recipe.safety.filter:
        names += [FILTERED, *score_samples(directory, context, [sampler for sampler, _, _ in measured], classes)]
    arguments = {
        "directory": directory,
        "recipe": context.recipe,
        "source": context.source(),
        "features": context.directory("features"),
        "tokenizer_uri": context.directory("tokenizer").uri,
        "classes": classes,
        "measured": measured,
    }
    context.executor.call(examine, arguments)
    return context.commit(stage, context.entries(stage, names))


def examine(
    *,
    on_log: Callable[..., None],
    directory: StageDirectory,
    recipe: Recipe,
    source: StageDirectory,
    features: StageDirectory,
    tokenizer_uri: str,
    classes: Sequence[int],
    measured: list[tuple[Sampler, StageDirectory, int]],
) -> None:
    """Check the recorded samples of each sampler; draw the worst cases of the last one, the candidate, again.

    Args:
        classes: those that have images.
        measured: samplers, where their samples are, and their number there.
    """
    train, held_out = (read_features(features, [name]) for name in (TRAIN, HELD_OUT))
    _, names = read_source(source)
    spec, filtered = recipe.safety.filter_spec, None
    rows = []
    for done, (sampler, where, index) in enumerate(measured, start=1):
        if spec:
            filtered = Filtered.of(*scores_of(directory, recipe, done - 1), names, spec.threshold)
        seeds = [Finding.of(train, held_out, samples_of(where, recipe, index, seed)) for seed in recipe.evaluate.seeds]
        rows.append(row_of(sampler.label, seeds, classes, names, filtered))
        on_log({"samplers_checked": float(done)})
    directory.write_json(RESULTS, {"rows": rows, "num_samples": recipe.evaluate.num_samples})
    images = load_images(recipe, source, tokenizer_uri)
    worst = {name: names.index(rows[-1]["worst"][name][0]) for name in ("within_class_diversity", "class_disparity")}
    draw = Drawer(recipe, classes)

    def drawn(numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        return to_uint8(draw(measured[-1][0], recipe.evaluate.seeds[0], torch.from_numpy(numbers))[1]).numpy()

    pictures = _pictures(seeds[0], images, worst, drawn)
    if filtered:
        labels, scores = scores_of(directory, recipe, len(measured) - 1)
        pictures[FILTERED] = filtered_picture(labels, scores, names.index(filtered.worst), drawn, SHOWN)
    for name, picture in pictures.items():
        directory.write_bytes(name, picture)


def load_safety(directory: StageDirectory) -> list[dict[str, Any]]:
    """Rows of a finished check: the base, its best CFG, the candidate."""
    valid_manifest(directory)
    return directory.read_json(RESULTS)["rows"]


@dataclass(frozen=True, eq=False)
class Finding:
    """What the samples of one sampling seed show."""

    samples: FeatureSet
    diversity_K: list[float | None]
    #: Share of samples with a twin, and each sample's nearest other one.
    twins: float
    twin: safety.Nearest
    memorisation: float
    #: Of each sample.
    nearest_train: safety.Nearest
    nearest_held_out: safety.Nearest
    confusion_KK: NDArray[np.float64]

    @classmethod
    def of(cls, train: FeatureSet, held_out: FeatureSet, samples: FeatureSet) -> Finding:
        real = np.concatenate([train.features, held_out.features])
        labels = np.concatenate([train.labels, held_out.labels])
        num_classes = samples.logits.shape[1]
        return cls(
            samples,
            safety.within_class_diversity(real, labels, samples.features, samples.labels, num_classes),
            *safety.twins(real, samples.features),
            *safety.memorisation(train.features, held_out.features, samples.features),
            safety.confusion(samples.logits, samples.labels),
        )


def row_of(
    label: str,
    seeds: Sequence[Finding],
    classes: Sequence[int],
    names: Sequence[str],
    filtered: Filtered | None = None,
) -> dict[str, Any]:
    """A sampler's values, means over its seeds, with the classes that are worst and the numbers of every class; and
    what the content filter blocks of its first seed, where there is one."""
    diversity = {k: _mean(seed.diversity_K[k] for seed in seeds) for k in classes}
    known = {k: value for k, value in diversity.items() if value is not None}
    confusion_KK = np.mean([seed.confusion_KK for seed in seeds], axis=0)
    least = min(known, key=known.__getitem__)
    # Few samples leave classes with images without a sample: nothing is known of these.
    drawn_K = np.isin(np.arange(len(names)), np.concatenate([seed.samples.labels for seed in seeds]))
    disparity, unequal = safety.disparity(confusion_KK, drawn_K)
    leakage, drawn, taken = safety.leakage(confusion_KK)
    return {
        "label": label,
        "within_class_diversity": known[least],
        "twins": _mean(seed.twins for seed in seeds),
        "memorisation": _mean(seed.memorisation for seed in seeds),
        "class_disparity": disparity,
        "leakage": leakage,
        "worst": {
            "within_class_diversity": [names[least]],
            "class_disparity": [names[unequal]],
            "leakage": [names[drawn], names[taken]],
            **({"filtered_in_class": [filtered.worst]} if filtered else {}),
        },
        "classes": list(names),
        "diversity_per_class": {names[k]: value for k, value in diversity.items()},
        "confusion": confusion_KK.tolist(),
        **(filtered.values() if filtered else {}),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if None in found else float(np.mean(found))


def _pictures(
    finding: Finding,
    images: LoadedImages,
    worst: dict[str, int],
    drawn: Callable[[NDArray[np.int64]], NDArray[np.uint8]],
) -> dict[str, bytes]:
    """The worst cases of each kind, the worst first."""
    real = images.pixels.transpose(0, 2, 3, 1)
    train, held_out = np.flatnonzero(~images.held_out), np.flatnonzero(images.held_out)
    copied = np.argsort(finding.nearest_train.squared / np.maximum(finding.nearest_held_out.squared, 1e-12))[:SHOWN]
    # Each pair once.
    alike = [
        i
        for i in np.argsort(finding.twin.squared)
        if i < finding.twin.index[i] or i != finding.twin.index[finding.twin.index[i]]
    ]
    alike = np.asarray(alike[:SHOWN])
    labels, taken = finding.samples.labels, finding.samples.logits.argmax(axis=1)
    uniform, unequal = worst["within_class_diversity"], worst["class_disparity"]
    of_uniform = np.flatnonzero(labels == uniform)[:SHOWN]
    of_unequal = np.flatnonzero(labels == unequal)
    of_unequal = of_unequal[np.argsort(taken[of_unequal] == unequal, kind="stable")][: 2 * SHOWN]
    pictures = drawn(np.concatenate([copied, alike, finding.twin.index[alike], of_uniform, of_unequal]))
    copies, ones, others, least, confused = np.split(
        pictures, np.cumsum([len(copied), len(alike), len(alike), len(of_uniform)])
    )
    return {
        COPIES: grid_png(
            [
                copies,
                real[train[finding.nearest_train.index[copied]]],
                real[held_out[finding.nearest_held_out.index[copied]]],
            ]
        ),
        TWINS: grid_png([ones, others]),
        UNIFORM: grid_png([least, real[np.flatnonzero(images.labels == uniform)[:SHOWN]]]),
        CONFUSED: grid_png([part for part in (confused[:SHOWN], confused[SHOWN:]) if len(part)]),
    }
