"""Reads the parts of shards that workers made, writes shards of tokens/, images/ and quarantine/; watches progress and
how many images are bad."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cca_core import pairs
from cca_core.config import Recipe
from cca_core.manifest import FileEntry
from cca_core.schema import IMAGES, QUARANTINE, tokens_schema
from cca_core.stages.inputs import too_many_bad
from cca_core.store import StageDirectory, shard_name
from cca_core.train.pace import Pace
from cca_core.workers.decode import found_table

#: Directories of one digest whose shards have the same names. tokens/ is written last: its shard says that all are.
SIBLINGS = ("images", "quarantine", "tokens")


class ShardWriter:
    """Gathers the parts of each shard, in whatever order they come, and writes the shard when it has all of them."""

    def __init__(self, directory: StageDirectory, recipe: Recipe, tokenizer_spec: Any) -> None:
        self.directory, self.recipe = directory, recipe
        self.num_tokens = tokenizer_spec.num_tokens(recipe.tokens.image_size)
        self.schema = tokens_schema(self.num_tokens, tokenizer_spec.codebook_size)
        #: (directory name, shard) -> entry of what was written here.
        self.written: dict[tuple[str, str], FileEntry] = {}
        self._parts: dict[int, list[dict[str, Any]]] = defaultdict(list)

    def add(self, part: dict[str, Any], total: int) -> None:
        """Take one part of a listing of ``total`` rows; write its shard if it was the last one missing."""
        rows = self.recipe.tokens.rows_per_shard
        start = part["start"] // rows * rows
        stop = min(start + rows, total)
        parts = self._parts[start]
        parts.append(part)
        if sum(part["stop"] - part["start"] for part in parts) == stop - start:
            self._write(shard_name(start, stop), sorted(self._parts.pop(start), key=lambda part: part["start"]))

    def _write(self, name: str, parts: list[dict[str, Any]]) -> None:
        found = pa.concat_tables([found_table(part["found"]) for part in parts])
        tokens = np.frombuffer(b"".join(part["tokens"] for part in parts), np.int64).reshape(-1, self.num_tokens)
        bad = pc.not_equal(found.column("error"), "")
        good = found.filter(pc.invert(bad))
        tables = {
            "images": good.select(IMAGES.names),
            "quarantine": found.filter(bad).select(QUARANTINE.names),
            "tokens": self._tokens(good, tokens),
        }
        for sibling in SIBLINGS:
            self.written[sibling, name] = self.directory.sibling(sibling).write_table(name, tables[sibling])

    def _tokens(self, good: pa.Table, tokens: np.ndarray) -> pa.Table:
        if not good.num_rows:
            return self.schema.empty_table()
        ids, views = good.column("image_id").to_pylist(), self.recipe.tokens.num_views
        held_out = pairs.held_out(pairs.id_hashes(ids), self.recipe.source.held_out_fraction)
        values = tokens.astype(str(self.schema.field("tokens").type.value_type)).reshape(-1)
        return pa.table(
            {
                "image_id": [image_id for image_id in ids for _ in range(views)],
                "view": np.tile(np.arange(views, dtype=np.uint8), len(ids)),
                "label": np.repeat(good.column("label").to_numpy(), views),
                "held_out": np.repeat(held_out, views),
                "tokens": pa.FixedSizeListArray.from_arrays(pa.array(values), self.num_tokens),
            },
            schema=self.schema,
        )


class Watch:
    """Says how far the work is, and ends it where too many images are bad."""

    def __init__(
        self, recipe: Recipe, on_log: Callable[[dict[str, float]], None], *, total: int, done: int, errors: list[str]
    ) -> None:
        """``done`` images were finished by earlier attempts, which met ``errors``."""
        self.recipe, self.total, self.done = recipe, total, done
        self.errors, self.pace = Counter(errors), Pace(on_log, total, done)

    def parts(self, parts: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Hand on parts. Raises ConfigError as soon as the bad ones exceed ``source.max_bad_fraction`` of all."""
        for part in parts:
            yield part
            self.done += part["stop"] - part["start"]
            self.errors.update(error for error in found_table(part["found"]).column("error").to_pylist() if error)
            self.pace(self.done, bad_images=self.errors.total())
            self.check()

    def check(self) -> None:
        if self.errors.total() > self.recipe.source.max_bad_fraction * self.total:
            raise too_many_bad(self.recipe, self.errors, self.total)
