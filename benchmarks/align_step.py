"""Reads nothing, writes nothing but a table: the alignment step against the official algorithm, ingredient by
ingredient, in images/s and peak memory.

    python benchmarks/align_step.py > benchmarks/results/align_step_2cpu.md
    python benchmarks/align_step.py --shape L --batch-sizes 16 --micro-batch-size 16     (on a GPU)

Random weights in the shape of a released LlamaGen: speed and memory do not depend on their values. The official
algorithm is written plainly: the frozen model in the loop, log_softmax over [2B, L, V] in float32, eager, one batch at
once. Every line is a process of its own, which takes its steps in turn with one of the official algorithm: a slow
moment of the machine hits both, and ratios are those of such a pair. Seconds of a step are medians. Peak memory is that
of the whole process (on a GPU, of torch's allocator).

The second table is what the reference costs when it is cached: reference + k alignments against k runs with the frozen
model in the loop, from the same lines.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cca_core import pairs
from cca_core.config import ExecutionConfig, OptimConfig
from cca_core.models import ARImageModel, family
from cca_core.models.llamagen.network import LlamaGen
from cca_core.objectives import CCA
from cca_core.objectives.base import Batch
from cca_core.train.batches import BatchSource
from cca_core.train.distributed import pick_device, world
from cca_core.train.fit import Hooks, autocast, fit
from cca_core.train.optim import build_optimizer, clip_gradients

#: Name -> tokens of an image.
SHAPES = {"B": 256, "L": 576, "XL": 576}
OPTIM = OptimConfig(lr=1e-5, weight_decay=0.05)
OBJECTIVE = CCA(beta=0.02, lambda_=300.0)
IMAGES, CLASSES = 4096, 1000
#: In this order, each with what it adds to the one above. The first two are the algorithm itself, the last is ours.
PLAIN = {
    "official": "official: frozen model in the loop",
    "cached": "reference cached",
    "chunked": "log-probs in chunks",
}
LOOP = {
    "loop": "the loop of this project, micro-batches",
    "compiled": "blocks compiled",
}
REFERENCE = "reference"
NULL_SHARE_MAX = 0.2


class Images:
    """Random tokens in the place of a token data set."""

    num_views = 1

    def __init__(self, model: ARImageModel) -> None:
        rng = np.random.default_rng(0)
        self.hashes_N = pairs.id_hashes([f"image-{i}" for i in range(IMAGES)])
        self.labels_N = rng.integers(CLASSES, size=IMAGES)
        self.train_images = np.arange(IMAGES)
        self.all_tokens = rng.integers(model.spec.vocab_size, size=(IMAGES, model.spec.num_tokens))

    def tokens(self, images: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.int64]:
        del views
        return self.all_tokens[images]


class Columns:
    """Reference columns, without a file."""

    def fill(self, batch: Batch, epoch: int, images: NDArray[np.int64]) -> Batch:
        del epoch, images
        return Batch(**{**vars(batch), "ref_pos_B": zeros(batch), "ref_neg_B": zeros(batch)})


def zeros(batch: Batch) -> Tensor:
    return torch.full((len(batch.weight_B),), -2500.0)


def build(shape: str) -> LlamaGen:
    torch.manual_seed(0)
    model = family("llamagen").build_model(family("llamagen").released.model_spec(f"GPT-{shape}", SHAPES[shape]))
    model.init_weights(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.output.weight, std=0.02)
    return model


def plain_log_probs(model: LlamaGen, tokens_BL: Tensor, cond_B: Tensor) -> Tensor:
    logits = model.output(model.hidden(tokens_BL, cond_B)).float()
    return torch.log_softmax(logits, -1).gather(-1, tokens_BL[..., None])[..., 0].sum(-1)


def plain_steps(name: str, args: argparse.Namespace) -> Iterator[None]:
    """Steps of the algorithm written plainly, one per ``next``."""
    device = pick_device("auto")
    model = build(args.shape).to(device)
    frozen = build(args.shape).to(device).eval() if name == "official" else None
    optimizer, images = build_optimizer(model, OPTIM), Images(model)
    score: Callable[[LlamaGen, Tensor, Tensor], Tensor] = plain_log_probs
    if name == "chunked":
        score = lambda model, tokens, cond: model(tokens, cond).sum(-1)  # noqa: E731
    model.train()
    for start in range(0, IMAGES, args.batch_size):
        rows = np.arange(start, start + args.batch_size)
        tokens = torch.from_numpy(images.all_tokens[rows]).repeat(2, 1).to(device)
        labels = torch.from_numpy(images.labels_N[rows])
        cond = torch.cat([labels, labels.roll(-1)]).to(device)
        with autocast(device, args.precision):
            pos, neg = score(model, tokens, cond).chunk(2)
            ref_pos = ref_neg = torch.full_like(pos, -2500.0)
            if frozen is not None:
                with torch.no_grad():
                    ref_pos, ref_neg = score(frozen, tokens, cond).chunk(2)
        loss = OBJECTIVE.terms(pos, neg, ref_pos, ref_neg, (labels == labels.roll(-1)).to(device)).mean()
        loss.backward()
        clip_gradients(model, OPTIM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        yield


def reference_steps(args: argparse.Namespace) -> Iterator[None]:
    """Scoring one batch as the reference stage does: right and wrong condition, and the null one for a fifth."""
    device = pick_device("auto")
    model = build(args.shape).to(device).eval()
    tokens = torch.from_numpy(Images(model).all_tokens[: args.batch_size]).to(device)
    cond = torch.zeros(args.batch_size, dtype=torch.int64, device=device)
    null_rows = round(NULL_SHARE_MAX * args.batch_size)
    while True:
        with torch.inference_mode(), autocast(device, args.precision):
            for rows in (args.batch_size, args.batch_size, null_rows):
                if rows:
                    model(tokens[:rows], cond[:rows]).sum(-1).tolist()
        yield


def fit_steps(name: str, args: argparse.Namespace, wait: Callable[[], bool]) -> None:
    """The project's own loop; ``wait`` is called after each step and says whether to go on."""

    class Ended(Exception):
        pass

    def on_log(record: dict[str, float]) -> None:
        if not wait():
            raise Ended

    model = build(args.shape)
    batches = BatchSource(
        Images(model),
        seed=0,
        global_batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size,
        null_label=CLASSES,
        null_share=0.1,
        null_purpose=pairs.Purpose.NULL,
        reference=Columns(),
    )
    execution = ExecutionConfig(log_every_steps=1, compile=name == "compiled")
    with world(pick_device("auto")) as alone:
        try:
            fit(
                model,
                OBJECTIVE,
                batches,
                OPTIM,
                epochs=1,
                dropout=0.0,
                world=alone,
                execution=execution,
                precision=args.precision,
                hooks=Hooks(on_log=on_log),
            )
        except Ended:
            return


