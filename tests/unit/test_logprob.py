"""Reads and writes nothing: log-probs of tokens against a plain log-softmax, in value, gradient, dtype and memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cca_core.logprob import token_logp

ROWS, LENGTH, WIDTH, VOCAB = 3, 7, 5, 11


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, LENGTH, WIDTH, generator=generator).mul(scale).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)


def plain(hidden_BLC: Tensor, weight_VC: Tensor, tokens_BL: Tensor) -> Tensor:
    logits = (hidden_BLC @ weight_VC.T).float()
    return logits.log_softmax(-1).gather(-1, tokens_BL[..., None])[..., 0]


def gradients(logp_BL: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Of a sum in which every position counts differently."""
    factors = torch.linspace(-2, 3, logp_BL.numel()).view_as(logp_BL)
    return torch.autograd.grad((logp_BL * factors).sum(), (hidden, weight))


CHUNKS = [1, VOCAB, 4 * VOCAB, ROWS * LENGTH * VOCAB, 1 << 24]


@pytest.mark.parametrize("chunk_elements", CHUNKS)
def test_value_and_gradients_equal_a_plain_log_softmax_for_any_chunk(chunk_elements):
    hidden, weight, tokens = inputs()
    logp, expected = token_logp(hidden, weight, tokens, chunk_elements=chunk_elements), plain(hidden, weight, tokens)
    torch.testing.assert_close(logp, expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients(logp, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_gradients_by_finite_differences():
    hidden, weight, tokens = inputs()
    step = 1e-2
    for index, parameter in enumerate((hidden, weight)):
        gradient = gradients(token_logp(hidden, weight, tokens), hidden, weight)[index]
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

        def loss(shift: float, index: int = index, direction: Tensor = direction) -> Tensor:
            moved = [x.detach() + shift * direction if i == index else x for i, x in enumerate((hidden, weight))]
            logp = token_logp(*moved, tokens)
            return (logp * torch.linspace(-2, 3, logp.numel()).view_as(logp)).sum()

        slope = (loss(step) - loss(-step)) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient_and_leaves_the_other_alone(frozen):
    hidden, weight, tokens = inputs()
    expected = gradients(plain(hidden, weight, tokens), hidden, weight)[1 - frozen]
    (hidden, weight)[frozen].requires_grad_(False)
    token_logp(hidden, weight, tokens).mul(torch.linspace(-2, 3, ROWS * LENGTH).view(ROWS, LENGTH)).sum().backward()
    assert (hidden, weight)[frozen].grad is None
    torch.testing.assert_close((hidden, weight)[1 - frozen].grad, expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_model_gives_float32_log_probs_and_bfloat16_gradients():
    hidden, weight, tokens = inputs(torch.bfloat16)
    logp = token_logp(hidden, weight, tokens)
    assert logp.dtype == torch.float32
    # The softmax is float32: only the logits are rounded.
    torch.testing.assert_close(logp, plain(hidden, weight, tokens), rtol=0, atol=1e-6)
    exact = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    wide = gradients(plain(*exact, tokens), *exact)
    for got, want in zip(gradients(logp, hidden, weight), wide, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.1)


def test_log_probs_are_finite_where_a_probability_underflows():
    hidden, weight, tokens = inputs(scale=1000.0)
    logp = token_logp(hidden, weight, tokens)
    assert logp.min() < -1000
    assert logp.max() <= 0
    torch.testing.assert_close(logp, plain(hidden, weight, tokens))
    assert all(gradient.isfinite().all() for gradient in gradients(logp, hidden, weight))


class Sizes(TorchDispatchMode):
    """Notes the number of elements of every tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements += [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out


@contextmanager
def largest() -> Iterator[list[int]]:
    """The largest tensor made inside the block, in elements."""
    answer: list[int] = []
    with Sizes() as sizes:
        yield answer
    answer.append(max(sizes.elements))


def test_the_logits_of_all_positions_never_exist_at_once():
    rows, length, width, vocab, chunk = 4, 64, 2, 512, 8 * 512
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, length, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    tokens = torch.randint(vocab, (rows, length), generator=generator)
    with largest() as seen:
        plain(hidden, weight, tokens).sum().backward()
    assert seen == [rows * length * vocab], "the measure sees a tensor of all logits"
    with largest() as forward:
        logp = token_logp(hidden, weight, tokens, chunk_elements=chunk)
    with largest() as backward:
        logp.sum().backward()
    assert forward == backward == [chunk]


def test_the_default_chunk_bounds_a_model_of_the_largest_vocabulary():
    hidden, tokens = torch.zeros(2, 1100, 1), torch.zeros(2, 1100, dtype=torch.int64)
    with largest() as seen, torch.no_grad():
        logp = token_logp(hidden, torch.zeros(16384, 1), tokens)
    assert seen[0] * 4 <= 64 << 20
    torch.testing.assert_close(logp, torch.full((2, 1100), -9.704061))
