"""Reads features and logits in memory, writes nothing: how good samples are, as numbers."""

from cca_core.metrics.fidelity import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

__all__ = [
    "Moments",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
