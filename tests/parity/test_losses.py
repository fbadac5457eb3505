"""Reads data/losses: losses and gradients against the official loss statements, and where we depart from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from cca_core.objectives import Batch, cca_loss, dpo_loss, unlearning_loss

DATA = Path(__file__).parent / "data" / "losses"
CASES = json.loads((DATA / "cases.json").read_text())


def chosen(loss_type: str, *, null: bool | None, trainer: str = "") -> list[dict]:
    """The cases of a loss; ``null``: whether the official run had null rows (uncond_ratio > 0)."""
    return [
        case
        for case in CASES
        if case["loss_type"] == loss_type
        and "raises" not in case
        and (null is None or (case["uncond_ratio"] > 0) == null)
        and trainer in case["trainer"]
    ]


def name(case: dict) -> str:
    return f"{case['case']}-{case['trainer']}-{case['loss_type']}-null{case['uncond_ratio']}-lambda{case['lambda_']}"


@dataclass
class Rows:
    """The eight sequences of a case; ``inputs`` are what our losses take, the first two with gradients."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    golden: dict[str, Tensor]

    @property
    def ratios(self) -> tuple[Tensor, Tensor]:
        pos, neg, ref_pos, ref_neg, _ = self.inputs
        return (pos - ref_pos).detach(), (neg - ref_neg).detach()


def rows_of(case: dict) -> Rows:
    prefix = f"case{case['case']:02d}."
    tensors = load_file(DATA / "cases.safetensors")
    golden = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    null = golden["null_mask"].bool()
    batch = Batch(null, golden["class_ids_masked"], golden["neg_class_ids_masked"], null, torch.ones(8))
    pos, neg = (golden[f"policy_{which}"].requires_grad_() for which in ("pos", "neg"))
    return Rows((pos, neg, golden["ref_pos"], golden["ref_neg"], batch.positive_B), golden)


def check(case: dict, rows: Rows, loss: Tensor, metrics: dict[str, Tensor]) -> None:
    """Loss and gradients to the tolerances of the recording, and the metrics that the official scripts log."""
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    loss.backward()
    tolerance = 1e-7 * max(1.0, case["lambda_"])
    for which, ours in zip(("pos", "neg"), rows.inputs[:2], strict=True):
        expected = rows.golden[f"grad_policy_{which}"]
        torch.testing.assert_close(ours.grad, expected, rtol=0, atol=tolerance)
    assert metrics["accuracy"].item() == pytest.approx(case["acc"], abs=1e-6)
    assert metrics["margin"].item() == pytest.approx(case["reward_margin"], abs=1e-4)
    assert metrics["log_ratio_pos"].item() == pytest.approx(case["chosen_reward"], abs=1e-4)
    assert metrics["log_ratio_neg"].item() == pytest.approx(case["rejected_reward"], abs=1e-4)


@pytest.mark.parametrize("case", chosen("CCA", null=True), ids=name)
def test_cca(case):
    rows = rows_of(case)
    check(case, rows, *cca_loss(*rows.inputs, beta=case["beta"], lambda_=case["lambda_"]))


@pytest.mark.parametrize("case", chosen("unlearning", null=True), ids=name)
def test_unlearning(case):
    rows = rows_of(case)
    check(case, rows, *unlearning_loss(*rows.inputs, lambda_=case["lambda_"]))


@pytest.mark.parametrize("case", chosen("DPO", null=None), ids=name)
def test_dpo(case):
    rows = rows_of(case)
    check(case, rows, *dpo_loss(*rows.inputs, beta=case["beta"]))


@pytest.mark.parametrize("case", chosen("CCA", null=True) + chosen("unlearning", null=True), ids=name)
def test_rows_that_count_as_positive(case):
    rows = rows_of(case)
    assert torch.equal(rows.inputs[-1], rows.golden["treated_as_positive"].bool())


def test_every_binding_case_was_compared():
    compared = chosen("CCA", null=True) + chosen("unlearning", null=True) + chosen("DPO", null=None)
    assert [case["case"] for case in CASES if case not in compared] == [2, 6, 9, 12, 13]


# Departures. Each test says what the official branch computes, and that ours does not.


