"""Reads all results, writes report/: the table, the verdict and the pictures that a reviewer looks at first."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from cca_core.stages.table import markdown_table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

REPORT, PLOT, SAMPLES = "report.md", "fidelity_diversity.png", "samples.png"


def report_markdown(
    recipe_name: str,
    decision: dict[str, Any],
    results: dict[str, Any],
    rows: list[dict[str, Any]],
    swept: list[str],
) -> str:
    """Verdict, table, rules and what the numbers are, as Markdown for the run's description and for a file.

    ``swept`` are the lines on where the candidate's settings come from; none without a sweep.
    """
    evaluated, compared = results["rows"][0], results["compared_costs"]
    lines = [f"# {recipe_name}: {decision['verdict']}", "", decision["says"], "", markdown_table(rows), ""]
    lines += ["## What it saves", ""]
    for label, cost in compared.items():
        mine = evaluated["cost"]
        lines.append(
            f"- against {label}: {cost['calls_per_image']} -> {mine['calls_per_image']} model calls per image, "
            f"{mine['tokens_images_per_s'] / cost['tokens_images_per_s']:.2f}x the images/s on tokens, "
            f"{mine['images_per_s'] / cost['images_per_s']:.2f}x end to end (one run, batch {mine['batch_size']})"
        )
    lines += ["", "## The gate", "", "| rule | value | limit | passed |", "| --- | ---: | ---: | --- |"]
    lines += [
        f"| {rule['name']} | {rule['value']:.3f} | {rule['limit']:.3f} | {'yes' if rule['passed'] else 'no'} |"
        for rule in decision["rules"]
    ]
    lines += swept
    first = rows[0]["per_seed"][0]
    seeds = ", ".join(str(seed["seed"]) for seed in rows[0]["per_seed"])
    lines += [
        "",
        "## How it was measured",
        "",
        f"{first['n']} samples per sampler and seed, sampling seeds {seeds}, mean +- standard deviation over them; "
        f"{first['n_real']} real images ({results['real']}). The distance is a Frechet distance in the features of the "
        f"embedded classifier (digest {results['features'][:12]}): it compares samplers of this run and is not FID.",
        "",
    ]
    return "\n".join(lines)


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
        (axes[1], "distance", "Frechet distance, classifier features (lower is better)"),
    ):
        for (group, members), marker in zip(groups.items(), "os*", strict=True):
            members.sort(key=lambda row: row["mean"]["recall"])
            x, y = ([row["mean"][key] for row in members] for key in ("recall", name))
            axis.plot(x, y, marker=marker, markersize=14 if marker == "*" else 7, label=group)
            for row, a, b in zip(members, x, y, strict=True):
                text = row["label"].replace("base, ", "").replace("aligned, ", "").replace("temperature", "T")
                axis.annotate(text, (a, b), textcoords="offset points", xytext=(6, 5), fontsize=8)
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
