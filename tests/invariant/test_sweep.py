"""Writes a storage below a temporary folder: a sweep ranks the same trials alike in any order and after any kill, reads
the run's one reference, and hands its winner to alignment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest

from cca_core import pairs
from cca_core.config import (
    AlignConfig,
    BaseConfig,
    ConfigError,
    EvaluateConfig,
    ExecutionConfig,
    FeaturesConfig,
    Recipe,
    SourceConfig,
    SweepConfig,
    TokenizerConfig,
    TokensConfig,
)
from cca_core.dataset import TokenDataset
from cca_core.stages import Context, LocalExecutor, run_stage
from cca_core.stages.grid import Settings, trials
from cca_core.stages.sweep import chosen
from cca_core.stages.trial import trial_states
from cca_core.store import Store
from cca_core.train.batches import BatchSource
from tests.invariant.test_codes import run

BEFORE = ("tokenizer", "tokens", "features", "base", "baseline", "reference")
#: Of the lrs, one can only break.
SWEEP = SweepConfig(
    enabled=True,
    objectives=("cca", "dpo"),
    betas=(0.1,),
    lambdas=(1.0,),
    lrs=(1e-3, 3e-3, 1e30),
    null_shares=(0.1,),
    num_trials=0,
    fraction=0.7,
    evaluations=2,
    num_samples=16,
    seeds=(0, 1),
    keep=2,
)


class Reversing(LocalExecutor):
    """Runs trials last first, and remembers which."""

    def __init__(self) -> None:
        super().__init__(lambda record: None, lambda done, total: None, "cpu")
        self.ran: list[tuple[str, int]] = []

    def trials(self, job: Any, arguments: Any, units: Any, on_end: Any) -> None:
        self.ran += [(unit["settings"].key, unit["evaluation"]) for unit in units]
        super().trials(job, arguments, units[::-1], on_end)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, write_images: Callable[..., Path]) -> Recipe:
    return Recipe(
        source=SourceConfig(kind="folder", uri=str(write_images(tmp_path_factory.mktemp("images")))),
        tokens=TokensConfig(rows_per_shard=30, batch_size=8),
        tokenizer=TokenizerConfig(epochs=2, codebook_size=16),
        features=FeaturesConfig(width=8, feature_dim=8, epochs=1),
        base=BaseConfig(dim=16, num_layers=1, num_heads=2, epochs=2),
        align=AlignConfig(epochs=2, global_batch_size=8, beta=0.5, dropout=0.0),
        sweep=SWEEP,
        evaluate=EvaluateConfig(
            num_samples=16, seeds=(0,), cfg_scales=(2.0,), temperatures=(), batch_size=8, cost_images=8
        ),
        execution=ExecutionConfig(device="cpu", log_every_steps=1),
    )


@pytest.fixture(scope="module")
def before(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with all that a sweep needs."""
    root = tmp_path_factory.mktemp("before")
    run(recipe, root, *BEFORE)
    return root


@pytest.fixture(scope="module")
def finished(recipe: Recipe, before: Path, tmp_path_factory: pytest.TempPathFactory) -> Context:
    root = copytree(before, tmp_path_factory.mktemp("finished") / "storage")
    return run(recipe, root, "sweep", "align", "align-2")


def results(context: Context) -> dict[str, Any]:
    found = context.directory("sweep").read_json("results.json")
    for row in found["trials"]:
        del row["seconds"]
    return found


