"""Reads a range of a source's listing (images or recorded codes), writes one shard of tokens/ and of quarantine/."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from cca_core import pairs
from cca_core.config import ConfigError, Recipe
from cca_core.generate import pad_rows, padded_batches
from cca_core.manifest import FileEntry, Manifest
from cca_core.models import load_tokenizer
from cca_core.models.load import read_spec
from cca_core.schema import CONDITIONS, QUARANTINE, tokens_schema
from cca_core.sources import open_source
from cca_core.store import StageDirectory, shard_name
from cca_core.train.distributed import pick_device
from cca_core.workers.codes import RecordedTokens, read_codes
from cca_core.workers.images import DecodedImage, decode_views
from cca_core.workers.ranges import RangeWorker, entry_of, report, split_range

#: Listed once by the driver; the underscore hides it from pyarrow.dataset.
LISTING_NAME = "_listing.arrow"

#: What a worker reads of each image before it has its tokens.
Read = TypeVar("Read", DecodedImage, RecordedTokens)


def prepare(directory: StageDirectory, recipe: Recipe) -> list[dict[str, Any]]:
    """List the source, write the listing and the conditions; return the units that still have no shard."""
    listing, class_names = open_source(recipe.source).list()
    directory.write_table(LISTING_NAME, listing)
    conditions = directory.sibling("conditions")
    if conditions.manifest() is None:
        table = pa.table({"index": list(range(len(class_names))), "name": list(class_names)}, schema=CONDITIONS)
        entry = conditions.write_table("conditions.arrow", table)
        conditions.commit(_manifest(conditions, {}, {}, {"conditions.arrow": entry}, table.num_rows))
    ranges = split_range(len(listing), recipe.tokens.rows_per_shard)
    return [{"start": a, "stop": b} for a, b in ranges if not directory.readable(shard_name(a, b))]


class TokensShard(RangeWorker, Generic[Read]):
    """Turns one range of the listing into tokens. Quarantine is written first: the token shard says the unit is
    done."""

    #: The tokenizer's.
    spec: Any

    def __init__(self, directory: StageDirectory, recipe: Recipe) -> None:
        self.directory, self.recipe = directory, recipe
        self.source = open_source(recipe.source)
        self.listing = directory.read_table(LISTING_NAME)

    @abstractmethod
    def read(self, listing: pa.Table) -> Iterable[Read]:
        """The images of a slice of the listing, in its order; with ``error`` where one cannot be used."""

    @abstractmethod
    def tokens(self, images: list[Read]) -> NDArray[np.int64]:
        """Tokens [n V, L] of all views of readable images, image by image."""

    @property
    def num_tokens(self) -> int:
        """Of one view."""
        return self.spec.num_tokens(self.recipe.tokens.image_size)

    def run(self, *, start: int, stop: int) -> dict[str, Any]:
        images = list(self.read(self.listing.slice(start, stop - start)))
        good = [image for image in images if not image.error]
        bad = [image for image in images if image.error]
        quarantine = pa.table(
            {
                "image_id": [image.id for image in bad],
                "uri": [image.uri for image in bad],
                "error": [image.error for image in bad],
            },
            schema=QUARANTINE,
        )
        name = shard_name(start, stop)
        self.directory.sibling("quarantine").write_table(name, quarantine)
        entry = self.directory.write_table(name, self._table(good))
        return report(name, entry, images=len(images), quarantined=len(bad))

    def _table(self, images: list[Read]) -> pa.Table:
        schema = tokens_schema(self.num_tokens, self.spec.codebook_size)
        if not images:
            return schema.empty_table()
        ids = [image.id for image in images]
        held_out = pairs.held_out(pairs.id_hashes(ids), self.recipe.source.held_out_fraction)
        views = self.recipe.tokens.num_views
        tokens = self.tokens(images).astype(str(schema.field("tokens").type.value_type))
        return pa.table(
            {
                "image_id": [image_id for image_id in ids for _ in range(views)],
                "view": np.tile(np.arange(views, dtype=np.uint8), len(ids)),
                "label": np.repeat(np.asarray([image.label for image in images], np.int32), views),
                "held_out": np.repeat(held_out, views),
                "tokens": pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), self.num_tokens),
            },
            schema=schema,
        )


class EncodeShard(TokensShard[DecodedImage]):
    """Decodes and encodes images."""

    def __init__(self, directory: StageDirectory, recipe: Recipe, tokenizer_uri: str, num_threads: int) -> None:
        super().__init__(directory, recipe)
        torch.set_num_threads(num_threads)
        self.device = pick_device(recipe.execution.device)
        self.tokenizer = load_tokenizer(tokenizer_uri, device=str(self.device))
        self.spec = self.tokenizer.spec

    def read(self, listing: pa.Table) -> Iterable[DecodedImage]:
        return decode_views(self.source, listing, self.recipe.tokens)

    @torch.inference_mode()
    def tokens(self, images: list[DecodedImage]) -> NDArray[np.int64]:
        """In padded batches of one shape: the same images give the same tokens in any company."""
        pixels_NCHW = torch.from_numpy(np.concatenate([image.views_VSS3 for image in images])).permute(0, 3, 1, 2)
        size = self.recipe.tokens.batch_size
        parts = []
        for rows in padded_batches(len(pixels_NCHW), size):
            pixels = (pad_rows(pixels_NCHW[rows], size).to(self.device).float() / 255 - 0.5) / 0.5
            parts.append(self.tokenizer.encode(pixels)[: rows.stop - rows.start].cpu())
        return torch.cat(parts).numpy()


class ImportShard(TokensShard[RecordedTokens]):
    """Takes over recorded codes. Of the tokenizer only the spec is read: no network runs."""

    def __init__(self, directory: StageDirectory, recipe: Recipe, tokenizer_uri: str, num_threads: int) -> None:
        super().__init__(directory, recipe)
        del num_threads
        self.spec = read_spec(tokenizer_uri, "tokenizer")

    def read(self, listing: pa.Table) -> Iterable[RecordedTokens]:
        return read_codes(
            self.source,
            listing,
            num_views=self.recipe.tokens.num_views,
            num_tokens=self.num_tokens,
            codebook_size=self.spec.codebook_size,
        )

    def tokens(self, images: list[RecordedTokens]) -> NDArray[np.int64]:
        return np.concatenate([image.tokens_VL for image in images])


def finish(
    directory: StageDirectory,
    recipe: Recipe,
    done: list[dict[str, Any]],
    *,
    section: dict[str, Any],
    upstream: dict[str, str],
    code_version: int,
) -> Manifest:
    """Check the shards, count, and write the manifests of tokens/ and quarantine/.

    ``done`` are the reports of the units run now; shards of earlier attempts are read and hashed again.
    """
    total = directory.read_table(LISTING_NAME).num_rows
    reported = {found["file"]: entry_of(found) for found in done}
    files: dict[str, FileEntry] = {}
    quarantine = directory.sibling("quarantine")
    quarantine_files: dict[str, FileEntry] = {}
    labels: list[np.ndarray] = []
    held_out = 0
    for start, stop in split_range(total, recipe.tokens.rows_per_shard):
        name = shard_name(start, stop)
        table = directory.read_table(name)
        files[name] = reported.get(name) or directory.entry(name, rows=table.num_rows)
        bad = quarantine.read_table(name)
        quarantine_files[name] = quarantine.entry(name, rows=bad.num_rows)
        first_views = table.filter(pc.equal(table.column("view"), 0))
        labels.append(first_views.column("label").to_numpy())
        held_out += pc.sum(first_views.column("held_out")).as_py() or 0
    names = directory.sibling("conditions").read_table("conditions.arrow").column("name").to_pylist()
    counts = np.bincount(np.concatenate(labels), minlength=len(names))
    images, quarantined = int(counts.sum()), sum(entry.rows for entry in quarantine_files.values())
    _check_usable(recipe, images, quarantined, counts, names)
    schema = table.schema
    facts = {
        "num_images": images,
        "num_views": recipe.tokens.num_views,
        "num_tokens": schema.field("tokens").type.list_size,
        "num_classes": len(names),
        "quarantined": quarantined,
        "held_out": int(held_out),
        "images_per_class": counts.tolist(),
        # A negative is the label of a random row: it equals the true one with this probability.
        "expected_share_negative_equals_positive": float(((counts / images) ** 2).sum()),
    }
    quarantine.commit(_manifest(quarantine, section, upstream, quarantine_files, quarantined, code_version))
    files[LISTING_NAME] = directory.entry(LISTING_NAME, rows=total)
    manifest = _manifest(
        directory, section, upstream, files, images * recipe.tokens.num_views, code_version, facts, str(schema)
    )
    directory.commit(manifest)
    return manifest


def _check_usable(recipe: Recipe, images: int, quarantined: int, counts: np.ndarray, names: list[str]) -> None:
    where = recipe.source.uri or recipe.source.kind
    if images == 0:
        raise ConfigError(
            f"no readable image in {where}: all {quarantined} are in quarantine/, with the reason of each"
        )
    if (counts > 0).sum() < 2:
        raise ConfigError(
            f"{where} has images of one class only ({names[int(counts.argmax())]}): CCA contrasts at least two classes"
        )


def _manifest(
    directory: StageDirectory,
    section: dict[str, Any],
    upstream: dict[str, str],
    files: dict[str, FileEntry],
    rows: int,
    code_version: int = 0,
    facts: dict[str, Any] | None = None,
    schema: str = "",
) -> Manifest:
    return Manifest(
        stage=directory.stage,
        code_version=code_version,
        digest=directory.digest,
        config=section,
        upstream=upstream,
        files=files,
        rows=rows,
        facts=facts or {},
        schema=schema,
    )
