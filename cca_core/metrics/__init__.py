"""Reads features and logits in memory, writes nothing: how good samples are, as numbers."""

from cca_core.metrics.fidelity import Moments, frechet_distance, inception_score
from cca_core.metrics.kernel import kernel_distance, subset_kernel_distance
from cca_core.metrics.neighbours import density_coverage, precision_recall

__all__ = [
    "Moments",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "precision_recall",
    "subset_kernel_distance",
]
