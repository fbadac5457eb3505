"""Reads data/cca_train_step: five optimiser steps of CCA on LlamaGen, and their variants, against the official loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cca_core.config import AlignConfig, OptimConfig
from cca_core.models import ARImageModel, load_model
from cca_core.objectives import Batch, Objective, alignment_objective
from cca_core.objectives.base import sequence_logps
from cca_core.train.optim import build_optimizer, clip_gradients

DATA = Path(__file__).parent / "data"
STEP = DATA / "cca_train_step"
LOG = json.loads((STEP / "log.json").read_text())
GOLDEN = load_file(STEP / "batches.safetensors")

LOSS_TOLERANCE = 2e-4
LOGP_TOLERANCE = 5e-4
NORM_TOLERANCE = 2e-4  # relative
# Of DPO's log-ratios after a step. Where both conditions of a row coincide, its exact gradient is zero: the rounding
# noise that is left, another one on each processor (3e-4 to 8e-4 seen), is made a full step by Adam.
DPO_TOLERANCE = 2e-3


def reference_model() -> ARImageModel:
    return load_model(str(DATA / "gpt_c2i" / "ckpt.pt"), num_tokens=16, num_heads=4)


def policy_model() -> ARImageModel:
    model = reference_model()
    noise = load_file(STEP / "policy_noise_int8.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += noise[name].float() * 2**-10
    return model.train()


def settings_of(variant: dict) -> dict:
    return LOG["settings"] | variant.get("settings", {})


def objective_of(settings: dict) -> Objective:
    name = settings["loss_type"].lower()
    return alignment_objective(AlignConfig(objective=name, beta=settings["beta"], lambda_=settings["lambda_"]))


def optim_of(settings: dict) -> OptimConfig:
    return OptimConfig(
        lr=settings["lr"],
        betas=tuple(settings["betas"]),
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
        clip_norm=settings.get("max_norm", settings["max_grad_norm"]),
    )


def batch_of(step: int, null_share: float) -> Batch:
    """The recorded rows under the recorded conditions; ``null_share`` 0 leaves the masks out."""
    labels, rows = GOLDEN["labels"][step], GOLDEN["labels"].shape[1]
    if null_share > 0:
        null, pos, neg = (GOLDEN[name][step] for name in ("null_masks", "pos_labels", "neg_labels"))
    else:
        null, pos, neg = torch.zeros(rows), labels, labels.roll(-1)
    return Batch(GOLDEN["tokens"][step], pos, neg, null.bool(), torch.ones(rows))


def with_reference(batch: Batch, reference: ARImageModel) -> Batch:
    with torch.no_grad():
        pos, neg = sequence_logps(reference, batch)
    return Batch(**{**vars(batch), "ref_pos_B": pos, "ref_neg_B": neg})


class Run:
    """The official loop made of our parts: what each step gave, and the model at the end."""

    def __init__(self, settings: dict, steps: int, micro_batches: int = 1) -> None:
        objective, optim = objective_of(settings), optim_of(settings)
        reference, self.model = reference_model(), policy_model()
        optimizer = build_optimizer(self.model, optim)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.logps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.first_gradients: dict[str, Tensor] = {}
        for step in range(steps):
            batch = with_reference(batch_of(step, settings["uncond_ratio"]), reference)
            with torch.no_grad():
                logps = (*sequence_logps(self.model, batch), batch.ref_pos_B, batch.ref_neg_B)
            self.logps.append(logps)
            self.metrics.append(
                {name: value.item() for name, value in objective.mean(*logps, batch.positive_B)[1].items()}
            )
            output = objective.step(self.model, batch)
            mean = output.loss_sum / output.rows
            self.losses.append(mean.item())
            (mean / micro_batches).backward()
            if step == 0:
                self.first_gradients = {name: p.grad.clone() for name, p in self.model.named_parameters()}
            if (step + 1) % micro_batches == 0:
                self.norms.append(clip_gradients(self.model, optim).item())
                optimizer.step()
                optimizer.zero_grad()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach(), expected, rtol=0, atol=tolerance)


def check_steps(run: Run, recorded: list[dict], norms: bool = True, later: float = LOGP_TOLERANCE) -> None:
    """``later`` is the tolerance of log-ratios after the first step."""
    assert run.losses == pytest.approx([step["loss"] for step in recorded], abs=LOSS_TOLERANCE)
    if norms:
        expected = [step["grad_norm"] for step in recorded if step["grad_norm"] is not None]
        assert run.norms == pytest.approx(expected, rel=NORM_TOLERANCE)
    for step, (ours, official) in enumerate(zip(run.metrics, recorded, strict=True)):
        tolerance = later if step else LOGP_TOLERANCE
        assert ours["accuracy"] == pytest.approx(official["acc"], abs=1e-6)
        assert ours["margin"] == pytest.approx(official["reward_margin"], abs=tolerance)
        assert ours["log_ratio_pos"] == pytest.approx(official["chosen_reward"], abs=tolerance)
        assert ours["log_ratio_neg"] == pytest.approx(official["rejected_reward"], abs=tolerance)


def check_final_norms(run: Run, variant: dict) -> None:
    """Only norms and sums of the final tensors were recorded for a variant."""
    for name, parameter in run.model.named_parameters():
        assert parameter.norm().item() == pytest.approx(variant["final_l2"][name], abs=5e-5), name
        # A sum also adds up the few elements that Adam moves by rounding noise.
        assert parameter.double().sum().item() == pytest.approx(variant["final_sum"][name], abs=1e-3), name


@pytest.fixture(scope="module")
def run() -> Run:
    torch.set_num_threads(1)
    return Run(LOG["settings"], steps=5)


def test_log_probs_of_policy_and_reference(run):
    names = ("img_logps", "negative_img_logps", "img_ref_logps", "negative_img_ref_logps")
    for step, logps in enumerate(run.logps):
        for name, ours in zip(names, logps, strict=True):
            assert ours.dtype == torch.float32
            close(ours, GOLDEN[name][step], LOGP_TOLERANCE)


def test_losses_norms_and_metrics(run):
    check_steps(run, LOG["steps"])
    assert min(run.norms) > LOG["settings"]["max_grad_norm"], "clipping was active in every step"


def test_gradients_of_the_first_step(run):
    expected = load_file(STEP / "step0_grads_subset.safetensors")
    assert len(expected) == 12
    for name, gradient in expected.items():
        close(run.first_gradients[name], gradient, 1e-4)


def test_parameters_after_five_steps(run):
    expected = load_file(STEP / "final_params.safetensors")
    parameters = dict(run.model.named_parameters())
    assert parameters.keys() == expected.keys()
    off = torch.cat([(parameters[name].detach() - value).abs().flatten() for name, value in expected.items()])
    # Adam turns rounding noise of gradients near zero into steps that are seen: a few elements may be further off.
    assert off.max() < 5e-4
    assert off.quantile(0.999) < 1e-5
    start = dict(policy_model().named_parameters())
    moved = torch.cat([(start[name].detach() - value).abs().flatten() for name, value in expected.items()])
    assert moved.max().item() == pytest.approx(LOG["max_abs_param_update"], abs=1e-5)


def test_groups_of_the_optimiser():
    model = policy_model()
    decayed, _ = build_optimizer(model, optim_of(LOG["settings"])).param_groups
    ids = {id(parameter) for parameter in decayed["params"]}
    ours = {name: "decay" if id(p) in ids else "no_decay" for name, p in model.named_parameters()}
    assert ours == LOG["optimizer_group_of_parameter"]


def variant(**settings: object) -> dict:
    (found,) = (v for v in LOG["variants"] if v["settings"] == settings)
    return found


BINDING = [
    variant(loss_type="DPO", uncond_ratio=0.0),
    variant(loss_type="DPO", uncond_ratio=0.3),
    variant(loss_type="unlearning", uncond_ratio=0.3, lambda_=5.0),
    variant(loss_type="CCA", uncond_ratio=0.3, lambda_=0.5),
    variant(loss_type="CCA", uncond_ratio=0.3, max_norm=0.0),
]


@pytest.mark.parametrize("variant", BINDING, ids=lambda v: "-".join(f"{k}{x}" for k, x in v["settings"].items()))
def test_variants(variant):
    steps = variant["comparable_steps"]
    run = Run(settings_of(variant), steps)
    clipped = settings_of(variant).get("max_norm") != 0
    later = DPO_TOLERANCE if settings_of(variant)["loss_type"] == "DPO" else LOGP_TOLERANCE
    check_steps(run, variant["steps"][:steps], norms=clipped, later=later)
    if steps == 5:
        check_final_norms(run, variant)


# Departures. Each test says what the official loop computes, and that ours does not.


def test_departure_l1_cca_without_null_rows_is_unlearning_officially():
    # L1: with uncond_ratio 0 the official LlamaGen script has no sigmoid, under the name CCA. Ours is the paper's loss.
    official = variant(loss_type="CCA", uncond_ratio=0.0, lambda_=2.0)
    run = Run(settings_of(official), steps=1)
    pos, neg = (policy - reference for policy, reference in zip(run.logps[0][:2], run.logps[0][2:], strict=True))
    assert (2 * neg - pos).mean().item() == pytest.approx(official["steps"][0]["loss"], abs=3 * LOGP_TOLERANCE)
    assert run.losses[0] > 0 > official["steps"][0]["loss"]


def test_departure_l8_accumulation_is_a_sum_officially():
    # L8: the official LlamaGen loop does not divide by the number of micro-batches: clipping and log see the sum of two
    # gradients. Ours is the gradient of the mean over both, so its norm is half as large. Here clipping acts on either,
    # and what it leaves is the same.
    official = variant(loss_type="CCA", uncond_ratio=0.3, ga=2)
    stepped = [step["stepped"] for step in official["steps"]]
    assert stepped == [False, True, False, True, False]
    run = Run(settings_of(official), steps=5, micro_batches=2)
    check_steps(run, official["steps"], norms=False)
    norms = [step["grad_norm"] for step in official["steps"] if step["stepped"]]
    assert [2 * norm for norm in run.norms] == pytest.approx(norms, rel=NORM_TOLERANCE)
    assert min(run.norms) > LOG["settings"]["max_grad_norm"]
    check_final_norms(run, official)


def test_every_variant_was_compared_or_is_a_departure():
    departures = [
        variant(loss_type="CCA", uncond_ratio=0.0, lambda_=2.0),
        variant(loss_type="CCA", uncond_ratio=0.3, ga=2),
    ]
    assert len(LOG["variants"]) == len(BINDING) + len(departures)
    assert all(v in BINDING + departures for v in LOG["variants"])
