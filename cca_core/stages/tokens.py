"""Reads the source's images (or recorded codes) and the tokenizer; writes tokens/, images/, quarantine/ and
conditions/."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cca_core.config import ConfigError, Recipe
from cca_core.dataset import read_source
from cca_core.manifest import FileEntry, Manifest
from cca_core.models.load import read_spec
from cca_core.schema import CONDITIONS
from cca_core.stages.data_tests import check_tokens
from cca_core.stages.reconstructions import PICTURE, reconstruct, shown_images
from cca_core.stages.run import Context
from cca_core.stages.shards import SIBLINGS, ShardWriter, Watch
from cca_core.store import StageDirectory, shard_name
from cca_core.workers.decode import DecodePart, part_bytes, part_images
from cca_core.workers.encode import EncodePart, ReadCodesPart
from cca_core.workers.ranges import RangeWorker, split_range


def run(stage: str, context: Context) -> Manifest:
    directory, recipe, source = context.directory(stage), context.recipe, context.source()
    listing, names = read_source(source)
    arguments = {"recipe": recipe, "source": source, "tokenizer_uri": context.directory("tokenizer").uri}
    spec = read_spec(arguments["tokenizer_uri"], "tokenizer")
    shards = split_range(len(listing), recipe.tokens.rows_per_shard)
    left = [(a, b) for a, b in shards if not all(directory.sibling(s).readable(shard_name(a, b)) for s in SIBLINGS)]
    parts = [
        {"start": start + a, "stop": start + b}
        for start, stop in left
        for a, b in split_range(stop - start, part_images(recipe.tokens))
    ]
    writer = ShardWriter(directory, recipe, spec)
    finished = sorted(set(shards) - set(left))
    known = [error for a, b in finished for error in _errors(directory, shard_name(a, b))]
    done = len(listing) - sum(b - a for a, b in left)
    watch = Watch(recipe, context.executor.on_log, total=len(listing), done=done, errors=known)
    watch.check()
    workers: list[type[RangeWorker]] = [DecodePart, EncodePart]
    if recipe.source.kind == "codes":
        workers = [ReadCodesPart]
    with closing(context.executor.map(workers, arguments, parts, part_bytes(recipe.tokens))) as made:
        for part in watch.parts(made):
            writer.add(part, len(listing))
    files = {
        sibling: {
            name: writer.written.get((sibling, name)) or _entry(directory.sibling(sibling), name)
            for name in (shard_name(a, b) for a, b in shards)
        }
        for sibling in SIBLINGS
    }
    return _finish(context, directory, names, files, spec.codebook_size)


def _write_conditions(directory: StageDirectory, names: tuple[str, ...]) -> None:
    conditions = directory.sibling("conditions")
    if conditions.manifest() is None:
        table = pa.table({"index": list(range(len(names))), "name": list(names)}, schema=CONDITIONS)
        entry = conditions.write_table("conditions.arrow", table)
        conditions.commit(_manifest(conditions, {"conditions.arrow": entry}))


def _errors(directory: StageDirectory, name: str) -> list[str]:
    return directory.sibling("quarantine").read_table(name).column("error").to_pylist()


def _entry(directory: StageDirectory, name: str) -> FileEntry:
    """Of a shard that an earlier attempt wrote."""
    return directory.entry(name, rows=directory.read_table(name).num_rows)


def _finish(
    context: Context,
    directory: StageDirectory,
    names: tuple[str, ...],
    files: dict[str, dict[str, FileEntry]],
    codebook_size: int,
) -> Manifest:
    """Test the data, count, picture it, and write the manifests of all siblings, that of tokens/ last."""
    recipe = context.recipe
    quarantined = sum(entry.rows for entry in files["quarantine"].values())
    shards = {name: directory.read_table(name) for name in files["tokens"]}
    first_views = [table.filter(pc.equal(table.column("view"), 0)) for table in shards.values()]
    counts = np.zeros(len(names), np.int64)
    for table in first_views:
        counts += np.bincount(table.column("label").to_numpy(), minlength=len(names))
    _check_usable(recipe, int(counts.sum()), quarantined, counts, names)
    usage = sum(np.bincount(_codes(table), minlength=codebook_size) for table in shards.values())
    facts: dict[str, Any] = {
        "num_images": int(counts.sum()),
        "num_views": recipe.tokens.num_views,
        "num_tokens": first_views[0].schema.field("tokens").type.list_size,
        "num_classes": len(names),
        "quarantined": quarantined,
        "held_out": sum(pc.sum(table.column("held_out")).as_py() or 0 for table in first_views),
        "images_per_class": counts.tolist(),
        "codes_used": int((usage > 0).sum()),
        "codebook_size": codebook_size,
        "codebook_perplexity": _perplexity(usage),
    }
    facts |= check_tokens(
        shards,
        files,
        num_views=facts["num_views"],
        images_per_class=counts,
        codebook_size=codebook_size,
        seed=recipe.seed,
    )
    if recipe.source.kind != "codes":
        arguments = {
            "directory": directory.sibling("images"),
            "recipe": recipe,
            "source": context.source(),
            "tokenizer_uri": context.directory("tokenizer").uri,
            "good": shown_images(list(shards.values()), facts["num_images"], recipe.tokens.centre_view),
        }
        facts |= context.executor.call(reconstruct, arguments)
        files["images"][PICTURE] = directory.sibling("images").entry(PICTURE)
    _write_conditions(directory, names)
    for sibling in SIBLINGS[:-1]:
        kept = directory.sibling(sibling)
        kept.commit(_manifest(kept, files[sibling]))
    rows = facts["num_images"] * facts["num_views"]
    return context.commit("tokens", files["tokens"], rows=rows, facts=facts, schema=str(first_views[0].schema))


def _codes(table: pa.Table) -> np.ndarray:
    return table.column("tokens").combine_chunks().flatten().to_numpy()


def _perplexity(usage: np.ndarray) -> float:
    """Codes that would be in use if all were used as often as each other: exp of the entropy in nats."""
    shares = usage[usage > 0] / usage.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def _check_usable(recipe: Recipe, images: int, quarantined: int, counts: np.ndarray, names: tuple[str, ...]) -> None:
    where = recipe.source.uri or recipe.source.kind
    if images == 0:
        raise ConfigError(
            f"no readable image in {where}: all {quarantined} are in quarantine/, with the reason of each"
        )
    if (counts > 0).sum() < 2:
        raise ConfigError(
            f"{where} has images of one class only ({names[int(counts.argmax())]}): CCA contrasts at least two classes"
        )


def _manifest(directory: StageDirectory, files: dict[str, FileEntry]) -> Manifest:
    """Of a directory beside tokens/, whose manifest says what both were made from."""
    rows = sum(entry.rows for entry in files.values())
    return Manifest(
        stage=directory.stage,
        code_version=0,
        digest=directory.digest,
        config={},
        upstream={},
        files=files,
        rows=rows,
    )
