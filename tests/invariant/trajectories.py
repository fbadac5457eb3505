"""Reads a storage root of tests/invariant/test_training.py, writes train states: one run, on one rank or on two."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor

from cca_core import pairs
from cca_core.config import AlignConfig, ExecutionConfig, OptimConfig, Recipe
from cca_core.dataset import ReferenceColumns, TokenDataset
from cca_core.models import ARImageModel, load_model
from cca_core.objectives import CCA, Likelihood, Objective
from cca_core.store import Store
from cca_core.train.adaptive import controls
from cca_core.train.batches import BatchSource, CachedReference, OnlineReference
from cca_core.train.distributed import world
from cca_core.train.fit import Hooks, fit
from cca_core.train.train_state import TrainStates

DIGESTS = {name: name[0] * 64 for name in ("tokens", "base", "reference")}
EPOCHS, GLOBAL_BATCH, MICRO_BATCH, STEPS = 2, 32, 8, 6
CPU = torch.device("cpu")
#: A large eps lets Adam feel the scale of a gradient, and keeps it from turning rounding noise into steps. The clip
#: norm lies among the norms of this run, so that some steps are clipped and some are not.
OPTIM = OptimConfig(lr=1e-2, eps=1e-2, weight_decay=0.05, clip_norm=3.0, warmup_steps=2, schedule="cosine")


ADAPTIVE = Recipe(align=AlignConfig(lambda_="auto", null_share="auto"))


@dataclass(frozen=True)
class Setting:
    """How one run is done. Runs that differ in nothing but these compute the same."""

    micro_batch: int = MICRO_BATCH
    reference: str = "cached"
    dropout: float = 0.0
    objective: str = "cca"
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    compile: bool = False
    activation_checkpointing: bool = False
    #: lambda and null share follow the training.
    adaptive: bool = False
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


def policy(root: str) -> ARImageModel:
    """The base, moved a little: a policy equal to its reference has log-ratios whose sign is rounding noise."""
    model = load_model(Store(root).directory("base", DIGESTS["base"]).uri)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / 32
    return model


def objective_of(setting: Setting) -> Objective:
    return CCA(beta=0.3, lambda_=2.0) if setting.objective == "cca" else Likelihood()


def train(root: str, setting: Setting) -> Trajectory:
    """One run, on as many ranks as call this."""
    model = policy(root)
    result = Trajectory()

    def on_log(record: dict[str, float]) -> None:
        if record["step"] == setting.lost_in_step:
            raise Lost

    states = TrainStates(Store(root).directory("align", setting.states)) if setting.states else None
    with world(CPU) as group:
        try:
            done = fit(
                model,
                objective_of(setting),
                batch_source(root, setting),
                OPTIM,
                epochs=EPOCHS,
                dropout=setting.dropout,
                world=group,
                execution=ExecutionConfig(
                    checkpoint_every_steps=setting.save_every,
                    log_every_steps=1,
                    sharding=setting.sharding,
                    compile=setting.compile,
                    activation_checkpointing=setting.activation_checkpointing,
                ),
                states=states,
                controls=controls(ADAPTIVE) if setting.adaptive else (),
                hooks=Hooks(on_log=on_log),
            )
        except Lost:
            return result
    result.curve = [{k: v for k, v in record.items() if k != "images_per_s"} for record in done.curve]
    result.weights = {name: tensor.clone() for name, tensor in whole(model).items()}
    result.resumed_from = done.resumed_from
    return result


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights as this rank sees them, shards of all ranks put together."""
    state = model.state_dict().items()
    return {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state}


def one_rank_of(rank: int, size: int, root: str, settings: list[Setting], meeting: str, out: str) -> None:
    """One of several processes; it runs all ``settings``, one after the other."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=120))
    trajectories = [train(root, setting) for setting in settings]
    torch.save([vars(t) for t in trajectories], f"{out}/rank-{rank}.pt")
    dist.destroy_process_group()


def on_ranks(size: int, root: str, settings: list[Setting], folder: Path) -> list[list[Trajectory]]:
    """The trajectories of ``settings`` as each of ``size`` ranks saw them."""
    mp.spawn(one_rank_of, (size, root, settings, str(folder / "meeting"), str(folder)), nprocs=size)
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(size)]
    return [[Trajectory(**run) for run in rank] for rank in ranks]
