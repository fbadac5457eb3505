"""Reads the source and the tokenizer, writes tokens/, conditions/ and quarantine/; recorded codes are taken over."""

from __future__ import annotations

from cca_core.manifest import Manifest
from cca_core.stages.graph import upstream_of
from cca_core.stages.run import Context, spec_of
from cca_core.workers import encode


def run(stage: str, context: Context) -> Manifest:
    directory, recipe = context.directory(stage), context.recipe
    units = encode.prepare(directory, recipe)
    arguments = {"directory": directory, "recipe": recipe, "tokenizer_uri": context.directory("tokenizer").uri}
    worker = encode.ImportShard if recipe.source.kind == "codes" else encode.EncodeShard
    done = list(context.executor.map(worker, arguments, units))
    spec = spec_of(stage, recipe)
    return encode.finish(
        directory,
        recipe,
        done,
        section=spec.section(recipe),
        upstream=upstream_of(spec, context.digests),
        code_version=spec.code_version,
    )
