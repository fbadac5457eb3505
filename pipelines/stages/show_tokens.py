"""Reads a finished tokens/ directory and its siblings, writes to MLflow: what the data is, to look at."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from cca_core.config import Recipe
from cca_core.dataset import class_names, shard_tables
from cca_core.manifest import Manifest
from cca_core.stages.reconstructions import PICTURE
from cca_core.store import StageDirectory
from pipelines.tracking import Tracker

#: More class names than this do not fit below the bars.
MAX_NAMES = 40


def show_tokens(tracker: Tracker, run_id: str, directory: StageDirectory, manifest: Manifest, recipe: Recipe) -> None:
    """Lineage, class histogram, reconstructions, sizes and modes met, codebook usage, quarantine."""
    lineage(tracker, run_id, directory, manifest, recipe)
    images, facts = directory.sibling("images"), manifest.facts
    if PICTURE in _files(images):
        tracker.artifact(run_id, PICTURE.lstrip("_"), images.read_bytes(PICTURE))
    figures = {
        "images_per_class.png": _classes(class_names(directory), facts["images_per_class"]),
        "codebook_usage.png": _usage(directory, facts["codebook_size"]),
    }
    met = pa.concat_tables(shard_tables(images))
    if recipe.source.kind != "codes":
        tracker.table(run_id, _formats(met), "formats.json")
        if len(set(zip(met["width"].to_pylist(), met["height"].to_pylist(), strict=True))) > 1:
            figures["sizes.png"] = _sizes(met)
    for path, figure in figures.items():
        tracker.figure(run_id, figure, path)
        plt.close(figure)
    bad = pa.concat_tables(shard_tables(directory.sibling("quarantine")))
    if bad.num_rows:
        tracker.table(run_id, bad.to_pydict(), "quarantine.json")


def lineage(tracker: Tracker, run_id: str, tokens: StageDirectory, manifest: Manifest, recipe: Recipe) -> None:
    """The images that came in and the tokens that were made of them, as data sets of a run."""
    images = recipe.source.uri or tokens.uri
    tracker.dataset(run_id, uri=images, name="images", digest=manifest.upstream["source"], context="input")
    tracker.dataset(run_id, uri=tokens.uri, name="tokens", digest=manifest.digest, context="output")


def _files(directory: StageDirectory) -> list[str]:
    manifest = directory.manifest()
    return list(manifest.files) if manifest else []


def _classes(names: tuple[str, ...], counts: list[int]) -> Figure:
    figure, axis = plt.subplots(figsize=(8, 3.5), constrained_layout=True)
    axis.bar(range(len(counts)), counts)
    axis.set_title(f"images per class ({sum(counts)} in all)")
    if len(names) <= MAX_NAMES:
        axis.set_xticks(range(len(names)), names, rotation=45 if len(names) > 10 else 0)
    else:
        axis.set_xlabel("class")
    return figure


def _usage(directory: StageDirectory, codebook_size: int) -> Figure:
    counts = np.zeros(codebook_size, np.int64)
    for table in shard_tables(directory):
        tokens = table.column("tokens").combine_chunks().flatten().to_numpy()
        counts += np.bincount(tokens, minlength=codebook_size)
    figure, axis = plt.subplots(figsize=(8, 3.5), constrained_layout=True)
    axis.plot(np.sort(counts / counts.sum())[::-1])
    axis.set_yscale("log")
    axis.set_xlabel("code, by use")
    axis.set_ylabel("share of all tokens")
    axis.set_title(f"codebook usage: {(counts > 0).sum()} of {codebook_size} codes")
    return figure


def _formats(met: pa.Table) -> dict[str, list[object]]:
    """Formats and modes met: how many images, and from which to which size."""
    sides = [(side, how) for side in ("width", "height") for how in ("min", "max")]
    grouped = met.group_by(["format", "mode"]).aggregate([([], "count_all"), *sides])
    columns = grouped.sort_by([("count_all", "descending")]).to_pydict()
    return {"images": columns.pop("count_all"), **columns}


def _sizes(met: pa.Table) -> Figure:
    figure, axis = plt.subplots(figsize=(5, 4), constrained_layout=True)
    sizes = met.group_by(["width", "height"]).aggregate([([], "count_all")])
    shown = axis.scatter(sizes["width"], sizes["height"], c=sizes["count_all"], s=12)
    figure.colorbar(shown, label="images")
    axis.set_xlabel("width (pixels)")
    axis.set_ylabel("height (pixels)")
    short = pc.min_element_wise(met["width"], met["height"])
    axis.set_title(f"shorter side: {pc.min(short)} to {pc.max(short)} pixels")
    return figure
