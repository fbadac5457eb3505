"""Reads and writes nothing: log-probs of given tokens from hidden states, without a [B, L, V] float32 tensor.

The output layer and the log-softmax run over chunks of positions. The exponentials of the last chunk wait for the
backward pass, which recomputes those of the others: the peak is one chunk whatever the batch, and a batch of one chunk
computes nothing twice.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Elements of one chunk of logits: 64 MiB in float32.
CHUNK_ELEMENTS = 1 << 24


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_BLC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, tokens_BL: Tensor, chunk: int
    ) -> Tensor:
        logp_BL = torch.empty(tokens_BL.shape, dtype=torch.float32, device=hidden_BLC.device)
        hidden_NC, tokens_N, logp_N = hidden_BLC.flatten(0, 1), tokens_BL.flatten(), logp_BL.view(-1)
        exps = None
        for start in range(0, len(tokens_N), chunk):
            rows = slice(start, start + chunk)
            del exps  # before the next ones are made
            shifted = _shifted_logits(hidden_NC[rows], weight_VC, bias_V)
            token_logit_N = shifted.gather(1, tokens_N[rows, None])[:, 0]
            exps = shifted.exp_()
            logp_N[rows] = token_logit_N - exps.sum(-1).log()
        ctx.save_for_backward(hidden_NC, weight_VC, bias_V, tokens_N)
        ctx.chunk, ctx.last_exps = chunk, exps
        return logp_BL  # no view: FSDP2 hooks onto it

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        grad_N = grads[0].flatten()
        hidden_NC, weight_VC, bias_V, tokens_N = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden_NC) if ctx.needs_input_grad[0] else None
        # Chunks add up in float32 at least: bfloat16 would lose the small ones. One alone needs no wide copy.
        narrow = weight_VC.dtype
        wide = torch.promote_types(narrow, torch.float32) if len(tokens_N) > ctx.chunk else narrow
        grad_weight = grad_bias = None
        last, ctx.last_exps = ctx.last_exps, None
        for start in reversed(range(0, len(tokens_N), ctx.chunk)):
            rows = slice(start, start + ctx.chunk)
            exps = _shifted_logits(hidden_NC[rows], weight_VC, bias_V).exp_() if last is None else last
            last = None
            # d logp / d logits = onehot(token) - softmax, in the place of the exponentials
            grad_logits = exps.mul_((-grad_N[rows] / exps.sum(-1))[:, None])
            del exps
            grad_logits.scatter_add_(1, tokens_N[rows, None], grad_N[rows, None])
            if ctx.needs_input_grad[2]:
                grad_bias = _add(grad_bias, grad_logits.sum(0))
            grad_logits = grad_logits.to(narrow)
            if grad_hidden is not None:
                grad_hidden[rows] = grad_logits @ weight_VC
            if ctx.needs_input_grad[1]:
                grad_weight = _add(grad_weight, (grad_logits.T @ hidden_NC[rows]).to(wide))
            del grad_logits
        grads_of_map = [g.to(narrow) if g is not None else None for g in (grad_weight, grad_bias)]
        grad_BLC = grad_hidden.view(*grads[0].shape, -1) if grad_hidden is not None else None
        return grad_BLC, *grads_of_map, None, None


def _shifted_logits(hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits less the largest of their row, float32 [N, V]: their exponentials are at most 1."""
    logits = F.linear(hidden_NC, weight_VC, bias_V).float()
    return logits.sub_(logits.amax(-1, keepdim=True))


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def token_logp(
    hidden_BLC: Tensor,
    weight_VC: Tensor,
    tokens_BL: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """log softmax(hidden @ weight.T + bias) at ``tokens``: float32 [B, L] in nats, whatever the dtype of the model (or
    of autocast)."""
    kind = hidden_BLC.device.type
    if torch.is_autocast_enabled(kind):  # which does not look into a function of our own
        hidden_BLC, weight_VC = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden_BLC, weight_VC))
        bias_V = bias_V if bias_V is None else bias_V.to(weight_VC.dtype)
    chunk = max(1, chunk_elements // weight_VC.shape[0])
    return _TokenLogp.apply(hidden_BLC, weight_VC, bias_V, tokens_BL, chunk)
