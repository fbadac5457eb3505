"""Reads weights in memory, writes nothing: linear maps for drawing, whose weights stay as they are for many calls.

On a CPU those with much to multiply are packed for oneDNN, in their own precision: at the rows of a decode step that is
faster than ``F.linear``, which takes float32 to MKL (benchmarks/sampling.py). A call to oneDNN costs more, which small
ones feel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[[Tensor], Tensor]
#: Products of a call, weights times rows, from which packing pays.
MIN_PRODUCTS = 2**20
Made = TypeVar("Made")


def packed_linear(*maps: nn.Linear, rows: int) -> Linear:
    """The outputs of linear maps of the same input (without a bias) side by side, for inputs of ``rows`` rows."""
    weight = maps[0].weight.detach() if len(maps) == 1 else torch.cat([part.weight.detach() for part in maps])
    if _packs(weight) and rows * weight.numel() >= MIN_PRODUCTS:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return lambda x: F.linear(x, weight)


def _packs(weight: Tensor) -> bool:
    """Whether oneDNN multiplies in the weights' precision on this machine: bfloat16 needs AVX-512 or newer."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedOnce:
    """Keeps what was made of a model's weights for as long as the model lives and its weights stay the same."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[nn.Module, tuple[object, object]] = WeakKeyDictionary()

    def get(self, model: nn.Module, kind: object, make: Callable[[], Made]) -> Made:
        """What ``make`` gave the last time, where it was of the same ``kind`` and the same weights."""
        state = (kind, tuple((p.data_ptr(), p._version) for p in model.parameters()))
        kept = self._kept.get(model)
        if kept is None or kept[0] != state:
            kept = state, make()
            self._kept[model] = kept
        return kept[1]  # type: ignore[return-value]
