"""Writes small data sets: what the data stages make depends on the data alone, not on how or in what order they ran."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from cca_core import pairs
from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.config import AlignConfig, ExecutionConfig, Recipe, ReferenceConfig, SourceConfig, TokensConfig
from cca_core.dataset import TokenDataset, shard_tables, valid_manifest
from cca_core.models import family
from cca_core.models.llamagen.network import LlamaGen
from cca_core.models.llamagen.tokenizer import VQSpec, VQTokenizer
from cca_core.sources import listing_digest, open_source
from cca_core.stages import Context, LocalExecutor, run_stage
from cca_core.store import StageDirectory, Store
from tests.invariant.interruptions import InOrder, Killed, back, files, stamps, turn

DIGESTS = {name: name[0] * 64 for name in ("source", "tokenizer", "tokens", "base", "reference")}


class Tokens:
    """The tokens stage over a folder of images, two of them broken, with a random tokenizer."""

    STAGES = ("tokens", "images", "quarantine", "conditions", "source")

    def __init__(self, images: Path) -> None:
        source = SourceConfig(kind="folder", uri=str(images))
        tokens = TokensConfig(rows_per_shard=9, batch_size=8, views="centre_flip")
        self.recipe = Recipe(source=source, tokens=tokens, execution=ExecutionConfig(device="cpu"))

    def run(self, root: Path, executor: LocalExecutor, **changes: Any) -> StageDirectory:
        store = Store(str(root))
        tokenizer = store.directory("tokenizer", DIGESTS["tokenizer"])
        if not tokenizer.exists("bundle.json"):
            for name, data in random_tokenizer().items():
                tokenizer.write_bytes(name, data)
        recipe = replace(self.recipe, tokens=replace(self.recipe.tokens, **changes))
        digests = {**DIGESTS, "source": listing_digest(*open_source(recipe.source).list())}
        run_stage("tokens", Context(recipe, store, digests, executor))
        return store.directory("tokens", DIGESTS["tokens"])


def random_tokenizer() -> dict[str, bytes]:
    spec = VQSpec(
        width=32, width_multipliers=(1, 1), num_res_blocks=1, latent_channels=32, codebook_size=16, codebook_dim=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = family("llamagen").build_tokenizer(spec)
    info = BundleInfo(model=None, tokenizer=Part("llamagen", vars(spec)), image_size=8)
    return bundle_files(info, None, tokenizer.state_dict())


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., Path]) -> Tokens:
    images = write_images(tmp_path_factory.mktemp("images") / "train")
    for broken in ("dark/007.png", "light/019.png"):
        (images / broken).write_bytes(b"not an image")
    return Tokens(images)


@pytest.fixture(scope="module")
def plain(tokens: Tokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    tokens.run(root, InOrder())
    return root


def test_the_tokens_differ_from_image_to_image(plain):
    dataset = TokenDataset(Store(str(plain)).directory("tokens", DIGESTS["tokens"]))
    assert (len(dataset), dataset.num_views, dataset.num_tokens) == (38, 2, 16)
    assert dataset.manifest.facts["quarantined"] == 2
    rows = dataset.tokens(np.arange(38).repeat(2), np.tile([0, 1], 38))
    assert len(np.unique(rows, axis=0)) > 70


@pytest.mark.parametrize("order", [back, turn])
def test_the_order_of_the_shards_leaves_no_trace(tokens, plain, tmp_path, order):
    tokens.run(tmp_path, InOrder(order))
    assert files(tmp_path, *tokens.STAGES) == files(plain, *tokens.STAGES)


def test_an_interruption_leaves_no_trace(tokens, plain, tmp_path):
    with pytest.raises(Killed):
        tokens.run(tmp_path, InOrder(back, killed_after=5))
    before = stamps(tmp_path)
    assert len(before) == 2
    assert Store(str(tmp_path)).directory("tokens", DIGESTS["tokens"]).manifest() is None
    tokens.run(tmp_path, InOrder())
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before, "finished shards are not made again"
    assert files(tmp_path, *tokens.STAGES) == files(plain, *tokens.STAGES)


def test_an_interruption_inside_a_shard_leaves_no_trace(tokens, plain, tmp_path, monkeypatch):
    write, shards = Store.write_bytes, []

    def write_or_die(self: Store, path: str, data: bytes) -> None:
        shards.extend([path] if "/tokens/" in path and "/rows-" in path else [])
        if len(shards) == 2:
            raise Killed
        write(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_bytes", write_or_die)
        with pytest.raises(Killed):
            tokens.run(tmp_path, InOrder())
    quarantined = sorted((tmp_path / "quarantine").rglob("rows-*"))
    assert len(quarantined) == 2 > len(stamps(tmp_path)), "killed between the two files of a unit"
    tokens.run(tmp_path, InOrder())
    assert files(tmp_path, *tokens.STAGES) == files(plain, *tokens.STAGES)


def test_the_shard_size_changes_the_files_but_not_the_rows(tokens, plain, tmp_path):
    other = tokens.run(tmp_path, InOrder(), rows_per_shard=16)
    expected = Store(str(plain)).directory("tokens", DIGESTS["tokens"])
    assert len(shard_tables(other)) == 3 < len(shard_tables(expected)) == 5
    assert pa.concat_tables(shard_tables(other)).equals(pa.concat_tables(shard_tables(expected)))


def test_every_call_of_the_tokenizer_has_the_shape_of_a_full_batch(tokens, tmp_path, monkeypatch):
    shapes, encode = [], VQTokenizer.encode
    monkeypatch.setattr(VQTokenizer, "encode", lambda self, images: shapes.append(images.shape) or encode(self, images))
    tokens.run(tmp_path, InOrder())
    assert set(shapes) == {(8, 3, 8, 8)}


def test_a_batch_that_is_left_to_the_device_gives_the_same_tokens(tokens, plain, tmp_path, monkeypatch):
    shapes, encode = [], VQTokenizer.encode
    monkeypatch.setattr(VQTokenizer, "encode", lambda self, images: shapes.append(images.shape) or encode(self, images))
    tokens.run(tmp_path, InOrder(), batch_size=0)
    assert {shape[0] for shape in shapes} == {256}
    assert files(tmp_path, *tokens.STAGES).keys() == files(plain, *tokens.STAGES).keys()
    found, expected = (
        pa.concat_tables(shard_tables(Store(str(root)).directory("tokens", DIGESTS["tokens"])))
        for root in (tmp_path, plain)
    )
    assert found.equals(expected)


class Reference:
    """The reference stage over random tokens, with a random base: two epochs, held-out images among the rows."""

    def __init__(self, root: Path, write_tokens: Callable[..., StageDirectory], model: torch.nn.Module) -> None:
        self.root, self.model = root, model
        self.dataset = TokenDataset(write_tokens(root, images=80))
        info = BundleInfo(model=Part("llamagen", vars(model.spec)), tokenizer=None, image_size=8)
        for name, data in bundle_files(info, model.state_dict(), None).items():
            Store(str(root)).directory("base", DIGESTS["base"]).write_bytes(name, data)

    def run(self, name: str, executor: LocalExecutor, *, rows_per_shard: int = 20) -> StageDirectory:
        """Made under a digest of its own, so that several lie over the same tokens."""
        recipe = Recipe(
            seed=5,
            tokens=TokensConfig(rows_per_shard=rows_per_shard),
            reference=ReferenceConfig(null_share_max=0.3),
            align=AlignConfig(epochs=2),
            execution=ExecutionConfig(device="cpu", micro_batch_size=8),
        )
        store = Store(str(self.root))
        run_stage("reference", Context(recipe, store, {**DIGESTS, "reference": name}, executor))
        return store.directory("reference", name)

    def shards(self, name: str) -> dict[str, bytes]:
        return {k: v for k, v in files(self.root, f"reference/{name}").items() if "rows-" in k}


def columns(directory: StageDirectory, epoch: int) -> dict[str, np.ndarray]:
    names = sorted(name for name in valid_manifest(directory).files if name.startswith(f"e{epoch}/"))
    table = pa.concat_tables([directory.read_table(name) for name in names])
    return {name: table.column(name).to_numpy() for name in table.column_names}


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory,
    write_tokens: Callable[..., StageDirectory],
    random_llamagen: Callable[..., torch.nn.Module],
) -> Reference:
    return Reference(tmp_path_factory.mktemp("reference"), write_tokens, random_llamagen(seed=2))


@pytest.fixture(scope="module")
def scored(reference: Reference) -> StageDirectory:
    return reference.run("plain", InOrder())


def test_epochs_differ_in_negatives_and_share_the_positives(reference, scored):
    first, second = columns(scored, 0), columns(scored, 1)
    same_view = (first["view"] == second["view"]) & ~reference.dataset.held_out_N
    assert 10 < same_view.sum() < (~reference.dataset.held_out_N).sum()
    assert np.array_equal(first["ref_logp_pos"][same_view], second["ref_logp_pos"][same_view])
    other_view = first["view"] != second["view"]
    assert (first["ref_logp_pos"] != second["ref_logp_pos"])[other_view].all()
    assert 0.2 < (first["cond_neg"] != second["cond_neg"]).mean() < 0.9
    moved = same_view & (first["cond_neg"] != second["cond_neg"])
    assert (first["ref_logp_neg"] != second["ref_logp_neg"])[moved].all()


@pytest.mark.parametrize("epoch", [0, 1])
def test_columns_are_the_draws_and_the_log_probs_of_the_base(reference, scored, epoch):
    dataset, found = reference.dataset, columns(scored, epoch)
    train = ~dataset.held_out_N
    key = {"seed": 5, "epoch": epoch}
    null = train & (pairs.uniform(dataset.hashes_N, purpose=pairs.Purpose.NULL, **key) < 0.3)
    assert np.array_equal(found["row"], np.arange(len(dataset)))
    assert np.array_equal(found["view"], pairs.views(dataset.hashes_N, 2, **key))
    assert np.array_equal(found["cond_neg"], pairs.negatives(dataset.hashes_N, dataset.labels_N, **key))
    tokens = torch.from_numpy(dataset.tokens(found["row"], found["view"].astype(np.int64)))
    conditions = {
        "pos": (dataset.labels_N, train),
        "neg": (found["cond_neg"].astype(np.int64), train),
        "null": (np.full(len(dataset), 3), null),
    }
    for name, (cond, wanted) in conditions.items():
        with torch.inference_mode():
            logp = reference.model(tokens, torch.from_numpy(cond)).sum(-1).numpy()
        ours = found[f"ref_logp_{name}"]
        np.testing.assert_allclose(ours[wanted], logp[wanted], rtol=1e-6)
        assert np.isnan(ours[~wanted]).all(), "held-out images, and rows no null draw reaches, are not scored"


def test_the_reference_is_the_same_for_any_order_and_after_an_interruption(reference, scored):
    with pytest.raises(Killed):
        reference.run("again", InOrder(back, killed_after=2))
    before = stamps(reference.root, "reference/again")
    assert len(before) == 2 * 2, "two units, two epochs each"
    reference.run("again", InOrder())
    after = stamps(reference.root, "reference/again")
    assert {name: after[name] for name in before} == before
    plain = reference.shards("plain")
    assert {k.replace("again", "plain"): v for k, v in reference.shards("again").items()} == plain


def test_the_shard_size_does_not_change_the_reference(reference, scored, monkeypatch):
    shapes, forward = [], LlamaGen.forward
    monkeypatch.setattr(LlamaGen, "forward", lambda self, *row: shapes.append(row[0].shape) or forward(self, *row))
    other = reference.run("larger", InOrder(), rows_per_shard=33)
    assert set(shapes) == {(8, 16)}, "every call has the shape of a full batch"
    for epoch in range(2):
        expected = columns(scored, epoch)
        for name, values in columns(other, epoch).items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-6, err_msg=name)
