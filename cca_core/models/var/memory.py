"""Reads and writes nothing: what the VAR transformer keeps for its backward pass, from the sizes alone."""

from __future__ import annotations

from cca_core.models.var.network import VARSpec


def activation_bytes(spec: VARSpec, rows: int, *, dropout: bool, mask_bytes: int = 1) -> int:
    """Bytes that one float32 forward pass over ``rows`` sequences saves for its backward pass.

    Per position and layer, with width C and H heads, in floats:

        norm and modulation, twice   6 C       its input, normalised, modulated
        attention                    9 C       q, k and v; q normalised, q scaled, k normalised; the result by scale
                                               and in one piece; projected
        its softmax and norms        5 H + 4   fused attention saves no [L, L] scores
        feed-forward                 9 C       inside before and after gelu, 4 C each; outside

    and 3 C + 2 for the head's norm; per row and layer 9 C of modulation, whatever the length. Stochastic depth draws
    one number per row and saves next to nothing, so ``dropout`` and ``mask_bytes`` change nothing here.
    """
    del dropout, mask_bytes
    c = spec.dim
    position = spec.num_layers * (24 * c + 5 * spec.num_heads + 4) + 3 * c + 2
    return 4 * rows * (spec.num_tokens * position + spec.num_layers * 9 * c)
