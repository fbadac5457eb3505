"""Reads nothing: which generator answers while a version is on trial, with fake generators behind the real HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from deploy.access import Access
from deploy.api import ApiError
from deploy.fleet import MIN_ANSWERS, Canary, Fleet, Side
from deploy.generator import filtered
from deploy.routes import http_api
from tests.fake_generator import VERSION, FakeGenerator, asking_of

TRIED = "fake/2"


class Trial:
    """A champion and a canary with a share of the requests."""

    def __init__(self, share: float = 0.1) -> None:
        self.champion, self.canary = FakeGenerator(), FakeGenerator(TRIED)
        #: Version -> whether it is worse, as the metrics say it.
        self.told: dict[str, bool] = {}
        self.fleet = Fleet(self.champion, lambda: self.canary, self.told.__setitem__)
        self.fleet.configure(TRIED, share)

    @property
    def state(self) -> dict[str, Any]:
        return self.fleet.said()

    def asking(self, use: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            async with asking_of(http_api(self.fleet, Access(), list)) as client:
                return await use(client)

        return asyncio.run(run())

    def post(self, times: int = 1, **fields: Any) -> list[httpx.Response]:
        async def use(client: httpx.AsyncClient) -> list[httpx.Response]:
            asked = {"prompt": "ant", "seed": 1, **fields}
            return [await client.post("/v1/images/generations", json=asked) for _ in range(times)]

        return self.asking(use)


def models(answers: list[httpx.Response]) -> list[str]:
    assert {answer.status_code for answer in answers} == {200}, answers[0].text
    return [answer.json()["model"] for answer in answers]


def fails(error: Exception) -> Callable[[], None]:
    def raising() -> None:
        raise error

    return raising


@pytest.mark.parametrize(("share", "times"), [(0.1, 10), (0.25, 4), (0.5, 2)])
def test_its_share_of_the_requests_evenly(share, times):
    drew = models(Trial(share).post(40))
    assert drew == ([VERSION] * (times - 1) + [TRIED]) * (40 // times)


def test_who_asks_for_a_version_gets_that_one():
    trial = Trial()
    assert models(trial.post(3, model=TRIED)) == [TRIED] * 3
    assert models(trial.post(30, model=VERSION)) == [VERSION] * 30
    assert TRIED in models(trial.post(20, model="fake"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "error", [RuntimeError("broken"), ApiError(503, "busy", None, "busy"), ApiError(400, "no", None, "unknown_class")]
)
def test_a_broken_canary_fails_no_request_and_gets_none_any_more(error, stream):
    trial = Trial(0.5)
    trial.canary.before = fails(error)
    answers = trial.post(20, stream=stream)
    assert {answer.status_code for answer in answers} == {200}
    assert all(VERSION in answer.text and "error" not in answer.text for answer in answers)
    assert len(trial.canary.asked) == 3, "three failures are enough"
    assert trial.state["ended"] == "3 of 3 requests failed"
    assert trial.told == {TRIED: True}
    assert trial.state["champion"]["failed"] == 0


def test_the_champion_draws_the_seed_that_the_canary_did_not():
    trial = Trial(0.5)
    trial.canary.before = fails(RuntimeError())
    answers = trial.post(2, seed=7, n=2)
    assert answers[1].json()["data"] == answers[0].json()["data"]


def test_a_wrong_request_speaks_for_neither():
    trial = Trial(0.5)
    assert {answer.status_code for answer in trial.post(20, prompt="dog")} == {400}
    assert {answer.status_code for answer in trial.post(20, cfg_scale=-1)} == {400}
    assert (trial.state["ended"], trial.state["canary"]["requests"]) == ("", 0)


def test_who_asks_for_the_canary_is_told_of_its_errors():
    trial = Trial()
    trial.canary.before = fails(RuntimeError())
    (answer,) = trial.post(model=TRIED)
    assert answer.status_code == 500
    assert trial.state["canary"]["failed"] == 1


def test_a_canary_that_hangs_leaves_the_champion_half_of_the_time():
    trial = Trial(0.5)
    trial.canary.gate.clear()
    assert models(trial.post(2, timeout_s=0.4)) == [VERSION] * 2
    assert trial.state["canary"]["failed"] == 1


def test_a_client_that_goes_away_speaks_for_neither():
    trial = Trial(0.5)
    trial.canary.gate.clear()

    async def use(client: httpx.AsyncClient) -> None:
        url, asked = "/v1/images/generations", {"prompt": "ant"}
        await client.post(url, json=asked)
        gone = asyncio.create_task(client.post(url, json=asked))
        while not trial.canary.asked:
            await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)

    trial.asking(use)
    assert trial.state["canary"]["requests"] == 0
    assert trial.state["champion"]["requests"] == 1


@pytest.mark.parametrize(
    ("canary", "champion", "ended"),
    [
        (Side(60, failed=3), Side(600), ""),  # 5 %
        (Side(59, failed=3), Side(600), "3 of 59 requests failed"),
        (Side(2, failed=2), Side(600), ""),
        (Side(20, failed=3), Side(600, failed=60), ""),  # the champion fails too
        (Side(10, blocked=5), Side(100, blocked=40), ""),
        (Side(10, blocked=5), Side(100, blocked=10), "its content filter blocked 5 of 10 requests"),
    ],
)
def test_it_is_worse_where_more_goes_wrong_than_with_the_champion(canary, champion, ended):
    trial = Canary(TRIED, 0.1, canary=canary, champion=champion)
    trial.judge()
    assert trial.ended == ended


@pytest.mark.parametrize(("seconds", "answers", "worse"), [(0.31, 20, False), (0.33, 20, True), (9.0, 19, False)])
def test_it_is_worse_where_its_answers_take_longer(seconds, answers, worse):
    trial = Canary(TRIED, 0.1)
    for _ in range(answers):
        trial.canary.answered(seconds)
    for _ in range(MIN_ANSWERS):
        trial.champion.answered(0.2)
    trial.judge()
    assert trial.ended == (f"its answers take {seconds:.2f} s, the champion's 0.20 s (medians)" if worse else "")


def test_what_the_canarys_filter_blocks_the_champion_draws():
    trial = Trial(0.5)
    trial.canary.before = fails(filtered(1, 1))
    assert models(trial.post(20)) == [VERSION] * 20
    assert trial.state["ended"] == "its content filter blocked 3 of 3 requests"


def test_a_configuration_that_names_it_again_forgets_nothing():
    trial = Trial(0.5)
    trial.canary.before = fails(RuntimeError())
    trial.post(20)
    trial.fleet.configure(TRIED, 0.5)
    assert trial.state["ended"], "a change of the keys file must not begin it anew"
    trial.fleet.configure()
    assert trial.state is None
    assert trial.told == {TRIED: False}
    assert models(trial.post(10)) == [VERSION] * 10
