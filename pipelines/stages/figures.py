"""Reads result rows and grids of samples in memory, writes nothing: the figures of the report."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

QUALITY_COST, PLOT, SAMPLES = "quality_cost.png", "fidelity_diversity.png", "samples.png"


def quality_cost(samplers: list[dict[str, Any]], distance_name: str, unit: str) -> Figure:
    """Distance and class consistency over the cost of 1,000 images, end to end.

    Args:
        samplers: those of the report's data.
        unit: of the cost.
    """
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    groups = {
        "base, guided (CFG)": [row for row in samplers if row["sampling"]["cfg_scale"] > 1],
        "base, guidance-free": [row for row in _of("base", samplers) if row["sampling"]["cfg_scale"] <= 1],
        "aligned, guidance-free": _of("aligned", samplers),
    }
    for axis, name, title in (
        (axes[0], "distance", f"{distance_name} (lower is better)"),
        (axes[1], "class_consistency", "class consistency (higher is better)"),
    ):
        for (group, members), marker in zip(groups.items(), "os*", strict=True):
            x = [row["cost_per_1000"] for row in members]
            y = [row["measured"][name]["mean"] for row in members]
            axis.scatter(x, y, marker=marker, s=160 if marker == "*" else 50, label=group)
            for row, a, b in zip(members, x, y, strict=True):
                axis.annotate(_short(row["label"]), (a, b), textcoords="offset points", xytext=(6, 5), fontsize=8)
        axis.set_xlim(0, 1.2 * max(row["cost_per_1000"] for row in samplers))
        axis.margins(y=0.12)
        axis.set_xlabel(f"cost of 1,000 images, end to end ({unit})")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def _of(model: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["label"].startswith(model)]


def _short(label: str) -> str:
    return label.replace("base, ", "").replace("aligned, ", "").replace("temperature", "T")


def fidelity_diversity(rows: list[dict[str, Any]]) -> Figure:
    """Class consistency over recall, and distance over recall: base over CFG scales and temperatures, and aligned."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    groups = {
        "base over CFG scales": [
            r for r in rows if r["label"].startswith("base") and r["sampling"]["temperature"] == 1
        ],
        "base over temperatures": [
            r for r in rows if r["label"].startswith("base") and r["sampling"]["cfg_scale"] <= 1
        ],
        "aligned, guidance-free": [r for r in rows if r["label"].startswith("aligned")],
    }
    for axis, name, title in (
        (axes[0], "class_consistency", "class consistency (higher is better)"),
        (axes[1], "distance", f"{rows[0]['distance_name']} (lower is better)"),
    ):
        for (group, members), marker in zip(groups.items(), "os*", strict=True):
            members = sorted((row for row in members if "recall" in row["mean"]), key=lambda row: row["mean"]["recall"])
            x, y = ([row["mean"][key] for row in members] for key in ("recall", name))
            axis.plot(x, y, marker=marker, markersize=14 if marker == "*" else 7, label=group)
            for row, a, b in zip(members, x, y, strict=True):
                axis.annotate(_short(row["label"]), (a, b), textcoords="offset points", xytext=(6, 5), fontsize=8)
        axis.set_xlabel("recall (diversity)")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    return figure


def sample_panels(panels: dict[str, bytes]) -> Figure:
    """PNG grids below each other under their titles; columns are classes, equal places have equal seeds."""
    images = {title: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for title, data in panels.items()}
    heights = [image.shape[0] for image in images.values()]
    width = max(image.shape[1] for image in images.values())
    figure, axes = plt.subplots(
        len(images),
        1,
        figsize=(width / 60, sum(heights) / 60 + 0.35 * len(images)),
        height_ratios=heights,
        constrained_layout=True,
        squeeze=False,
    )
    for axis, (title, image) in zip(axes[:, 0], images.items(), strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=10, loc="left")
        axis.axis("off")
    return figure


def png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()
