"""Reads data/vq_llamagen: our VQ tokenizer against values recorded from the official code."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cca_core.models import ImageTokenizer, load_tokenizer, to_uint8
from cca_core.train.tokenizer import COMMITMENT

DATA = Path(__file__).parent / "data" / "vq_llamagen"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ImageTokenizer:
    path = tmp_path_factory.mktemp("vq") / "ckpt.pt"
    path.write_bytes(lzma.decompress((DATA / "ckpt.pt.xz").read_bytes()))
    return load_tokenizer(str(path))


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    tensors = load_file(DATA / "reference.safetensors")
    return {**tensors, "image": tensors["image_int8"].float() / 64}


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


def test_the_spec_is_read_off_the_tensors(tokenizer):
    config = json.loads((DATA / "config.json").read_text())
    spec = tokenizer.spec
    assert (spec.width, spec.width_multipliers, spec.num_res_blocks) == (32, (1, 1, 1, 1, 2), 2)
    assert (spec.latent_channels, spec.codebook_size, spec.codebook_dim, spec.downsample) == (64, 64, 8, 16)
    assert {name: list(tensor.shape) for name, tensor in tokenizer.state_dict().items()} == config["state_dict"]
    assert [name for name, _ in tokenizer.named_parameters()] == config["parameters"]


def test_latents_before_quantisation(tokenizer, golden):
    close(tokenizer.latents(golden["image"]), golden["pre_quant"], 1e-4)


def test_tokens_are_exact(tokenizer, golden):
    tokens = tokenizer.encode(golden["image"])
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens.flatten(), golden["code_indices"])


def test_quantised_latents(tokenizer, golden):
    # The codebook is stored un-normalised and normalised on every use (V1).
    assert (tokenizer.quantize.embedding.weight.norm(dim=-1) - 1).abs().max() > 0.01
    for tokens, expected in (
        (golden["code_indices"].view(2, 16), golden["quantized"]),
        (golden["codes"].long(), golden["codes_latents"]),
    ):
        codes = tokenizer.quantize.codes()[tokens]
        close(codes.transpose(1, 2).unflatten(2, (4, 4)), expected, 1e-5)


def test_images_of_tokens(tokenizer, golden):
    close(tokenizer.decode(golden["code_indices"].view(2, 16)), golden["recon_from_codes"], 2e-4)
    close(tokenizer.decode(golden["codes"].long()), golden["codes_decoded"], 2e-4)


def test_pixels_are_truncated_not_rounded(golden):
    pixels = to_uint8(golden["codes_decoded"])
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, golden["codes_decoded_uint8_nhwc"])
    # clamp(127.5 x + 128), then truncated (M4): 1.0 gives 255, and 0 gives 128.
    ends = to_uint8(torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 2.0]).view(1, 1, 1, 6)).flatten()
    assert ends.tolist() == [0, 0, 128, 255, 255, 255]


def test_pixels_of_our_own_decoding(tokenizer, golden):
    pixels = to_uint8(tokenizer.decode(golden["codes"].long())).int()
    assert (pixels - golden["codes_decoded_uint8_nhwc"].int()).abs().max() <= 1


def test_the_codebook_losses_of_the_trainer(tokenizer, golden):
    step = tokenizer.code_step(golden["image"])
    assert torch.equal(step.tokens_N, golden["code_indices"])
    close(step.codebook, golden["train_vq_loss"][0], 1e-5)
    close(COMMITMENT * step.commitment, golden["train_commit_loss"][0], 1e-5)
