"""Writes small data sets and train states: settings of training that must give one and the same trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray

from cca_core import pairs
from cca_core.bundle import BundleInfo, Part, bundle_files
from cca_core.config import AlignConfig, ExecutionConfig, OptimConfig, Recipe, TokensConfig
from cca_core.dataset import ReferenceColumns, TokenDataset
from cca_core.models import load_model
from cca_core.objectives import CCA, Likelihood
from cca_core.stages import Context, LocalExecutor, run_stage
from cca_core.store import StageDirectory, Store
from cca_core.train.batches import BatchSource, CachedReference, OnlineReference
from cca_core.train.distributed import world
from cca_core.train.fit import fit
from cca_core.train.train_state import TrainStates

DIGESTS = {name: name[0] * 64 for name in ("tokens", "base", "reference")}
EPOCHS, GLOBAL_BATCH, MICRO_BATCH, STEPS = 2, 32, 8, 6
CPU = torch.device("cpu")
#: A large eps lets Adam feel the scale of a gradient, and keeps it from turning rounding noise into steps. The clip
#: norm lies among the norms of this run, so that some steps are clipped and some are not.
OPTIM = OptimConfig(lr=1e-2, eps=1e-2, weight_decay=0.05, clip_norm=0.9, warmup_steps=2, schedule="cosine")


@dataclass(frozen=True)
class Setting:
    """How one run is done. Runs that differ in nothing but these compute the same."""

    micro_batch: int = MICRO_BATCH
    reference: str = "cached"
    dropout: float = 0.0
    objective: str = "cca"
    #: Where its train states lie; empty: it keeps none.
    states: str = ""
    #: It is lost in this step, after the steps before it were saved as ``save_every`` says.
    lost_in_step: int = 0
    save_every: int = 2


@dataclass
class Trajectory:
    curve: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    resumed_from: int = 0

    def column(self, name: str) -> NDArray[np.float64]:
        return np.asarray([record[name] for record in self.curve])


class Lost(Exception):
    """A worker that is gone."""


def batch_source(root: str, setting: Setting) -> BatchSource:
    store = Store(root)
    tokens, base, columns = (store.directory(stage, digest) for stage, digest in DIGESTS.items())
    reference: Any = None
    if setting.objective == "cca":
        cached = setting.reference == "cached"
        reference = CachedReference(ReferenceColumns(columns)) if cached else OnlineReference(load_model(base.uri))
    return BatchSource(
        TokenDataset(tokens),
        seed=3,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=setting.micro_batch,
        null_label=3,
        null_share=0.15,
        null_purpose=pairs.Purpose.NULL if reference else pairs.Purpose.LABEL_DROPOUT,
        reference=reference,
    )


def train(root: str, setting: Setting) -> Trajectory:
    """One run, on as many ranks as call this."""
    model = load_model(Store(root).directory("base", DIGESTS["base"]).uri)
    result = Trajectory()

    def on_log(record: dict[str, float]) -> None:
        if record["step"] == setting.lost_in_step:
            raise Lost

    states = TrainStates(Store(root).directory("align", setting.states)) if setting.states else None
    objective = CCA(beta=0.3, lambda_=2.0) if setting.objective == "cca" else Likelihood()
    with world(CPU) as group:
        try:
            done = fit(
                model,
                objective,
                batch_source(root, setting),
                OPTIM,
                epochs=EPOCHS,
                dropout=setting.dropout,
                world=group,
                states=states,
                checkpoint_every_steps=setting.save_every,
                on_log=on_log,
            )
        except Lost:
            return result
    result.curve = [{k: v for k, v in record.items() if k != "images_per_s"} for record in done.curve]
    result.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result.resumed_from = done.resumed_from
    return result


def rank_of_two(rank: int, root: str, settings: list[Setting], meeting: str, out: str) -> None:
    """One of two processes; it runs all ``settings``, one after the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    trajectories = [train(root, setting) for setting in settings]
    torch.save([vars(t) for t in trajectories], f"{out}/rank-{rank}.pt")
    dist.destroy_process_group()


def on_two_ranks(root: str, settings: list[Setting], folder: Path) -> list[list[Trajectory]]:
    """The trajectories of ``settings`` as both ranks saw them."""
    mp.spawn(rank_of_two, (root, settings, str(folder / "meeting"), str(folder)), nprocs=2)
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    return [[Trajectory(**run) for run in rank] for rank in ranks]


def same(run: Trajectory, expected: Trajectory) -> None:
    """The same but for rounding: within a tolerance, and with no drift to one side."""
    assert [record.keys() for record in run.curve] == [record.keys() for record in expected.curve]
    for name in run.curve[0]:
        np.testing.assert_allclose(run.column(name), expected.column(name), rtol=1e-4, atol=1e-5, err_msg=name)
    residual = torch.cat([(run.weights[k] - expected.weights[k]).double().flatten() for k in expected.weights])
    assert residual.abs().max() < 1e-5
    error = residual.std() / len(residual) ** 0.5
    assert residual.mean().abs() <= 4 * error, "the difference has a direction: this is not rounding"


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
    write_tokens(folder, images=92, rows_per_shard=40)
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


#: Alignment with dropout, on one rank and on two.
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
    }
    ranks = on_two_ranks(root, list(settings.values()), tmp_path_factory.mktemp("ranks"))
    return {name: list(runs) for name, *runs in zip(settings, *ranks, strict=True)}


def test_this_run_tells_settings_apart(root, one_rank):
    losses, norms = one_rank.column("loss"), one_rank.column("grad_norm")
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.01
    assert norms.min() < OPTIM.clip_norm < norms.max()
    other = train(root, DROPOUT)
    with pytest.raises(AssertionError):
        same(other, one_rank)


def test_both_ranks_hold_the_same_weights(two_ranks):
    for first, second in two_ranks.values():
        equal(second, first)


@pytest.mark.parametrize(
    ("name", "setting"), [("plain", Setting()), ("dropout", DROPOUT), ("likelihood", LIKELIHOOD)], ids=str
)
def test_two_ranks_are_one(root, two_ranks, name, setting):
    same(two_ranks[name][0], train(root, setting))


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
    equal(train(root, replace(DROPOUT, states="dropout")), train(root, DROPOUT))


def test_interrupted_and_resumed_on_two_ranks(two_ranks):
    assert two_ranks["resumed"][0].resumed_from == 4
    equal(two_ranks["resumed"][0], two_ranks["plain"][0])


def test_resumed_on_another_number_of_ranks(root, one_rank, two_ranks):
    more = two_ranks["resumed from one"][0]
    fewer = train(root, Setting(states="from-two"))
    assert more.resumed_from == fewer.resumed_from == 4
    same(more, one_rank)
    same(fewer, one_rank)


def test_a_state_that_was_not_finished_is_passed_over(root, one_rank):
    train(root, Setting(states="torn", lost_in_step=5))
    torn = Path(root) / "train_state" / "torn" / "step-00000005"
    torn.mkdir()
    (torn / "__0_0.distcp").write_bytes(b"half")
    resumed = train(root, Setting(states="torn"))
    assert resumed.resumed_from == 4
    equal(resumed, one_rank)
