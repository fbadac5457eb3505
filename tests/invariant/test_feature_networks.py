"""Writes a storage below a temporary folder: the evaluation with a scripted feature network and published statistics,
and samples exported as the evaluation drew them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cca_core.config import (
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
from cca_core.export import export_samples
from cca_core.generate import Sampling
from cca_core.metrics import Moments
from cca_core.stages import Context
from cca_core.stages.evaluate import load_results
from cca_core.stages.features import TRAIN, feature_set
from cca_core.stages.table import markdown_table
from tests.invariant.test_codes import run
from tests.unit.test_network import FeaturesOnly, ThreeClasses, WithLogits, WithSpatial, saved

STAGES = ("tokenizer", "tokens", "features", "base", "baseline")
OF_IMAGES = {"precision", "recall", "density", "coverage", "kernel_distance"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., Path]) -> Recipe:
    return Recipe(
        source=SourceConfig(kind="folder", uri=str(write_images(tmp_path_factory.mktemp("images")))),
        tokens=TokensConfig(rows_per_shard=9, batch_size=8),
        tokenizer=TokenizerConfig(epochs=1),
        features=FeaturesConfig(width=8, feature_dim=8, epochs=1),
        base=BaseConfig(dim=16, num_layers=1, num_heads=2, epochs=1),
        evaluate=EvaluateConfig(
            num_samples=40, seeds=(0, 1), cfg_scales=(2.0,), temperatures=(), batch_size=8, cost_images=8
        ),
        execution=ExecutionConfig(device="cpu"),
    )


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


def measured(context: Context) -> list[dict[str, Any]]:
    return load_results(context.directory("baseline"))["rows"]


def test_the_embedded_classifier_gives_every_number_with_an_interval(recipe, storage):
    rows = measured(run(recipe, storage, *STAGES))
    for row in rows:
        assert OF_IMAGES | {"distance", "inception_score", "class_consistency"} <= set(row["mean"])
        assert OF_IMAGES | {"distance", "inception_score", "class_consistency"} <= set(row["interval"])
        for name, (low, high) in row["interval"].items():
            assert low <= row["mean"][name] <= high, name
    titles = [title.strip() for title in markdown_table(rows).splitlines()[0].strip("|").split("|")]
    assert titles[:4] == ["sampler", "distance", "IS", "precision"]
    assert "spatial" not in markdown_table(rows)


def test_a_network_without_logits_leaves_out_the_score_and_keeps_class_consistency(recipe, storage, tmp_path):
    config = saved(FeaturesOnly(), tmp_path, width=8, feature_dim=8, epochs=1)
    context = run(replace(recipe, features=config), storage, *STAGES)
    row, embedded = measured(context)[0], measured(run(recipe, storage, *STAGES))[0]
    assert "inception_score" not in row["mean"]
    assert "| IS |" not in markdown_table([row])
    assert row["mean"]["class_consistency"] == embedded["mean"]["class_consistency"]
    assert row["mean"]["distance"] != embedded["mean"]["distance"]
    results = load_results(context.directory("baseline"))
    assert results["network"].startswith("network.pt (sha256 ")
    assert {row["distance_name"] for row in results["rows"]} == {"distance"}
    # The stage keeps the file: workers need no other, and it stays pinned.
    kept = context.directory("features").read_bytes("network.pt")
    assert hashlib.sha256(kept).hexdigest() == config.sha256


def test_where_the_file_lies_changes_no_digest_and_another_file_does(recipe, storage, tmp_path):
    config = saved(WithLogits(), tmp_path)
    elsewhere = tmp_path / "elsewhere.pt"
    elsewhere.write_bytes(Path(config.network).read_bytes())
    one, other, embedded = (
        run(replace(recipe, features=features), storage).digests["features"]
        for features in (config, replace(config, network=str(elsewhere)), recipe.features)
    )
    assert one == other != embedded
    elsewhere.write_bytes(b"another file")
    with pytest.raises(ConfigError, match=r"features\.sha256 says"):
        run(replace(recipe, features=replace(config, network=str(elsewhere))), storage)
    elsewhere.unlink()
    with pytest.raises(ConfigError, match="no feature network at"):
        run(replace(recipe, features=replace(config, network=str(elsewhere))), storage)


def test_class_logits_replace_the_classifier(recipe, storage, tmp_path):
    config = saved(WithLogits(), tmp_path, class_logits=True)
    context = run(replace(recipe, features=config), storage, *STAGES)
    assert "classifier.json" not in context.directory("features").manifest().files
    assert {"inception_score", "class_consistency"} <= set(measured(context)[0]["mean"])
    three = saved(ThreeClasses(), tmp_path, class_logits=True)
    with pytest.raises(ConfigError, match="has 3 classes and the source 2"):
        run(replace(recipe, features=three), storage, *STAGES)


def real_statistics(context: Context, path: Path) -> Path:
    """The statistics of the training images, as a published file has them."""
    table = context.directory("features").read_table(TRAIN)
    known = feature_set(table, np.arange(table.num_rows, dtype=np.uint64))
    of, spatial = Moments.of(known.features), Moments.of(known.spatial)
    statistics = {"mu": of.mean, "sigma": of.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez(path, **statistics)
    return path


def test_published_statistics_alone_give_distances_and_say_what_is_missing(recipe, storage, tmp_path):
    recipe = replace(recipe, features=saved(WithSpatial(), tmp_path))
    own = run(recipe, storage, *STAGES)
    assert "spatial_distance" in measured(own)[0]["mean"]
    path = real_statistics(own, tmp_path / "reference.npz")
    published = replace(recipe, evaluate=replace(recipe.evaluate, real_statistics=str(path)))
    context = run(published, storage, *STAGES)
    assert context.digests["features"] != own.digests["features"]
    row = measured(context)[0]
    assert OF_IMAGES.isdisjoint(row["mean"])
    assert {"distance", "spatial_distance", "class_consistency"} <= set(row["mean"])
    assert load_results(context.directory("baseline"))["real"] == "published: reference.npz"
    assert "recall" not in markdown_table([row])
    assert " - " in markdown_table([measured(own)[0], row])

    np.savez(path, mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(ConfigError, match="use the statistics of that network"):
        run(published, storage, *STAGES)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(ConfigError, match="only one of mu and sigma"):
        run(published, storage, *STAGES)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(ConfigError, match="holds other"):
        run(published, storage, *STAGES)


def test_published_images_give_every_number(recipe, storage, tmp_path):
    recipe = replace(recipe, features=saved(WithLogits(), tmp_path))
    pixels = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "reference.npz", pixels)
    published = replace(recipe, evaluate=replace(recipe.evaluate, real_statistics=str(tmp_path / "reference.npz")))
    row = measured(run(published, storage, *STAGES))[0]
    assert {"distance", *OF_IMAGES} <= set(row["mean"])
    assert row["per_seed"][0]["n_real"] == 30
    features = pixels.astype(np.float32).mean(axis=(1, 2))
    drawn = run(published, storage, *STAGES).directory("features").read_table("real-imported.arrow")
    found = np.array(drawn.column("features").to_pylist())
    np.testing.assert_allclose(found, features, rtol=1e-5)


def test_exported_samples_are_those_that_were_measured(recipe, storage, tmp_path):
    recipe = replace(recipe, features=saved(WithLogits(), tmp_path))
    context = run(recipe, storage, *STAGES)
    out, bundle = tmp_path / "samples.npz", context.directory("base").uri
    settings = {"num_samples": 40, "sampling": Sampling(), "seed": 1, "batch_size": 8}
    assert export_samples(bundle, out, **settings) == (40, 8, 8, 3)
    with np.load(out, allow_pickle=False) as found:
        images, labels = found["arr_0"], found["arr_1"]
    assert (images.shape, images.dtype, labels.shape) == ((40, 8, 8, 3), np.uint8, (40,))
    shards = context.directory("baseline")
    names = sorted(name for name in shards.manifest().files if name.startswith("s00/seed1/"))
    tables = [shards.read_table(name) for name in names]
    features = np.concatenate([np.array(table.column("features").to_pylist()) for table in tables])
    expected = np.concatenate([table.column("label").to_numpy() for table in tables])
    np.testing.assert_allclose(images.astype(np.float32).mean(axis=(1, 2)), features, rtol=1e-5)
    np.testing.assert_array_equal(labels, expected)
    with pytest.raises(ConfigError, match=r"samples\.npz"):
        export_samples(bundle, out, **settings)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
