"""Writes a token data set to a temporary folder: the loop's steps, records, dropout and refusal of bad gradients."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cca_core.config import ExecutionConfig, OptimConfig
from cca_core.dataset import TokenDataset
from cca_core.objectives import Batch, Likelihood, LossOutput
from cca_core.pairs import Purpose
from cca_core.train.batches import BatchSource
from cca_core.train.distributed import World, world
from cca_core.train.errors import NonFiniteError
from cca_core.train.fit import FitResult, Hooks, fit

OPTIM = OptimConfig(lr=1e-2, warmup_steps=3, schedule="cosine")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_tokens) -> TokenDataset:
    return TokenDataset(write_tokens(tmp_path_factory.mktemp("tokens")))


@pytest.fixture
def alone() -> Iterator[World]:
    with world(torch.device("cpu")) as group:
        yield group


def batches_of(dataset: TokenDataset, **changes) -> BatchSource:
    default = {"seed": 0, "global_batch_size": 20, "micro_batch_size": 10, "null_label": 3, "null_share": 0.1}
    return BatchSource(dataset, **{**default, "null_purpose": Purpose.LABEL_DROPOUT, **changes})


def train(model: nn.Module, batches: BatchSource, alone: World, *, objective=None, **changes) -> FitResult:
    hooks = Hooks(**{name: changes.pop(name) for name in list(changes) if name in vars(Hooks())})
    execution = ExecutionConfig(log_every_steps=changes.pop("log_every_steps", 1))
    default = {"epochs": 2, "dropout": 0.0, "world": alone, "execution": execution, "hooks": hooks}
    return fit(model, objective or Likelihood(), batches, changes.pop("optim", OPTIM), **{**default, **changes})


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class BadAt(Likelihood):
    """The likelihood, but one micro-batch has a gradient that is not finite, though its loss is."""

    def __init__(self, micro_batch: int) -> None:
        object.__setattr__(self, "left", itertools.count(-micro_batch))

    def step(self, model: nn.Module, batch: Batch) -> LossOutput:
        output = super().step(model, batch)
        if next(self.left) != 0:
            return output
        # d sqrt(x)/dx is infinite at 0.
        return LossOutput(output.loss_sum + (output.loss_sum * 0).sqrt(), output.rows, output.metrics)


def test_a_gradient_that_is_not_finite_ends_the_run_and_leaves_the_weights(dataset, alone, random_llamagen):
    batches, records = batches_of(dataset), []
    model, good = random_llamagen(), random_llamagen()
    # Two micro-batches a step: the sixth is the second of step 3.
    with pytest.raises(NonFiniteError, match=r"not finite at step 3: lower optim\.lr, or look at the data"):
        train(model, batches, alone, objective=BadAt(5), on_log=records.append)
    assert [record["step"] for record in records] == [1, 2]
    seen: list[dict[str, Tensor]] = []
    train(good, batches, alone, on_log=lambda _: seen.append(copy_of(good)))
    assert same(model, seen[1]), "the weights of step 2"
    assert not same(model, seen[0])
    assert not same(model, seen[2])


def test_without_clipping_a_bad_gradient_is_refused_too(dataset, alone, random_llamagen):
    model = random_llamagen()
    before = copy_of(model)
    with pytest.raises(NonFiniteError, match="step 1:"):
        train(model, batches_of(dataset), alone, objective=BadAt(0), optim=OptimConfig(lr=1.0, clip_norm=0.0))
    assert same(model, before)


def test_a_run_that_fails_leaves_no_ddp_behind_in_its_traceback(dataset, alone, random_llamagen):
    """It would be the process group's last holder, and hang (Parallel.close)."""

    def fail(record: dict[str, float]) -> None:
        raise KeyError(record["step"])

    with pytest.raises(KeyError) as held:
        train(random_llamagen(), batches_of(dataset), alone, on_log=fail)
    assert held.traceback
    assert not [found for found in gc.get_objects() if type(found) is DistributedDataParallel]


