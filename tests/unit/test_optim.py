"""Reads and writes nothing: the schedule by hand, the decay groups, clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cca_core.config import OptimConfig
from cca_core.train.optim import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_learning_rate,
)


def schedule(config: OptimConfig, total_steps: int) -> list[float]:
    return [learning_rate(config, step, total_steps) for step in range(total_steps)]


def test_warm_up_then_constant():
    config = OptimConfig(lr=0.4, warmup_steps=4)
    assert schedule(config, 6) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_warm_up_then_cosine_to_the_final_share():
    config = OptimConfig(lr=1.0, warmup_steps=2, schedule="cosine", final_lr_share=0.2)
    # 0.2 + 0.8 * (1 + cos(pi * p)) / 2 at p = 1/4, 1/2, 3/4, 1.
    falling = [0.8828427, 0.6, 0.3171573, 0.2]
    assert schedule(config, 6) == pytest.approx([0.5, 1.0, *falling])
    assert learning_rate(config, 100, 6) == pytest.approx(0.2)


def test_a_run_shorter_than_its_warm_up():
    config = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine")
    assert schedule(config, 2) == pytest.approx([0.25, 0.5])


def test_no_warm_up():
    assert schedule(OptimConfig(lr=0.3), 3) == [0.3, 0.3, 0.3]


def test_decay_acts_on_matrices_only_and_frozen_parameters_stay_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 2))
    model[2].bias.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.05))
    decayed, plain = optimizer.param_groups
    assert [p.dim() for p in decayed["params"]] == [4, 2]
    assert [p.dim() for p in plain["params"]] == [1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


def test_decay_shrinks_a_matrix_without_gradient_by_lr_times_decay():
    model = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.5))
    set_learning_rate(optimizer, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), 0.95 * before["weight"])
    torch.testing.assert_close(model.bias.detach(), before["bias"])


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, 1.0), (0.0, 5.0), (10.0, 5.0)])
def test_clipping(clip_norm, expected):
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(model, OptimConfig(lr=1.0, clip_norm=clip_norm)).item() == 5.0
    assert model.weight.grad.norm().item() == pytest.approx(expected)


def test_a_gradient_that_is_not_finite_is_refused():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, torch.inf]])
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_gradients(model, OptimConfig(lr=1.0, clip_norm=0.0))
