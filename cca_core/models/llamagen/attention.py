"""Reads and writes nothing: attention of one new position per row over what its row has cached.

PyTorch's kernel on a CPU is made for many queries: for one, in bfloat16, it takes three to five times as long as
reading the cache once does (benchmarks/sampling.py). There a large cache is read by a kernel that is compiled from the
formula.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

#: Numbers in one layer's keys from which compiling pays, which takes some seconds once per shape of the heads.
MIN_CACHED = 2**19


def compiles(keys_SHLD: Tensor) -> bool:
    """Whether the cache of a layer is one that a compiled kernel reads: narrow, large, on a CPU with a C++ compiler."""
    return (
        keys_SHLD.device.type == "cpu"
        and keys_SHLD.dtype == torch.bfloat16
        and keys_SHLD.numel() >= MIN_CACHED
        and shutil.which(os.environ.get("CXX", "g++")) is not None
    )


def attend(q_SH1D: Tensor, keys_SKLD: Tensor, values_SKLD: Tensor, mask_S11L: Tensor, *, compiled: bool) -> Tensor:
    """[S, H, 1, D] in the queries' dtype. K heads are cached, each for H / K queries; ``mask_S11L`` is added to the
    scores. A row's bits are the same among any neighbours."""
    if not compiled:
        grouped = keys_SKLD.shape[1] != q_SH1D.shape[1]
        return F.scaled_dot_product_attention(q_SH1D, keys_SKLD, values_SKLD, attn_mask=mask_S11L, enable_gqa=grouped)
    # The number of rows and the length are not compiled in: the same code for one row as for many.
    for tensor, dims in ((q_SH1D, [0]), (keys_SKLD, [0, 2]), (values_SKLD, [0, 2]), (mask_S11L, [0, 3])):
        torch._dynamo.decorators.mark_unbacked(tensor, dims)
    return _compiled()(q_SH1D, keys_SKLD, values_SKLD, mask_S11L)


@cache  # at the first use: importing the compiler takes a second
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_attend_one, recompile_limit=64)  # once for each shape of the heads


def _attend_one(q_SH1D: Tensor, keys_SKLD: Tensor, values_SKLD: Tensor, mask_S11L: Tensor) -> Tensor:
    """softmax(q k / sqrt(D) + mask) v, sums in float32."""
    scale = q_SH1D.shape[-1] ** -0.5
    q_SKG1D = q_SH1D.float().unflatten(1, (keys_SKLD.shape[1], -1))
    scores_SKGL = (q_SKG1D * keys_SKLD.float()[:, :, None]).sum(-1) * scale + mask_S11L.float()
    probs_SKGL = scores_SKGL.softmax(-1)
    out_SKGD = (probs_SKGL[..., None] * values_SKLD.float()[:, :, None]).sum(-2)
    return out_SKGD.flatten(1, 2)[:, :, None].type_as(q_SH1D)
