"""Writes a storage root in which alignment is the next stage; runs it and reads what it left, train states included."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from cca_core.config import Recipe
from cca_core.dataset import TokenDataset
from cca_core.stages import Context, LocalExecutor, run_stage
from cca_core.stages.graph import active, plan
from cca_core.stages.inputs import input_digests
from cca_core.store import Store
from pipelines.recipe import load_recipe
from tests.driver import TINY

#: 480 short steps, 24 in an epoch, of which the last is shorter; a state and a record of each.
SETTINGS = {
    "source.limit": "460",
    "tokens.rows_per_shard": "500",
    "tokenizer.epochs": "1",
    "features.epochs": "1",
    "base.epochs": "2",
    "base.global_batch_size": "32",
    "align.epochs": "20",
    "align.global_batch_size": "16",
    "align.dropout": "0.1",
    "evaluate.num_samples": "50",
    "evaluate.seeds": "[0]",
    "evaluate.cfg_scales": "[1.5]",
    "evaluate.temperatures": "[0.8]",
    "evaluate.cost_images": "10",
    "execution.device": "cpu",
    "execution.num_workers": "2",
    "execution.micro_batch_size": "4",
    "execution.checkpoint_every_steps": "1",
    "execution.log_every_steps": "1",
}


def arguments(**execution: str) -> list[str]:
    """Of `cca run`, for alignment alone."""
    settings = SETTINGS | {f"execution.{name}": value for name, value in execution.items()}
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")] + ["--only", "align"]


def context(folder: Path, executor: Any = None, **execution: str) -> Context:
    """What the stages below ``folder`` are given; everything in this process unless there is an executor."""
    recipe: Recipe = load_recipe(str(TINY), arguments(**execution)[1:-2:2])
    store = Store(str(folder / ".cca" / "storage"))
    executor = executor or LocalExecutor(lambda record: None, lambda done, total: None, "cpu")
    return Context(recipe, store, plan(recipe, input_digests(recipe, store)), executor)


def prepare(folder: Path) -> Path:
    """Run everything before alignment, in this process; what one executor made, the others reuse."""
    prepared = context(folder)
    for stage in active(prepared.recipe):
        if stage.name == "align":
            return folder
        run_stage(stage.name, prepared)
    raise AssertionError("no alignment in this recipe")


def copy_of(prepared: Path, folder: Path) -> Path:
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    return folder


def train_states(folder: Path) -> list[int]:
    """The steps whose states are complete, in order."""
    found = (folder / ".cca" / "storage" / "train_state").glob("*/step-*/.metadata")
    return sorted(int(match[1]) for path in found if (match := re.fullmatch(r"step-(\d+)-\w+", path.parent.name)))


def newest_state(folder: Path) -> int:
    return max(train_states(folder), default=0)


@dataclass(frozen=True)
class Aligned:
    """What an alignment left."""

    model: bytes
    weights: dict[str, NDArray[np.float32]]
    curve: list[dict[str, float]]

    def column(self, name: str) -> NDArray[np.float64]:
        return np.asarray([record[name] for record in self.curve])


def aligned(folder: Path) -> Aligned:
    (path,) = (folder / ".cca" / "storage" / "align").glob("*/model.safetensors")
    curve = json.loads((path.parent / "curve.json").read_text())
    timeless = [{name: value for name, value in record.items() if name != "images_per_s"} for record in curve]
    return Aligned(path.read_bytes(), load_file(path), timeless)


def every_row_once(run: Aligned, folder: Path) -> None:
    """Each step stands in the curve once, and the rows that were computed make whole epochs."""
    made = context(folder)
    images = len(TokenDataset(made.directory("tokens")).train_images)
    batch = made.recipe.align.global_batch_size
    per_epoch, epochs = -(-images // batch), made.recipe.align.epochs
    assert images % batch, "the last batch of an epoch is a short one"
    assert run.column("step").tolist() == list(range(1, epochs * per_epoch + 1))
    rows = run.column("rows").reshape(epochs, per_epoch)
    assert rows.sum(1).tolist() == [images] * epochs
    assert (rows[:, :-1] == batch).all()


def same_bits(run: Aligned, expected: Aligned) -> None:
    assert run.curve == expected.curve
    assert run.model == expected.model


def same_but_for_rounding(run: Aligned, expected: Aligned) -> None:
    """At another world size sums are added in another order: losses are the same within 1e-4, and drift nowhere."""
    assert run.column("step").tolist() == expected.column("step").tolist()
    assert run.column("rows").tolist() == expected.column("rows").tolist()
    for name in ("loss", "grad_norm"):  # AdamW hardly feels the scale of a gradient: its norm tells
        np.testing.assert_allclose(run.column(name), expected.column(name), rtol=1e-4, err_msg=name)
    assert run.weights.keys() == expected.weights.keys()
    residual = np.concatenate([(run.weights[name] - expected.weights[name]).ravel() for name in run.weights])
    for difference in (residual, run.column("loss") - expected.column("loss")):
        error = difference.std(dtype=np.float64) / len(difference) ** 0.5
        assert abs(difference.mean(dtype=np.float64)) <= 8 * error, "it has a direction: this is not rounding"
    assert np.abs(residual).max() < 1e-4