def work(name: str, args: argparse.Namespace) -> None:
    """A line of the table in its own process: a step for every line of stdin, answered by its seconds; then its peak
    memory in bytes."""
    started = time.perf_counter()

    def answer() -> bool:
        nonlocal started
        print(time.perf_counter() - started, flush=True)
        go_on = sys.stdin.readline().strip() == "step"
        started = time.perf_counter()
        return go_on

    if name in LOOP:
        fit_steps(name, args, answer)
    else:
        for _ in reference_steps(args) if name == REFERENCE else plain_steps(name, args):
            if not answer():
                break
    print(peak_bytes(), flush=True)


def peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def micro_batch_size(batch_size: int, args: argparse.Namespace) -> int:
    return min(args.micro_batch_size or max(1, batch_size // 4), batch_size)


class Line:
    """One process of the table."""

    def __init__(self, name: str, batch_size: int, precision: str, args: argparse.Namespace) -> None:
        micro = micro_batch_size(batch_size, args)
        options = [f"--shape={args.shape}", f"--micro-batch-size={micro}", f"--precision={precision}"]
        self.batch_size, self.seconds = batch_size, []
        self.process = subprocess.Popen(
            [sys.executable, __file__, f"--work={name}", f"--batch-size={batch_size}", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()  # the first step, with compilation

    def step(self) -> None:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.seconds.append(self._read())

    def end(self) -> None:
        self.process.stdin.close()
        self.peak = self._read() / 2**30
        self.process.wait()

    def _read(self) -> float:
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("a line of the table ended early: see above")
        return float(answer)

    @property
    def median(self) -> float:
        """Seconds of a step."""
        return statistics.median(self.seconds)

    @property
    def images_per_s(self) -> float:
        return self.batch_size / self.median


@dataclass(frozen=True)
class Row:
    """A line of the table, measured in turn with the official algorithm."""

    images_per_s: float
    peak: float
    over_official: float


def measure(batch_size: int, args: argparse.Namespace) -> dict[tuple[str, str], Row]:
    """Each line in turn with the official one in float32, both in processes of their own: no more than two at once.
    Prints the table as it grows."""
    titles = {**PLAIN, **LOOP, REFERENCE: "(scoring alone, as the reference stage does)"}
    names = [(name, "float32") for name in titles if name != "official"]
    names += [(name, "bfloat16") for name in ("official", "compiled", REFERENCE)]
    print(f"\n## {batch_size} images per step, micro-batches of {micro_batch_size(batch_size, args)}\n")
    print("| ingredient | images/s | over official | peak memory, GiB |\n| --- | ---: | ---: | ---: |", flush=True)
    rows = {}

    def add(name: str, precision: str, row: Row) -> None:
        rows[name, precision] = row
        title = titles[name] + (", bfloat16" if precision == "bfloat16" else "")
        print(f"| {title} | {row.images_per_s:.3f} | {row.over_official:.2f} | {row.peak:.2f} |", flush=True)

    official = Line("official", batch_size, "float32", args)
    for name, precision in names:
        line = Line(name, batch_size, precision, args)
        official.seconds.clear()
        for _ in range(args.repeats):
            official.step()
            line.step()
        line.end()
        add(name, precision, Row(line.images_per_s, line.peak, official.median / line.median))
    official.end()
    add("official", "float32", Row(official.images_per_s, official.peak, 1.0))
    return rows


def judge(batch_size: int, rows: dict[tuple[str, str], Row]) -> bool:
    """Print what the goals of design.md section 6 are about; whether they hold."""
    official = rows["official", "float32"]
    # Not every processor multiplies faster in bfloat16: some need twice the time of float32.
    faster = max(("float32", "bfloat16"), key=lambda precision: rows["compiled", precision].over_official)
    best = rows["compiled", faster]
    goals = [
        (f"all in: {faster} over official in float32", best.over_official, 2.5 if torch.cuda.is_available() else 2.2)
    ]
    for precision in ("float32", "bfloat16"):
        ratio = rows["compiled", precision].over_official / rows["official", precision].over_official
        goals.append((f"{precision} over official in {precision}", ratio, 1.25))
    for precision in ("float32", "bfloat16"):
        # In units of an official step. An online run is the same loop with the frozen model's forward of both
        # conditions, which is what the reference stage does but for the null condition.
        aligned, scored = (1 / rows[name, precision].over_official for name in ("compiled", REFERENCE))
        online = aligned + scored * 2 / (2 + NULL_SHARE_MAX)
        for k, goal in ((1, 0.95), (4, 1.2)):
            title = f"reference + {k} alignments against {k} online runs, {precision}"
            goals.append((title, k * online / (scored + k * aligned), goal))
    memory = best.peak / official.peak, 0.55 if batch_size <= 4 else 0.4
    print("\n| goal | measured | |\n| --- | ---: | ---: |")
    for title, value, goal in goals:
        print(f"| {title} | {value:.2f} | >= {goal} |")
    print(f"| all in: peak memory over official | {memory[0]:.2f} | <= {memory[1]} |", flush=True)
    return all(value >= goal for _, value, goal in goals) and memory[0] <= memory[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--shape", choices=SHAPES, default="B", help="the released LlamaGen (default: B)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16], help="images per step")
    parser.add_argument("--micro-batch-size", type=int, help="images per forward pass of the loop (default: a quarter)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each line")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--batch-size", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--precision", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work, args)
        return 0
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    print(f"`python {' '.join(sys.argv)}`, commit {commit}, {platform.machine()}, {hardware}; LlamaGen-{args.shape},")
    print(f"{SHAPES[args.shape]} tokens; medians of {args.repeats} steps.", flush=True)
    held = [judge(size, measure(size, args)) for size in args.batch_sizes]
    print(f"\nGoals {'hold' if all(held) else 'do not hold'}.")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
