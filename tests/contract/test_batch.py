"""Writes keys and audit logs to temporary folders: batches of requests, with a fake generator behind the real API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx
import pytest
from ray.serve.exceptions import BackPressureError

from deploy import batch as batch_module
from deploy.access import Access
from deploy.api import ApiError
from deploy.batch import AT_ONCE, MAX_BATCH_BYTES, MAX_BATCH_IMAGES, Share
from deploy.keys import VARIABLE, add_key, disable
from deploy.proxy import PlainHeaders
from deploy.routes import http_api
from tests.fake_generator import FakeGenerator, client, fleet
from tests.malformed import request

URL = "/v1/images/batches"
SINGLE = "/v1/images/generations"


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


def line(**fields: Any) -> dict[str, Any]:
    return {"custom_id": f"seed-{fields['seed']}", "method": "POST", "url": SINGLE, "body": {"prompt": "ant", **fields}}


def jsonl(lines: Sequence[Any]) -> bytes:
    return "".join(json.dumps(one) + "\n" for one in lines).encode()


def asked(
    use: Callable[[httpx.AsyncClient], Awaitable[Any]],
    generator: FakeGenerator | None = None,
    access: Access | None = None,
) -> Any:
    async def run() -> Any:
        async with client(generator, access) as asking:
            return await use(asking)

    return asyncio.run(run())


def sent(content: bytes, generator: FakeGenerator | None = None, **about: Any) -> list[dict[str, Any]]:
    """The answers to a batch, by line."""
    answer = asked(lambda asking: asking.post(URL, content=content, **about), generator)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    return sorted(map(json.loads, answer.text.splitlines()), key=lambda found: found["line"])


def codes(answers: Sequence[dict[str, Any]]) -> list[tuple[int, str | None]]:
    found = (one["response"] for one in answers)
    return [(one["status_code"], one["body"].get("error", {}).get("code")) for one in found]


def test_a_line_has_the_answer_of_the_same_request_alone():
    asks = [line(seed=seed, n=1 + seed % 3, output_format="webp") for seed in range(12)]
    answers = sent(jsonl(asks), headers={"X-Request-Id": "mine"})
    assert [one["custom_id"] for one in answers] == [f"seed-{seed}" for seed in range(12)]
    for number, (ask, answer) in enumerate(zip(asks, answers, strict=True), 1):
        alone = asked(lambda asking, ask=ask: asking.post(SINGLE, json=ask["body"])).json()
        assert answer["response"]["body"] | {"created": 0} == alone | {"created": 0}
        assert answer["id"] == answer["response"]["request_id"] == f"mine:{number}"
        assert (answer["response"]["status_code"], answer["error"], answer["line"]) == (200, None, number)


def test_a_wrong_line_is_told_and_the_others_are_drawn():
    body = {"prompt": "ant"}
    lines = [
        json.dumps({"custom_id": "\u732b", "body": body}),
        "",
        "{",
        "[]",
        '"ant"',
        "[" * 30_000,
        json.dumps(body),
        json.dumps({"custom_id": 3, "body": body}),
        json.dumps({"custom_id": "no body"}),
        json.dumps({"body": body, "url": "/v1/chat/completions"}),
        json.dumps({"body": body, "method": "GET"}),
        json.dumps({"body": {**body, "sed": 1}}),
        json.dumps({"body": {**body, "stream": True}}),
        json.dumps({"custom_id": "dog", "body": {"prompt": "dog"}}),
        json.dumps({"body": {**body, "model": "gpt-image-1"}}),
        json.dumps({"custom_id": "last", "body": body}),
    ]
    answers = sent("\n".join(lines).encode())  # the last line may lack its end
    assert [one["line"] for one in answers] == [1, *range(3, 17)], "an empty line asks for nothing"
    assert codes(answers) == [
        (200, None),
        *[(400, "invalid_json")] * 4,
        (400, "unknown_parameter"),
        *[(400, "invalid_value")] * 4,
        (400, "unknown_parameter"),
        (400, "unsupported_value"),
        (400, "unknown_class"),
        (404, "model_not_found"),
        (200, None),
    ]
    assert [one["custom_id"] for one in answers if one["custom_id"]] == ["\u732b", "no body", "dog", "last"]


def test_malformed_lines_are_all_answered_and_none_is_a_fault_of_the_service():
    bodies = [request(number)[3] for number in range(600)]
    lines = [text for body in bodies if len(body) < 20_000 for text in body.split(b"\n") if text.strip()]
    wrapped = [b'{"body": ' + text + b"}" for text in lines]
    for batch in (lines, wrapped):
        answers = sent(b"\n".join(batch))
        assert [one["line"] for one in answers] == list(range(1, len(batch) + 1))
        assert all(status < 500 for status, _ in codes(answers))
    assert (200, None) in codes(answers), "some are well-formed by chance"


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"", 400, "the batch is empty"),
        (b" \r\n\n", 400, "the batch is empty"),
        (b"{}\n" * (MAX_BATCH_IMAGES + 1), 400, f"more than {MAX_BATCH_IMAGES} images"),
        (jsonl([line(seed=0, n=16)]) * (MAX_BATCH_IMAGES // 16 + 1), 400, f"more than {MAX_BATCH_IMAGES} images"),
        (b" " * (MAX_BATCH_BYTES + 1), 413, f"more than the {MAX_BATCH_BYTES} bytes"),
    ],
    ids=["nothing", "blank", "lines", "images", "bytes"],
)
def test_a_batch_that_is_refused_draws_nothing(content, status, says):
    generator = FakeGenerator()
    answer = asked(lambda asking: asking.post(URL, content=content), generator)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert not generator.asked


class Held:
    """A batch whose drawing waits for the generator's gate, sent as Serve sends it; what has come back."""

    def __init__(self, generator: FakeGenerator, lines: Sequence[Any], access: Access | None = None) -> None:
        generator.gate.clear()
        self.received: list[dict[str, Any]] = []
        app = http_api(fleet(generator), access or Access(), list)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": URL,
            "raw_path": URL.encode(),
            "query_string": b"",
            "headers": [],
        }
        self.messages = [{"type": "http.request", "body": jsonl(lines), "more_body": False}]
        self.answering = asyncio.create_task(app(scope, self.receive, self.send))

    async def receive(self) -> dict[str, Any]:
        if self.messages:
            return self.messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: dict[str, Any]) -> None:
        if message.get("body"):
            self.received.append(json.loads(message["body"]))


