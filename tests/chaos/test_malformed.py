"""Writes to temporary folders: thousands of malformed requests, to the API in this process and to a running service."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from deploy.access import Access
from deploy.keys import add_key
from tests.fake_generator import FakeGenerator, client
from tests.malformed import NO_METHOD, request
from tests.service import ANSWER_S, Service, bundle, start

IN_PROCESS = 10_000
OVER_HTTP = 400
ANSWERED_S = 20
#: Requests until caches are filled, and what the process may grow by afterwards.
WARM_UP = 1000
GROWTH_BYTES = 24 * 1024**2


def check(number: int, answer: httpx.Response) -> None:
    """No fault of the service's, an error in OpenAI's form, nothing of the inside."""
    assert answer.status_code < 500, (number, request(number), answer.text[:500])
    assert "Traceback" not in answer.text
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        error = json.loads(answer.text)["error"]
        assert error.keys() == {"message", "type", "param", "code"}, (number, request(number))
        assert error["message"]


def held_bytes(generator: FakeGenerator) -> int:
    """Memory of this process, without what the fake keeps for other tests."""
    generator.asked.clear()
    generator.responses.clear()
    gc.collect()
    return psutil.Process().memory_info().rss


async def send(asking: httpx.AsyncClient, number: int) -> int:
    method, path, headers, body = request(number)
    async with asyncio.timeout(ANSWERED_S):
        answer = await asking.request(method, path, headers=headers, content=body)
    check(number, answer)
    return answer.status_code


@pytest.mark.parametrize("keys", [False, True])
def test_ten_thousand_malformed_requests_get_an_answer_and_leave_nothing(tmp_path, keys):
    """With a fake generator; a third of the requests meets a service that asks for keys."""
    access = Access()
    if keys:
        add_key(tmp_path / "keys.json", "ann", replace=False)
        access.configure(keys=str(tmp_path / "keys.json"))
    numbers = range(IN_PROCESS // 3) if keys else range(IN_PROCESS // 3, IN_PROCESS)

    async def run() -> Counter[int]:
        generator = FakeGenerator()
        async with client(generator, access) as asking:
            found = Counter([await send(asking, number) for number in numbers[:WARM_UP]])
            before = held_bytes(generator)
            found.update([await send(asking, number) for number in numbers[WARM_UP:]])
            assert held_bytes(generator) - before < GROWTH_BYTES
            assert access.metrics.now_open == 0
            return found

    found = asyncio.run(run())
    assert found[401 if keys else 400] > len(numbers) / 2, found
    assert keys or found[200] > len(numbers) / 50, "some are well-formed by chance, or nothing was tested"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("malformed")
    (folder / "tiny").mkdir()
    for name, data in bundle(0).items():
        (folder / "tiny" / name).write_bytes(data)
    driver, port = start(folder, "--model", "tiny", "--max-replicas", "1")
    try:
        driver.wait_line("ready: ")
        yield Service(driver, f"http://127.0.0.1:{port}", "")
    finally:
        driver.process.send_signal(signal.SIGTERM)
        driver.finish(90)


def test_a_running_service_answers_them_too_and_draws_as_before(service):
    before = service.draw("ant", seed=1)

    def one(number: int) -> int:
        method, path, headers, body = request(number)
        # A method without a body that has one is a matter of the HTTP server.
        answer = asking.request(method, path, headers=headers, content=body if method == "POST" else None)
        if method == NO_METHOD:  # the HTTP server refuses it in its own words
            assert 400 <= answer.status_code < 500
        else:
            check(number, answer)
        return answer.status_code

    limits = httpx.Limits(max_connections=8)
    with (
        httpx.Client(base_url=service.address, timeout=ANSWER_S, limits=limits) as asking,
        ThreadPoolExecutor(8) as pool,
    ):
        found = Counter(pool.map(one, range(OVER_HTTP)))
    assert found[400] > OVER_HTTP / 3, found
    assert service.draw("ant", seed=1) == before


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\nContent-Length: 10\r\n\r\n123456789",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS on a plain port
    ],
)
def test_what_is_no_http_is_refused_and_harms_nobody(service, sent):
    address: tuple[Any, ...] = ("127.0.0.1", int(service.address.rsplit(":", 1)[1]))
    with socket.create_connection(address, timeout=ANSWERED_S) as connection:
        try:
            connection.sendall(sent)
            said = connection.recv(64)
        except ConnectionError:
            said = b""
    assert said == b"" or said.startswith(b"HTTP/1.1 4"), said
    assert httpx.get(f"{service.address}/readyz", timeout=ANSWER_S).status_code == 200