def test_steps_epochs_and_learning_rates_of_the_curve(dataset, alone, random_llamagen):
    batches, records = batches_of(dataset), []
    per_epoch = batches.steps_per_epoch
    assert per_epoch == 3
    result = train(random_llamagen(), batches, alone, on_log=records.append)
    assert result.curve == records
    assert (result.steps, result.resumed_from) == (6, 0)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in records] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    lrs = [record["lr"] for record in records]
    assert lrs[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2])
    assert lrs[-1] == pytest.approx(1e-2 * 0.05)
    assert all(record["grad_norm"] > 0 and record["images_per_s"] > 0 for record in records)
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize(("every", "steps"), [(2, [2, 4, 6]), (4, [4, 6]), (100, [6])])
def test_the_last_step_is_always_logged(dataset, alone, random_llamagen, every, steps):
    result = train(random_llamagen(), batches_of(dataset), alone, log_every_steps=every)
    assert [record["step"] for record in result.curve] == steps


def test_the_first_record_is_the_mean_over_the_global_batch(dataset, alone, random_llamagen):
    batches, model = batches_of(dataset, micro_batch_size=7), random_llamagen()
    with torch.no_grad():
        nats = [
            -model(batch.tokens_BL, batch.pos_cond_B).mean(-1)[batch.weight_B > 0]
            for _, batch in batches.micro_batches(0, rank=0, world_size=1)
        ]
    record = train(model, batches, alone).curve[0]
    assert len(torch.cat(nats)) == 20
    assert record["loss"] == pytest.approx(torch.cat(nats).mean().item(), rel=1e-5)


def rates(model: nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


def test_dropout_acts_in_training_and_is_off_after(dataset, alone, random_llamagen):
    model, plain = random_llamagen(), random_llamagen()
    during: set[float] = set()

    def on_log(_: dict[str, float]) -> None:
        during.update(rates(model))
        assert model.training

    dropped = train(model, batches_of(dataset), alone, dropout=0.3, on_log=on_log)
    undropped = train(plain, batches_of(dataset), alone)
    assert during == {0.3}
    assert rates(model) == {0.0}
    assert not model.training
    assert dropped.curve[0]["loss"] != undropped.curve[0]["loss"]
    model.train()  # a later run without dropout meets none
    tokens, cond = torch.zeros(1, 16, dtype=torch.int64), torch.tensor([0])
    assert torch.equal(model(tokens, cond), model(tokens, cond))


def test_a_run_repeats_itself_and_leaves_the_global_generator_alone(dataset, alone, random_llamagen):
    models = [random_llamagen(), random_llamagen(), random_llamagen()]
    torch.manual_seed(1)
    expected = torch.rand(3)
    for model, seed, other in zip(models, (0, 0, 1), (1, 2, 3), strict=True):
        torch.manual_seed(other)
        train(model, batches_of(dataset, seed=seed), alone, dropout=0.2, epochs=1)
        if other == 1:
            assert torch.equal(torch.rand(3), expected)
    assert same(models[0], copy_of(models[1]))
    assert not same(models[0], copy_of(models[2]))


@pytest.mark.parametrize("seed", [2**31 - 1, 2026_11_24_00, -1])
def test_any_seed_that_a_recipe_can_hold_trains(dataset, alone, random_llamagen, seed):
    result = train(random_llamagen(), batches_of(dataset, seed=seed), alone, epochs=1)
    assert result.steps == 3


def test_frozen_weights_stay(dataset, alone, random_llamagen):
    model = random_llamagen()
    model.tok_embeddings.requires_grad_(False)
    before = copy_of(model)
    train(model, batches_of(dataset), alone, optim=OptimConfig(lr=1e-2, weight_decay=0.5))
    assert torch.equal(model.tok_embeddings.weight, before["tok_embeddings.weight"])
    assert not torch.equal(model.output.weight, before["output.weight"])
