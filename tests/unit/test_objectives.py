"""Reads and writes nothing: each loss by hand, its gradient by finite differences, and whose rows count in a metric."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor, nn

from cca_core.config import AlignConfig
from cca_core.objectives import (
    CCA,
    DPO,
    REFERENCE,
    Batch,
    Likelihood,
    Unlearning,
    alignment_objective,
    cca_loss,
    dpo_loss,
    unlearning_loss,
)

OBJECTIVES = [CCA(beta=0.1, lambda_=1.0), CCA(beta=0.5, lambda_=3.0), DPO(beta=0.2), Unlearning(lambda_=2.0)]
#: Log-ratios policy - reference of three rows: two contrasts, and one whose "negative" is positive.
RATIO_POS, RATIO_NEG, POSITIVE = [2.0, -1.0, 4.0], [3.0, -6.0, 1.0], [False, False, True]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_probs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ref_pos, ref_neg = (
        torch.tensor([-50.0, -40.0, -45.0], dtype=dtype),
        torch.tensor([-52.0, -47.0, -44.0], dtype=dtype),
    )
    pos, neg = ref_pos + torch.tensor(RATIO_POS, dtype=dtype), ref_neg + torch.tensor(RATIO_NEG, dtype=dtype)
    return pos, neg, ref_pos, ref_neg, torch.tensor(POSITIVE)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 1.0, 4.0])
def test_cca_by_hand(lambda_):
    beta = 0.3
    rows = []
    for pos, neg, positive in zip(RATIO_POS, RATIO_NEG, POSITIVE, strict=True):
        second = math.log(sigmoid(beta * neg)) if positive else lambda_ * math.log(sigmoid(-beta * neg))
        rows.append(-(math.log(sigmoid(beta * pos)) + second) / max(lambda_, 1))
    loss, _ = cca_loss(*log_probs(), beta=beta, lambda_=lambda_)
    assert loss.item() == pytest.approx(sum(rows) / 3, rel=1e-5)


def test_dpo_by_hand():
    rows = [-math.log(sigmoid(0.3 * (pos - neg))) for pos, neg in zip(RATIO_POS, RATIO_NEG, strict=True)]
    loss, _ = dpo_loss(*log_probs(), beta=0.3)
    assert loss.item() == pytest.approx(sum(rows) / 3, rel=1e-5)


@pytest.mark.parametrize("lambda_", [0.0, 0.5, 4.0])
def test_unlearning_by_hand(lambda_):
    rows = [lambda_ * 3 - 2, lambda_ * -6 + 1, -1 - 4]
    loss, _ = unlearning_loss(*log_probs(), lambda_=lambda_)
    assert loss.item() == pytest.approx(sum(rows) / 3 / max(lambda_, 1), rel=1e-5)


def test_metrics_of_a_plain_loss_are_means_over_all_rows():
    _, metrics = dpo_loss(*log_probs(), beta=0.3)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"accuracy": 2 / 3, "margin": (-1 + 5 + 3) / 3, "log_ratio_pos": 5 / 3, "log_ratio_neg": -2 / 3}, rel=1e-5
    )


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_gradients_by_finite_differences(objective):
    pos, neg, *rest = log_probs(torch.float64)
    pos.requires_grad_()
    neg.requires_grad_()
    assert torch.autograd.gradcheck(lambda pos, neg: objective.terms(pos, neg, *rest), (pos, neg))
    objective.terms(pos, neg, *rest).sum().backward()
    assert (pos.grad <= 0).all(), "the right condition goes up"
    assert (neg.grad[:2] >= 0).all(), "the wrong one goes down"


def test_losses_are_float32_at_thousands_of_nats():
    pos = torch.tensor([-4000.0], requires_grad=True)
    far = torch.tensor([-4000.5])
    for objective in OBJECTIVES:
        terms = objective.terms(pos, far, far, pos.detach(), torch.tensor([False]))
        assert terms.dtype == torch.float32
        assert terms.isfinite().all()
    loss, _ = cca_loss(pos, far, far - 9000, far + 9000, torch.tensor([False]), beta=1.0, lambda_=1.0)
    assert loss.item() == pytest.approx(0, abs=1e-6)
    loss, _ = cca_loss(pos, far, pos.detach() + 9000, far - 9000, torch.tensor([False]), beta=1.0, lambda_=1.0)
    assert loss.item() == pytest.approx(18000)
    assert torch.autograd.grad(loss, pos)[0].item() == pytest.approx(-1)


class Scores(nn.Module):
    """A model whose log-prob of every token is its weight for (image, condition); the image is its first token."""

    def __init__(self, images: int) -> None:
        super().__init__()
        weight_IC = torch.randn(images, 4, generator=torch.Generator().manual_seed(0))
        self.weight_IC = nn.Parameter(weight_IC - 3)
        self.calls = 0

    def forward(self, tokens_BL: Tensor, cond_B: Tensor) -> Tensor:
        self.calls += 1
        return self.weight_IC[tokens_BL[:, 0], cond_B][:, None].expand(tokens_BL.shape)


def batch(weights: list[float] | None = None) -> Batch:
    """Five images under four conditions (3 is null): contrast, null, equal classes, contrast, contrast."""
    pos_cond, neg_cond = torch.tensor([0, 3, 1, 2, 1]), torch.tensor([1, 3, 1, 0, 2])
    return Batch(
        tokens_BL=torch.arange(5)[:, None].expand(5, 4),
        pos_cond_B=pos_cond,
        neg_cond_B=neg_cond,
        null_B=pos_cond == 3,
        weight_B=torch.tensor(weights or [1.0] * 5),
        ref_pos_B=torch.tensor([-12.0, -11.0, -10.0, -14.0, -13.0]),
        ref_neg_B=torch.tensor([-13.0, -11.0, -10.0, -11.0, -9.0]),
    )


def ratios(model: Scores) -> tuple[Tensor, Tensor]:
    rows, full = torch.arange(5), batch()
    pos, neg = (4 * model.weight_IC[rows, cond] for cond in (full.pos_cond_B, full.neg_cond_B))
    return (pos - full.ref_pos_B).detach(), (neg - full.ref_neg_B).detach()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_metrics_count_contrasts_only(objective):
    model = Scores(5)
    output = objective.step(model, batch([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert model.calls == 1, "one forward on stacked rows, or data parallel training would lose a gradient"
    pos, neg = ratios(model)
    contrasts = [0, 3]  # not the null row, not the one of equal classes, not padding
    expected = {
        "contrast_rows": 2.0,
        "log_ratio_pos": pos[contrasts].sum(),
        "log_ratio_neg": neg[contrasts].sum(),
        "margin": (pos - neg)[contrasts].sum(),
        "accuracy": (pos > neg)[contrasts].sum(),
        "null_rows": 1.0,
        "log_ratio_null": pos[1],
    }
    assert output.metrics.keys() == expected.keys()
    for name, value in output.metrics.items():
        assert value.item() == pytest.approx(float(expected[name]), rel=1e-5), name
    assert output.rows.item() == 4
    assert not any(value.requires_grad for value in output.metrics.values())
    without_null = objective.step(model, batch([1.0, 0.0, 1.0, 1.0, 1.0])).metrics
    assert (without_null["null_rows"], without_null["log_ratio_null"]) == (0, 0)


@pytest.mark.parametrize("objective", [*OBJECTIVES, Likelihood()], ids=repr)
def test_padding_adds_nothing_to_loss_gradient_or_metrics(objective):
    padded, short = batch([1.0, 1.0, 1.0, 1.0, 0.0]), batch()
    short = replace(short, **{field.name: getattr(short, field.name)[:4] for field in fields(Batch)})
    outputs, gradients = [], []
    for rows in (padded, short):
        model = Scores(5)
        outputs.append(objective.step(model, rows))
        outputs[-1].loss_sum.backward()
        gradients.append(model.weight_IC.grad)
    torch.testing.assert_close(outputs[0].loss_sum, outputs[1].loss_sum)
    assert outputs[0].rows == outputs[1].rows
    torch.testing.assert_close(outputs[0].metrics, outputs[1].metrics)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert (gradients[0][4] == 0).all()
    assert (gradients[0][0] != 0).any()


def test_likelihood_is_nats_per_token_under_the_positive_condition():
    model = Scores(5)
    output = Likelihood().step(model, batch([1.0, 1.0, 0.0, 0.0, 0.0]))
    assert output.loss_sum.item() == pytest.approx(-(model.weight_IC[0, 0] + model.weight_IC[1, 3]).item())
    assert (Likelihood.needs, CCA.needs) == ((), (REFERENCE,))


def test_the_recipe_names_the_objective_and_its_weights():
    named = {name: alignment_objective(AlignConfig(objective=name, beta=0.3, lambda_=2.0)) for name in ("cca", "dpo")}
    assert named == {"cca": CCA(beta=0.3, lambda_=2.0), "dpo": DPO(beta=0.3)}
    assert alignment_objective(AlignConfig(objective="unlearning", lambda_=2.0)) == Unlearning(lambda_=2.0)