async def settled(generator: FakeGenerator) -> int:
    """How many lines a generator is asked for when nothing changes any more."""
    before = -1
    while before != len(generator.responses) or not generator.responses:
        before = len(generator.responses)
        for _ in range(200):
            await asyncio.sleep(0)
        await asyncio.to_thread(lambda: None)
    return before


@pytest.mark.parametrize(("n", "at_once"), [(1, AT_ONCE), (4, AT_ONCE // 4), (16, 1)])
def test_few_images_are_drawn_at_once_whatever_the_batch(n, at_once):
    async def use() -> None:
        generator = FakeGenerator()
        held = Held(generator, [line(seed=seed, n=n) for seed in range(20)])
        assert await settled(generator) == at_once
        generator.gate.set()
        await held.answering
        assert len(held.received) == 20

    asyncio.run(use())


def test_a_line_is_answered_when_it_is_done_not_when_all_are():
    async def use() -> None:
        generator = FakeGenerator()
        generator.before = generator.gate.clear  # one goes through, the next waits
        held = Held(generator, [line(seed=seed, n=AT_ONCE) for seed in range(3)])
        generator.gate.set()
        while not held.received:
            await asyncio.sleep(0.001)
        assert not held.answering.done()
        assert held.received[0]["custom_id"] == "seed-0"
        held.answering.cancel()
        await asyncio.gather(held.answering, return_exceptions=True)

    asyncio.run(use())


def test_a_client_that_goes_away_ends_the_batch(tmp_path):
    audit = tmp_path / "audit.jsonl"

    async def use() -> None:
        generator, access = FakeGenerator(), Access()
        access.configure(audit=str(audit))
        held = Held(generator, [line(seed=seed) for seed in range(20)], access)
        await settled(generator)
        held.answering.cancel()  # what Serve does when the client goes away
        await asyncio.gather(held.answering, return_exceptions=True)
        assert [response.cancelled for response in generator.responses] == [True] * AT_ONCE, "nothing else is begun"

    asyncio.run(use())
    written = [json.loads(text) for text in audit.read_text().splitlines()]
    assert [one["outcome"] for one in written] == ["cancelled"] * AT_ONCE


def test_a_large_line_is_not_overtaken_for_ever():
    async def use() -> list[str]:
        share, order = Share(4), []

        async def take(name: str, images: int) -> None:
            async with share.of(images):
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(take("a", 1), take("large", 16), take("b", 1), take("c", 1))
        return order

    assert asyncio.run(use()) == ["a", "large", "b", "c"]


def test_limits_and_the_audit_log_are_those_of_single_requests(tmp_path):
    keys, audit = tmp_path / "keys.json", tmp_path / "audit.jsonl"
    key = add_key(keys, "ann", replace=False, images_per_day=5)
    access = Access()
    access.configure(keys=str(keys), audit=str(audit))

    async def use(asking: httpx.AsyncClient) -> list[Any]:
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "job"}
        lines = [line(seed=1, n=3), line(seed=2, n=3), line(seed=3, n=2), line(seed=4)]
        drawn = await asking.post(URL, content=jsonl(lines), headers=headers)
        refused = await asking.post(URL, content=jsonl(lines), headers={"X-Request-Id": "no-key"})
        return [sorted(map(json.loads, drawn.text.splitlines()), key=lambda one: one["line"]), refused]

    answers, refused = asked(use, access=access)
    assert codes(answers) == [(200, None), (429, "insufficient_quota"), (200, None), (429, "insufficient_quota")]
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "missing_api_key")
    written = {one["request_id"]: one for one in map(json.loads, audit.read_text().splitlines())}
    assert {name: (one["key"], one["n"], one["outcome"]) for name, one in written.items()} == {
        "job:1": ("ann", 3, "ok"),
        "job:2": ("ann", 3, "insufficient_quota"),
        "job:3": ("ann", 2, "ok"),
        "job:4": ("ann", 1, "insufficient_quota"),
        "no-key": (None, None, "missing_api_key"),
    }


def test_a_key_that_is_cut_off_ends_its_batch(tmp_path):
    keys = tmp_path / "keys.json"
    key = add_key(keys, "ann", replace=False)
    access, generator = Access(), FakeGenerator()
    access.configure(keys=str(keys))
    generator.before = lambda: None if "disabled" in keys.read_text() else disable(keys, "ann")
    lines = jsonl([line(seed=seed, n=AT_ONCE) for seed in range(AT_ONCE + 3)])
    answer = asked(
        lambda asking: asking.post(URL, content=lines, headers={"Authorization": f"Bearer {key}"}), generator, access
    )
    found = codes(list(map(json.loads, answer.text.splitlines())))
    assert found.count((200, None)) >= 1, "those that were let in before"
    assert found.count((401, "invalid_api_key")) >= 3, "those that began later"
    assert len(found) == AT_ONCE + 3


def test_a_line_waits_where_a_single_request_is_told_to_come_back():
    refusals = iter(
        [
            BackPressureError(num_queued_requests=1, max_queued_requests=1),
            ApiError(503, "away", None, "unavailable", 1),
            None,
        ]
    )
    generator = FakeGenerator()

    def refuse() -> None:
        if error := next(refusals):
            raise error

    generator.before = refuse
    assert codes(sent(jsonl([line(seed=0)]), generator)) == [(200, None)]


def test_a_fault_inside_is_one_lines_answer_without_the_reason():
    faults = iter([RuntimeError("secret"), None])
    generator = FakeGenerator()

    def fail() -> None:
        if error := next(faults):
            raise error

    generator.before = fail
    answers = sent(jsonl([line(seed=seed) for seed in range(2)]), generator)
    assert sorted(code for code, _ in codes(answers)) == [200, 500]
    assert "secret" not in json.dumps(answers)


def test_what_is_not_done_in_time_is_told_and_ends(monkeypatch):
    monkeypatch.setattr(batch_module, "BATCH_S", 0.05)

    async def use() -> None:
        generator = FakeGenerator()
        held = Held(generator, [line(seed=seed) for seed in range(AT_ONCE + 2)])
        await held.answering
        assert [one["error"]["code"] for one in held.received] == ["batch_expired"] * (AT_ONCE + 2)
        assert all(one["response"] is None for one in held.received)
        assert all(response.cancelled for response in generator.responses)

    asyncio.run(use())


def test_serves_limit_of_time_is_the_services_to_set():
    seen: list[dict[bytes, bytes]] = []

    async def proxy(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.append(dict(scope["headers"]))

    orders = [(b"x-request-timeout-seconds", b"-1"), (b"x-request-disconnect-disabled", b"?1"), (b"a", b"b")]
    for path in (SINGLE, URL):
        asyncio.run(PlainHeaders(proxy)({"type": "http", "path": path, "headers": orders}, None, None))
    assert seen == [{b"a": b"b"}, {b"a": b"b", b"x-request-timeout-seconds": b"3660.0"}]
