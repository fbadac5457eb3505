"""Reads and writes nothing: what the LlamaGen transformer keeps for its backward pass, from the sizes alone."""

from __future__ import annotations

from cca_core.models.llamagen.network import LlamaGenSpec


def activation_bytes(spec: LlamaGenSpec, rows: int, *, dropout: bool, mask_bytes: int = 1) -> int:
    """Bytes that one float32 forward pass over ``rows`` sequences saves for its backward pass.

    Per position and layer, with width C, keys of width K and feed-forward width F, in floats:

        norm before attention    3 C         its input, normalised, times the weight
        attention                3 C + 3 K   q, k and v before the rotation, q and k after it, the result
        its softmax, both norms  H + 2       one number per head and norm: fused attention saves no [L, L] scores
        norm before feed-forward 3 C
        feed-forward             4 F         w1, its silu, w3, their product

    and 3 C + 1 for the last norm. Dropout adds a mask of C after the embedding and two per layer. A sequence has one
    position per condition token and token, but the last, which predicts nothing.

    Args:
        mask_bytes: of one element of a dropout mask: 1 on a GPU, 4 on a CPU.
    """
    c, k, f = spec.dim, spec.num_kv_heads * spec.head_dim, spec.ffn_dim
    layer = 9 * c + 3 * k + spec.num_heads + 2 + 4 * f
    floats = spec.num_layers * layer + 3 * c + 1
    masks = (2 * spec.num_layers + 1) * c if dropout else 0
    positions = rows * (spec.num_cond_tokens + spec.num_tokens - 1)
    return positions * (4 * floats + mask_bytes * masks)
