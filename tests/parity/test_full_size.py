"""Reads data/full_size: names, shapes and counts of the released LlamaGen sizes, built without memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cca_core.models.llamagen.network import LlamaGen, LlamaGenSpec, default_ffn_dim
from cca_core.models.llamagen.tokenizer import VQSpec, VQTokenizer
from cca_core.models.llamagen.weights import model_spec, tokenizer_spec

DATA = Path(__file__).parent / "data" / "full_size"
GPTS = {
    name: size
    for name, size in json.loads((DATA / "llamagen_gpt.json").read_text()).items()
    if size["model_type"] == "c2i"
}
VQS = json.loads((DATA / "llamagen_vq.json").read_text())
WIDTH_MULTIPLIERS = {"VQ-16": (1, 1, 2, 2, 4), "VQ-8": (1, 2, 2, 4)}


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_every_released_size_is_here():
    assert set(GPTS) >= {"GPT-B", "GPT-L", "GPT-XL", "GPT-XXL", "GPT-3B"}
    assert set(VQS) == set(WIDTH_MULTIPLIERS)


@pytest.mark.parametrize("name", GPTS)
def test_gpt(name):
    size = GPTS[name]
    spec = LlamaGenSpec(
        vocab_size=16384,
        num_tokens=576,
        num_classes=1000,
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
    # The file alone tells all but the number of tokens, the heads included.
    assert model_spec(model.state_dict(), num_tokens=576)[0] == spec


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