def test_trials_are_ranked_and_the_worse_half_stops_early_but_for_the_recipes_own(finished, recipe):
    found = results(finished)
    rows = found["trials"]
    assert {row["key"] for row in rows} == {settings.key for settings in trials(recipe)}
    # 5 of 7 work; 3 go on, and the recipe's own settings whether they are among them or not.
    full = [row for row in rows if row["ended"] == "at its end"]
    assert [row["rank"] for row in full] == [1, 2, 3, 4][: len(full)]
    assert len(full) in (2, 3)
    assert sum(row["own"] for row in full) == 1
    assert [row["metrics"]["distance"] for row in full] == sorted(row["metrics"]["distance"] for row in full)
    assert found["winner"] == rows[0]["settings"]
    assert {row["step"] for row in full} == {2 * -(-len(trained(finished)) // 8)}


def trained(context: Context) -> np.ndarray:
    return TokenDataset(context.directory("tokens"), fraction=SWEEP.fraction).train_images


def test_a_trial_that_breaks_is_marked_and_the_others_go_on(finished):
    rows = results(finished)["trials"]
    failed = [row for row in rows if row["settings"]["lr"] == 1e30]
    assert rows[-len(failed) :] == failed
    assert all("not finite at step" in row["error"] and row["ended"] == "failed" for row in failed)
    assert not any(row["error"] for row in rows[: -len(failed)])


def test_every_trial_has_the_same_numbers_guided_and_not_and_a_picture(finished):
    rows = [row for row in results(finished)["trials"] if not row["error"]]
    assert len({tuple(row["metrics"]) for row in rows}) == 1
    assert {"distance", "recall", "class_consistency", "distance_cfg", "recall_cfg"} <= set(rows[0]["metrics"])
    files = set(finished.directory("sweep").manifest().files)
    assert {f"trials/{row['key']}-e{n + 1}.png" for row in rows for n in range(row["evaluations"])} <= files


def test_the_order_of_trials_does_not_matter(finished, recipe, before, tmp_path):
    executor = Reversing()
    other = Context(recipe, Store(str(copytree(before, tmp_path / "storage"))), finished.digests, executor)
    run_stage("sweep", other)
    assert results(other) == results(finished)
    assert len(executor.ran) > len(trials(recipe))


def test_a_killed_sweep_measures_what_is_missing_and_nothing_else(finished, recipe, tmp_path):
    store = Store(str(copytree(finished.store.root, tmp_path / "storage")))
    executor = Reversing()
    killed = Context(recipe, store, finished.digests, executor)
    directory = Path(killed.directory("sweep").path)
    lost = chosen(killed.directory("sweep"), 1).key
    (directory / "_manifest.json").unlink()
    (directory / "results.json").unlink()
    (directory / "trials" / f"{lost}-e2.json").unlink()
    run_stage("sweep", killed)
    assert executor.ran == [(lost, 2)]
    assert results(killed) == results(finished)
    assert not list(Path(store.root, "train_state").glob("**/step-*"))


def test_a_trial_whose_result_is_gone_starts_again_though_its_train_state_is_there(finished, recipe, before, tmp_path):
    class Stopping(Reversing):
        def trials(self, job: Any, arguments: Any, units: Any, on_end: Any) -> None:
            if units[0]["evaluation"] == 2:
                raise KeyboardInterrupt
            super().trials(job, arguments, units, on_end)

    root = copytree(before, tmp_path / "storage")
    stopped = Context(recipe, Store(str(root)), finished.digests, Stopping())
    with pytest.raises(KeyboardInterrupt):
        run_stage("sweep", stopped)
    own = Settings.of(recipe.align).key
    assert trial_states(stopped.directory("sweep"), own).steps() == [4]
    (Path(stopped.directory("sweep").path) / "trials" / f"{own}-e1.json").unlink()
    executor = Reversing()
    run_stage("sweep", replace(stopped, executor=executor))
    assert [unit for unit in executor.ran if unit[1] == 1] == [(own, 1)]
    assert results(stopped) == results(finished)


def test_a_trial_of_fewer_steps_than_evaluations_is_refused(recipe, before, tmp_path):
    short = replace(recipe, sweep=replace(SWEEP, evaluations=40))
    with pytest.raises(ConfigError, match=r"fewer than sweep\.evaluations=40: lower it"):
        run(short, copytree(before, tmp_path / "storage"), "sweep")


def test_alignment_takes_the_settings_of_its_rank(finished, recipe):
    rows = results(finished)["trials"]
    for name, row in zip(("align", "align-2"), rows, strict=False):
        directory = finished.directory(name)
        assert directory.manifest().facts["settings"] == row["settings"]
        assert directory.read_json("curve.json")[-1]["lr"] == row["settings"]["lr"]
        settings = Settings(**row["settings"])
        plain = replace(recipe, sweep=SweepConfig(), align=settings.apply(recipe.align))
        same = run(plain, Path(finished.store.root), "align")
        model = (Path(directory.path) / "model.safetensors").read_bytes()
        assert (Path(same.directory("align").path) / "model.safetensors").read_bytes() == model


def test_a_sweep_of_which_nothing_works_says_why(recipe, before, tmp_path):
    own = replace(recipe.align, optim=replace(recipe.align.optim, lr=1e30))
    broken = replace(recipe, align=own, sweep=replace(SWEEP, lrs=(1e30,), keep=1))
    with pytest.raises(ConfigError, match=r"all 3 trials failed, that of the recipe's own .*: lower optim\.lr"):
        run(broken, copytree(before, tmp_path / "storage"), "sweep")


def test_a_share_of_the_images_has_the_draws_and_so_the_reference_of_all(finished):
    whole, part = (TokenDataset(finished.directory("tokens"), fraction=share) for share in (1.0, 0.5))
    assert 0 < len(part.train_images) < len(whole.train_images)
    assert set(part.train_images) <= set(whole.train_images)
    assert len(part) == len(whole)

    def drawn(dataset: TokenDataset) -> dict[int, tuple]:
        batches = BatchSource(
            dataset,
            seed=0,
            global_batch_size=8,
            micro_batch_size=8,
            null_label=2,
            null_share=0.3,
            null_purpose=pairs.Purpose.NULL,
        )
        rows = {}
        for step in range(batches.steps_per_epoch):
            images = batches.images(step)
            ((_, batch),) = batches.micro_batches(step, rank=0, world_size=1)
            columns = (batch.neg_cond_B, batch.null_B, batch.tokens_BL)
            rows |= {int(image): tuple(c[i].tolist() for c in columns) for i, image in enumerate(images)}
        return rows

    of_part, of_all = drawn(part), drawn(whole)
    assert set(of_part) == set(part.train_images)
    assert of_part == {image: of_all[image] for image in of_part}


def test_a_smaller_share_lies_within_a_larger_one():
    hashes = pairs.id_hashes([str(i) for i in range(2000)])
    small, large = (pairs.within_fraction(hashes, share) for share in (0.1, 0.4))
    assert abs(small.mean() - 0.1) < 0.03
    assert abs(large.mean() - 0.4) < 0.04
    assert not (small & ~large).any()
    # What is held out says nothing about who is in a share.
    assert abs(large[pairs.held_out(hashes, 0.5)].mean() - 0.4) < 0.06


def test_every_trial_starts_at_the_cached_reference_though_it_sees_a_share_of_the_images(finished):
    directory = finished.directory("sweep")
    for row in results(finished)["trials"]:
        curve = directory.read_json(f"trials/{row['key']}-e1.json")["curve"]
        for name in ("log_ratio_pos", "log_ratio_neg", "log_ratio_null") if curve else ():
            assert abs(curve[0][name]) < 1e-4
