"""Reads and writes train states: resumable, disposable directories of torch.distributed.checkpoint, one per saved step.

Not to be confused with a bundle. torch pickles the metadata of these files, so they stay on trusted storage.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import Future
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from cca_core.config import ConfigError
from cca_core.store import StageDirectory

FORMAT_VERSION = 2
#: What the loop keeps beside model and optimizer.
_LOOP = ("step", "curve", "adaptive", "format_version")
#: An older state is kept until the newer one is complete.
KEEP = 2


class TrainStates:
    """The train states of one stage directory, in the sibling ``train_state/``. A step resumes on any world size.

    What a step draws (order, negatives, dropout) is a function of its number, so the step is all the loop has to keep.
    """

    def __init__(self, directory: StageDirectory) -> None:
        self.directory = directory.sibling("train_state")
        self._saving: Future[Any] | None = None
        self._group: dist.ProcessGroup | None = None

    def steps(self) -> list[int]:
        """Saved steps in order; torch writes ``.metadata`` last, so a directory without it is no state."""
        fs = self.directory.store.fs
        fs.invalidate_cache(self.directory.path)
        found = fs.find(self.directory.path) if fs.exists(self.directory.path) else []
        return sorted(int(match[1]) for path in found if (match := re.search(r"/step-(\d+)/\.metadata$", path)))

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
        weights, moments = get_state_dict(model, optimizer)
        # As text: torch would take a list apart and then ask for exactly as many items when it loads.
        texts = {"curve": json.dumps(curve), "adaptive": json.dumps(adaptive)}
        loop = {"step": step, **texts, "format_version": FORMAT_VERSION}
        state = {"model": weights, "optimizer": moments, "loop": loop}
        self._saving = dcp.async_save(state, checkpoint_id=self._id(step), process_group=self._group)

    def wait(self) -> None:
        """Wait for the state that is being written; rank 0 then removes those that are no longer needed."""
        if self._saving is None:
            return
        self._saving.result()
        self._saving = None
        if dist.get_rank() == 0:
            for old in self.steps()[:-KEEP]:
                self.directory.store.fs.rm(self._path(old), recursive=True)

    def restore(self, model: nn.Module, optimizer: Any) -> tuple[int, list[dict[str, float]], dict[str, list[float]]]:
        """Load the newest state into model and optimizer on all ranks; the step to go on with (0 without a state),
        the curve up to it and the weights that follow the training."""
        latest: list[int] = [max(self.steps(), default=0)]
        dist.broadcast_object_list(latest, src=0)  # ranks may see the storage at different moments
        if latest[0] == 0:
            return 0, [], {}
        weights, moments = get_state_dict(model, optimizer)
        # The version alone first: torch refuses to load what another format does not hold.
        version = {"loop": {"format_version": 0}}
        dcp.load(version, checkpoint_id=self._id(latest[0]))
        if version["loop"]["format_version"] != FORMAT_VERSION:
            raise ConfigError(
                f"the train state in {self.directory.uri} has another format: delete it to train from the start"
            )
        state = {"model": weights, "optimizer": moments, "loop": dict.fromkeys(_LOOP, "")}
        dcp.load(state, checkpoint_id=self._id(latest[0]))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        loop = state["loop"]
        return int(loop["step"]), json.loads(loop["curve"]), json.loads(loop["adaptive"])

    def remove(self) -> None:
        """Delete all states; called once the stage's result stands."""
        fs = self.directory.store.fs
        if fs.exists(self.directory.path):
            fs.rm(self.directory.path, recursive=True)

    def _path(self, step: int) -> str:
        return f"{self.directory.path}/step-{step:08d}"

    def _id(self, step: int) -> str:
        return f"{self.directory.uri}/step-{step:08d}"
