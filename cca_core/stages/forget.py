"""Reads and writes a storage root: takes images out of every data set that was derived from them.

Token data sets are written again without the images, under the digest that the smaller source gives, from the tokens
that are there: the bytes are those that tokenizing again would make. What cannot be cut out is deleted, and made again
by the next run: wrong conditions are drawn over all rows, so a reference without some rows is another reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from cca_core.config import ConfigError, Recipe
from cca_core.dataset import read_source, shard_tables
from cca_core.manifest import Manifest, stage_digest
from cca_core.parse import from_dict
from cca_core.sources import listing_digest
from cca_core.stages.evaluate import PICTURES
from cca_core.stages.forgotten import forgotten_ids, remember_to_forget, without
from cca_core.stages.graph import active, upstream_of
from cca_core.stages.inputs import write_source
from cca_core.stages.run import Context, LocalExecutor, run_stage
from cca_core.stages.safety import COPIES, UNIFORM
from cca_core.stages.shards import SIBLINGS
from cca_core.stages.tokenizer import PICTURE
from cca_core.store import StageDirectory, Store, shard_name
from cca_core.workers.ranges import split_range

#: Directories with rows of images, by what a manifest says they were made from.
OF_SOURCE, OF_TOKENS = ("features",), ("reference",)
#: Models: never deleted here, but named.
MODELS = ("tokenizer", "base", "align")


@dataclass
class Forgotten:
    """What ``forget`` did."""

    images: int = 0
    #: Old directory -> new one, "" where there is none.
    rewritten: dict[str, str] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    #: Digests of models that saw the images, by stage.
    models: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    #: Files that show some real images, and stay with the models that they describe.
    pictures: list[str] = field(default_factory=list)


def forget(store: Store, image_ids: list[str], say: Callable[[str], None]) -> Forgotten:
    """Take images out of all data sets in ``store``, and keep them out of every later run.

    Safe to repeat: what an interrupted call left undone, the next one does.
    """
    remember_to_forget(store, image_ids)
    forgotten, done = forgotten_ids(store), Forgotten()
    touched_sources: dict[str, str] = {}
    for directory, manifest in finished(store, "source"):
        listing, names = read_source(directory)
        kept = without(listing, forgotten)
        if len(kept) < len(listing):
            done.images = max(done.images, len(listing) - len(kept))
            new = store.directory("source", listing_digest(kept, names))
            write_source(new, kept, names, manifest.config)
            touched_sources[directory.digest] = new.digest
    touched_tokens: set[str] = set()
    for directory, manifest in finished(store, "tokens"):
        if manifest.upstream["source"] in touched_sources:
            say(f"tokens/{directory.digest[:12]}: written again without them")
            done.rewritten[directory.uri] = _rewrite(directory, manifest, touched_sources, forgotten, done.notes)
            touched_tokens.add(directory.digest)
    done.models = _models(store, set(touched_sources), touched_tokens)
    touched_tokens |= {directory.digest for directory in _unfinished_with(store, forgotten)}
    done.pictures = _pictures(store, set(touched_sources))
    for stage, key, digests in (
        *((stage, "source", set(touched_sources)) for stage in OF_SOURCE),
        *((stage, "tokens", touched_tokens) for stage in OF_TOKENS),
    ):
        for directory, manifest in finished(store, stage):
            if manifest.upstream.get(key) in digests:
                _delete(directory, done)
    for digest in sorted(touched_tokens):
        for name in (*SIBLINGS[::-1], "conditions"):
            _delete(store.directory(name, digest), done)
    for digest in touched_sources:
        _delete(store.directory("source", digest), done)
    return done


def directories(store: Store, stage: str) -> list[StageDirectory]:
    """All directories of a stage, finished or not."""
    store.fs.invalidate_cache(store.root)
    folder = f"{store.root}/{stage}"
    if not store.fs.exists(folder):
        return []
    names = (path.rstrip("/").rsplit("/", 1)[1] for path in store.fs.ls(folder, detail=False))
    return [store.directory(stage, name) for name in sorted(names)]


def finished(store: Store, stage: str) -> Iterator[tuple[StageDirectory, Manifest]]:
    """The finished directories of a stage."""
    for directory in directories(store, stage):
        manifest = directory.manifest()
        if manifest is not None:
            yield directory, manifest


def _rewrite(
    directory: StageDirectory,
    manifest: Manifest,
    sources: dict[str, str],
    forgotten: frozenset[str],
    notes: list[str],
) -> str:
    """Write the shards that are left under their new digest; return its address, "" where nothing usable is left."""
    store = directory.store
    digests = {**manifest.upstream, "source": sources[manifest.upstream["source"]]}
    source = store.directory("source", digests["source"])
    tokenizer_uri = store.directory("tokenizer", digests["tokenizer"]).uri
    recipe = _recipe_of(source, manifest, tokenizer_uri)
    spec = next(spec for spec in active(recipe) if spec.name == "tokens")
    if manifest.code_version != spec.code_version:
        notes.append(f"{directory.uri} is of another release: its tokens are made again by the next run")
        return ""
    digests["tokens"] = stage_digest("tokens", spec.code_version, manifest.config, upstream_of(spec, digests))
    new = store.directory("tokens", digests["tokens"])
    _cut(directory, new, read_source(source)[0], recipe, forgotten)
    try:
        run_stage("tokens", Context(recipe, store, digests, LocalExecutor(lambda _: None, lambda *_: None)))
    except ConfigError as error:
        notes.append(f"what is left of {directory.uri} makes no data set: {error}")
        return ""
    return new.uri


def _recipe_of(source: StageDirectory, manifest: Manifest, tokenizer_uri: str) -> Recipe:
    """As much of the recipe as the tokens stage reads, from the manifests."""
    kept = source.manifest()
    assert kept is not None  # written just before
    config = {
        "source": {**kept.config, "held_out_fraction": manifest.config["held_out_fraction"], "max_bad_fraction": 1.0},
        "tokens": manifest.config["tokens"],
        "tokenizer": {"checkpoint": tokenizer_uri},
    }
    return from_dict(Recipe, config)


def _cut(
    old: StageDirectory, new: StageDirectory, listing: pa.Table, recipe: Recipe, forgotten: frozenset[str]
) -> None:
    """Deal the remaining rows of all siblings out to the shards of the shorter listing."""
    bad = without(pa.concat_tables(shard_tables(old.sibling("quarantine"))), forgotten)
    tokens = pa.concat_tables(shard_tables(old))
    views = recipe.tokens.num_views
    first = tokens.take(pa.array(np.arange(0, tokens.num_rows, views))).select(["image_id"])
    numbered = without(first.append_column("row", pa.array(np.arange(first.num_rows))), forgotten)
    rows = numbered.column("row").to_numpy()
    images = pa.concat_tables(shard_tables(old.sibling("images"))).take(pa.array(rows))
    kept = tokens.take(pa.array((rows[:, None] * views + np.arange(views)).reshape(-1)))
    known_bad = set(zip(bad.column("image_id").to_pylist(), bad.column("uri").to_pylist(), strict=True))
    names = zip(listing.column("image_id").to_pylist(), listing.column("uri").to_pylist(), strict=True)
    is_bad = np.array([name in known_bad for name in names])
    for start, stop in split_range(len(listing), recipe.tokens.rows_per_shard):
        bad_before, bad_here = int(is_bad[:start].sum()), int(is_bad[start:stop].sum())
        good_before, good_here = start - bad_before, stop - start - bad_here
        tables = {
            "images": images.slice(good_before, good_here),
            "quarantine": bad.slice(bad_before, bad_here),
            "tokens": kept.slice(good_before * views, good_here * views),
        }
        for sibling in SIBLINGS:
            new.sibling(sibling).write_table(shard_name(start, stop), tables[sibling])


def _models(store: Store, sources: set[str], tokens: set[str]) -> dict[str, list[str]]:
    """Models that were trained on the images, or on tokens of them, or that started from such a model."""
    found: dict[str, list[str]] = {}
    seen = sources | tokens
    for stage in MODELS:
        for directory, manifest in finished(store, stage):
            trained = not manifest.facts.get("imported")
            if trained and seen & set(manifest.upstream.values()):
                found.setdefault(stage, []).append(directory.digest)
                seen.add(directory.digest)
    return found


def _pictures(store: Store, sources: set[str]) -> list[str]:
    features = {d.digest for d, manifest in finished(store, "features") if manifest.upstream["source"] in sources}
    measured = {d.digest for d, manifest in finished(store, "evaluate") if manifest.upstream["features"] in features}
    shown = [
        f"{directory.uri}/{name}"
        for stage, key, digests, name in (
            ("tokenizer", "source", sources, PICTURE),
            ("baseline", "features", features, PICTURES["real images, held out"]),
            ("safety", "evaluate", measured, COPIES),
            ("safety", "evaluate", measured, UNIFORM),
        )
        for directory, manifest in finished(store, stage)
        if manifest.upstream.get(key) in digests and name in manifest.files
    ]
    return shown


def _delete(directory: StageDirectory, done: Forgotten) -> None:
    if directory.store.fs.exists(directory.path):
        directory.remove()
        done.deleted.append(directory.uri)


def _unfinished_with(store: Store, forgotten: frozenset[str]) -> Iterator[StageDirectory]:
    """tokens/ directories that a run began, did not finish, and in which one of the images is already."""
    for directory in directories(store, "tokens"):
        if directory.manifest() is None:
            names = [path.rsplit("/", 1)[1] for path in store.fs.ls(directory.path, detail=False)]
            tables = [directory.read_table(name) for name in names if name.startswith("rows-")]
            if any(len(without(table, forgotten)) < len(table) for table in tables):
                yield directory
