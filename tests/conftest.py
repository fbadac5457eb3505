"""Writes small data sets, models and images below pytest's temporary folders, for several tiers of tests."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from fsspec.core import url_to_fs
from PIL import Image

from cca_core import pairs
from cca_core.manifest import Manifest
from cca_core.models.llamagen.network import LlamaGen, LlamaGenSpec
from cca_core.schema import CONDITIONS, tokens_schema
from cca_core.store import StageDirectory, Store, shard_name

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Exact values depend on the number of threads, and an earlier test may have changed it."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def random_llamagen() -> Callable[..., LlamaGen]:
    """Makes a small LlamaGen whose output layer is random too: official initialisation makes every token as likely."""

    def make(seed: int = 0, **sizes: int) -> LlamaGen:
        default = {"vocab_size": 24, "num_tokens": 16, "num_classes": 3, "dim": 16, "num_layers": 2}
        spec = LlamaGenSpec(**{**default, "num_heads": 2, "num_kv_heads": 2, "ffn_dim": 32, **sizes})
        generator = torch.Generator().manual_seed(seed)
        model = LlamaGen(spec)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.4, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def write_tokens() -> Callable[..., StageDirectory]:
    """Writes a token data set of random tokens, whose first one tells the class: images that a model can learn."""

    def write(root: Path, *, images: int = 60, views: int = 2, rows_per_shard: int = 25) -> StageDirectory:
        rng = np.random.default_rng(0)
        directory = Store(str(root)).directory("tokens", "t" * 64)
        classes, num_tokens, vocab_size = 3, 16, 24
        ids = [f"image-{i:03d}" for i in range(images)]
        labels = rng.integers(classes, size=images)
        held_out = pairs.held_out(pairs.id_hashes(ids), 0.2)
        tokens = rng.integers(vocab_size, size=(images, views, num_tokens)).astype(np.uint16)
        tokens[:, :, 0] = labels[:, None]
        files = {}
        for start in range(0, images, rows_per_shard):
            stop = min(start + rows_per_shard, images)
            flat = pa.array(tokens[start:stop].reshape(-1))
            table = pa.table(
                {
                    "image_id": np.repeat(ids[start:stop], views),
                    "view": np.tile(np.arange(views, dtype=np.uint8), stop - start),
                    "label": np.repeat(labels[start:stop], views).astype(np.int32),
                    "held_out": np.repeat(held_out[start:stop], views),
                    "tokens": pa.FixedSizeListArray.from_arrays(flat, num_tokens),
                },
                schema=tokens_schema(num_tokens, vocab_size),
            )
            files[shard_name(start, stop)] = directory.write_table(shard_name(start, stop), table)
        names = pa.table({"index": range(classes), "name": ["ant", "bee", "cat"]}, schema=CONDITIONS)
        directory.sibling("conditions").write_table("conditions.arrow", names)
        facts = {"num_images": images, "num_views": views, "num_tokens": num_tokens, "num_classes": classes}
        manifest = Manifest(
            stage="tokens",
            code_version=1,
            digest=directory.digest,
            config={},
            upstream={},
            files=files,
            rows=images * views,
            facts=facts,
        )
        directory.commit(manifest)
        return directory

    return write


@pytest.fixture(scope="session")
def write_codes() -> Callable[..., None]:
    """Writes codes and labels as the official extraction does, to any URI: image id -> codes [V, N], and -> label."""

    def write(
        root: Path | str, codes: Mapping[str, np.ndarray], labels: Mapping[str, int], *, name: str = "set8"
    ) -> None:
        fs, path = url_to_fs(str(root))
        arrays = {f"{name}_codes/{n}.npy": np.asarray(views, np.int64)[None] for n, views in codes.items()}
        arrays |= {f"{name}_labels/{n}.npy": np.array([label], np.int64) for n, label in labels.items()}
        for file, array in arrays.items():
            data = io.BytesIO()
            np.save(data, array)
            fs.makedirs(f"{path}/{file}".rpartition("/")[0], exist_ok=True)
            fs.pipe_file(f"{path}/{file}", data.getvalue())

    return write


@pytest.fixture(scope="session")
def write_images() -> Callable[..., Path]:
    """Writes a folder of 8x8 PNG files, one folder per class: two noisy patterns that a model can tell apart."""

    def write(root: Path, classes: tuple[str, ...] = ("dark", "light"), per_class: int = 20) -> Path:
        rng = np.random.default_rng(0)
        for label, name in enumerate(classes):
            (root / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = rng.integers(0, 90, size=(8, 8, 3)) + 160 * label // max(1, len(classes) - 1)
                Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:03d}.png")
        return root

    return write
