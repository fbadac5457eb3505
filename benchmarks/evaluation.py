"""Reads nothing; writes stage directories below --storage and a table: what an evaluation takes beyond bare sampling.

    python benchmarks/evaluation.py --storage .cca/evaluation > benchmarks/results/evaluation_2cpu.md

The default recipe (the digits): --samples of each of eight samplers (guidance-free, four CFG scales, three
temperatures). Bare sampling draws and decodes them in one process with all cores, half of the samplers before and half
after; the evaluation is the stage baseline on Ray, its start-up excluded, down to results.json and the pictures. The
goal is a ratio of at most 1.3 at 10,000 samples.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace

import torch

from cca_core.config import ExecutionConfig, Recipe
from cca_core.dataset import classes_with_images
from cca_core.stages import Context, plan, run_stage
from cca_core.stages.evaluate import baseline_samplers
from cca_core.stages.graph import active
from cca_core.stages.inputs import input_digests
from cca_core.store import Store
from cca_core.workers.sample import Drawer, Sampler
from pipelines.ray_executor import RayExecutor
from pipelines.settings import quiet_libraries

GOAL = 1.3


def recipe_of(samples: int) -> Recipe:
    recipe = Recipe()
    # The cost of an image is a measurement of its own, of a number of images that does not grow with the samples.
    config = replace(recipe.evaluate, num_samples=samples, seeds=(0,), cost_images=8)
    return replace(recipe, evaluate=config)


def bare(context: Context, samplers: list[Sampler]) -> float:
    """Seconds to draw and decode all samples of these samplers."""
    draw = Drawer(context.recipe, classes_with_images(context.directory("tokens")))
    draw(samplers[0], 0, torch.arange(context.recipe.evaluate.batch_size))
    started = time.perf_counter()
    for sampler in samplers:
        draw(sampler, 0, torch.arange(context.recipe.evaluate.num_samples))
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description="An evaluation against bare sampling.")
    parser.add_argument("--storage", default=".cca/evaluation")
    parser.add_argument("--samples", type=int, default=10_000)
    arguments = parser.parse_args()
    quiet_libraries()
    recipe, store = recipe_of(arguments.samples), Store(arguments.storage)
    executor = RayExecutor(store, ExecutionConfig(), "", lambda record: None, lambda done, total: None)
    context = Context(recipe, store, plan(recipe, input_digests(recipe, store)), executor)
    if context.directory("baseline").manifest() is not None:
        sys.exit(
            f"{arguments.storage} holds this evaluation already, and reusing it takes no time: give a new --storage"
        )
    executor.start()
    try:
        for spec in active(recipe)[:4]:
            print(spec.name, file=sys.stderr)
            run_stage(spec.name, context)
        samplers = baseline_samplers(context)
        seconds = bare(context, samplers[::2])
        started = time.perf_counter()
        run_stage("baseline", context)
        took = time.perf_counter() - started
        seconds += bare(context, samplers[1::2])
    finally:
        executor.stop()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    print("# An evaluation against bare sampling\n")
    print(f"`python benchmarks/evaluation.py --samples {arguments.samples}`, commit {commit.strip()},")
    print(f"{os.cpu_count()} CPU cores, torch {torch.__version__}, {len(samplers)} samplers, one run.\n")
    print("| what | seconds |\n| --- | ---: |")
    print(f"| bare sampling, tokens and decoding | {seconds:.1f} |\n| evaluation | {took:.1f} |\n")
    reached = "reached" if took <= GOAL * seconds else "missed"
    print(f"Ratio {took / seconds:.2f}; the goal is at most {GOAL}: {reached}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
