"""Reads a LlamaGen in memory, writes nothing: rows that decode side by side, each at a position of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cca_core.models.base import Captions, ClassIds, SlotDecoder
from cca_core.models.llamagen.attention import attend, compiles
from cca_core.models.llamagen.network import LlamaGen
from cca_core.models.packed import Linear, PackedOnce, packed_linear

#: Attention reads the cache up to the next multiple of this. What is read depends on a row's own position alone, so
#: that its neighbours leave no trace in its rounding.
BUCKET = 64


@dataclass(frozen=True)
class PackedLayer:
    """The linear maps of one block; w1 and w3 read the same input."""

    wqkv: Linear
    wo: Linear
    w13: Linear
    w2: Linear


@dataclass(frozen=True)
class PackedModel:
    layers: tuple[PackedLayer, ...]
    output: Linear


def pack(model: LlamaGen, rows: int) -> PackedModel:
    layers = [
        PackedLayer(
            packed_linear(layer.attention.wqkv, rows=rows),
            packed_linear(layer.attention.wo, rows=rows),
            packed_linear(layer.feed_forward.w1, layer.feed_forward.w3, rows=rows),
            packed_linear(layer.feed_forward.w2, rows=rows),
        )
        for layer in model.layers
    ]
    return PackedModel(tuple(layers), packed_linear(model.output, rows=rows))


_packed = PackedOnce()


class LlamaGenSlots(SlotDecoder):
    """Slots of a class-conditional LlamaGen: the condition is the first position, so that entering is a step like any
    other."""

    continuous = True

    def __init__(self, model: LlamaGen, num_slots: int) -> None:
        self.model, spec = model, model.spec
        self.packed = _packed.get(model, num_slots, lambda: pack(model, num_slots))
        weight = model.output.weight
        length = spec.num_cond_tokens + spec.num_tokens - 1
        shape = (spec.num_layers, num_slots, spec.num_kv_heads, length, spec.head_dim)
        # Zeros, not whatever lies in memory: what is masked is multiplied by 0, and NaN would stay.
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        self.compiled = compiles(self.keys[0])
        self.positions = [-1] * num_slots
        self.embedded_SC = torch.zeros(num_slots, spec.dim, dtype=weight.dtype, device=weight.device)
        self.rows_S = torch.arange(num_slots, device=weight.device)

    def enter(self, slots: list[int], cond: ClassIds | Captions) -> None:
        embedded, _ = self.model.cls_embedding(cond)
        self.embedded_SC[slots] = embedded[:, 0]
        for slot in slots:
            self.positions[slot] = 0

    def leave(self, slots: list[int]) -> None:
        for slot in slots:
            self.positions[slot] = -1

    def step(self, previous_Sn: Tensor) -> Tensor:
        model, device = self.model, self.keys.device
        at_S = torch.tensor([max(position, 0) for position in self.positions], device=device)
        x = torch.where((at_S == 0)[:, None], self.embedded_SC, model.tok_embeddings(previous_Sn[:, 0]))[:, None]
        table_S = model.rotary[at_S]
        runs = self._runs(at_S)
        for layer, packed, keys, values in zip(model.layers, self.packed.layers, self.keys, self.values, strict=True):
            x = x + packed.wo(self._attend(packed.wqkv(layer.attention_norm(x)), table_S, keys, values, at_S, runs))
            gate, up = packed.w13(layer.ffn_norm(x)).chunk(2, dim=-1)
            x = x + packed.w2(F.silu(gate) * up)
        self.positions = [position + 1 if position >= 0 else -1 for position in self.positions]
        return self.packed.output(model.norm(x)).float()

    def _attend(
        self,
        qkv_S1C: Tensor,
        table_S: Tensor,
        keys: Tensor,
        values: Tensor,
        at_S: Tensor,
        runs: list[tuple[slice, int, Tensor]],
    ) -> Tensor:
        spec = self.model.spec
        qk, v = qkv_S1C.unflatten(-1, (-1, spec.head_dim)).split(
            [spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], dim=2
        )
        q, k = _rotate_rows(qk, table_S).split([spec.num_heads, spec.num_kv_heads], dim=2)
        keys[self.rows_S, :, at_S] = k[:, 0]
        values[self.rows_S, :, at_S] = v[:, 0]
        q = q.transpose(1, 2)
        parts = [
            attend(q[rows], keys[rows, :, :stop], values[rows, :, :stop], mask, compiled=self.compiled)
            for rows, stop, mask in runs
        ]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.transpose(1, 2).flatten(2)

    def _runs(self, at_S: Tensor) -> list[tuple[slice, int, Tensor]]:
        """Neighbouring slots whose bucket is the same: (slots, positions read, what counts of them). Slots take turns,
        so that there are about as many runs as buckets; an idle one goes with its neighbour."""
        buckets: list[int] = []
        for position in self.positions:
            idle = buckets[-1] if buckets else 0
            buckets.append(position // BUCKET if position >= 0 else idle)
        length, runs, start = self.keys.shape[3], [], 0
        for stop in range(1, len(buckets) + 1):
            if stop == len(buckets) or buckets[stop] != buckets[start]:
                read = min((buckets[start] + 1) * BUCKET, length)
                cells = torch.arange(read, device=at_S.device)
                unseen = cells > at_S[start:stop, None, None, None]
                mask = torch.zeros(unseen.shape, dtype=self.keys.dtype, device=at_S.device)
                runs.append((slice(start, stop), read, mask.masked_fill_(unseen, -torch.inf)))
                start = stop
        return runs


def _rotate_rows(x_S1HD: Tensor, table_S: Tensor) -> Tensor:
    """``rotate``, where each row has the angles of its own position: float32 [S, D/2, 2]. Pairs as complex numbers: one
    product instead of ten small operations; training keeps those, since its blocks may be compiled, for which complex
    numbers are foreign."""
    pairs = torch.view_as_complex(x_S1HD.float().unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(table_S)[:, None, None]
    return torch.view_as_real(turned).flatten(-2).type_as(x_S1HD)
