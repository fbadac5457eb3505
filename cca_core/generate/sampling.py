"""Reads and writes nothing: from logits to tokens (temperature, top-k, top-p, inverse CDF)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cca_core.config import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. cfg_scale 1.0 means no guidance, hence one model call per step, for every family."""

    #: 0 takes the most likely token.
    temperature: float = 1.0
    #: 0 keeps all; otherwise the k largest logits and all ties of the k-th.
    top_k: int = 0
    #: 1.0 keeps all; otherwise the smallest set of largest probabilities that reaches p.
    top_p: float = 1.0
    cfg_scale: float = 1.0
    #: Guide only the first tokens (family's convention); negative guides all.
    cfg_interval: int = -1

    def __post_init__(self) -> None:
        for name, ok in (
            ("temperature must be at least 0", self.temperature >= 0),
            ("top_k must be at least 0", self.top_k >= 0),
            ("top_p must lie in [0, 1]", 0 <= self.top_p <= 1),
            ("cfg_scale must be at least 0", self.cfg_scale >= 0),
        ):
            if not ok:
                raise ConfigError(f"sampling.{name}")

    @property
    def guided(self) -> bool:
        """Scales up to 1 run no null pass at all (official LlamaGen: 0.5 equals 1.0)."""
        return self.cfg_scale > 1.0


def filtered_probs(logits_RV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after temperature, top-k and top-p, float32 [R, V]; the order and ties of official LlamaGen."""
    logits = logits_RV.float() / max(sampling.temperature, 1e-5)
    vocab_size = logits.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        kth = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # An entry goes iff the mass before it already exceeds p: the one that crosses p stays, and so does the first.
        removed = probs.cumsum(-1).roll(1, -1) > sampling.top_p
        removed[..., 0] = False
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(-1, index, removed), -torch.inf)
    return logits.softmax(-1)


def draw(logits_RV: Tensor, uniforms_R: Tensor, sampling: Sampling) -> Tensor:
    """Tokens int64 [R] by inverse CDF: the first whose cumulative probability exceeds the row's uniform (float64)."""
    if sampling.temperature == 0:
        return logits_RV.argmax(-1)
    cdf = filtered_probs(logits_RV, sampling).double().cumsum(-1)
    target = uniforms_R.unsqueeze(-1) * cdf[..., -1:]
    return (cdf <= target).sum(-1)
