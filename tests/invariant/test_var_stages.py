"""Writes a storage below a temporary folder: a small VAR goes through the same stages as the default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

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
    ReferenceConfig,
    SourceConfig,
    TokenizerConfig,
    TokensConfig,
)
from cca_core.convert import convert
from cca_core.generate import Sampling, generate
from cca_core.models import load_model, load_tokenizer
from cca_core.stages import Context
from tests.invariant.test_codes import run

STAGES = ("tokenizer", "tokens", "features", "base", "baseline", "reference", "align", "evaluate", "safety")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., Path]) -> Recipe:
    return Recipe(
        family="var",
        source=SourceConfig(kind="folder", uri=str(write_images(tmp_path_factory.mktemp("images")))),
        tokens=TokensConfig(rows_per_shard=9, batch_size=8),
        tokenizer=TokenizerConfig(patch_nums=(1, 2, 4), epochs=2),
        features=FeaturesConfig(width=8, feature_dim=8, epochs=1),
        base=BaseConfig(dim=16, num_layers=2, num_heads=2, epochs=2),
        align=AlignConfig(epochs=1, global_batch_size=8, dropout=0.0),
        evaluate=EvaluateConfig(
            num_samples=16, seeds=(0,), cfg_scales=(2.0,), temperatures=(), batch_size=8, cost_images=8
        ),
        execution=ExecutionConfig(device="cpu", log_every_steps=1),
    )


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Context:
    return run(recipe, tmp_path_factory.mktemp("storage"), *STAGES)


def test_one_call_per_scale_and_half_of_them_without_guidance(finished):
    assert finished.directory("tokens").manifest().facts["num_tokens"] == 1 + 4 + 16
    rows = {row["label"]: row for row in finished.directory("baseline").read_json("results.json")["rows"]}
    assert rows["base, CFG 2"]["cost"]["calls_per_image"] == 6
    assert rows["base"]["cost"]["calls_per_image"] == 3
    (aligned, *_) = finished.directory("evaluate").read_json("results.json")["rows"]
    assert aligned["cost"]["calls_per_image"] == 3


def test_the_alignment_starts_at_its_cached_reference(finished):
    first = finished.directory("align").read_json("curve.json")[0]
    assert abs(first["log_ratio_pos"]) < 1e-4
    assert abs(first["log_ratio_neg"]) < 1e-4


def test_a_reference_online_gives_the_same_model(finished, recipe, tmp_path):
    online = run(replace(recipe, reference=ReferenceConfig(mode="online")), tmp_path, *STAGES[:-1])
    models = [load_model(context.directory("align").uri).state_dict() for context in (finished, online)]
    for name, value in models[0].items():
        torch.testing.assert_close(models[1][name], value, atol=1e-5, rtol=0)


def test_the_aligned_bundle_needs_nothing_else_and_goes_back_to_official_files(finished, tmp_path):
    uri = finished.directory("align").uri
    model = load_model(uri)
    convert(uri, tmp_path / "official")
    vae = load_tokenizer(str(tmp_path / "official" / "tokenizer.pt"), patch_nums=(1, 2, 4))
    again = load_model(str(tmp_path / "official" / "model.pt"), tokenizer=vae, num_heads=2)
    classes, seeds = torch.tensor([0, 1, 1, 0]), torch.arange(4)
    tokens = generate(model, classes, Sampling(), seeds, batch_size=4)
    with torch.no_grad():
        assert torch.equal(again(tokens, classes), model(tokens, classes))
    assert torch.equal(
        generate(again, classes, Sampling(cfg_scale=2.0), seeds, batch_size=4),
        generate(model, classes, Sampling(cfg_scale=2.0), seeds, batch_size=4),
    )


def test_a_recipe_of_another_family_than_its_files_is_refused(finished, recipe, tmp_path):
    uri = finished.directory("tokenizer").uri
    mixed = replace(recipe, family="llamagen", tokenizer=TokenizerConfig(checkpoint=uri))
    with pytest.raises(ConfigError, match="is no tokenizer of family llamagen: set family: in the recipe"):
        run(mixed, tmp_path, "tokenizer")
    base = BaseConfig(checkpoint=finished.directory("base").uri)
    mixed = replace(recipe, family="llamagen", tokenizer=TokenizerConfig(codebook_size=64), base=base)
    with pytest.raises(ConfigError, match="is no model of family llamagen: set family: in the recipe"):
        run(mixed, tmp_path, "tokenizer")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_nums": ()}, "needs tokenizer.patch_nums"),
        ({"patch_nums": (1, 2, 3)}, "does not fit scales"),
        ({"latent_channels": 8}, "has no tokenizer.latent_channels"),
    ],
)
def test_scales_that_do_not_fit_are_refused_before_anything_runs(recipe, tmp_path, changes, message):
    wrong = replace(recipe, tokenizer=replace(recipe.tokenizer, **changes))
    with pytest.raises(ConfigError, match=message):
        run(wrong, tmp_path, "tokenizer")
    assert not list(tmp_path.iterdir())
