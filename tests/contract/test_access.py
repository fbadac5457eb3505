"""Writes keys files and audit logs to temporary folders: who is let in, how much each may have, what is kept of it."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from cca_core.config import ConfigError
from deploy.access import Access
from deploy.api import MAX_BODY_BYTES, ApiError
from deploy.audit import AuditLog
from deploy.keys import VARIABLE, Holder, KeyRing, add_key, disable
from deploy.limits import Limits
from tests.driver import cca
from tests.fake_generator import VERSION, FakeGenerator, client
from tests.service import free_port

URL = "/v1/images/generations"


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def at_door(
    file: Path,
    use: Callable[[httpx.AsyncClient], Awaitable[Any]],
    audit: str = "",
    generator: FakeGenerator | None = None,
) -> Any:
    """What ``use`` gives, with a client of an API that has these keys."""

    async def run() -> Any:
        access = Access()
        access.configure(keys=str(file), audit=audit)
        async with client(generator, access) as asking:
            return await use(asking)

    return asyncio.run(run())


def lines(audit: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in audit.read_text().splitlines()]


def test_the_file_has_no_key_and_only_its_owner_reads_it(file):
    key = add_key(file, "ann", replace=False)
    assert key.startswith("cca-")
    assert len(key) > 40
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    assert KeyRing(str(file)).find(key)[0] == "ann"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": "Bearer "}, "missing_api_key"),
        ({"Authorization": "Basic YTpi"}, "missing_api_key"),
        (bearer("cca-wrong"), "invalid_api_key"),
        (bearer("\u00e9\u00e8"), "invalid_api_key"),
    ],
)
def test_without_a_good_key_it_is_401_in_openais_form(file, headers, code):
    add_key(file, "ann", replace=False)
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}

    async def use(asking):
        drawn = await asking.post(URL, json={"prompt": "ant"}, headers=encoded)
        return [
            drawn,
            await asking.get("/v1/models", headers=encoded),
            await asking.get("/v1/models/a", headers=encoded),
        ]

    for answer in at_door(file, use):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"] | {"message": ""} == {
            "message": "",
            "type": "invalid_request_error",
            "param": None,
            "code": code,
        }


def test_health_needs_no_key(file):
    add_key(file, "ann", replace=False)

    async def use(asking):
        return [(await asking.get(path)).status_code for path in ("/healthz", "/readyz")]

    assert at_door(file, use) == [200, 200]


def test_a_key_is_cut_off_and_another_let_in_while_the_service_runs(file):
    ann, bob = add_key(file, "ann", replace=False), add_key(file, "bob", replace=False)

    async def use(asking):
        async def status(key: str) -> int:
            return (await asking.post(URL, json={"prompt": "ant"}, headers=bearer(key))).status_code

        assert [await status(ann), await status(bob)] == [200, 200]
        disable(file, "ann")
        assert [await status(ann), await status(bob)] == [401, 200]
        second = add_key(file, "bob", replace=False)
        assert [await status(bob), await status(second)] == [200, 200], "both keys are good during a rotation"
        third = add_key(file, "bob", replace=True)
        assert [await status(key) for key in (bob, second, third)] == [401, 401, 200]
        again = add_key(file, "ann", replace=False)
        assert [await status(ann), await status(again)] == [401, 200], "a key that was disabled stays so"

    at_door(file, use)


@pytest.mark.parametrize("spoil", [lambda file: file.write_text("{"), lambda file: file.unlink()])
def test_a_spoilt_file_neither_opens_nor_stops_the_service(file, spoil):
    ann = add_key(file, "ann", replace=False)

    async def use(asking):
        async def status(headers: dict[str, str]) -> int:
            return (await asking.post(URL, json={"prompt": "ant"}, headers=headers)).status_code

        spoil(file)
        assert [await status(bearer(ann)), await status({}), await status(bearer("cca-x"))] == [200, 401, 401]
        file.write_text("{}")
        assert await status(bearer(ann)) == 401, "a good file counts again"

    at_door(file, use)


def test_the_environment_may_hold_the_keys(file, monkeypatch):
    ann = add_key(file, "ann", replace=False)
    monkeypatch.setenv(VARIABLE, file.read_text())
    assert KeyRing("").find(ann)[0] == "ann"
    assert not KeyRing("").open
    with pytest.raises(ConfigError, match="given twice"):
        KeyRing(str(file))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read .*: make it with `cca key`"),
        ("{", "invalid json"),
        ('{"ann": {"sha256": ["abc"]}}', r"ann\.sha256\.0: string should match"),
        ('{"ann": {"sha256": [], "request_per_minute": 3}}', "ann.request_per_minute: extra inputs"),
        ('{"a b": {"sha256": []}}', "a b: string should match"),
        (json.dumps({name: {"sha256": ["0" * 64]} for name in ("ann", "bob")}), "one key is ann's and bob's"),
    ],
)
def test_a_bad_keys_file_is_said_at_the_start(file, content, says):
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=says):
        KeyRing(str(file))


def test_over_the_rate_it_is_429_with_the_time_to_wait(file):
    ann, bob = add_key(file, "ann", replace=False, requests_per_minute=2), add_key(file, "bob", replace=False)

    async def use(asking):
        async def ask(key: str) -> httpx.Response:
            return await asking.post(URL, json={"prompt": "ant"}, headers=bearer(key))

        second_key = add_key(file, "ann", replace=False)
        answers = [await ask(key) for key in (ann, second_key, ann, bob)]
        assert [answer.status_code for answer in answers] == [200, 200, 429, 200]
        assert 50 <= int(answers[2].headers["retry-after"]) <= 60
        error = answers[2].json()["error"]
        assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
        assert "2 requests a minute" in error["message"]

    at_door(file, use)


def test_over_the_quota_it_is_429_and_failed_requests_cost_nothing(file):
    ann = add_key(file, "ann", replace=False, images_per_day=5)

    async def use(asking):
        async def ask(n: int, prompt: str = "ant") -> httpx.Response:
            return await asking.post(URL, json={"prompt": prompt, "n": n}, headers=bearer(ann))

        asked = [(4, "ant"), (1, "no such class"), (2, "ant"), (1, "ant"), (1, "ant")]
        answers = [await ask(n, prompt) for n, prompt in asked]
        assert [answer.status_code for answer in answers] == [200, 400, 429, 200, 429]
        error = answers[2].json()["error"]
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
        assert "5 images a day (UTC) and has 1 left, this request asks for 2" in error["message"]
        assert int(answers[2].headers["retry-after"]) <= 86_400

    at_door(file, use)


def test_limits_end_with_the_minute_and_the_day():
    now = [86_400 * 7 - 30.0]
    limits = Limits(clock=lambda: now[0])
    ann = Holder(sha256=[], requests_per_minute=2, images_per_day=3)

    def ask(images: int) -> int | None:
        try:
            with limits.admitted("ann", ann, images):
                return None
        except ApiError as error:
            return error.retry_after_s

    assert ask(1) is None
    now[0] += 10
    assert ask(2) is None
    assert ask(1) == 50, "the first request is a minute old in 50 s"
    now[0] += 19.5
    assert ask(1) == 31
    now[0] += 30.6  # the minute has passed, and so has midnight
    assert [ask(3), ask(1)] == [None, 10]
    now[0] += 10
    assert ask(1) == 86_400 - 40, "the quota comes back at midnight"


def test_the_audit_log_has_a_line_for_every_request_and_never_a_key(file, tmp_path):
    audit, ann = tmp_path / "audit.jsonl", add_key(file, "ann", replace=False, requests_per_minute=4)

    async def use(asking):
        for content, headers in (
            ({"prompt": "1", "n": 2, "seed": 7, "temperature": 0.5}, bearer(ann) | {"X-Request-Id": "mine-1"}),
            ({"prompt": "dog", "top_k": 3}, bearer(ann)),
            ({"prompt": "ant", "sed": 1}, bearer(ann)),
            ({"prompt": "ant"}, bearer("cca-guess")),
        ):
            await asking.post(URL, json=content, headers=headers)

    at_door(file, use, str(audit))
    first, *others = lines(audit)
    assert first.pop("when").endswith("Z")
    assert 0 <= first.pop("seconds") < 60
    assert first == {
        "request_id": "mine-1",
        "key": "ann",
        "class": "bee",
        "n": 2,
        "seed": 7,
        "sampling": {"temperature": 0.5, "top_k": 0, "top_p": 1.0, "cfg_scale": 1.5, "cfg_interval": -1},
        "version": VERSION,
        "outcome": "ok",
    }
    assert [(one["key"], one["class"], one["outcome"]) for one in others] == [
        ("ann", "dog", "unknown_class"),
        ("ann", None, "unknown_parameter"),
        (None, None, "invalid_api_key"),
    ]
    assert len({one["request_id"] for one in (first, *others)}) == 4
    assert ann not in audit.read_text()
    assert "cca-guess" not in audit.read_text()


def test_a_log_that_was_moved_away_is_begun_anew_and_a_full_disk_loses_no_image(file, tmp_path):
    audit, ann = tmp_path / "log" / "audit.jsonl", add_key(file, "ann", replace=False)
    audit.parent.mkdir()

    async def use(asking):
        async def ask() -> int:
            return (await asking.post(URL, json={"prompt": "ant"}, headers=bearer(ann))).status_code

        assert await ask() == 200
        audit.rename(tmp_path / "old.jsonl")
        assert await ask() == 200
        assert len(lines(audit)) == len(lines(tmp_path / "old.jsonl")) == 1
        audit.unlink()
        audit.parent.rmdir()
        assert await ask() == 200, "nowhere to write"

    at_door(file, use, str(audit))


def test_an_audit_log_that_cannot_be_written_is_said_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be written \(No such file or directory\): name a file"):
        AuditLog(str(tmp_path / "nowhere" / "audit.jsonl"))


def test_a_service_without_its_files_does_not_start(tmp_path):
    for option, says in (("--keys", "the keys file .*nope cannot be read"), ("--audit", "the audit log .*nope cannot")):
        result = cca(tmp_path, "serve", "--port", str(free_port()), option, "nowhere/nope")
        assert result.returncode == 2
        assert re.match(f"error: {says}", result.stderr), result.stderr


def test_no_more_of_a_body_is_read_than_a_request_may_have(file):
    read = []

    async def endless():
        while True:
            read.append(1024)
            yield b"x" * 1024

    async def use(asking):
        return await asking.post(URL, content=endless(), headers=bearer(add_key(file, "ann", replace=False)))

    file.write_text("{}")
    answer = at_door(file, use)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert sum(read) <= MAX_BODY_BYTES + 2048


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_inside_shows_nothing_of_the_inside(file, tmp_path, stream):
    audit, ann = tmp_path / "audit.jsonl", add_key(file, "ann", replace=False)

    async def use(asking):
        good = iter([None] * stream)  # a stream begins before it fails

        def fail() -> None:
            if next(good, "bad"):
                raise RuntimeError("secret of the inside")

        generator.before = fail
        return await asking.post(URL, json={"prompt": "ant", "n": 2, "stream": stream}, headers=bearer(ann))

    generator = FakeGenerator()
    answer = at_door(file, use, str(audit), generator)
    assert answer.status_code == (200 if stream else 500)
    error = json.loads(answer.text.split("data: ")[-1])["error"] if stream else answer.json()["error"]
    assert error["type"] == "server_error"
    for word in ("secret", "Traceback", "RuntimeError", "deploy"):
        assert word not in answer.text
    assert lines(audit)[0]["outcome"] == "internal_error"


def test_cca_key_prints_a_key_once_and_says_how_to_use_it(tmp_path):
    made = cca(tmp_path, "key", "ann", "--requests-per-minute", "60", "--images-per-day", "1000")
    assert made.returncode == 0, made.stderr
    key, said = made.stdout.splitlines()
    assert "cca serve --keys keys.json" in said
    name, holder = KeyRing(str(tmp_path / "keys.json")).find(key)
    assert (name, holder.requests_per_minute, holder.images_per_day) == ("ann", 60, 1000)
    assert cca(tmp_path, "key", "ann", "--disable").returncode == 0
    assert KeyRing(str(tmp_path / "keys.json")).find(key) is None
    wrong = cca(tmp_path, "key", "a b")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: a b: string should match")
    assert cca(tmp_path, "key", "bob", "--disable").stderr.startswith("error: keys.json has no bob: it has ann")
    assert sorted(os.listdir(tmp_path)) == ["keys.json"]
