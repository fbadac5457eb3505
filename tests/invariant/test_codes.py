"""Writes images, their recorded codes and storages of both: codes in the official layout give the tokens of images."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

from cca_core.config import (
    AlignConfig,
    BaseConfig,
    ConfigError,
    EvaluateConfig,
    ExecutionConfig,
    FeaturesConfig,
    Recipe,
    SourceConfig,
    TokenizerConfig,
    TokensConfig,
)
from cca_core.dataset import class_names, shard_tables
from cca_core.generate import decode_images
from cca_core.models import load_tokenizer, to_uint8
from cca_core.models.llamagen.tokenizer import VQTokenizer
from cca_core.stages import Context, LocalExecutor, plan, run_stage
from cca_core.stages.graph import active
from cca_core.stages.inputs import check_checkpoints, input_digests
from cca_core.store import Store
from cca_core.workers.images import load_images
from tests.unit.test_bundle import tokenizer_of
from tests.unit.test_bundle import write as write_bundle

ALIGNED = ("tokenizer", "tokens", "features", "base", "baseline", "reference", "align")


def run(recipe: Recipe, root: Path, *stages: str) -> Context:
    """These stages, as `python -m cca_core` runs them."""
    store = Store(str(root))
    digests = plan(recipe, input_digests(recipe))
    check_checkpoints(recipe, store.directory("base", digests["base"]))
    executor = LocalExecutor(lambda record: None, lambda done, total: None, "cpu")
    context = Context(recipe, store, digests, executor)
    for stage in (spec.name for spec in active(recipe) if spec.name in stages):
        run_stage(stage, context)
    return context


def rows(context: Context, stage: str = "tokens") -> pa.Table:
    directory = context.directory("tokens").sibling(stage)
    return pa.concat_tables(shard_tables(directory))


class Recorded(NamedTuple):
    """A run over images, and the folder of official codes of what it made."""

    recipe: Recipe
    encoded: Context
    codes: Path

    def of_codes(self, uri: Path | str, **tokens: object) -> Recipe:
        return replace(
            self.recipe,
            source=SourceConfig(kind="codes", uri=str(uri), class_names=("dark", "light")),
            tokens=replace(self.recipe.tokens, **tokens),
        )


@pytest.fixture(scope="module")
def recorded(
    tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., Path], write_codes: Callable[..., None]
) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    images = write_images(folder / "images")
    recipe = Recipe(
        source=SourceConfig(kind="folder", uri=str(images)),
        tokens=TokensConfig(rows_per_shard=9, batch_size=8, views="centre_flip"),
        tokenizer=TokenizerConfig(checkpoint=write_bundle(folder / "vq", None, tokenizer_of())),
        features=FeaturesConfig(width=8, feature_dim=8, epochs=1),
        base=BaseConfig(dim=16, num_layers=1, num_heads=2, epochs=1),
        align=AlignConfig(epochs=1),
        evaluate=EvaluateConfig(
            num_samples=16, seeds=(0,), cfg_scales=(2.0,), temperatures=(), batch_size=8, cost_images=8
        ),
        execution=ExecutionConfig(device="cpu"),
    )
    encoded = run(recipe, folder / "storage", "tokenizer", "tokens")
    table = rows(encoded)
    tokens = np.array(table.column("tokens").to_pylist()).reshape(-1, 2, 16)
    labels = table.column("label").to_pylist()[::2]
    names = [str(n) for n in range(len(labels))]
    write_codes(folder / "codes", dict(zip(names, tokens, strict=True)), dict(zip(names, labels, strict=True)))
    return Recorded(recipe, encoded, folder / "codes")


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VQTokenizer, "encode", None)


def test_recorded_codes_become_the_tokens_that_were_recorded(recorded, tmp_path, no_encoder):
    context = run(recorded.of_codes(recorded.codes), tmp_path, "tokenizer", "tokens")
    expected, found = rows(recorded.encoded), rows(context)
    assert found.schema == expected.schema
    order = sorted(range(40), key=str)
    assert found.column("image_id").to_pylist() == [str(n) for n in order for _ in range(2)]
    wanted = expected.take([2 * n + view for n in order for view in range(2)])
    for name in ("view", "label", "tokens"):
        assert found.column(name).to_pylist() == wanted.column(name).to_pylist()
    facts, before = (run.directory("tokens").manifest().facts for run in (context, recorded.encoded))
    assert 0 < facts["held_out"] < 40
    by_id = ("held_out", "share_negative_equals_positive", "data_tests")
    assert set(before) - set(facts) == {"reconstruction_psnr_db", "reconstructed_images"}, "there is no image to show"
    assert {name: before[name] for name in facts if name not in by_id} == {
        name: value for name, value in facts.items() if name not in by_id
    }
    assert class_names(context.directory("tokens")) == ("dark", "light")
    assert len(shard_tables(context.directory("tokens"))) == 5
    assert rows(context, "quarantine").num_rows == 0


def test_the_rows_do_not_depend_on_root_store_or_size_of_shards(recorded, tmp_path):
    expected = rows(run(recorded.of_codes(recorded.codes), tmp_path / "local", "tokenizer", "tokens"))
    memory = f"memory://{tmp_path.name}"
    store, local = Store(memory), recorded.codes
    for path in local.rglob("*.npy"):
        store.write_bytes(f"{store.root}/{path.relative_to(local)}", path.read_bytes())
    remote = recorded.of_codes(f"{memory}/set8_codes", rows_per_shard=16)
    assert rows(run(remote, tmp_path / "remote", "tokenizer", "tokens")).equals(expected)


def test_everything_up_to_the_alignment_runs_on_codes(recorded, tmp_path):
    context = run(recorded.of_codes(recorded.codes), tmp_path, *ALIGNED)
    assert all(context.directory(stage).manifest() is not None for stage in ALIGNED)
    features, baseline = (context.directory(stage) for stage in ("features", "baseline"))
    assert features.manifest().upstream == {name: context.digests[name] for name in ("source", "tokenizer")}
    assert features.manifest().facts["real_images"] == "reconstructions, decoded from recorded codes"
    assert baseline.read_json("results.json")["real"] == "all, reconstructions, decoded from recorded codes"
    assert baseline.read_bytes("grid-real.png").startswith(b"\x89PNG")


def test_the_decoded_centre_stands_in_for_the_image(recorded, tmp_path, write_codes):
    generator = np.random.default_rng(0)
    codes = {f"{n:03d}": generator.integers(24, size=(10, 16)) for n in range(40)}
    write_codes(tmp_path, codes, {name: int(name) % 2 for name in codes})
    (tmp_path / "set8_codes" / "007.npy").write_bytes(b"torn")
    recipe = recorded.of_codes(tmp_path, views="ten_crop")
    kept = run(recipe, tmp_path / "storage").source()
    images = load_images(recipe, kept, recipe.tokenizer.checkpoint)
    del codes["007"]
    centres = torch.from_numpy(np.stack([views[4] for views in codes.values()]))
    decoded = to_uint8(decode_images(load_tokenizer(recipe.tokenizer.checkpoint), centres, batch_size=39))
    assert images.pixels.shape == (39, 3, 8, 8)
    assert np.abs(images.pixels - decoded.numpy().transpose(0, 3, 1, 2).astype(int)).max() <= 1
    assert images.labels.tolist() == [int(name) % 2 for name in codes]
    assert images.class_names == ("dark", "light")
    assert 0 < images.held_out.sum() < 39


def npy(array: np.ndarray, **settings: bool) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **settings)
    return out.getvalue()


BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "half": (npy(np.zeros((1, 2, 16), np.int64))[:200], "not a whole .npy array"),
    "pickle": (
        npy(np.array([{}], object), allow_pickle=True),
        "Object arrays cannot be loaded when allow_pickle=False",
    ),
    "float": (npy(np.zeros((1, 2, 16))), "holds float64, not integers"),
    "ten views": (npy(np.zeros((1, 10, 16), np.int64)), "codes of shape [1, 10, 16] instead of [1, 2, 16]"),
    "two images": (npy(np.zeros((2, 2, 16), np.int64)), "codes of shape [2, 2, 16] instead of [1, 2, 16]"),
    "flat": (npy(np.zeros((2, 16), np.int64)), "codes of shape [2, 16] instead of [1, 2, 16]"),
    "too large": (npy(np.full((1, 2, 16), 24)), "codes from 24 to 24, outside the codebook of 24 (0 to 23)"),
    "negative": (npy(np.full((1, 2, 16), -1)), "codes from -1 to -1, outside the codebook of 24 (0 to 23)"),
}


def test_bad_files_are_quarantined_with_the_reason(recorded, tmp_path, write_codes):
    tokens = np.random.default_rng(0).integers(24, size=(30, 2, 16))
    good = {f"{n:02d}": tokens[n] for n in range(30)}
    write_codes(tmp_path, good, {name: int(name) % 2 for name in good} | {"no codes": 1})
    (tmp_path / "set8_labels" / "17.npy").unlink()
    for number, (data, _) in enumerate(BAD_FILES.values()):
        (tmp_path / "set8_codes" / f"{number:02d}.npy").write_bytes(data)
    # The largest code and other integers are as good.
    (tmp_path / "set8_codes" / "29.npy").write_bytes(npy(np.full((1, 2, 16), 23, np.uint16)))
    context = run(recorded.of_codes(tmp_path), tmp_path / "storage", "tokenizer", "tokens")
    bad = rows(context, "quarantine").to_pylist()
    reasons = {row["image_id"]: row["error"] for row in bad}
    assert list(reasons) == [f"{n:02d}" for n in range(len(BAD_FILES))] + ["17", "no codes"]
    for number, (_, reason) in enumerate(BAD_FILES.values()):
        assert reason in reasons[f"{number:02d}"]
    assert "no label: FileNotFoundError" in reasons["17"]
    assert "FileNotFoundError" in reasons["no codes"]
    assert bad[0]["uri"].endswith("set8_codes/00.npy")
    left = [name for name in good if name not in reasons]
    table = rows(context)
    assert table.column("image_id").to_pylist()[::2] == left
    assert table.column("tokens").to_pylist()[-2:] == [[23] * 16] * 2
    facts = context.directory("tokens").manifest().facts
    assert (facts["num_images"], facts["quarantined"]) == (len(left), len(reasons))


@pytest.mark.parametrize(
    ("shape", "tokens", "message"),
    [
        ((2, 16), {"views": "ten_crop"}, r"have 2 views .*ten_crop has 10: set tokens\.views=centre_flip"),
        ((10, 16), {}, r"have 10 views of an image, tokens\.views=centre_flip has 2: set tokens\.views=ten_crop"),
        ((20, 16), {}, r"have 20 views .*: a recipe knows 1 \(centre\), 2 \(centre_flip\), 10 \(ten_crop\)"),
        ((2, 16), {"image_size": 16}, r"have 16 tokens per view, tokens\.image_size=16 has 64 .*: set tokens\.image_"),
        ((2, 4, 4), {}, r"have shape \[1, 2, 4, 4\], not \[1, views, tokens\]: point source\.uri at"),
    ],
    ids=["fewer views", "more views", "views of two folders", "size", "grid"],
)
def test_codes_of_other_views_or_sizes_are_refused_before_anything_runs(
    recorded, tmp_path, write_codes, shape, tokens, message
):
    write_codes(tmp_path / "codes", {str(n): np.zeros(shape) for n in range(6)}, {str(n): n % 2 for n in range(6)})
    with pytest.raises(ConfigError, match=message):
        run(recorded.of_codes(tmp_path / "codes", **tokens), tmp_path / "storage", "tokenizer", "tokens")
    assert not (tmp_path / "storage").exists()