@pytest.mark.parametrize("case", chosen("CCA", null=False, trainer="llamagen"), ids=name)
def test_departure_l1_llamagen_cca_without_null_rows_has_no_sigmoid(case):
    # L1: the official script with its default uncond_ratio 0 trains unlearning under the name CCA: beta is unused,
    # nothing is divided by lambda, and rows whose negative equals the positive are pushed down.
    rows = rows_of(case)
    pos, neg = rows.ratios
    lambda_ = case["lambda_"]
    assert (lambda_ * neg - pos).mean().item() == pytest.approx(case["loss"], rel=1e-6)
    ours, _ = cca_loss(*rows.inputs, beta=case["beta"], lambda_=lambda_)
    assert ours.item() != pytest.approx(case["loss"], rel=0.01)
    # Ours is the CCA of the paper whether rows are null or not.
    positive = rows.inputs[-1]
    pull = -F.logsigmoid(case["beta"] * pos)
    push = -torch.where(positive, 1.0, lambda_) * F.logsigmoid(torch.where(positive, 1, -1) * case["beta"] * neg)
    assert ours.item() == pytest.approx(((pull + push) / max(lambda_, 1)).mean().item(), rel=1e-6)


@pytest.mark.parametrize("case", chosen("CCA", null=False, trainer="var"), ids=name)
def test_departure_l1_var_cca_without_null_rows_is_not_divided(case):
    # L1: here the sigmoid is there, but the division by max(lambda, 1) is not, and every row counts as a true negative.
    rows = rows_of(case)
    pos, neg = rows.ratios
    beta, lambda_ = case["beta"], case["lambda_"]
    official = -F.logsigmoid(beta * pos) - lambda_ * F.logsigmoid(-beta * neg)
    assert official.mean().item() == pytest.approx(case["loss"], rel=1e-6)
    none = torch.zeros(8, dtype=torch.bool)
    ours, _ = cca_loss(*rows.inputs[:4], none, beta=beta, lambda_=lambda_)
    assert ours.item() * lambda_ == pytest.approx(case["loss"], rel=1e-6)


@pytest.mark.parametrize("case", chosen("unlearning", null=False), ids=name)
def test_departure_l3_unlearning_without_null_rows_pushes_equal_classes_down(case):
    # L3: rows whose negative equals the positive count as positives only where uncond_ratio > 0; ours do always. Nor is
    # that branch divided by max(lambda, 1).
    rows = rows_of(case)
    pos, neg = rows.ratios
    lambda_ = case["lambda_"]
    undivided = (lambda_ * neg - pos).mean().item()
    assert undivided == pytest.approx(case["loss"], rel=1e-6)
    none = torch.zeros(8, dtype=torch.bool)
    ours, _ = unlearning_loss(*rows.inputs[:4], none, lambda_=lambda_)
    assert ours.item() == pytest.approx(undivided / max(lambda_, 1), rel=1e-6)


def test_departure_l2_the_offered_spelling_of_unlearning_works_here():
    # L2: the official parser offers "Unlearning", and the code then raises NotImplementedError.
    case = CASES[13]
    assert (case["loss_type"], case["raises"]) == ("Unlearning", "NotImplementedError")
    loss, _ = unlearning_loss(*(torch.zeros(2) for _ in range(4)), torch.zeros(2, dtype=torch.bool), lambda_=1.0)
    assert loss.item() == 0


def test_departure_l5_our_training_metrics_leave_null_rows_out():
    # L5: the official accuracy counts null rows as wrong; `mean` reports that one, training only true contrasts.
    from cca_core.objectives import CCA
    from cca_core.objectives.base import contrast_metrics

    null = torch.tensor([True, False, False, False])
    cond = torch.tensor([3, 0, 1, 2])
    batch = Batch(null, cond, torch.tensor([3, 1, 2, 2]), null, torch.ones(4))
    pos, neg = torch.tensor([0.0, 2.0, 1.0, 5.0]), torch.tensor([0.0, 1.0, 3.0, 5.0])
    zeros = torch.zeros(4)
    _, official = CCA(0.1, 1.0).mean(pos, neg, zeros, zeros, batch.positive_B)
    ours = contrast_metrics(pos, neg, batch)
    assert official["accuracy"] == 0.25
    assert (ours["accuracy"], ours["contrast_rows"], ours["null_rows"]) == (1, 2, 1)
    assert ours["margin"] == (2 - 1) + (1 - 3)
