"""Reads nothing; writes a bundle to a temporary folder, a plot and a table: do replicas follow the load?

    python -m benchmarks.load --plot docs/images/load.png > benchmarks/results/load_2cpu.md

`cca serve` with up to two generator replicas, a model of the size of the embedded default with random weights. Clients
in an open loop climb from 1 to 64 and back: each asks for 16 images, a replica's slots, every so many seconds, whether
or not the last answer has come; how many seconds is measured first, so that 64 clients ask for a fifth more than one
replica can draw. The configuration is that of `cca serve` but for autoscaling: a replica counts as full with one such
request, and looking back and scaling down take seconds instead of minutes.

Exit code 1 where a request failed, or the replicas did not follow: two at the height, one in the end. Requests that
were refused with Retry-After are counted apart.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from benchmarks.clients import OK, REFUSED, Answer, Body, count, open_loop, percentile, poisson, saturated
from benchmarks.service import Service, provenance, serving, write_bundle

matplotlib.use("Agg")
from matplotlib import pyplot as plt

CLIENTS = (1, 2, 4, 8, 16, 32, 64, 64, 64, 32, 16, 8, 4, 2, 1)
PEAK = CLIENTS.index(max(CLIENTS))
IMAGES = 16
REPLICAS = 2
#: What all clients at the height ask for, in images/s of one replica.
HEIGHT = 1.2
AUTOSCALING = {"target_ongoing_requests": 1, "look_back_period_s": 15, "upscale_delay_s": 5, "downscale_delay_s": 20}
#: Longest wait for one replica after the last request.
CALM_S = 90.0
POLL_S = 1.0
BIN_S = 5.0


@dataclass(frozen=True)
class Seen:
    """Generator replicas that run at a time."""

    at_s: float
    replicas: int


def requests(step_s: float, every_s: float) -> Iterator[tuple[float, Body, None]]:
    """Independent requests, of each client one in ``every_s`` on average; a number of clients stays for ``step_s``."""
    seed = 0
    for step, clients in enumerate(CLIENTS):
        for due_s in poisson(clients / every_s, step * step_s, (step + 1) * step_s, seed=step):
            yield due_s, {"prompt": str(seed % 10), "n": IMAGES, "seed": seed * IMAGES}, None
            seed += 1


async def pause(service: Service) -> float:
    """Seconds between two requests of a client, on average."""
    rate, answers = await saturated(
        service.api, {"prompt": "0", "n": IMAGES}, clients=4, seconds=10.0, stagger_s=1.0, warm_s=3.0
    )
    if any(answer.outcome != OK for answer in answers):
        sys.exit(f"requests fail before the load begins: {sorted({answer.outcome for answer in answers})}")
    return max(CLIENTS) * IMAGES / (HEIGHT * rate)


async def run(service: Service, step_s: float, every_s: float) -> tuple[list[Answer], list[Seen]]:
    """All answers, and the replicas second by second until one is left."""
    seen: list[Seen] = []
    started = time.perf_counter()
    answers = asyncio.create_task(open_loop(service.api, requests(step_s, every_s)))
    calm = len(CLIENTS) * step_s + CALM_S
    while not answers.done() or (seen[-1].replicas > 1 and seen[-1].at_s < calm):
        seen.append(Seen(time.perf_counter() - started, await asyncio.to_thread(service.generators)))
        await asyncio.sleep(POLL_S)
    return await answers, seen


def table(answers: list[Answer], seen: list[Seen], step_s: float) -> None:
    """A line per number of clients."""
    print("\n| clients | replicas | requests | ok | refused | failed | images/s | p50, s | p95, s |")
    print("| ---: |" + " ---: |" * 8)
    for step, clients in enumerate(CLIENTS):
        part = [answer for answer in answers if step * step_s <= answer.due_s < (step + 1) * step_s]
        ran = sorted({one.replicas for one in seen if step * step_s <= one.at_s < (step + 1) * step_s})
        counts = [count(part, OK), count(part, REFUSED), sum(answer.failed for answer in part)]
        cells = [clients, " to ".join(map(str, ran)), len(part), *counts]
        cells += [f"{sum(answer.images for answer in part) / step_s:.0f}"]
        cells += [f"{percentile(part, percent):.2f}" for percent in (50, 95)]
        print(f"| {' | '.join(map(str, cells))} |")


def plot(file: Path, answers: list[Answer], seen: list[Seen], step_s: float) -> None:
    """Load, replicas and latency over time, one above the other."""
    figure, (load, replicas, latency) = plt.subplots(3, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    edges = [step * step_s for step in range(len(CLIENTS) + 1)]
    load.stairs(CLIENTS, edges, fill=True, color="#9ecae1")
    load.set_ylabel("clients")
    replicas.step([one.at_s for one in seen], [one.replicas for one in seen], where="post", color="#31a354")
    replicas.set_ylim(0, REPLICAS + 0.3)
    replicas.set_yticks(range(REPLICAS + 1))
    replicas.set_ylabel("generator\nreplicas")
    starts = [BIN_S * index for index in range(int(edges[-1] / BIN_S))]
    bins = [[answer for answer in answers if start <= answer.due_s < start + BIN_S] for start in starts]
    centres = [start + BIN_S / 2 for start in starts]
    for percent, colour in ((50, "#3182bd"), (95, "#de2d26")):
        # A gap where nothing was answered.
        latency.plot(centres, [percentile(part, percent) for part in bins], color=colour, label=f"p{percent}")
    for name, marker, which in (
        ("refused", "v", [answer for answer in answers if answer.outcome == REFUSED]),
        ("failed", "x", [answer for answer in answers if answer.failed]),
    ):
        if which:
            latency.plot([answer.due_s for answer in which], [0] * len(which), f"k{marker}", label=name)
    latency.set_ylabel(f"seconds until\nall {IMAGES} images")
    latency.set_ylim(bottom=0)
    latency.set_xlabel("seconds")
    latency.legend(loc="upper left")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--plot", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--step", type=float, default=20.0, help="seconds of each number of clients")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cca-bench-") as folder:
        bundle = write_bundle(Path(folder), "digits")
        with serving(bundle, max_replicas=REPLICAS) as service:
            every_s = asyncio.run(pause(service))
            service.set_autoscaling(**AUTOSCALING)
            answers, seen = asyncio.run(run(service, arguments.step, every_s))
    print(f"# Load that climbs and falls\n\n{provenance('load')}.")
    print(f"A client asks for {IMAGES} images every {every_s:.1f} s on average.")
    print(f"Autoscaling: {', '.join(f'{name} {value}' for name, value in AUTOSCALING.items())}.")
    table(answers, seen, arguments.step)
    plot(arguments.plot, answers, seen, arguments.step)
    failed = [answer.outcome for answer in answers if answer.failed]
    refused = count(answers, REFUSED)
    height = max(one.replicas for one in seen if one.at_s >= PEAK * arguments.step)
    print(f"\n{len(answers)} requests, {refused} refused with Retry-After, {len(failed)} failed {sorted(set(failed))}.")
    print(f"Replicas: {height} at the height, {seen[-1].replicas} after {seen[-1].at_s:.0f} s.")
    return 0 if not failed and height == REPLICAS and seen[-1].replicas == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
