"""Writes a storage below a temporary folder: the stage safety with a content filter, whole and interrupted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cca_core.bundle import FILTER_NAME
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
from cca_core.dataset import classes_with_images
from cca_core.metrics.content_filter import ContentFilter
from cca_core.safety_config import SafetyConfig
from cca_core.stages import Context, run_stage
from cca_core.stages.evaluate import candidate_samplers
from cca_core.stages.filtered import FILTERED, scores_of
from cca_core.stages.graph import PER_CANDIDATE
from cca_core.stages.safety import PICTURES, RESULTS, load_safety
from cca_core.workers.content_filter import FilterShard
from cca_core.workers.sample import Drawer
from tests.invariant.test_codes import ALIGNED, run
from tests.planted_filters import Brightness, scripted

SETTINGS = {"filter_threshold": 0.531, "filter_input_range": "unit"}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., Path], storage: Path) -> Context:
    """A finished run of a recipe that names no filter."""
    recipe = Recipe(
        source=SourceConfig(kind="folder", uri=str(write_images(tmp_path_factory.mktemp("images")))),
        tokens=TokensConfig(rows_per_shard=9, batch_size=8),
        tokenizer=TokenizerConfig(epochs=1),
        features=FeaturesConfig(width=8, feature_dim=8, epochs=1),
        base=BaseConfig(dim=16, num_layers=1, num_heads=2, epochs=1),
        align=AlignConfig(epochs=1),
        evaluate=EvaluateConfig(
            num_samples=40, seeds=(3, 1), cfg_scales=(2.0,), temperatures=(), batch_size=8, cost_images=8
        ),
        execution=ExecutionConfig(device="cpu"),
    )
    return run(recipe, storage, *ALIGNED, *PER_CANDIDATE)


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, without: Context, storage: Path) -> Context:
    """The same with a filter."""
    path = tmp_path_factory.mktemp("filter") / "brightness.pt"
    path.write_bytes(scripted(Brightness()))
    pinned = {"filter": str(path), "filter_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    recipe = replace(without.recipe, safety=SafetyConfig(**pinned, **SETTINGS))
    return run(recipe, storage, *ALIGNED, *PER_CANDIDATE)


def test_a_filter_repeats_the_check_of_safety_alone_and_is_kept_with_it(without, filtered):
    assert {name for name, digest in filtered.digests.items() if digest != without.digests[name]} == {"safety"}
    files = filtered.directory("safety").manifest().files
    scores = {name for name in files if name.startswith("scores-s")}
    assert len(scores) == 6, "three samplers, two units of four batches and one of one"
    assert set(files) == {RESULTS, *PICTURES, FILTERED, FILTER_NAME, *scores}
    kept = filtered.directory("safety").read_bytes(FILTER_NAME)
    assert hashlib.sha256(kept).hexdigest() == filtered.recipe.safety.filter_sha256
    assert set(without.directory("safety").manifest().files) == {RESULTS, *PICTURES}
    assert all("filtered" not in row for row in load_safety(without.directory("safety")))


def test_scores_are_of_the_first_seeds_samples_before_and_after(filtered):
    recipe, directory = filtered.recipe, filtered.directory("safety")
    draw = Drawer(recipe, classes_with_images(filtered.directory("tokens")))
    classes, images = draw(candidate_samplers(filtered, 1)[0], recipe.evaluate.seeds[0], torch.arange(40))
    spec = recipe.safety.filter_spec
    expected = ContentFilter(scripted(Brightness()), spec, key="").scores(images, batch_size=40)
    labels, scores = scores_of(directory, recipe, 2)
    np.testing.assert_array_equal(labels, classes)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    rows = load_safety(directory)
    assert [row["label"] for row in rows] == ["base", "base, CFG 2", "aligned"]
    assert 0 < rows[2]["filtered"] == (scores >= spec.threshold).mean() < 1
    for index, row in enumerate(rows):
        labels, scores = scores_of(directory, recipe, index)
        assert set(row["filtered_per_class"]) == set(row["classes"])
        (worst,) = row["worst"]["filtered_in_class"]
        of_worst = scores[labels == row["classes"].index(worst)]
        assert row["filtered_in_class"] == max(row["filtered_per_class"].values())
        assert row["filtered_in_class"] == pytest.approx((of_worst >= spec.threshold).mean())


def test_an_interrupted_check_scores_only_what_is_missing(filtered, monkeypatch):
    directory = filtered.directory("safety")
    before = directory.manifest()
    lost = sorted(name for name in before.files if name.startswith("scores-s01"))[0]
    for name in (lost, "_manifest.json"):
        directory.store.fs.rm(f"{directory.path}/{name}")
    done = []
    scored = FilterShard.run
    monkeypatch.setattr(FilterShard, "run", lambda self, **unit: done.append(unit) or scored(self, **unit))
    assert run_stage("safety", filtered).files == before.files
    assert done == [{"sampler": 1, "start": 0, "stop": 32}]


def test_another_file_at_the_address_is_refused_before_anything_runs(filtered, storage):
    with Path(filtered.recipe.safety.filter).open("ab") as file:
        file.write(b"more")
    with pytest.raises(ConfigError, match=r"has sha256 [0-9a-f]{64}, not [0-9a-f]{64} as safety\.filter_sha256 says"):
        run(filtered.recipe, storage)
