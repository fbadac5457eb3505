"""Reads an address of the service, writes nothing: clients that ask for images, and what became of their requests.

In a closed loop a client waits for its answer before it asks again: it finds out how much a service can do. In an open
loop requests leave when they are due, whatever became of those before them: a slow service is asked no less. Seconds
count from when a request was due.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

#: Above the service's own limit, so that it is the service that says so.
ANSWER_S = 150.0
OK, REFUSED, LEFT = "ok", "refused", "left"
#: An answer of the service, not of a client, that asks to come back later.
BUSY = (429, 503)
UNAVAILABLE = '"code":"unavailable"'
Body = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What became of a request: ok, refused (the service has no room and says when to come back), left (the client did
    not wait), or what failed."""

    due_s: float
    seconds: float
    outcome: str
    images: int

    @property
    def failed(self) -> bool:
        return self.outcome not in (OK, REFUSED, LEFT)


def connected(api: str) -> httpx.AsyncClient:
    """Connections without an upper limit of their number, which would be a queue of the client's own."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=api, timeout=ANSWER_S, limits=limits)


async def ask(http: httpx.AsyncClient, body: Body, due: float, started: float, leave_s: float | None = None) -> Answer:
    """One request, due at a time of ``time.perf_counter``; ``leave_s`` is how long its client waits."""
    wanted = body.get("n", 1)
    try:
        async with asyncio.timeout(leave_s):
            answer = await http.post("/v1/images/generations", json=body)
        seconds = time.perf_counter() - due
        if answer.status_code == 200:
            got = _images(answer)
            outcome = OK if got == wanted else f"{got} images for {wanted}"
        else:
            outcome = REFUSED if _refused(answer) else f"status {answer.status_code}"
    except TimeoutError:
        seconds, outcome = time.perf_counter() - due, LEFT
    except httpx.HTTPError as error:
        seconds, outcome = time.perf_counter() - due, f"{type(error).__name__} {error}".strip()
    return Answer(due - started, seconds, outcome, wanted if outcome == OK else 0)


async def open_loop(api: str, requests: Iterable[tuple[float, Body, float | None]]) -> list[Answer]:
    """Send each request when it is due, in seconds from now, and wait for all answers.

    Args:
        requests: when it is due, its body, and how long its client waits (None: for the answer), in order of time.
    """
    asked: list[asyncio.Task[Answer]] = []
    async with connected(api) as http:
        started = time.perf_counter()
        for due_s, body, leave_s in requests:
            await asyncio.sleep(max(0.0, started + due_s - time.perf_counter()))
            asked.append(asyncio.create_task(ask(http, body, started + due_s, started, leave_s)))
        return await asyncio.gather(*asked)


async def saturated(
    api: str, body: Body, *, clients: int, seconds: float, stagger_s: float, warm_s: float
) -> tuple[float, list[Answer]]:
    """Images/s of a closed loop, and all answers.

    Args:
        stagger_s: clients begin one after the other within that time, so that the images of a full engine are not in
            step, as they never are in a service that has run for a while.
        warm_s: answers of that time do not count.
        seconds: the time after that, in which answers count.
    """
    seeds, number = itertools.count(), body.get("n", 1)
    answers: list[Answer] = []
    counted: list[float] = []
    failed, ended = asyncio.Event(), asyncio.Event()
    started = time.perf_counter()

    async def client(http: httpx.AsyncClient, index: int) -> None:
        await asyncio.sleep(stagger_s * index / clients)
        while True:
            answer = await ask(http, {**body, "seed": next(seeds) * number}, time.perf_counter(), started)
            if ended.is_set():
                return
            answers.append(answer)
            if time.perf_counter() - started >= warm_s:
                counted.append(time.perf_counter())
            if answer.outcome != OK:
                failed.set()

    async with connected(api) as http:
        asking = [asyncio.create_task(client(http, index)) for index in range(clients)]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(failed.wait(), warm_s + seconds)
        ended.set()
        for task in asking:  # their requests leave the engine: nothing is left for whoever measures next
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
    # From an answer to an answer: the time before the first one that counts is that of images which do not.
    rate = (len(counted) - 1) * number / (counted[-1] - counted[0]) if len(counted) > 1 else 0.0
    return rate, answers


def poisson(rate: float, begin_s: float, end_s: float, seed: int) -> Iterator[float]:
    """Times of requests that come independently of each other, ``rate`` a second on average."""
    rng, now = random.Random(seed), begin_s
    while (now := now + rng.expovariate(rate)) < end_s:
        yield now


def count(answers: Sequence[Answer], outcome: str) -> int:
    return sum(answer.outcome == outcome for answer in answers)


def percentile(answers: Sequence[Answer], percent: float) -> float:
    """Of the seconds until whole answers; NaN where there is none."""
    seconds = [answer.seconds for answer in answers if answer.outcome == OK]
    return float(np.percentile(seconds, percent)) if seconds else float("nan")


def _refused(answer: httpx.Response) -> bool:
    """Not let in, and told when to come back. What was let in and then found no generator has failed."""
    return answer.status_code in BUSY and "retry-after" in answer.headers and UNAVAILABLE not in answer.text


def _images(answer: httpx.Response) -> int:
    """Images of a whole answer or of server-sent events."""
    if answer.headers["content-type"].startswith("text/event-stream"):
        return answer.text.count("event: image_generation.completed\n")
    return len(json.loads(answer.content)["data"])
