"""Reads nothing; writes a bundle to a temporary folder and a table: does a service at half load stay as it is?

    python -m benchmarks.soak > benchmarks/results/soak_2cpu.md      (an hour; `make soak` is the same)
    python -m benchmarks.soak --minutes 10

`cca serve` with one generator replica, a model of the size of the embedded default with random weights, and Poisson
arrivals at half of the requests/s that a closed loop gets first. Of 20 requests one is guided, one is streamed and one
is left by its client within a tenth of a second. The time is cut into twelve rounds; after each the load pauses until
the service says that no slot is used and no request is open.

Exit code 1 where, from the first third of the rounds to the last, the memory of a kind of process or the p95 has grown
by more than its limit, or where a request failed or was refused, more slots were used than there are, or one was still
used in a pause.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.clients import LEFT, OK, REFUSED, Body, count, open_loop, percentile, poisson, saturated
from benchmarks.service import Service, provenance, serving, write_bundle
from deploy.drawing import SLOTS

ROUNDS = 12
IMAGES = 4
#: Largest growth from the first third to the last. A small process moves by some MiB in any case.
MEMORY_GROWTH, MEMORY_SLACK_MIB, P95_GROWTH = 0.10, 16.0, 0.25
#: Of EVERY requests in a row, which one is guided, streamed, left.
EVERY, GUIDED, STREAMED, LEAVING = 20, 5, 10, 15
SAMPLE_S = 5.0
#: Ray's metrics are some seconds late: longest wait until they say that nothing is under way.
IDLE_S = 60.0
SLOTS_USED = "ray_cca_slots_used"
UNDER_WAY = (SLOTS_USED, "ray_cca_images_waiting", "ray_cca_open_requests")


@dataclass(frozen=True)
class Round:
    """What one round has seen."""

    requests: int
    refused: int
    left: int
    failed: tuple[str, ...]
    p50_s: float
    p95_s: float
    #: Medians in MiB, by kind of process.
    memory: dict[str, float]
    #: Most slots that were used at once, where the service says so.
    slots: float
    #: What was still under way at the end of the pause.
    idle: dict[str, float]


def requests(rate: float, seconds: float, first: int) -> Iterator[tuple[float, Body, float | None]]:
    """Arrivals of a round; ``first`` numbers its first request."""
    for number, due_s in enumerate(poisson(rate, 0.0, seconds, seed=first), first):
        body = {"prompt": str(number % 10), "n": IMAGES, "seed": number * IMAGES % 2**30}
        if number % EVERY == GUIDED:
            body["cfg_scale"] = 2.0
        if number % EVERY == STREAMED:
            body["stream"] = True
        # From before the request is read to after it is drawn.
        yield due_s, body, number // EVERY % 10 / 100 if number % EVERY == LEAVING else None


async def one_round(service: Service, rate: float, seconds: float, first: int) -> Round:
    """Load, and the pause after it."""
    memory: list[dict[str, float]] = []
    slots = 0.0
    answering = asyncio.create_task(open_loop(service.api, requests(rate, seconds, first)))
    while not answering.done():
        memory.append(await asyncio.to_thread(service.memory))
        slots = max(slots, (await asyncio.to_thread(service.gauges, SLOTS_USED)).get(SLOTS_USED, 0.0))
        await asyncio.wait([answering], timeout=SAMPLE_S)
    answers = await answering
    deadline = time.monotonic() + IDLE_S
    while any((idle := await asyncio.to_thread(service.gauges, *UNDER_WAY)).values()) and time.monotonic() < deadline:
        await asyncio.sleep(1.0)
    return Round(
        requests=len(answers),
        refused=count(answers, REFUSED),
        left=count(answers, LEFT),
        failed=tuple(answer.outcome for answer in answers if answer.failed),
        p50_s=percentile(answers, 50),
        p95_s=percentile(answers, 95),
        memory={kind: statistics.median(one.get(kind, 0.0) for one in memory) for kind in memory[0]},
        slots=slots,
        idle=idle,
    )


def faults(rounds: Sequence[Round]) -> list[str]:
    """What was not flat, in words; nothing where all was."""
    third = len(rounds) // 3
    first, last = rounds[:third], rounds[-third:]
    found = []
    for kind in first[0].memory:
        before, after = (statistics.fmean(one.memory.get(kind, 0.0) for one in part) for part in (first, last))
        if after > before * (1 + MEMORY_GROWTH) and after > before + MEMORY_SLACK_MIB:
            found.append(f"memory of {kind}: {before:.0f} MiB, then {after:.0f} MiB")
    before, after = (statistics.fmean(one.p95_s for one in part) for part in (first, last))
    if not after <= before * (1 + P95_GROWTH):
        found.append(f"p95: {before:.3f} s, then {after:.3f} s")
    for number, one in enumerate(rounds, 1):
        if one.failed:
            found.append(f"round {number}: {len(one.failed)} requests failed: {sorted(set(one.failed))}")
        if one.refused:
            found.append(f"round {number}: {one.refused} requests refused, which half load never asks for")
        if one.slots > SLOTS:
            found.append(f"round {number}: {one.slots:.0f} of {SLOTS} slots used")
        if not one.idle or any(one.idle.values()):
            found.append(f"round {number}: not idle after {IDLE_S:.0f} s: {one.idle or 'its metrics do not say'}")
    return found


def header(one: Round) -> str:
    idle = ", ".join(name.removeprefix("ray_cca_").replace("_", " ") for name in one.idle)
    names = ["round", "requests", "refused", "left", "failed", "p50, s", "p95, s", "most slots used", f"idle: {idle}"]
    names += [f"{kind}, MiB" for kind in one.memory]
    return f"| {' | '.join(names)} |\n|{' ---: |' * len(names)}"


def row(number: int, one: Round) -> str:
    idle = ", ".join(f"{value:.0f}" for value in one.idle.values())
    counts = f"{one.requests} | {one.refused} | {one.left} | {len(one.failed)}"
    memory = " | ".join(f"{mebibytes:.0f}" for mebibytes in one.memory.values())
    return f"| {number} | {counts} | {one.p50_s:.3f} | {one.p95_s:.3f} | {one.slots:.0f} | {idle} | {memory} |"


async def soak(service: Service, minutes: float) -> list[Round]:
    """All rounds, each printed as it ends."""
    body = {"prompt": "0", "n": IMAGES}
    most, answers = await saturated(service.api, body, clients=16, seconds=20.0, stagger_s=1.0, warm_s=10.0)
    if any(answer.outcome != OK for answer in answers):
        sys.exit(f"requests fail before the soak begins: {sorted({answer.outcome for answer in answers})}")
    rate = most / IMAGES / 2
    print(f"Half load is {rate:.1f} requests/s of {IMAGES} images; saturation {most:.0f} images/s.\n")
    rounds: list[Round] = []
    first = 0
    for number in range(1, ROUNDS + 1):
        rounds.append(await one_round(service, rate, 60 * minutes / ROUNDS, first))
        first += rounds[-1].requests
        if number == 1:
            print(header(rounds[0]))
        print(row(number, rounds[-1]), flush=True)
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=60.0)
    arguments = parser.parse_args()
    print(f"# A soak of the service\n\n{provenance('soak')}.")
    with tempfile.TemporaryDirectory(prefix="cca-bench-") as folder:
        bundle = write_bundle(Path(folder), "digits")
        with serving(bundle, max_replicas=1) as service:
            found = faults(asyncio.run(soak(service, arguments.minutes)))
    limits = f"memory {MEMORY_GROWTH:.0%} and {MEMORY_SLACK_MIB:.0f} MiB, p95 {P95_GROWTH:.0%}"
    print(f"\nGrowth that is let pass from the first third to the last: {limits}.")
    print("Flat." if not found else "Not flat:\n\n" + "\n".join(f"- {fault}" for fault in found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
