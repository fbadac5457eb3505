"""Writes a storage below a temporary folder: an alignment that is measured on the way ends when it only got worse, with
the best weights it had, killed or not, and measuring changes nothing of its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load

from cca_core.config import (
    AlignConfig,
    BaseConfig,
    EvaluateConfig,
    ExecutionConfig,
    FeaturesConfig,
    OptimConfig,
    Recipe,
    SourceConfig,
    TokenizerConfig,
    TokensConfig,
)
from cca_core.models import load_model
from cca_core.stages import Context, LocalExecutor, align, plan, run_stage
from cca_core.stages.early_stop import EVALUATIONS_NAME, PATIENCE, SEED, best_weights, train_aligned_watched
from cca_core.stages.inputs import input_digests
from cca_core.stages.judge import Judge
from cca_core.store import Store
from cca_core.train.distributed import world
from cca_core.train.fit import Hooks
from cca_core.train.jobs import CURVE_NAME
from cca_core.train.train_state import TrainStates
from tests.invariant.interruptions import Killed
from tests.invariant.test_codes import run

BEFORE = ("tokenizer", "tokens", "features", "base", "baseline", "reference")
STEPS_BETWEEN = 5


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., Path]) -> Recipe:
    return Recipe(
        source=SourceConfig(kind="folder", uri=str(write_images(tmp_path_factory.mktemp("images")))),
        tokens=TokensConfig(rows_per_shard=30, batch_size=8),
        tokenizer=TokenizerConfig(epochs=2, codebook_size=16),
        features=FeaturesConfig(width=8, feature_dim=8, epochs=1),
        base=BaseConfig(dim=16, num_layers=1, num_heads=2, epochs=2),
        # A learning rate that spoils the model soon.
        align=AlignConfig(
            epochs=8, global_batch_size=8, dropout=0.1, evaluations=8, evaluation_samples=32, optim=OptimConfig(lr=0.1)
        ),
        evaluate=EvaluateConfig(
            num_samples=16, seeds=(0,), cfg_scales=(2.0,), temperatures=(), batch_size=8, cost_images=8
        ),
        execution=ExecutionConfig(device="cpu", log_every_steps=1, checkpoint_every_steps=3),
    )


@pytest.fixture(scope="module")
def before(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("before")
    run(recipe, root, *BEFORE)
    return root


@pytest.fixture(scope="module")
def stopped(recipe: Recipe, before: Path, tmp_path_factory: pytest.TempPathFactory) -> Context:
    return run(recipe, copytree(before, tmp_path_factory.mktemp("stopped") / "storage"), "align")


def outcome(context: Context) -> tuple[bytes, list[dict], list[dict]]:
    """Weights, evaluations, and the curve but for its speed."""
    directory = context.directory("align")
    curve = directory.read_json(CURVE_NAME)
    for record in curve:
        del record["images_per_s"]
    return directory.read_bytes("model.safetensors"), directory.read_json(EVALUATIONS_NAME), curve


def test_training_ends_when_it_only_got_worse_with_the_best_weights(stopped, recipe):
    _, records, curve = outcome(stopped)
    distances = [record["distance"] for record in records]
    best = distances.index(min(distances))
    assert len(records) == best + 1 + PATIENCE < recipe.align.evaluations
    assert [record["step"] for record in records] == [STEPS_BETWEEN * n for n in range(1, len(records) + 1)]
    assert curve[-1]["step"] == records[-1]["step"]
    directory = stopped.directory("align")
    assert directory.manifest().facts["best_step"] == records[best]["step"]
    where = (stopped.directory("base"), stopped.directory("features"))
    judge = Judge(recipe, *where, [0, 1], [SEED], 32, torch.device("cpu"), real="held_out")
    assert judge(load_model(directory.uri))[0]["distance"] == pytest.approx(min(distances), rel=1e-6)
    assert not best_weights(directory).exists(""), "nothing is left of the weights that lost"
    assert TrainStates(directory).steps() == []


def test_measuring_changes_nothing_of_the_training(stopped, recipe, before, tmp_path):
    blind = replace(recipe, align=replace(recipe.align, evaluations=0))
    context = run(blind, copytree(before, tmp_path / "storage"), "align")
    curve = context.directory("align").read_json(CURVE_NAME)
    seen = stopped.directory("align").read_json(CURVE_NAME)
    assert len(seen) < len(curve)
    assert [record["loss"] for record in seen] == [record["loss"] for record in curve[: len(seen)]]
    assert not context.directory("align").exists(EVALUATIONS_NAME)


class KilledAt(LocalExecutor):
    """Dies where the record of that step, of training or of an evaluation, is logged."""

    def __init__(self, step: int, name: str) -> None:
        super().__init__(self.log, lambda done, total: None, "cpu")
        self.step, self.name = step, name

    def log(self, record: dict[str, float]) -> None:
        if record["step"] == self.step and self.name in record:
            raise Killed


@pytest.mark.parametrize(("step", "name"), [(2, "loss"), (5, "small_distance"), (7, "loss"), (10, "small_distance")])
def test_killed_at_any_point_it_ends_alike(stopped, recipe, before, tmp_path, step, name):
    root = copytree(before, tmp_path / "storage")
    context = replace(run(recipe, root, *BEFORE), executor=KilledAt(step, name))
    with pytest.raises(Killed):
        run_stage("align", context)
    assert outcome(run(recipe, root, "align")) == outcome(stopped)


def test_killed_after_the_decision_to_stop_it_does_not_train_on(stopped, recipe, before, tmp_path, monkeypatch):
    root = copytree(before, tmp_path / "storage")

    def killed(**arguments):
        whole(**arguments)
        raise Killed

    whole = align.train_aligned_watched
    monkeypatch.setattr(align, "train_aligned_watched", killed)
    with pytest.raises(Killed):
        run(recipe, root, "align")
    monkeypatch.undo()
    assert outcome(run(recipe, root, "align")) == outcome(stopped)


def test_features_count_where_they_choose_the_weights(recipe, tmp_path):
    def digest(**changes) -> str:
        features = replace(recipe.features, epochs=2)
        changed = replace(recipe, align=replace(recipe.align, **changes))
        return [run(r, tmp_path / "none").digests["align"] for r in (changed, replace(changed, features=features))]

    measured, blind = digest(), digest(evaluations=0)
    assert measured[0] != measured[1]
    assert blind[0] == blind[1]


def one_of_two(rank: int, root: str, recipe: Recipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/group", rank=rank, world_size=2)
    store, digests = Store(root), plan(recipe, input_digests(recipe))
    names = ("tokens", "base", "reference", "features")
    with world(torch.device("cpu")) as group:
        train_aligned_watched(
            world=group,
            hooks=Hooks(),
            directory=store.directory("align", digests["align"]),
            recipe=recipe,
            classes=[0, 1],
            **{name: store.directory(name, digests[name]) for name in names},
        )
    dist.destroy_process_group()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_ranks_choose_as_one_does(recipe, before, tmp_path, sharding):
    gentle = replace(recipe.align, evaluations=3, optim=OptimConfig(lr=1e-3))
    recipe = replace(recipe, align=gentle, execution=replace(recipe.execution, sharding=sharding, micro_batch_size=4))
    alone = outcome(run(recipe, copytree(before, tmp_path / "alone"), "align"))
    root = copytree(before, tmp_path / "two")
    mp.spawn(one_of_two, (str(root), recipe), nprocs=2)
    directory = Store(str(root)).directory("align", plan(recipe, input_digests(recipe))["align"])
    for of_two, of_one in zip(directory.read_json(EVALUATIONS_NAME), alone[1], strict=True):
        assert of_two == pytest.approx(of_one, rel=0.02)
    weights = [load(data) for data in (directory.read_bytes("model.safetensors"), alone[0])]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-4)
