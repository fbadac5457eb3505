"""Clients and verdicts of the benchmarks of the service: what they call a failure, and that a fault is seen."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from benchmarks import soak
from benchmarks.clients import LEFT, OK, REFUSED, Answer, ask, connected, open_loop, poisson, saturated
from deploy.api import ApiError
from tests.driver import answering

#: The prompt says what the service does.
ANSWERS: dict[str, tuple[int, dict[str, str], dict[str, Any]]] = {
    "good": (200, {}, {"data": [{}, {}]}),
    "one is missing": (200, {}, {"data": [{}]}),
    "busy": (503, {"Retry-After": "1"}, {}),
    "over quota": (429, {"Retry-After": "1"}, {}),
    "away": (503, {}, {}),
    "given up": (503, {"Retry-After": "1"}, ApiError(503, "no generator answers", None, "unavailable").body()),
    "broken": (500, {"Retry-After": "1"}, {}),
}


class Service:
    """Answers as the prompt says; "wait" only once two requests have come."""

    def __init__(self) -> None:
        self.waiting = 0
        self.two = asyncio.Event()
        self.app = FastAPI()
        self.app.post("/v1/images/generations")(self.generations)

    async def generations(self, request: Request) -> JSONResponse:
        prompt = (await request.json())["prompt"]
        if prompt == "wait":
            self.waiting += 1
            if self.waiting == 2:
                self.two.set()
            await self.two.wait()
            prompt = "good"
        status, headers, body = ANSWERS[prompt]
        return JSONResponse(body, status, headers)


@pytest.fixture
def api() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener, answering(Service().app, listener) as address:
        yield address


def asked(api: str, prompt: str, leave_s: float | None = None) -> Answer:
    (answer,) = asyncio.run(open_loop(api, [(0.0, {"prompt": prompt, "n": 2}, leave_s)]))
    return answer


@pytest.mark.parametrize(
    ("prompt", "outcome", "failed"),
    [
        ("good", OK, False),
        ("busy", REFUSED, False),
        ("over quota", REFUSED, False),
        ("away", "status 503", True),
        ("given up", "status 503", True),
        ("broken", "status 500", True),
        ("one is missing", "1 images for 2", True),
    ],
)
def test_a_refusal_with_retry_after_is_no_failure(api: str, prompt: str, outcome: str, failed: bool) -> None:
    answer = asked(api, prompt)
    assert (answer.outcome, answer.failed) == (outcome, failed)
    assert answer.images == (2 if outcome == OK else 0)


def test_a_client_that_leaves_is_no_failure(api: str) -> None:
    answer = asked(api, "wait", leave_s=0.05)
    assert (answer.outcome, answer.failed) == (LEFT, False)


def test_nobody_there_is_a_failure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert asked(address, "good").failed


def test_an_open_loop_does_not_wait_for_answers(api: str) -> None:
    """The first request is answered only after the second has come."""
    body = {"prompt": "wait", "n": 2}
    answers = asyncio.run(open_loop(api, [(0.0, body, 5.0), (0.1, body, 5.0)]))
    assert [answer.outcome for answer in answers] == [OK, OK]
    assert answers[0].seconds > 0.1


def test_seconds_count_from_when_a_request_was_due(api: str) -> None:
    """A client that is late, because it is busy itself, must not flatter the service."""

    async def late() -> Answer:
        async with connected(api) as http:
            now = time.perf_counter()
            return await ask(http, {"prompt": "good", "n": 2}, now - 3.0, now)

    answer = asyncio.run(late())
    assert answer.seconds > 3.0


def test_saturation_ends_at_the_first_failure(api: str) -> None:
    body = {"prompt": "broken", "n": 2}
    _, answers = asyncio.run(saturated(api, body, clients=2, seconds=100.0, stagger_s=0.0, warm_s=0.0))
    assert "status 500" in {answer.outcome for answer in answers}


def test_arrivals_come_at_their_rate() -> None:
    times = list(poisson(10.0, 100.0, 200.0, seed=0))
    assert 900 < len(times) < 1100
    assert times == sorted(times)
    assert 100 <= times[0] < times[-1] < 200


ROUND = soak.Round(
    requests=100,
    refused=0,
    left=5,
    failed=(),
    p50_s=0.05,
    p95_s=0.1,
    memory={"generators": 500.0, "ingress": 200.0},
    slots=16,
    idle={"ray_cca_open_requests": 0.0},
)


def test_a_soak_that_is_flat_passes() -> None:
    assert soak.faults([ROUND] * 12) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"memory": {"generators": 500.0, "ingress": 240.0}}, "memory of ingress"),
        ({"p95_s": 0.2}, "p95"),
        ({"p95_s": float("nan")}, "p95"),
        ({"failed": ("status 500",)}, "status 500"),
        ({"refused": 1}, "refused"),
        ({"slots": 17}, "17 of 16 slots"),
        ({"idle": {"ray_cca_slots_used": 1.0}}, "not idle"),
        ({"idle": {}}, "not idle"),
    ],
)
def test_a_soak_that_is_not_flat_fails(change: dict[str, Any], said: str) -> None:
    worse = replace(ROUND, **change)
    found = soak.faults([ROUND] * 8 + [worse] * 4)
    assert found
    assert all(said in fault for fault in found)
