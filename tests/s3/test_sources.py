"""Writes the same images in every source format, on disk and on the S3 server: they give the same tokens everywhere."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cca_core.config import ExecutionConfig, Recipe, SourceConfig, TokenizerConfig, TokensConfig
from cca_core.dataset import shard_tables
from cca_core.sources import open_source
from cca_core.stages import Context, LocalExecutor, plan, run_stage
from cca_core.stages.inputs import input_digests
from cca_core.store import Store
from pipelines.ray_executor import RayExecutor
from tests.unit.test_bundle import tokenizer_of
from tests.unit.test_bundle import write as write_bundle

#: How each format is read so that an image has the id that it has in the folder.
KINDS: dict[str, dict[str, Any]] = {
    "folder": {},
    "parquet": {},
    "tar": {},
    "list": {"uri": "list/images.csv", "id_column": "key"},
    "jsonl": {"kind": "list", "uri": "jsonl/images.jsonl", "id_column": "key"},
}


class Images:
    """The same 40 images, one of them broken, in every format, on disk and on S3."""

    def __init__(self, folder: Path, s3_root: str) -> None:
        self.roots = {"local": str(folder), "s3": s3_root}
        self.paths = sorted((folder / "folder").rglob("*.png"))
        self.rows = [(f"{p.parent.name}/{p.stem}", p.parent.name, p.read_bytes()) for p in self.paths]
        for write in (self._parquet, self._tar, self._lists):
            write(folder)
        fs = Store(s3_root).fs
        for path in (path for path in folder.rglob("*") if path.is_file()):
            fs.pipe_file(f"{s3_root}/{path.relative_to(folder)}", path.read_bytes())

    def config(self, name: str, where: str) -> SourceConfig:
        settings = {"kind": name, "uri": name, **KINDS[name]}
        return SourceConfig(**{**settings, "uri": f"{self.roots[where]}/{settings['uri']}"})

    def _parquet(self, folder: Path) -> None:
        (folder / "parquet" / "deep").mkdir(parents=True)
        for name, part in (("a", self.rows[:25]), ("deep/b", self.rows[25:])):
            images = [{"bytes": data, "path": f"{key}.png"} for key, _, data in part]
            table = pa.table({"image": images, "label": [label for _, label, _ in part]})
            pq.write_table(table, folder / "parquet" / f"{name}.parquet", row_group_size=7)

    def _tar(self, folder: Path) -> None:
        (folder / "tar").mkdir()
        for name, part in (("000", self.rows[:17]), ("001", self.rows[17:])):
            with tarfile.open(folder / "tar" / f"{name}.tar", "w") as tar:
                for key, label, data in part:
                    other = ("json", json.dumps({"label": label}).encode())
                    for extension, content in (("png", data), ("cls", label.encode()) if name == "000" else other):
                        member = tarfile.TarInfo(f"{key}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))

    def _lists(self, folder: Path) -> None:
        entries = [{"uri": f"../folder/{k}.png", "label": label, "key": k} for k, label, _ in self.rows]
        (folder / "list").mkdir()
        (folder / "jsonl").mkdir()
        lines = ["uri,label,key", *(f'"{e["uri"]}",{e["label"]},"{e["key"]}"' for e in entries)]
        (folder / "list" / "images.csv").write_text("\n".join(lines) + "\n")
        (folder / "jsonl" / "images.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


@pytest.fixture
def images(store: Store, tmp_path: Path, write_images: Callable[..., Path]) -> Images:
    folder = write_images(tmp_path / "images" / "folder")
    (folder / "dark" / "003.png").rename(folder / "dark" / "3 [ä]+%20?.png")
    (folder / "light" / "004.png").write_bytes(b"not an image")
    return Images(tmp_path / "images", f"{store.uri}/images")


@pytest.mark.parametrize("name", KINDS)
def test_a_source_is_the_same_on_s3(images, name):
    seen = []
    for where in ("local", "s3"):
        source = open_source(images.config(name, where))
        listing, names = source.list()
        assert all(("s3://" in uri) == (where == "s3") for uri in listing["uri"].to_pylist())
        read = [(image.id, image.label, image.data, image.error) for image in source.read(listing.slice(5, 33))]
        seen.append((names, listing.select(["image_id", "location", "label"]).to_pydict(), read))
    assert seen[0] == seen[1]
    assert (seen[1][1]["image_id"], seen[1][0]) == (sorted(key for key, *_ in images.rows), ("dark", "light"))
    assert {data for *_, data, _ in seen[1][2]} <= {data for *_, data in images.rows}


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(
        tokens=TokensConfig(rows_per_shard=9, batch_size=8, views="centre_flip"),
        tokenizer=TokenizerConfig(checkpoint=write_bundle(tmp_path / "vq", None, tokenizer_of())),
        execution=ExecutionConfig(device="cpu"),
    )


def tokens(recipe: Recipe, source: SourceConfig, root: str, executor: Any = None) -> dict[str, bytes]:
    """Shards of tokens/ and images/ and the conditions by name, as bytes; quarantined ids beside them."""
    recipe, store = Recipe(**{**vars(recipe), "source": source}), Store(root)
    executor = executor or LocalExecutor(lambda record: None, lambda done, total: None, "cpu")
    context = Context(recipe, store, plan(recipe, input_digests(recipe, store)), executor)
    for stage in ("tokenizer", "tokens"):
        run_stage(stage, context)
    directory = context.directory("tokens")
    facts = directory.manifest().facts
    assert (facts["num_images"], facts["quarantined"]) == (39, 1)
    (bad,) = pa.concat_tables(shard_tables(directory.sibling("quarantine"))).to_pylist()
    found = {"quarantined": f"{bad['image_id']}: {bad['error']}".encode()}
    for stage in ("tokens", "images", "conditions"):
        sibling = directory.sibling(stage)
        names = [name for name in sibling.manifest().files if name.endswith(".arrow")]
        found |= {f"{stage}/{name}": sibling.read_bytes(name) for name in names}
    return found


@pytest.mark.parametrize("name", KINDS)
def test_tokens_are_the_same_bytes_whatever_the_source_and_the_store(images, recipe, store, tmp_path, name):
    expected = tokens(recipe, images.config("folder", "local"), str(tmp_path / "storage"))
    assert len(expected) == 1 + 5 + 5 + 1
    assert expected["quarantined"].startswith(b"light/004: not an image")
    rows = {
        image_id: row
        for table_name, data in expected.items()
        if table_name.startswith("tokens/")
        for image_id, row in _by_id(data).items()
    }
    assert len(rows) == 39
    assert len({row.tobytes() for row in rows.values()}) > 30, "the images differ"
    for where, root in (
        ("local", str(tmp_path / "to-local")),
        ("s3", str(tmp_path / "from-s3")),
        ("local", f"{store.uri}/to-s3"),
        ("s3", f"{store.uri}/s3-to-s3"),
    ):
        assert tokens(recipe, images.config(name, where), root) == expected


def _by_id(data: bytes) -> dict[str, np.ndarray]:
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    return {row["image_id"]: np.array(row["tokens"]) for row in table.to_pylist() if row["view"] == 0}


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Callable[[Store, int], RayExecutor]]:
    """An executor with so many actors of each kind, on one cluster."""
    made: list[RayExecutor] = []

    def make(store: Store, actors: int) -> RayExecutor:
        execution = ExecutionConfig(device="cpu", num_actors=actors, num_readers=actors)
        made.append(RayExecutor(store, execution, "", lambda record: None, lambda done, total: None))
        made[-1].start()
        return made[-1]

    yield make
    made[0].stop()


@pytest.mark.parametrize("actors", [1, 2])
def test_tokens_are_the_same_bytes_for_any_number_of_actors(images, recipe, store, tmp_path, on_ray, actors):
    expected = tokens(recipe, images.config("folder", "local"), str(tmp_path / "storage"))
    root = f"{store.uri}/on-ray"
    assert tokens(recipe, images.config("tar", "s3"), root, on_ray(Store(root), actors)) == expected
