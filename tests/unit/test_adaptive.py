"""Writes a token data set to a temporary folder: weights that follow the training, bfloat16, and skipped steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from cca_core.config import AlignConfig, ConfigError, ExecutionConfig, OptimConfig, Recipe
from cca_core.dataset import TokenDataset
from cca_core.objectives import CCA, Likelihood
from cca_core.objectives.base import Batch
from cca_core.pairs import Purpose
from cca_core.parse import from_dict
from cca_core.train.adaptive import GAINS, Control, controls
from cca_core.train.batches import BatchSource, OnlineReference, ahead
from cca_core.train.checks import check_reference
from cca_core.train.distributed import World, world
from cca_core.train.errors import NonFiniteError
from cca_core.train.fit import MOST_SKIPPED, Hooks, fit

TOKENS = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_tokens) -> TokenDataset:
    return TokenDataset(write_tokens(tmp_path_factory.mktemp("tokens")))


@pytest.fixture
def alone() -> Iterator[World]:
    with world(torch.device("cpu")) as group:
        yield group


def batches_of(dataset, reference, **changes) -> BatchSource:
    default = {"seed": 0, "global_batch_size": 24, "micro_batch_size": 12, "null_label": 3, "null_share": 0.2}
    return BatchSource(dataset, **{**default, "null_purpose": Purpose.NULL, "reference": reference, **changes})


def align(model, reference, dataset, alone, *, epochs=20, **options) -> list[dict[str, float]]:
    batches = batches_of(dataset, OnlineReference(reference, precision=options.get("precision", "float32")))
    options = {"execution": ExecutionConfig(log_every_steps=1), **options}
    optim = OptimConfig(lr=1e-3)
    objective = CCA(beta=0.1, lambda_=1.0)
    return fit(model, objective, batches, optim, epochs=epochs, dropout=0.0, world=alone, **options).curve


def control(weight, **changes) -> Control:
    metric = {"lambda_": "log_ratio_pos", "null_share": "log_ratio_null"}[weight]
    given = {"target": -0.1, "value": 1.0, "low": 0.01, "high": 1000.0, **changes}
    return Control(weight, metric, **given)


def test_a_control_moves_its_weight_towards_the_target():
    raised, lowered = control("lambda_"), control("lambda_")
    integral, proportional = GAINS["lambda_"]
    raised.update(0.0, TOKENS)
    assert raised.value == pytest.approx(math.exp((integral + proportional) * 0.1))
    lowered.update(-0.2 * TOKENS, TOKENS)
    assert lowered.value == pytest.approx(math.exp(-(integral + proportional) * 0.1))
    raised.update(-0.1 * TOKENS, TOKENS)
    assert raised.value == pytest.approx(math.exp(integral * 0.1)), "at the target the sum of errors is left"
    share = control("null_share", value=0.1, high=0.2)
    share.update(-1.0 * TOKENS, TOKENS)
    assert share.value == 0.2, "null images have become unlikely: more of them, up to what the reference holds"
    share.update(math.nan, TOKENS)
    assert share.value == 0.2


def test_a_recipe_says_which_weights_follow_the_training():
    assert controls(Recipe()) == ()
    align = {"lambda_": "auto", "null_share": "auto", "log_ratio_target": -0.2}
    lambda_, share = controls(from_dict(Recipe, {"align": align, "reference": {"null_share_max": 0.3}}))
    assert (lambda_.metric, lambda_.target, lambda_.value) == ("log_ratio_pos", -0.2, 1.0)
    assert (share.metric, share.target, share.value, share.high) == ("log_ratio_null", 0.0, 0.15, 0.3)
    with pytest.raises(ConfigError, match="'fast' is not a number or auto"):
        from_dict(Recipe, {"align": {"lambda_": "fast"}})
    assert controls(Recipe(align=AlignConfig(objective="dpo", lambda_="auto"))) == (), "it has no lambda"


@pytest.mark.parametrize("target", [-0.05, -0.3])
def test_lambda_keeps_the_mean_positive_log_ratio_at_its_target(dataset, alone, random_llamagen, target):
    controls = [control("lambda_", target=target)]
    curve = align(random_llamagen(), random_llamagen(), dataset, alone, epochs=60, controls=controls)
    late = [record["log_ratio_pos"] / TOKENS for record in curve[len(curve) // 2 :]]
    assert np.mean(late) == pytest.approx(target, abs=0.05)
    assert curve[0]["lambda_"] == 1.0
    assert len({record["lambda_"] for record in curve}) > 10


def test_what_dropout_takes_from_the_log_ratio_is_no_error(dataset, alone, random_llamagen):
    lambda_, share = control("lambda_", target=0.0), control("null_share", target=0.0, value=0.1, high=0.2)
    batches = batches_of(dataset, OnlineReference(random_llamagen()))
    options = {"execution": ExecutionConfig(log_every_steps=1), "dropout": 0.3, "controls": [lambda_, share]}
    # Nothing is learned, so that the first epoch is what was seen before it.
    curve = fit(random_llamagen(), CCA(0.1, 1.0), batches, OptimConfig(lr=0.0), epochs=1, world=alone, **options).curve
    rows = [record["rows"] * record["contrast_share"] for record in curve]
    dropped = np.average([record["log_ratio_pos"] for record in curve], weights=rows) / TOKENS
    assert dropped < -0.01, "the policy alone has dropout"
    assert lambda_.offset == pytest.approx(dropped, rel=1e-5)
    assert share.offset != 0
    errors = [record["log_ratio_pos"] / TOKENS - dropped for record in curve]
    assert lambda_.sum == pytest.approx(GAINS["lambda_"][0] * sum(errors), abs=1e-6)


def test_bfloat16_follows_float32(dataset, alone, random_llamagen):
    curves = [
        align(random_llamagen(), random_llamagen(), dataset, alone, epochs=2, precision=precision)
        for precision in ("float32", "bfloat16")
    ]
    losses = [[record["loss"] for record in curve] for curve in curves]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert abs(curves[1][0]["log_ratio_pos"]) < 1e-3, "policy and reference round alike"


class BadUpTo(Likelihood):
    """The likelihood, but its first micro-batches have a loss that is not a number."""

    def __init__(self, micro_batches: int) -> None:
        object.__setattr__(self, "left", [micro_batches])

    def step(self, model, batch: Batch):
        output = super().step(model, batch)
        self.left[0] -= 1
        return replace(output, loss_sum=output.loss_sum * math.nan) if self.left[0] >= 0 else output


def test_a_gradient_that_is_not_finite_is_skipped_where_the_recipe_says_so(dataset, alone, random_llamagen):
    options = {"epochs": 8, "dropout": 0.0, "world": alone, "execution": ExecutionConfig(log_every_steps=1)}
    batches = batches_of(dataset, None)
    seen = []

    def run(bad_steps: int):
        model = random_llamagen()
        start = {name: value.clone() for name, value in model.state_dict().items()}
        curve = fit(model, BadUpTo(2 * bad_steps), batches, OptimConfig(lr=1e-3), non_finite="skip", **options).curve
        seen.append(start)
        return curve

    curve = run(2)
    assert [record.get("skipped_steps") for record in curve[:3]] == [1.0, 2.0, 2.0]
    assert math.isnan(curve[1]["loss"])
    assert math.isfinite(curve[2]["loss"])
    assert curve[-1]["loss"] < curve[2]["loss"]
    with pytest.raises(NonFiniteError, match=f"not finite at step {MOST_SKIPPED + 1}"):
        run(MOST_SKIPPED + 1)


def test_a_reference_of_another_model_stops_the_run(dataset, alone, random_llamagen):
    own = batches_of(dataset, OnlineReference(random_llamagen()))
    check_reference(random_llamagen(), own, alone, "float32")
    other = batches_of(dataset, OnlineReference(random_llamagen(seed=5)))
    with pytest.raises(ConfigError, match=r"not that of the base: a log-ratio is .* rounding explains 0\.008"):
        check_reference(random_llamagen(), other, alone, "float32")


def test_batches_come_ahead_in_order_and_errors_come_through():
    def items():
        yield from range(1, 6)
        raise OSError("the disk went away")

    made = ahead(items())
    assert [next(made) for _ in range(5)] == [1, 2, 3, 4, 5]
    with pytest.raises(OSError, match="went away"):
        next(made)


def test_what_fails_beside_the_gradient_is_not_skipped(dataset, alone, random_llamagen, monkeypatch):
    def out_of_memory(self) -> None:
        raise RuntimeError("no memory for the moments")

    monkeypatch.setattr(torch.optim.AdamW, "step", out_of_memory)
    with pytest.raises(RuntimeError, match="no memory for the moments") as caught:
        align(random_llamagen(), random_llamagen(), dataset, alone, epochs=1, non_finite="skip")
    assert not isinstance(caught.value, NonFiniteError)


def test_training_that_is_ended_early_says_how_far_it_came(dataset, alone, random_llamagen):
    hooks = Hooks(evaluate_every_steps=2, on_evaluate=lambda step, model: step == 4)
    batches = batches_of(dataset, None)
    options = {"epochs": 8, "dropout": 0.0, "world": alone, "execution": ExecutionConfig(log_every_steps=1)}
    result = fit(random_llamagen(), Likelihood(), batches, OptimConfig(lr=1e-3), hooks=hooks, **options)
    assert result.steps == len(result.curve) == 4
