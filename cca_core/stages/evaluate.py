"""Reads bundles and real features, writes baseline/ or evaluate/: sample features, pictures, and results.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cca_core.config import Recipe
from cca_core.dataset import classes_with_images, valid_manifest
from cca_core.evaluate_config import PUBLISHED_INCEPTION
from cca_core.generate import Sampling, decode_images
from cca_core.manifest import Manifest
from cca_core.metrics.cost import measure_cost
from cca_core.metrics.intervals import interval
from cca_core.metrics.measure import FeatureSet, Measured, mean_deviations, measure
from cca_core.models import load_to_draw, load_tokenizer, to_uint8
from cca_core.stages.features import feature_set, real_set
from cca_core.stages.graph import rank_of, ranked
from cca_core.stages.run import Context, counted
from cca_core.store import StageDirectory
from cca_core.train.distributed import pick_device
from cca_core.workers.images import RECONSTRUCTIONS, grid_png, load_images
from cca_core.workers.ranges import split_range
from cca_core.workers.sample import GRID_ROWS, Sampler, SampleShard, grid_file, sample_ids, shard_file

RESULTS = "results.json"
#: Pictures of the baseline beside those of its samplers: title -> file.
PICTURES = {"real images, held out": "grid-real.png", "the same, encoded and decoded": "grid-reconstructed.png"}
#: Padded batches per unit of work.
BATCHES_PER_UNIT = 4


def run(stage: str, context: Context) -> Manifest:
    directory, recipe = context.directory(stage), context.recipe
    samplers = baseline_samplers(context) if stage == "baseline" else candidate_samplers(context, rank_of(stage))
    units = [
        {"sampler": index, "seed": seed, "start": a, "stop": b}
        for index in range(len(samplers))
        for seed in recipe.evaluate.seeds
        for a, b in sample_ranges(recipe)
    ]
    left = [unit for unit in units if not directory.readable(shard_file(**unit))]
    features = context.directory("features")
    classes = classes_with_images(context.directory("tokens"))
    arguments = {
        "directory": directory,
        "recipe": recipe,
        "samplers": samplers,
        "features": features,
        "classes": classes,
    }
    for _ in counted(context.executor, context.executor.map([SampleShard], arguments, left), len(left)):
        pass
    timed = samplers if stage == "baseline" else samplers + _compared(context)
    costs = context.executor.call(time_samplers, {"recipe": recipe, "samplers": timed})
    real = real_set(features, recipe.evaluate.real_set, k=recipe.evaluate.neighbour)
    rows = []
    for index, sampler in enumerate(samplers):
        measured = {}
        for seed in recipe.evaluate.seeds:
            measured[seed] = measure(real, samples_of(directory, recipe, index, seed), stream=seed)
        rows.append(result_row(sampler, measured, costs[index], distance_name(recipe)))
    results = {
        "rows": rows,
        "compared_costs": dict(zip([s.label for s in timed[len(samplers) :]], costs[len(samplers) :], strict=True)),
        "num_samples": recipe.evaluate.num_samples,
        "real": described_real(recipe),
        "features": context.digests["features"],
        "network": described_network(recipe),
    }
    directory.write_json(RESULTS, results)
    pictures: list[str] = []
    if stage == "baseline":
        arguments = {
            "directory": directory,
            "recipe": recipe,
            "source": context.source(),
            "base_uri": context.directory("base").uri,
        }
        pictures = context.executor.call(picture_real, arguments)
    names = [RESULTS, *pictures, *(grid_file(i) for i in range(len(samplers))), *(shard_file(**unit) for unit in units)]
    facts = {"best_cfg": best_cfg(rows)["label"]} if stage == "baseline" else {}
    return context.commit(stage, context.entries(stage, names), facts=facts)


def samples_of(directory: StageDirectory, recipe: Recipe, sampler: int, seed: int) -> FeatureSet:
    """The features of all samples of one sampler and seed, in the order of the samples' numbers."""
    names = [shard_file(sampler, seed, start, stop) for start, stop in sample_ranges(recipe)]
    table = pa.concat_tables([directory.read_table(name) for name in names])
    return feature_set(table, sample_ids(seed, 0, recipe.evaluate.num_samples))


def sample_ranges(recipe: Recipe) -> list[tuple[int, int]]:
    """The samples of one sampler and seed as units of work."""
    return split_range(recipe.evaluate.num_samples, BATCHES_PER_UNIT * recipe.evaluate.batch_size)


def baseline_samplers(context: Context) -> list[Sampler]:
    """The base guidance-free, over CFG scales, over temperatures."""
    uri, config = context.directory("base").uri, context.recipe.evaluate
    return [
        Sampler("base", uri, Sampling()),
        *(Sampler(f"base, CFG {s:g}", uri, Sampling(cfg_scale=s)) for s in config.cfg_scales),
        *(Sampler(f"base, temperature {t:g}", uri, Sampling(temperature=t)) for t in config.temperatures),
    ]


def candidate_samplers(context: Context, rank: int) -> list[Sampler]:
    """The aligned model, guidance-free, at temperature 1 and at the others the recipe names."""
    uri, config = context.directory(ranked("align", rank)).uri, context.recipe.evaluate
    name = "aligned" if rank == 1 else f"aligned {rank}"
    return [
        Sampler(name, uri, Sampling()),
        *(Sampler(f"{name}, temperature {t:g}", uri, Sampling(temperature=t)) for t in config.aligned_temperatures),
    ]


