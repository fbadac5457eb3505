"""Writes nothing: a small tokenizer learns images made here, the same each time, without touching other generators."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from cca_core.config import OptimConfig, TokenizerConfig
from cca_core.models import family
from cca_core.models.llamagen.tokenizer import VQTokenizer
from cca_core.train.tokenizer import reconstruction_facts, train_tokenizer

SMALL = TokenizerConfig(
    codebook_size=12, batch_size=32, epochs=14, optim=OptimConfig(lr=3e-3, warmup_steps=5, schedule="cosine")
)


def bars(count: int, seed: int) -> Tensor:
    """8x8 images, uint8: one bright bar, upright or flat, with a little noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 20, size=(count, 3, 8, 8))
    for image in pixels:
        line, upright = rng.integers(8), rng.integers(2)
        image[(slice(None), slice(None), line) if upright else (slice(None), line)] += 220
    return torch.from_numpy(pixels.astype(np.uint8))


def train(config: TokenizerConfig = SMALL, *, seed: int = 0, images: int = 96) -> tuple[VQTokenizer, dict, list[dict]]:
    epochs: list[dict[str, float]] = []
    tokenizer, facts = train_tokenizer(
        torch.cat([bars(images, 0), bars(40, 1)]),
        torch.arange(images + 40) >= images,
        config,
        family("llamagen"),
        seed=seed,
        device=torch.device("cpu"),
        on_epoch=epochs.append,
    )
    return tokenizer, facts, epochs


def squared_error(tokenizer: VQTokenizer, images: Tensor) -> float:
    pixels = images.float() / 127.5 - 1
    with torch.no_grad():
        decoded = tokenizer.decode(tokenizer.encode(pixels)).clamp(-1, 1)
    return (decoded - pixels).square().mean().item()


@pytest.fixture(scope="module")
def trained() -> tuple[VQTokenizer, dict, list[dict]]:
    torch.set_num_threads(1)
    return train()


def test_reconstructions_are_far_closer_than_the_mean_image(trained):
    tokenizer, facts, epochs = trained
    images, held_out = (bars(n, seed).float() / 127.5 - 1 for n, seed in ((96, 0), (40, 1)))
    of_the_mean = (held_out - images.mean(0)).square().mean().item()
    assert facts["held_out_mse"] < of_the_mean / 4
    assert epochs[-1]["squared_error"] < of_the_mean / 4 < of_the_mean / 2 < epochs[0]["squared_error"]
    assert not tokenizer.training


def test_the_facts_are_those_of_the_tokenizer_returned(trained):
    tokenizer, facts, epochs = trained
    held_out = bars(40, 1)
    assert facts["held_out_mse"] == pytest.approx(squared_error(tokenizer, held_out), rel=1e-4)
    # A range of 2 between black and white.
    assert facts["held_out_psnr_db"] == pytest.approx(10 * np.log10(4 / facts["held_out_mse"]), rel=1e-6)
    with torch.no_grad():
        used = tokenizer.encode(held_out.float() / 127.5 - 1).unique()
    assert facts["held_out_codes_used"] == len(used)
    assert facts["parameters"] == sum(p.numel() for p in tokenizer.parameters())
    assert facts["seconds"] > 0
    assert [record["epoch"] for record in epochs] == list(range(1, SMALL.epochs + 1))
    in_parts = reconstruction_facts(tokenizer, held_out, torch.arange(40), batch_size=7)
    assert in_parts == pytest.approx({name: facts[name] for name in in_parts}, rel=1e-4)


def test_most_codes_are_in_use(trained):
    _, facts, epochs = trained
    assert epochs[-1]["codes_used"] >= 10
    assert facts["held_out_codes_used"] >= 10


def test_codes_start_on_the_data_and_unused_ones_are_moved_there():
    # Two colours want few codes; a codebook of random directions would leave most of them far from any latent.
    config = dataclasses.replace(SMALL, epochs=1, codebook_size=32, optim=OptimConfig(lr=1e-9))
    tokenizer, _, epochs = train(config, images=32)
    latents = torch.nn.functional.normalize(tokenizer.latents(bars(32, 0).float() / 127.5 - 1), dim=1)
    similarity = tokenizer.quantize.codes() @ latents.permute(0, 2, 3, 1).flatten(0, 2).T
    assert similarity.max(1).values.min() > 0.99
    assert epochs[0]["codes_used"] > 16


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_generator_alone():
    config = dataclasses.replace(SMALL, epochs=2)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, _, curve = train(config, images=40)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    second, _, again = train(config, images=40)
    other, _, _ = train(config, images=40, seed=1)
    assert curve == again
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not torch.equal(first.encoder.conv_in.weight, other.encoder.conv_in.weight)
    assert not torch.equal(first.quantize.embedding.weight, other.quantize.embedding.weight)


def test_held_out_images_are_not_trained_on():
    config = dataclasses.replace(SMALL, epochs=1)
    results = [
        train_tokenizer(
            torch.cat([bars(40, 0), held_out]),
            torch.arange(40 + len(held_out)) >= 40,
            config,
            family("llamagen"),
            seed=0,
            device=torch.device("cpu"),
            on_epoch=lambda _: None,
        )[0]
        for held_out in (bars(8, 1), torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    ]
    assert all(map(torch.equal, results[0].parameters(), results[1].parameters()))


def test_the_recipe_gives_the_sizes():
    config = TokenizerConfig(width=64, width_multipliers=(1, 2), codebook_size=9, codebook_dim=5, latent_channels=32)
    tokenizer, _, _ = train(dataclasses.replace(config, epochs=0), images=8)
    assert tokenizer.spec == family("llamagen").small_tokenizer_spec(config)
    assert tokenizer.quantize.embedding.weight.shape == (9, 5)
    with torch.no_grad():
        tokens = tokenizer.encode(torch.zeros(2, 3, 8, 8))
    assert tokens.shape == (2, 16), "two levels halve the side once"
