"""Writes small data sets and train states: settings of training that must give one and the same trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.config import AlignConfig, ConfigError, ExecutionConfig, Recipe, TokensConfig
from cca_core.stages import Context, LocalExecutor, run_stage
from cca_core.store import StageDirectory, Store
from cca_core.train.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from tests.invariant.trajectories import (
    DIGESTS,
    EPOCHS,
    MICRO_BATCH,
    OPTIM,
    STEPS,
    Setting,
    Trajectory,
    batch_source,
    objective_of,
    on_ranks,
    policy,
    train,
)


def same(run: Trajectory, expected: Trajectory) -> None:
    """The same but for rounding: within a tolerance, and with no drift to one side."""
    assert [record.keys() for record in run.curve] == [record.keys() for record in expected.curve]
    for name in run.curve[0]:
        # Differences of log-probs near -60 nats round at 4e-6 each; loss and gradient are held more closely.
        absolute = 0 if name in ("loss", "grad_norm") else 1e-4
        np.testing.assert_allclose(run.column(name), expected.column(name), rtol=1e-4, atol=absolute, err_msg=name)
    residual = torch.cat([(run.weights[k] - expected.weights[k]).double().flatten() for k in expected.weights])
    assert residual.abs().max() < 1e-5
    error = residual.std() / len(residual) ** 0.5
    assert residual.mean().abs() <= 8 * error, "the difference has a direction: this is not rounding"


def equal(run: Trajectory, expected: Trajectory) -> None:
    """The same bits."""
    assert run.curve == expected.curve
    assert all(torch.equal(run.weights[name], value) for name, value in expected.weights.items())


@pytest.fixture(scope="module")
def root(
    tmp_path_factory: pytest.TempPathFactory,
    write_tokens: Callable[..., StageDirectory],
    random_llamagen: Callable[..., torch.nn.Module],
) -> str:
    """A storage root with tokens, a base, and the reference columns that the real stage wrote."""
    folder = tmp_path_factory.mktemp("storage")
    write_tokens(folder, images=84, rows_per_shard=40)
    store, model = Store(str(folder)), random_llamagen(seed=1)
    info = BundleInfo(model=Part("llamagen", vars(model.spec)), tokenizer=None, image_size=8)
    for name, data in bundle_files(info, model.state_dict(), None).items():
        store.directory("base", DIGESTS["base"]).write_bytes(name, data)
    recipe = Recipe(
        seed=3,
        tokens=TokensConfig(rows_per_shard=40),
        align=AlignConfig(epochs=EPOCHS),
        execution=ExecutionConfig(micro_batch_size=16, device="cpu"),
    )
    executor = LocalExecutor(lambda record: None, lambda done, total: None, "cpu")
    run_stage("reference", Context(recipe, store, DIGESTS, executor))
    torch.set_num_threads(1)
    return str(folder)


@pytest.fixture(scope="module")
def one_rank(root: str) -> Trajectory:
    torch.set_num_threads(1)
    return train(root, Setting())


DROPOUT = Setting(dropout=0.2)
LIKELIHOOD = Setting(objective="likelihood")


@pytest.fixture(scope="module")
def two_ranks(root: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Trajectory]]:
    """Everything that needs two processes, in one meeting of theirs."""
    train(root, Setting(states="from-one", lost_in_step=5))
    settings = {
        "plain": Setting(),
        "dropout": DROPOUT,
        "likelihood": LIKELIHOOD,
        "online": Setting(reference="online"),
        "lost": Setting(states="on-two", lost_in_step=5),
        "resumed": Setting(states="on-two"),
        "lost for one": Setting(states="from-two", lost_in_step=5),
        "resumed from one": Setting(states="from-one"),
        "adaptive": Setting(adaptive=True),
        "fsdp2": Setting(sharding="fsdp2"),
        "fsdp2, lost": Setting(sharding="fsdp2", states="from-fsdp2", lost_in_step=5),
        # 2 -> 1 -> 4: lost here in step 3, on one rank in step 5, and ended on four.
        "lost for one and four": Setting(states="2-1-4", lost_in_step=3),
    }
    return named(settings, on_ranks(2, root, list(settings.values()), tmp_path_factory.mktemp("ranks")))


@pytest.fixture(scope="module")
def four_ranks(
    root: str, two_ranks: dict[str, list[Trajectory]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Trajectory]]:
    """What needs four processes. ``two_ranks`` left the states that are resumed here."""
    train(root, Setting(states="2-1-4", lost_in_step=5))
    settings = {
        "plain": Setting(),
        "fsdp2": Setting(sharding="fsdp2"),
        "2-1-4": Setting(states="2-1-4"),
    }
    return named(settings, on_ranks(4, root, list(settings.values()), tmp_path_factory.mktemp("four")))


def named(settings: dict[str, Setting], ranks: list[list[Trajectory]]) -> dict[str, list[Trajectory]]:
    return {name: list(runs) for name, *runs in zip(settings, *ranks, strict=True)}


def test_different_runs_are_told_apart(root, one_rank):
    norms = one_rank.column("grad_norm")
    assert len(norms) == STEPS
    assert norms.min() < OPTIM.clip_norm < norms.max()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        same(train(root, DROPOUT), one_rank)
    drifted = replace(one_rank, weights={name: value + 1e-6 for name, value in one_rank.weights.items()})
    with pytest.raises(AssertionError, match="has a direction"):
        same(drifted, one_rank)


@pytest.mark.parametrize("setting", [Setting(), LIKELIHOOD], ids=["cca", "likelihood"])
def test_the_loop_is_the_plain_one(root, setting):
    model = policy(root).train()
    objective, optimizer = objective_of(setting), build_optimizer(model, OPTIM)
    batches = batch_source(root, replace(setting, micro_batch=1000))
    losses, norms = [], []
    for step in range(STEPS):
        ((_, batch),) = batches.micro_batches(step, rank=0, world_size=1)
        output = objective.step(model, batch)
        mean = output.loss_sum / len(batches.images(step))
        set_learning_rate(optimizer, learning_rate(OPTIM, step, STEPS))
        optimizer.zero_grad()
        mean.backward()
        norms.append(clip_gradients(model, OPTIM).item())
        optimizer.step()
        losses.append(mean.item())
    run = train(root, setting)
    assert run.column("loss") == pytest.approx(losses, rel=1e-4)
    assert run.column("grad_norm") == pytest.approx(norms, rel=1e-4)
    same(run, replace(run, weights=model.state_dict()))


def test_all_ranks_hold_the_same_weights(two_ranks, four_ranks):
    for first, *others in [*two_ranks.values(), *four_ranks.values()]:
        for other in others:
            equal(other, first)


@pytest.mark.parametrize("name", ["plain", "fsdp2", "2-1-4"])
def test_four_ranks_are_one(one_rank, four_ranks, name):
    same(four_ranks[name][0], one_rank)


def test_resumed_on_two_then_one_then_four(four_ranks):
    assert four_ranks["2-1-4"][0].resumed_from == 4


def test_weights_that_follow_the_training_are_the_same_on_two_ranks_and_resumed(root, two_ranks):
    alone = train(root, Setting(adaptive=True))
    assert min(len(set(alone.column(name))) for name in ("lambda_", "null_share")) >= STEPS - 1
    same(two_ranks["adaptive"][0], alone)
    train(root, Setting(adaptive=True, states="adaptive", lost_in_step=5))
    equal(train(root, Setting(adaptive=True, states="adaptive")), alone)


def test_sharded_is_copied(root, one_rank, two_ranks):
    same(two_ranks["fsdp2"][0], one_rank)
    same(train(root, Setting(sharding="fsdp2")), one_rank)


def test_a_sharded_state_resumes_where_the_model_is_copied(root, one_rank, two_ranks):
    resumed = train(root, Setting(states="from-fsdp2"))
    assert resumed.resumed_from == 4
    same(resumed, one_rank)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointed_activations_are_the_same(root, dropout):
    checkpointed = train(root, Setting(dropout=dropout, activation_checkpointing=True))
    equal(checkpointed, train(root, Setting(dropout=dropout)))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_is_eager(root, dropout):
    same(train(root, Setting(dropout=dropout, compile=True)), train(root, Setting(dropout=dropout)))


@pytest.mark.parametrize("name", ["plain", "dropout", "likelihood"])
def test_two_ranks_are_one(root, two_ranks, name):
    same(two_ranks[name][0], train(root, {"plain": Setting(), "dropout": DROPOUT, "likelihood": LIKELIHOOD}[name]))


def test_a_rank_without_rows_in_the_last_short_batch(root, one_rank, two_ranks):
    batches = batch_source(root, Setting())
    last = batches.steps_per_epoch - 1
    assert 0 < len(batches.images(last)) <= MICRO_BATCH
    rows = [
        [int(batch.weight_B.sum()) for _, batch in batches.micro_batches(last, rank=rank, world_size=2)]
        for rank in range(2)
    ]
    assert rows == [[len(batches.images(last))], [0]]
    same(two_ranks["plain"][0], one_rank)


@pytest.mark.parametrize("micro_batch", [32, 16, 5, 1, 1000])
def test_micro_batches_are_one_batch(root, one_rank, micro_batch):
    same(train(root, Setting(micro_batch=micro_batch)), one_rank)


def test_a_cached_reference_is_the_frozen_model_in_the_loop(root, one_rank, two_ranks):
    same(train(root, Setting(reference="online")), one_rank)
    same(two_ranks["online"][0], one_rank)


@pytest.mark.parametrize("lost_in_step", [1, 4, 5])
def test_interrupted_and_resumed_is_uninterrupted(root, one_rank, lost_in_step):
    states = f"lost-{lost_in_step}"
    assert not train(root, Setting(states=states, lost_in_step=lost_in_step)).weights
    resumed = train(root, Setting(states=states))
    # The state of a step is saved after it was logged: lost in step 4, the run goes on from 2.
    assert resumed.resumed_from == {1: 0, 4: 2, 5: 4}[lost_in_step]
    equal(resumed, one_rank)


def test_interrupted_and_resumed_with_dropout(root):
    train(root, replace(DROPOUT, states="dropout", lost_in_step=5))
    resumed = train(root, replace(DROPOUT, states="dropout"))
    assert resumed.resumed_from > 0
    equal(resumed, train(root, DROPOUT))


def test_interrupted_and_resumed_on_two_ranks(two_ranks):
    assert two_ranks["resumed"][0].resumed_from == 4
    equal(two_ranks["resumed"][0], two_ranks["plain"][0])


def test_resumed_on_another_number_of_ranks(root, one_rank, two_ranks):
    more = two_ranks["resumed from one"][0]
    fewer = train(root, Setting(states="from-two"))
    assert more.resumed_from == fewer.resumed_from == 4
    same(more, one_rank)
    same(fewer, one_rank)


def test_a_state_of_another_format_is_refused(root, monkeypatch):
    train(root, Setting(states="old", lost_in_step=5))
    monkeypatch.setattr("cca_core.train.train_state.FORMAT_VERSION", 99)
    with pytest.raises(ConfigError, match="another format: delete it to train from the start"):
        train(root, Setting(states="old"))


def test_a_state_that_was_not_finished_is_passed_over(root, one_rank):
    train(root, Setting(states="torn", lost_in_step=5))
    torn = Path(root) / "train_state" / "torn" / "step-00000005-lost"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    resumed = train(root, Setting(states="torn"))
    assert resumed.resumed_from == 4
    equal(resumed, one_rank)
