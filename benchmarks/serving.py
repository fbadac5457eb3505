"""Reads nothing; writes bundles to a temporary folder and a table: the service against the engine that it is made of.

    python -m benchmarks.serving > benchmarks/results/serving_2cpu.md
    python -m benchmarks.serving --shapes digits

`cca serve` with one generator replica that has all cores, asked over HTTP, and in turns with it, in this process with
as many threads, the engine at the same slots and the official loop of benchmarks/sampling.py. Random weights; images of
two pixels a token, so that tokens are the work. A turn is:

1. the engine offline: a batch of images at the service's slots, decoded one by one as the service does;
2. the service at saturation: a closed loop with twice as many images asked for as there are slots, out of step;
3. one image through the official loop alone, decoded;
4. the service at half of the images/s of 2: requests of one image, an open loop of Poisson arrivals.

Images/s are medians over the turns; the p95 is of all requests of 4, over the median of 3. Exit code 1 where a goal is
missed, which are for LlamaGen-B. The processor time by kind of process says what the service adds to drawing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.clients import OK, Answer, open_loop, percentile, poisson, saturated
from benchmarks.sampling import OfficialLoop, build
from benchmarks.service import Service, decoder, provenance, serving, write_bundle
from cca_core.generate import Engine, Sampling, decode_images
from cca_core.models import to_uint8
from deploy.drawing import DECODED_AT_ONCE, SLOTS

GOAL_SATURATION, GOAL_LATENCY = 0.85, 1.5
AT_ONCE = DECODED_AT_ONCE["cpu"]


@dataclass(frozen=True)
class Amounts:
    """How long a turn measures; goals hold where ``goals`` says so."""

    seconds: float
    half_load_s: float
    #: Images of a request at saturation.
    per_request: tuple[int, ...]
    goals: bool


SHAPES = {
    "B": Amounts(seconds=25.0, half_load_s=50.0, per_request=(1,), goals=True),
    "digits": Amounts(seconds=8.0, half_load_s=15.0, per_request=(1, 16), goals=False),
}


@dataclass
class Found:
    """What the turns of a shape have measured; processor time in seconds per image."""

    offline: list[float] = field(default_factory=list)
    offline_cpu_s: list[float] = field(default_factory=list)
    saturated: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    cpu_s: dict[int, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    alone_s: list[float] = field(default_factory=list)
    half_load: list[Answer] = field(default_factory=list)
    half_rates: list[float] = field(default_factory=list)


class Offline:
    """The engine, the decoder and the official loop in this process."""

    def __init__(self, shape: str) -> None:
        self.model = build(shape)
        self.tokenizer = decoder(self.model.spec.vocab_size)
        self.official = OfficialLoop(self.model)

    def engine(self, images: int) -> float:
        """Seconds to draw and decode so many images."""
        started = time.perf_counter()
        engine = Engine(self.model, SLOTS)
        seeds = torch.arange(images)
        engine.submit(seeds % self.model.spec.num_classes, Sampling(), seeds)
        while engine.busy:
            for drawn in engine.step():
                to_uint8(decode_images(self.tokenizer, drawn.tokens_N[None], batch_size=AT_ONCE))
        return time.perf_counter() - started

    def one_alone(self) -> float:
        """Seconds of one image through the official loop."""
        started = time.perf_counter()
        to_uint8(decode_images(self.tokenizer, self.official(torch.tensor([0])), batch_size=1))
        return time.perf_counter() - started


def measure(shape: str, service: Service, turns: int) -> Found:
    """All turns. Engine and official loop are warmed up first; `cca serve` does so itself."""
    amounts, offline, found = SHAPES[shape], Offline(shape), Found()
    offline.engine(SLOTS)
    offline.one_alone()
    drawing_s = offline.engine(SLOTS)
    images = SLOTS * max(2, round(amounts.seconds / drawing_s))

    def say(what: str) -> None:
        print(f"{shape}, turn {turn + 1} of {turns}: {what}", file=sys.stderr, flush=True)

    for turn in range(turns):
        say(f"the engine, {images} images")
        cpu = time.process_time()
        found.offline.append(images / offline.engine(images))
        found.offline_cpu_s.append((time.process_time() - cpu) / images)
        for number in amounts.per_request:
            say(f"the service, {number} to a request")
            _saturate(service, number, amounts.seconds, drawing_s, found)
        say("one image alone, then half load")
        found.alone_s += [offline.one_alone() for _ in range(3)]
        rate = found.saturated[1][-1] / 2
        found.half_rates.append(rate)
        times = poisson(rate, 0.0, amounts.half_load_s, seed=turn)
        asked = [(due_s, {"prompt": "0", "seed": seed}, None) for seed, due_s in enumerate(times)]
        found.half_load += _all_ok(asyncio.run(open_loop(service.api, asked)))
    return found


def _saturate(service: Service, number: int, seconds: float, drawing_s: float, found: Found) -> None:
    """Measure requests of ``number`` images. An image takes ``drawing_s`` in a full engine; twice that until all slots
    are taken and out of step, and a little more until what waits is there."""
    clients = max(4, 2 * SLOTS // number)
    body = {"prompt": "0", "n": number}
    before, own, began = service.cpu_seconds(), time.process_time(), time.perf_counter()
    warm_s = max(1.0, 2.2 * drawing_s)
    rate, answers = asyncio.run(
        saturated(service.api, body, clients=clients, seconds=seconds, stagger_s=drawing_s, warm_s=warm_s)
    )
    _all_ok(answers)
    found.saturated[number].append(rate)
    drawn = rate * (time.perf_counter() - began)
    cpu = found.cpu_s[number]
    for kind, spent in service.cpu_seconds().items():
        cpu[kind].append((spent - before.get(kind, 0.0)) / drawn)
    cpu["clients"].append((time.process_time() - own) / drawn)


def _all_ok(answers: list[Answer]) -> list[Answer]:
    bad = [answer.outcome for answer in answers if answer.outcome != OK]
    if bad:
        sys.exit(f"{len(bad)} of {len(answers)} requests were not answered: {sorted(set(bad))}")
    return answers


def report(shape: str, found: Found) -> bool:
    """Print a shape's tables; whether its goals hold."""
    amounts = SHAPES[shape]
    offline, alone_s = statistics.median(found.offline), statistics.median(found.alone_s)
    held = []

    def row(what: str, value: str, ratio: float | None = None, goal: str = "", holds: bool = True) -> None:
        if amounts.goals:
            held.append(holds)
        print(f"| {what} | {value} | {'' if ratio is None else f'{ratio:.2f}'} | {goal if amounts.goals else ''} |")

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.3g} ({', '.join(f'{value:.3g}' for value in values)})"

    print(f"\n## {shape}\n\n| what | median (turns) | ratio | goal |\n| --- | ---: | ---: | ---: |")
    row(f"engine offline, {SLOTS} slots, images/s", spread(found.offline))
    for number, rates in found.saturated.items():
        ratio = statistics.median(rates) / offline
        goal, holds = f">= {GOAL_SATURATION}", ratio >= GOAL_SATURATION
        row(f"service at saturation, {number} to a request, images/s", spread(rates), ratio, goal, holds)
    row("one image through the official loop alone, s", f"{alone_s:.3g} (n = {len(found.alone_s)})")
    half = f"service at half load ({statistics.median(found.half_rates):.3g} images/s), s"
    row(f"{half}, p50", f"{percentile(found.half_load, 50):.3g} (n = {len(found.half_load)})")
    p95 = percentile(found.half_load, 95)
    ratio = p95 / alone_s
    row(f"{half}, p95", f"{p95:.3g}", ratio, f"<= {GOAL_LATENCY}", ratio <= GOAL_LATENCY)

    numbers = list(found.cpu_s)
    print("\n| processor time at saturation, ms per image | " + " | ".join(f"{n} to a request" for n in numbers) + " |")
    print("| --- |" + " ---: |" * len(numbers))
    for kind in found.cpu_s[numbers[0]]:
        cells = [f"{1000 * statistics.median(found.cpu_s[n][kind]):.3g}" for n in numbers]
        print(f"| {kind} | {' | '.join(cells)} |")
    print(
        f"| (engine offline) | {' | '.join([f'{1000 * statistics.median(found.offline_cpu_s):.3g}'] * len(numbers))} |"
    )
    sys.stdout.flush()
    return all(held)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=["digits", "B"])
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)  # those of the one replica
    print(f"# The service against its engine\n\n{provenance('serving')},")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.turns} turns.")
    held = []
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory(prefix="cca-bench-") as folder:
            bundle = write_bundle(Path(folder), shape)
            with serving(bundle, max_replicas=1) as service:
                found = measure(shape, service, arguments.turns)
        held.append(report(shape, found))
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
