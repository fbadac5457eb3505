"""Reads the built-in recipes: they load, the default states every value there is, and those of released models state
the paper's and can be planned without a file."""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

import pytest
import yaml
from typer.testing import CliRunner

from cca_core.config import Recipe
from cca_core.parse import as_dict
from pipelines.cli import app
from pipelines.recipe import built_in, load_recipe, to_yaml


class Official(NamedTuple):
    """What the CCA repository's commands say of a model, and its file."""

    model: str
    file: str
    lambda_: float
    lr: float
    clip_norm: float
    dropout: float
    best_cfg: float


#: LlamaGen clips the sum of 16 accumulated gradients at 1.0, hence their mean at 1/16.
PAPER = {
    "llamagen_b_384": Official("GPT-B", "c2i_B_384.pt", 1000, 1e-5, 1 / 16, 0.1, 2.0),
    "llamagen_l_384": Official("GPT-L", "c2i_L_384.pt", 300, 1e-5, 1 / 16, 0.1, 2.0),
    "llamagen_xl_384": Official("GPT-XL", "c2i_XL_384.pt", 1000, 1e-5, 1 / 16, 0.1, 1.75),
    "llamagen_xxl_384": Official("GPT-XXL", "c2i_XXL_384.pt", 1000, 1e-5, 1 / 16, 0.1, 1.75),
    "llamagen_3b_384": Official("GPT-3B", "c2i_3B_384.pt", 500, 1e-5, 1 / 16, 0.1, 1.65),
    "var_d16_256": Official("d16", "var_d16.pth", 50, 2e-5, 2.0, 0.0, 2.5),
    "var_d20_256": Official("d20", "var_d20.pth", 50, 2e-5, 2.0, 0.1 * 20 / 24, 2.5),
    "var_d24_256": Official("d24", "var_d24.pth", 100, 2e-5, 2.0, 0.1, 2.5),
    "var_d30_256": Official("d30", "var_d30.pth", 1000, 2e-5, 2.0, 0.125, 2.5),
}


def test_the_default_recipe_states_every_value_and_the_configuration_agrees():
    assert load_recipe("digits", []) == Recipe()
    stated = yaml.safe_load((files("pipelines") / "recipes" / "digits.yaml").read_text())
    assert stated == as_dict(Recipe())


def test_every_recipe_loads_and_survives_its_resolved_form(tmp_path):
    assert {"digits", "cifar10_small", *PAPER} <= set(built_in())
    for name in built_in():
        recipe = load_recipe(name, ["source.uri=somewhere"] if name == "cifar10_small" else [])
        resolved = tmp_path / f"{name}.yaml"
        resolved.write_text(to_yaml(recipe))
        assert load_recipe(str(resolved), []) == recipe


@pytest.mark.parametrize("name", PAPER)
def test_a_released_model_is_aligned_with_the_papers_settings(name):
    recipe, official = load_recipe(name, []), PAPER[name]
    assert recipe.name == name.replace("_", "-")
    align, optim = recipe.align, recipe.align.optim
    assert (align.objective, align.beta, align.lambda_, align.null_share) == ("cca", 0.02, official.lambda_, 0.1)
    assert (align.epochs, align.global_batch_size) == (1, 256)
    assert align.dropout == pytest.approx(official.dropout, rel=1e-3)
    assert (optim.lr, optim.clip_norm) == (official.lr, official.clip_norm)
    assert (optim.betas, optim.eps, optim.weight_decay) == ((0.9, 0.95), 1e-8, 0.05)
    assert official.best_cfg in recipe.evaluate.cfg_scales
    assert recipe.evaluate.num_samples == 50_000


@pytest.mark.parametrize("name", PAPER)
def test_a_released_model_names_its_files_and_where_they_are_published(name):
    recipe, official = load_recipe(name, []), PAPER[name]
    llamagen = recipe.family == "llamagen"
    tokenizer = "vq_ds16_c2i.pt" if llamagen else "vae_ch160v4096z32.pth"
    assert recipe.base.checkpoint == f"checkpoints/{official.file}"
    assert recipe.tokenizer.checkpoint == f"checkpoints/{tokenizer}"
    assert (recipe.expect.model, recipe.expect.images) == (official.model, 1_281_167)
    assert recipe.expect.tokenizer == ("VQ-16" if llamagen else "vae_ch160v4096z32")
    text = (files("pipelines") / "recipes" / f"{name}.yaml").read_text()
    comment = "".join(line for line in text.splitlines() if line.startswith("#"))
    repository = "FoundationVision/LlamaGen" if llamagen else "FoundationVision/var"
    assert all(words in comment for words in (repository, official.file, tokenizer, f"cca plan {name}"))


@pytest.fixture
def cca(tmp_path, monkeypatch):
    """`cca` in this process, in a folder without weights and images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("CCA_STORAGE", raising=False)
    return lambda *arguments: CliRunner().invoke(app, arguments, catch_exceptions=False)


@pytest.mark.parametrize("name", PAPER)
def test_a_released_model_is_planned_without_a_file(cca, tmp_path, name):
    answer = cca("plan", name, "--gpu-gb", "80")
    assert answer.exit_code == 0
    said = {line[:26].strip(): line[26:].strip() for line in answer.output.splitlines()}
    assert answer.output.startswith("The stages cannot be planned yet. Not there:\n  source.uri ")
    llamagen = name.startswith("llamagen")
    tokens, steps = (576, 576) if llamagen else (680, 10)
    assert said["tokens per image"] == f"{tokens}; 10 views of each image"
    assert said["model"].endswith(f"parameters ({PAPER[name].model})")
    assert said["model calls per image"] == f"{2 * steps} guided, {steps} without guidance once aligned"
    assert said["images"] == "1,281,167 expected"
    assert said["tokens/"] == ("15.2 GB" if llamagen else "17.9 GB")
    assert said["reference/"] == "32.5 MB for 1 epoch"
    assert {"weights", "gradients", "AdamW's moments", "activations", "logits"} <= set(said)
    assert "It fits with DDP: 8 workers" in answer.output, "the recipe's micro-batch is chosen so"
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_plan_says_what_does_not_fit_and_what_would(cca):
    said = cca("plan", "llamagen_3b_384", "--gpu-gb", "80", "--set", "execution.micro_batch_size=5").output
    assert "It needs FSDP2 over 2 GPUs or more: execution.sharding=fsdp2." in said
    assert "With execution.micro_batch_size=2 it fits with DDP." in said
    said = cca("plan", "llamagen_3b_384", "--gpu-gb", "8", "--set", "execution.micro_batch_size=2").output
    assert "It fits no number of such GPUs" in said
    assert "Lower execution.micro_batch_size." in said


def test_a_plan_without_a_file_says_what_it_cannot_tell(cca):
    said = cca("plan", "digits", "--set", "base.checkpoint=none.pt").output
    assert "base.checkpoint        none.pt" in said
    assert "Sizes cannot be told yet: the size of the model is unknown: base.checkpoint is not there" in said


def test_a_plan_of_what_is_there_has_stages_and_sizes(cca):
    said = cca("plan").output
    assert "first time in this storage" in said
    assert "1,797 counted" in said
    assert "32 guided, 16 without guidance once aligned" in said
    assert said.rstrip().endswith("Run it with: cca run digits")
