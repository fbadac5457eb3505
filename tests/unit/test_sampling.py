"""Reads and writes nothing: tokens from logits by hand, at the edges of temperature, top-k, top-p and the uniform."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cca_core.config import ConfigError
from cca_core.generate import Sampling, calls_per_image, draw, filtered_probs, generate
from cca_core.pairs import sequence_uniforms

#: 1 - 2^-32 is the largest uniform that generation draws; the next float64 below 1 is the hardest case.
LARGEST = (1 - 2**-32, math.nextafter(1.0, 0.0))


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor([probabilities]).log()


def kept(logits: Tensor, **settings: float) -> list[int]:
    return filtered_probs(logits, Sampling(**settings))[0].nonzero()[:, 0].tolist()


def drawn(logits: Tensor, *uniforms: float, **settings: float) -> list[int]:
    rows = logits.expand(len(uniforms), -1)
    return draw(rows, torch.tensor(uniforms, dtype=torch.float64), Sampling(**settings)).tolist()


def test_temperature_0_takes_the_most_likely_whatever_the_uniform():
    logits = torch.tensor([[0.0, 3.0, 2.9999]])
    assert drawn(logits, 0.0, 0.5, LARGEST[1], temperature=0) == [1, 1, 1]
    assert drawn(logits, LARGEST[1], temperature=0, top_k=2, top_p=0.1) == [1]
    assert drawn(torch.tensor([[1.0, 1.0]]), LARGEST[1], temperature=0) == [0], "the first of equals"


def test_temperature_divides_the_logits():
    logits = logits_of(0.1, 0.3, 0.6)
    torch.testing.assert_close(filtered_probs(logits, Sampling()).log(), logits)
    torch.testing.assert_close(
        filtered_probs(logits, Sampling(temperature=0.5))[0], torch.tensor([0.01, 0.09, 0.36]) / 0.46
    )
    assert drawn(logits, LARGEST[1], 0.0, temperature=1e-45) == [2, 2], "the smallest temperature is no division by 0"
    flat = filtered_probs(logits, Sampling(temperature=1e9))
    torch.testing.assert_close(flat, torch.full((1, 3), 1 / 3))


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(0, [0, 1, 2, 3, 4]), (1, [3]), (2, [0, 1, 3]), (3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4])],
)
def test_top_k_keeps_all_ties_of_the_kth(top_k, expected):
    logits = torch.tensor([[2.0, 2.0, 1.0, 3.0, 0.0]])
    assert kept(logits, top_k=top_k) == expected
    probs = filtered_probs(logits, Sampling(top_k=top_k))[0]
    torch.testing.assert_close(probs[expected], logits[0, expected].softmax(-1))


def test_top_k_beyond_the_vocabulary_keeps_all():
    logits = torch.tensor([[2.0, 1.0]])
    assert kept(logits, top_k=1000) == [0, 1]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.0, [2]),
        (0.49, [2]),
        (0.51, [1, 2]),
        (0.79, [1, 2]),
        (0.81, [0, 1, 2]),
        (0.99, [0, 1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_entry_that_crosses_p(top_p, expected):
    logits = logits_of(0.15, 0.3, 0.5, 0.05)
    assert kept(logits, top_p=top_p) == expected
    probs = filtered_probs(logits, Sampling(top_p=top_p))[0]
    torch.testing.assert_close(probs[expected], logits[0, expected].softmax(-1))


def test_top_p_reads_what_temperature_and_top_k_left():
    logits = logits_of(0.15, 0.3, 0.5, 0.05)
    # Of the two that top-k keeps, the first has 0.625.
    assert kept(logits, top_k=2, top_p=0.6) == [2]
    assert kept(logits, top_p=0.6) == [1, 2]
    assert kept(logits, temperature=0.5, top_p=0.6) == [2]


def test_rows_are_filtered_one_by_one():
    first, second = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([9.0, 1.0, 8.9, 3.0])
    sampling = Sampling(temperature=0.7, top_k=3, top_p=0.8)
    both = filtered_probs(torch.stack([first, second]), sampling)
    assert torch.equal(both[0], filtered_probs(first[None], sampling)[0])
    assert torch.equal(both[1], filtered_probs(second[None], sampling)[0])
    assert both.dtype == torch.float32
    assert filtered_probs(first[None].bfloat16(), sampling).dtype == torch.float32


REFUSED = {
    "temperature": [-0.1, math.nan],
    "top_k": [-1],
    "top_p": [-0.01, 1.01, math.nan],
    "cfg_scale": [-1.0, math.nan],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_values_that_mean_nothing_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"sampling\.{name} must"):
        Sampling(**{name: value})


def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_uniform():
    logits = torch.tensor([[2.0, 1.0, 1.0]]).log()  # cumulative: 0.5, 0.75, 1
    assert drawn(logits, 0.0, 0.499, 0.501, 0.749, 0.751, LARGEST[0]) == [0, 0, 1, 1, 2, 2]


def test_a_large_vocabulary_is_told_apart():
    size = 1_000_003
    tokens = torch.tensor([0, 7, size // 3, size // 2, size - 2, size - 1])
    assert drawn(torch.zeros(1, size), *((tokens.double() + 0.5) / size).tolist()) == tokens.tolist()


@pytest.mark.parametrize("uniform", [0.0, *LARGEST])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 0.01}, {"temperature": 50.0}])
def test_no_uniform_draws_a_token_without_probability(uniform, settings):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, 64, generator=generator) * 4
    logits[:200, 40:] = -torch.inf  # nothing at the end of the vocabulary
    logits[100:, :9] = -1e4  # nothing but underflow at its start
    uniforms = torch.full((400,), uniform, dtype=torch.float64)
    tokens = draw(logits, uniforms, Sampling(**settings))
    assert tokens.dtype == torch.int64
    probs = filtered_probs(logits, Sampling(**settings))
    assert (probs.gather(1, tokens[:, None]) > 0).all()


def test_shares_of_many_draws_are_the_probabilities():
    uniforms = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = draw(logits_of(0.1, 0.2, 0.3, 0.4).expand(40_000, -1), uniforms, Sampling(top_k=3))
    shares = tokens.bincount(minlength=4) / 40_000
    torch.testing.assert_close(shares, torch.tensor([0.0, 2 / 9, 3 / 9, 4 / 9]), rtol=0, atol=0.012)


def test_only_a_scale_above_1_costs_a_second_call(random_llamagen):
    model = random_llamagen()
    assert [Sampling(cfg_scale=scale).guided for scale in (0.0, 0.5, 1.0, 1.001)] == [False, False, False, True]
    assert calls_per_image(model, Sampling()) == 16
    assert calls_per_image(model, Sampling(cfg_scale=2.0)) == 32


def test_a_sequence_is_a_function_of_condition_seed_and_sampling(random_llamagen):
    model, classes, seeds = random_llamagen(), torch.tensor([0, 1, 2, 0, 0]), torch.tensor([5, 6, 7, 5, 8])
    for sampling in (Sampling(temperature=0.9, top_k=10), Sampling(cfg_scale=2.0)):
        tokens = generate(model, classes, sampling, seeds, batch_size=4)
        assert tokens.shape == (5, 16)
        assert torch.equal(tokens[0], tokens[3])
        assert not torch.equal(tokens[0], tokens[4])
        assert torch.equal(generate(model, classes.flip(0), sampling, seeds.flip(0), batch_size=4).flip(0), tokens)
        assert torch.equal(generate(model, classes[2:3], sampling, seeds[2:3], batch_size=4)[0], tokens[2])


def test_every_token_has_a_uniform_of_its_own(random_llamagen):
    model, seeds = random_llamagen(), torch.tensor([3, 4])
    torch.nn.init.zeros_(model.output.weight)  # every token as likely
    tokens = generate(model, torch.tensor([0, 1]), Sampling(), seeds)
    assert tokens.tolist() == (sequence_uniforms(seeds.numpy(), 16) * 24).astype(int).tolist()


def test_no_sequence_is_an_empty_answer(random_llamagen):
    nothing = torch.empty(0, dtype=torch.int64)
    assert generate(random_llamagen(), nothing, Sampling(), nothing).shape == (0, 16)
