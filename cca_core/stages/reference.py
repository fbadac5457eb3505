"""Reads tokens/ and the frozen base, writes reference/: one directory of log-prob columns per epoch."""

from __future__ import annotations

from cca_core.dataset import valid_manifest
from cca_core.manifest import FileEntry, Manifest
from cca_core.schema import REFERENCE
from cca_core.stages.run import Context, counted
from cca_core.workers.ranges import split_range
from cca_core.workers.score import ScoreShard, shard_file


def run(stage: str, context: Context) -> Manifest:
    directory, recipe = context.directory(stage), context.recipe
    num_images = valid_manifest(context.directory("tokens")).facts["num_images"]
    ranges = split_range(num_images, recipe.tokens.rows_per_shard)
    epochs = range(recipe.align.epochs)
    units = [
        {"start": a, "stop": b}
        for a, b in ranges
        if not all(directory.readable(shard_file(epoch, a, b)) for epoch in epochs)
    ]
    arguments = {
        "directory": directory,
        "recipe": recipe,
        "tokens": context.directory("tokens"),
        "base_uri": context.directory("base").uri,
    }
    for _ in counted(context.executor, context.executor.map([ScoreShard], arguments, units), len(units)):
        pass
    files: dict[str, FileEntry] = {}
    for epoch in epochs:
        for a, b in ranges:
            name = shard_file(epoch, a, b)
            files[name] = directory.entry(name, rows=b - a)
    facts = {
        "epochs": recipe.align.epochs,
        "null_share_max": recipe.reference.null_share_max,
        "num_images": num_images,
        "bytes": sum(entry.size_bytes for entry in files.values()),
    }
    return context.commit(stage, files, rows=num_images * recipe.align.epochs, facts=facts, schema=str(REFERENCE))
