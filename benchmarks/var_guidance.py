"""Reads nothing, writes nothing: VAR images per second guidance-free and guided, tokens only, each at its best batch.

    python benchmarks/var_guidance.py

Random weights in the shape of a small VAR at the released scales (680 tokens): speed does not depend on the values.
Exit code 1 where guidance-free sampling is less than 1.8 times as fast.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

import torch

from cca_core.generate import Sampling, calls_per_image, generate
from cca_core.models import ARImageModel, family
from cca_core.models.var.network import VARSpec
from cca_core.models.var.tokenizer import MultiScaleVQSpec

PATCH_NUMS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
GOAL = 1.8


def build(dim: int, num_layers: int) -> ARImageModel:
    """A VAR of width ``dim`` with the released scales and codebook, random weights."""
    var = family("var")
    tokenizer_spec = MultiScaleVQSpec(
        width=32,
        width_multipliers=(1, 1),
        num_res_blocks=1,
        codebook_size=4096,
        codebook_dim=32,
        patch_nums=PATCH_NUMS,
    )
    spec = VARSpec(
        vocab_size=4096,
        num_tokens=sum(p * p for p in PATCH_NUMS),
        num_classes=1000,
        dim=dim,
        num_layers=num_layers,
        num_heads=dim // 64,
        codebook_dim=32,
        patch_nums=PATCH_NUMS,
    )
    torch.manual_seed(0)
    model = var.build_model(spec).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    model.attach_tokenizer(var.build_tokenizer(tokenizer_spec))
    return model


def images_per_s(model: ARImageModel, sampling: Sampling, batch_size: int) -> float:
    seeds = torch.arange(batch_size)
    started = time.perf_counter()
    generate(model, seeds % model.spec.num_classes, sampling, seeds, batch_size=batch_size)
    return batch_size / (time.perf_counter() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    model = build(arguments.dim, arguments.num_layers)
    samplers = {"guided (cfg_scale 2.5)": Sampling(cfg_scale=2.5), "guidance-free": Sampling()}
    speeds: dict[tuple[str, int], list[float]] = {(n, b): [] for n in samplers for b in arguments.batch_sizes}
    for repeat in range(arguments.repeats + 1):  # samplers in turn, so that a drifting machine touches all alike
        for (name, batch_size), found in speeds.items():
            speed = images_per_s(model, samplers[name], batch_size)
            if repeat:
                found.append(speed)
    median = {key: statistics.median(found) for key, found in speeds.items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    print(
        f"VAR of width {arguments.dim}, {arguments.num_layers} layers, scales {PATCH_NUMS}, random weights, tokens "
        f"only, float32; median of {arguments.repeats}.\n`python {' '.join(sys.argv)}`, commit {commit}, "
        f"{platform.machine()}, {os.cpu_count()} CPU cores.\n"
    )
    print("| sampler | calls/image | " + " | ".join(f"batch {b}" for b in arguments.batch_sizes) + " | best |")
    print("| --- |" + " ---: |" * (len(arguments.batch_sizes) + 2))
    best = {}
    for name, sampling in samplers.items():
        row = [median[name, b] for b in arguments.batch_sizes]
        best[name] = max(row)
        cells = " | ".join(f"{value:.2f}" for value in row)
        print(f"| {name}, images/s | {calls_per_image(model, sampling)} | {cells} | {best[name]:.2f} |")
    guided, free = best.values()
    print(f"\nguidance-free / guided, each at its best batch: {free / guided:.2f} (goal {GOAL})")
    return 0 if free / guided >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
