"""Reads data/full_size: names, shapes and counts of the released sizes, built without memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cca_core.models.llamagen.network import LlamaGen, LlamaGenSpec, default_ffn_dim
from cca_core.models.llamagen.tokenizer import VQSpec, VQTokenizer
from cca_core.models.llamagen.weights import is_model, model_spec, tokenizer_spec
from cca_core.models.var import weights as var_weights
from cca_core.models.var.network import VAR, VARSpec
from cca_core.models.var.tokenizer import MultiScaleVQSpec, MultiScaleVQTokenizer

DATA = Path(__file__).parent / "data" / "full_size"
GPTS = json.loads((DATA / "llamagen_gpt.json").read_text())
#: What a spec says of the condition.
CONDITIONS = {
    "c2i": {"num_classes": 1000},
    "t2i": {"num_classes": 0, "num_cond_tokens": 120, "caption_dim": 2048},
}
VQS = json.loads((DATA / "llamagen_vq.json").read_text())
VARS = json.loads((DATA / "var.json").read_text())
VAR_TOKENIZER = VARS.pop("vae_ch160v4096z32")
WIDTH_MULTIPLIERS = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_every_released_size_is_here():
    assert set(GPTS) >= {"GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B", "GPT-1B", "GPT-7B"}
    assert {size["model_type"] for size in GPTS.values()} == set(CONDITIONS)
    assert set(VQS) == set(WIDTH_MULTIPLIERS)
    assert set(VARS) == {"d16", "d20", "d24", "d30", "d36-s"}


@pytest.mark.parametrize("name", GPTS)
def test_gpt(name):
    size = GPTS[name]
    spec = LlamaGenSpec(
        vocab_size=16384,
        num_tokens=576,
        **CONDITIONS[size["model_type"]],
        dim=size["dim"],
        num_layers=size["n_layer"],
        num_heads=size["n_head"],
        num_kv_heads=size["n_head"],
        ffn_dim=default_ffn_dim(size["dim"]),
    )
    assert (spec.head_dim, spec.ffn_dim) == (size["head_dim"], size["ffn_hidden"])
    with torch.device("meta"):
        model = LlamaGen(spec)
    layers = range(size["n_layer"])
    expected = {key.format(i=i): shape for i in layers for key, shape in size["layer_tensors"].items()}
    assert shapes(model) == expected | size["other_tensors"]
    assert len(shapes(model)) == size["n_tensors"]
    assert sum(p.numel() for p in model.parameters()) == size["n_params"]
    assert sum(t.numel() for t in model.state_dict().values()) == size["n_state_dict_elements"]
    assert [n for n, _ in model.named_buffers() if n in shapes(model)] == size["buffers_in_state_dict"]
    # The file alone tells all but the number of tokens, the heads included.
    assert is_model(model.state_dict())
    assert model_spec(model.state_dict(), num_tokens=576)[0] == spec


def test_the_released_text_models_are_of_size_xl():
    """GPT-XL's layers with the captions of 120 tokens; no file of names is recorded for it."""
    sizes = {"dim": 1280, "num_layers": 36, "num_heads": 20, "num_kv_heads": 20, "ffn_dim": default_ffn_dim(1280)}
    spec = LlamaGenSpec(vocab_size=16384, num_tokens=256, **sizes, **CONDITIONS["t2i"])
    with torch.device("meta"):
        model = LlamaGen(spec)
    assert model_spec(model.state_dict(), num_tokens=256)[0] == spec
    # The class-conditional size with the projection in the place of 1001 rows.
    expected = GPTS["GPT-XL"]["n_params"] - 1001 * 1280 + 2048 * 1280 + 1280 * 1280
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("name", VQS)
def test_vq(name):
    expected = VQS[name]
    spec = VQSpec(
        width=128,
        width_multipliers=WIDTH_MULTIPLIERS[name],
        num_res_blocks=2,
        latent_channels=256,
        codebook_size=16384,
        codebook_dim=8,
    )
    with torch.device("meta"):
        tokenizer = VQTokenizer(spec)
    assert shapes(tokenizer) == expected["state_dict"]
    assert len(shapes(tokenizer)) == expected["n_tensors"]
    assert [name for name, _ in tokenizer.named_buffers()] == expected["buffers_in_state_dict"]
    parameters = sum(p.numel() for p in tokenizer.parameters())
    assert parameters in (expected["n_params"], expected["n_params"] - 65536)
    assert tokenizer_spec(tokenizer.state_dict())[0] == spec
    assert spec.downsample == int(name.removeprefix("VQ-"))


@pytest.mark.parametrize("name", VARS)
def test_var(name):
    size = VARS[name]
    spec = VARSpec(
        vocab_size=4096,
        num_tokens=size["L"],
        num_classes=1000,
        dim=size["embed_dim"],
        num_layers=size["depth"],
        num_heads=size["num_heads"],
        codebook_dim=32,
        patch_nums=tuple(size["patch_nums"]),
        shared_adaln=size["shared_aln"],
    )
    assert spec.head_dim == 64
    with torch.device("meta"):
        model = VAR(spec)
    blocks = range(size["depth"])
    expected = {key.format(i=i): shape for i in blocks for key, shape in size["block_tensors"].items()}
    # The constants of official files are no part of our state dict; the export makes them.
    state = var_weights.official_model(model)
    assert {key: list(tensor.shape) for key, tensor in state.items()} == expected | size["other_tensors"]
    assert len(state) == size["n_tensors"]
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == size["n_params"]
    constants = state.keys() - parameters.keys()
    assert constants == {*size["buffers"], *(f"blocks.{i}.attn.zero_k_bias" for i in blocks)}
    assert parameters.keys() == shapes(model).keys()
    # The file alone tells everything.
    found, tensors = var_weights.model_spec(state)
    assert found == spec
    assert tensors.keys() == parameters.keys()


def test_var_tokenizer():
    spec = MultiScaleVQSpec(
        width=160,
        width_multipliers=(1, 1, 2, 2, 4),
        num_res_blocks=2,
        codebook_size=4096,
        codebook_dim=32,
        patch_nums=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    )
    with torch.device("meta"):
        tokenizer = MultiScaleVQTokenizer(spec)
    assert shapes(tokenizer) == VAR_TOKENIZER["state_dict"]
    assert [name for name, _ in tokenizer.named_buffers()] == VAR_TOKENIZER["buffers"]
    assert sum(p.numel() for p in tokenizer.parameters()) == VAR_TOKENIZER["n_params"]
    assert var_weights.tokenizer_spec(tokenizer.state_dict(), patch_nums=spec.patch_nums)[0] == spec
    assert (spec.image_size, spec.num_tokens(256)) == (256, 680)
