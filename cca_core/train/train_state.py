"""Reads and writes train states: resumable, disposable directories of torch.distributed.checkpoint, one per saved step.

Not to be confused with a bundle. torch pickles the metadata of these files, so they stay on trusted storage.
"""

from __future__ import annotations

import json
import re
import uuid
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from cca_core.config import ConfigError
from cca_core.store import StageDirectory

T = TypeVar("T")

FORMAT_VERSION = 3
#: What the loop keeps beside model and optimizer.
_LOOP = ("step", "curve", "adaptive", "format_version")
#: An older state is kept until the newer one is complete.
KEEP = 2


class TrainStates:
    """The train states of one stage directory, in the sibling ``train_state/``. A step resumes on any world size.

    What a step draws (order, negatives, dropout) is a function of its number, so the step is all the loop has to keep.
    A state is named by its step and the attempt that wrote it: workers whose cluster is lost may write on for a while
    beside those that took their place, on another world size, and two layouts must not meet in one directory.
    """

    def __init__(self, directory: StageDirectory) -> None:
        self.directory = directory.sibling("train_state")
        self._saving: Future[Any] | None = None
        self._group: dist.ProcessGroup | None = None
        self._attempt = ""

    def steps(self) -> list[int]:
        """Saved steps in order."""
        return sorted({step for step, _ in self.saved()})

    def saved(self) -> list[tuple[int, str]]:
        """Step and name of each state, in order; torch writes ``.metadata`` last: a directory without it is none."""
        fs = self.directory.store.fs
        fs.invalidate_cache(self.directory.path)
        found = fs.find(self.directory.path) if fs.exists(self.directory.path) else []
        names = (match for path in found if (match := re.search(r"/(step-(\d+)-\w+)/\.metadata$", path)))
        return sorted((int(match[2]), match[1]) for match in names)

    def save(
        self,
        model: nn.Module,
        optimizer: Any,
        step: int,
        curve: list[dict[str, float]],
        adaptive: dict[str, list[float]],
    ) -> None:
        """Save from all ranks, with the curve so far and the weights that follow the training. Returns once the state
        is copied: it is written while training goes on."""
        self.wait()
        if self._group is None:  # its own, since training talks at the same time
            self._group = dist.new_group(backend="gloo")
            self._attempt = _of_rank_0(uuid.uuid4().hex[:8])
        weights, moments = get_state_dict(model, optimizer)
        # As text: torch would take a list apart and then ask for exactly as many items when it loads.
        texts = {"curve": json.dumps(curve), "adaptive": json.dumps(adaptive)}
        loop = {"step": step, **texts, "format_version": FORMAT_VERSION}
        state = {"model": weights, "optimizer": moments, "loop": loop}
        where = f"{self.directory.uri}/step-{step:08d}-{self._attempt}"
        self._saving = dcp.async_save(state, checkpoint_id=where, process_group=self._group)

    def wait(self) -> None:
        """Wait for the state that is being written; rank 0 then removes those that are no longer needed."""
        if self._saving is None:
            return
        self._saving.result()
        self._saving = None
        if dist.get_rank() == 0:
            for _, old in self.saved()[:-KEEP]:
                self.directory.store.fs.rm(f"{self.directory.path}/{old}", recursive=True)

    def restore(self, model: nn.Module, optimizer: Any) -> tuple[int, list[dict[str, float]], dict[str, list[float]]]:
        """Load the newest state into model and optimizer on all ranks; the step to go on with (0 without a state),
        the curve up to it and the weights that follow the training."""
        # Ranks may see the storage at different moments.
        _, latest = _of_rank_0(max(self.saved(), default=(0, "")))
        if not latest:
            return 0, [], {}
        where = f"{self.directory.uri}/{latest}"
        weights, moments = get_state_dict(model, optimizer)
        # The version alone first: torch refuses to load what another format does not hold.
        version = {"loop": {"format_version": 0}}
        dcp.load(version, checkpoint_id=where)
        if version["loop"]["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"the train state in {self.directory.uri} has another format: delete it to train from the start"
            )
        state = {"model": weights, "optimizer": moments, "loop": dict.fromkeys(_LOOP, "")}
        dcp.load(state, checkpoint_id=where)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        loop = state["loop"]
        return int(loop["step"]), json.loads(loop["curve"]), json.loads(loop["adaptive"])

    def remove(self) -> None:
        """Delete all states; called once the stage's result stands."""
        fs = self.directory.store.fs
        if fs.exists(self.directory.path):
            fs.rm(self.directory.path, recursive=True)


def _of_rank_0(value: T) -> T:
    """What rank 0 has, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