def _compared(context: Context) -> list[Sampler]:
    """Samplers of the base that are timed again beside the candidate, so that the ratio is of one run."""
    best = best_cfg(load_results(context.directory("baseline"))["rows"])
    return [s for s in baseline_samplers(context) if s.label in ("base", best["label"])]


def picture_real(
    *, on_log: Callable[..., None], directory: StageDirectory, recipe: Recipe, source: StageDirectory, base_uri: str
) -> list[str]:
    """Write held-out images and their reconstructions as grids, one column per class; return the file names.

    Where the source has codes, the images are reconstructions already, and the others those of reconstructions.
    """
    del on_log
    images = load_images(recipe, source, base_uri)
    tokenizer = load_tokenizer(base_uri)
    per_class = [np.flatnonzero(images.held_out & (images.labels == k)) for k in range(len(images.class_names))]
    rows = [[c[i] for c in per_class if i < len(c)] for i in range(GRID_ROWS)]
    real, reconstructed = PICTURES.values()
    shown = [torch.from_numpy(images.pixels[row]) for row in rows if row]
    directory.write_bytes(real, grid_png([row.permute(0, 2, 3, 1).numpy() for row in shown]))
    with torch.inference_mode():
        tokens = [tokenizer.encode(row.float() / 127.5 - 1) for row in shown]
    decoded = [to_uint8(decode_images(tokenizer, row)).numpy() for row in tokens]
    directory.write_bytes(reconstructed, grid_png(decoded))
    return [real, reconstructed]


def time_samplers(*, on_log: Callable[..., None], recipe: Recipe, samplers: list[Sampler]) -> list[dict[str, Any]]:
    """Cost of each sampler, measured in one process while nothing else runs."""
    del on_log
    device = str(pick_device(recipe.execution.device))
    loaded = {
        uri: (load_to_draw(uri, device=device), load_tokenizer(uri, device=device))
        for uri in {s.bundle_uri for s in samplers}
    }
    costs = measure_cost(
        [(*loaded[s.bundle_uri], s.sampling) for s in samplers],
        num_images=recipe.evaluate.cost_images,
        batch_size=recipe.evaluate.batch_size,
    )
    return [cost.as_dict() for cost in costs]


def described_real(recipe: Recipe) -> str:
    """The real set, for people."""
    if recipe.evaluate.real_statistics:
        return f"published: {recipe.evaluate.real_statistics.rsplit('/', 1)[-1]}"
    return recipe.evaluate.real + (f", {RECONSTRUCTIONS}" if recipe.source.kind == "codes" else "")


def distance_name(recipe: Recipe) -> str:
    """What the distance may be called."""
    return "FID" if recipe.features.published else "distance"


def described_network(recipe: Recipe) -> str:
    """The feature network, for people, and whether its distance is FID."""
    config = recipe.features
    if config.published:
        return f"{PUBLISHED_INCEPTION[config.sha256]} (sha256 {config.sha256[:12]}): it is FID"
    if config.network:
        name = config.network.rsplit("/", 1)[-1]
        return f"{name} (sha256 {config.sha256[:12]}): it compares samplers measured with that network and is not FID"
    return "the embedded classifier: it compares samplers of this run and is not FID"


def result_row(
    sampler: Sampler, measured: dict[int, Measured], cost: dict[str, Any], distance_name: str
) -> dict[str, Any]:
    """One row of the table: means, standard deviations and 95 % intervals of the means over sampling seeds, cost, and
    the values of each seed."""
    per_seed = [{"seed": seed, **found.values} for seed, found in measured.items()]
    names = [name for name, value in per_seed[0].items() if isinstance(value, float)]
    values = {name: [seed[name] for seed in per_seed] for name in names}
    moved = {name: mean_deviations(list(measured.values()), name) for name in names}
    # None for a class without samples, which is without for every seed.
    by_class = zip(*(seed["class_consistency_per_class"] for seed in per_seed), strict=True)
    return {
        "label": sampler.label,
        "distance_name": distance_name,
        "sampling": asdict(sampler.sampling),
        "mean": {name: statistics.fmean(v) for name, v in values.items()},
        "sd": {name: statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()},
        "interval": {
            name: interval(statistics.fmean(values[name]), found) for name, found in moved.items() if found is not None
        },
        "class_consistency_per_class": [None if None in v else float(np.mean(v)) for v in by_class],
        "cost": cost,
        "per_seed": per_seed,
    }


def load_results(directory: StageDirectory) -> dict[str, Any]:
    """results.json of a finished evaluation."""
    valid_manifest(directory)
    return directory.read_json(RESULTS)


def best_cfg(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The guided row of the smallest distance."""
    return min((row for row in rows if row["sampling"]["cfg_scale"] > 1), key=lambda row: row["mean"]["distance"])


def best_evaluated(evaluated: dict[str, dict[str, Any]]) -> str:
    """Of the candidates that a sweep chose, the one that the gate judges: evaluate stage -> its results."""
    return min(evaluated, key=lambda name: evaluated[name]["rows"][0]["mean"]["distance"])
