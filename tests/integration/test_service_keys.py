"""Writes keys and an audit log to temporary folders: `cca serve` with both, on real Ray, asked by the openai client."""

from __future__ import annotations

import json
import os
import re
import signal
import uuid
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deploy.keys import add_key, disable
from tests.contract.test_metrics import expressions
from tests.driver import until
from tests.service import ANSWER_S, NAME, Service


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("door")


@pytest.fixture(scope="module")
def ann(door: Path) -> str:
    return add_key(door / "keys.json", "ann", replace=False)


@pytest.fixture(scope="module")
def service(start_service, door: Path, ann: str) -> Service:
    return start_service("--keys", str(door / "keys.json"), "--audit", str(door / "audit.jsonl"))


def client(service: Service, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.address}/v1", api_key=key, max_retries=0, timeout=ANSWER_S)


def audited(door: Path, request_id: str) -> dict[str, Any] | None:
    lines = map(json.loads, (door / "audit.jsonl").read_text().splitlines())
    return next((line for line in lines if line["request_id"] == request_id), None)


def logged(request_id: str) -> list[str]:
    """Lines of the service's log about a request; it is written a little after the answer."""
    logs = Path("/tmp/ray").glob("session_*/logs/serve/replica_cca_Ingress_*")
    return [line for log in logs for line in log.read_text().splitlines() if request_id in line]


def test_the_start_says_that_keys_are_asked(service, door):
    assert f"keys: {door / 'keys.json'}" in service.driver.output
    service.driver.wait_line(".*curl.* -H 'authorization: Bearer KEY'")


def test_keys_let_in_and_are_cut_off_while_the_service_runs(service, door, ann):
    assert client(service, ann).images.generate(prompt="ant").data
    with pytest.raises(openai.AuthenticationError) as raised:
        client(service, "cca-guess").images.generate(prompt="ant")
    assert raised.value.code == "invalid_api_key"
    bob = add_key(door / "keys.json", "bob", replace=False)
    assert client(service, bob).models.list().data[0].id == f"{NAME}/1"
    disable(door / "keys.json", "bob")
    with pytest.raises(openai.AuthenticationError):
        client(service, bob).images.generate(prompt="ant")


def test_over_the_limit_the_client_is_told_to_wait(service, door):
    key = add_key(door / "keys.json", "carl", replace=False, requests_per_minute=1)
    client(service, key).images.generate(prompt="ant")
    with pytest.raises(openai.RateLimitError) as raised:
        client(service, key).images.generate(prompt="ant")
    assert raised.value.code == "rate_limit_exceeded"
    assert 1 <= int(raised.value.response.headers["retry-after"]) <= 60


def test_a_request_is_found_again_by_its_id(service, door, ann):
    name = f"mine-{uuid.uuid4()}"
    asked = client(service, ann).images.with_raw_response.generate(
        prompt="bee", n=2, extra_body={"seed": 3}, extra_headers={"X-Request-Id": name}
    )
    assert asked.headers["x-request-id"] == name
    line = audited(door, name)
    assert (line["key"], line["class"], line["n"], line["seed"]) == ("ann", "bee", 2, 3)
    assert (line["version"], line["outcome"]) == (f"{NAME}/1", "ok")
    made = client(service, ann).images.with_raw_response.generate(prompt="bee").headers["x-request-id"]
    assert audited(door, made)["outcome"] == "ok", "without an id of the caller's, one is made and told"
    assert {json.loads(line)["request_id"] for line in until(lambda: logged(name))} == {name}
    assert ann not in (door / "audit.jsonl").read_text()


def test_a_stream_has_the_images_of_the_whole_answer(service, ann):
    asked = {"prompt": "bee", "n": 4, "output_format": "webp"}
    whole = client(service, ann).images.generate(**asked, extra_body={"seed": 11}).data
    sent = list(client(service, ann).images.generate(**asked, stream=True, extra_body={"seed": 11}))
    assert {event.type for event in sent} == {"image_generation.completed"}
    assert {event.seed: event.b64_json for event in sent} == {image.seed: image.b64_json for image in whole}
    assert len(sent) == 4
    with pytest.raises(openai.BadRequestError, match="unknown class"):
        client(service, ann).images.generate(prompt="dog", stream=True)


def test_a_batch_has_an_answer_for_every_line(service, door, ann):
    """More lines than are drawn at once, in the form of OpenAI's batches."""
    bodies = [{"prompt": "bee", "seed": seed, "n": 1 + seed % 2} for seed in range(30)]
    lines = [{"custom_id": f"b-{i}", "method": "POST", "url": "/v1/images/generations"} for i in range(30)]
    batch = "\n".join(json.dumps({**line, "body": body}) for line, body in zip(lines, bodies, strict=True)) + "\n{"
    name = f"batch-{uuid.uuid4()}"
    headers = {"Authorization": f"Bearer {ann}", "X-Request-Id": name}
    answer = httpx.post(f"{service.address}/v1/images/batches", content=batch, headers=headers, timeout=ANSWER_S)
    assert answer.status_code == 200, answer.text
    answers = {one["line"]: one for one in map(json.loads, answer.text.splitlines())}
    assert answers.pop(31)["response"]["body"]["error"]["code"] == "invalid_json"
    assert [answers[line]["custom_id"] for line in sorted(answers)] == [f"b-{i}" for i in range(30)]
    for i in (0, 7, 29):
        body = answers[i + 1]["response"]["body"]
        alone = client(service, ann).images.generate(
            prompt="bee", n=bodies[i]["n"], extra_body={"seed": bodies[i]["seed"]}
        )
        assert [image["b64_json"] for image in body["data"]] == [image.b64_json for image in alone.data]
    assert audited(door, f"{name}:8")["outcome"] == "ok"


def test_a_batch_whose_client_goes_away_ends(service, door, ann):
    (pid,) = service.generators()
    name = f"gone-{uuid.uuid4()}"
    headers = {"Authorization": f"Bearer {ann}", "X-Request-Id": name}
    batch = '{"body": {"prompt": "ant"}}\n' * 20
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.address}/v1/images/batches", content=batch, headers=headers, timeout=1)
        until(lambda: all(audited(door, f"{name}:{line}") for line in range(1, 9)))
    finally:
        os.kill(pid, signal.SIGCONT)
    client(service, ann).images.generate(prompt="ant")
    found = [audited(door, f"{name}:{line}") for line in range(1, 21)]
    assert [one and one["outcome"] for one in found] == ["cancelled"] * 8 + [None] * 12


def test_metrics_have_every_series_of_the_dashboard_and_the_rules(service, ann):
    for stream in (False, True):
        client(service, ann).images.generate(prompt="ant", n=2, stream=stream)
    wanted = {name for expression in expressions().values() for name in re.findall(r"\bray_\w+", expression)}
    wanted.remove("ray_cca_filtered_images_total")  # this version has no content filter

    def shown() -> set[str]:
        text = httpx.get(f"{service.address}/metrics", timeout=ANSWER_S).text
        return set(re.findall(r"^(\w+)\{", text, re.M))

    until(lambda: wanted <= shown())


def test_a_deadline_is_kept_while_nothing_is_drawn(service, ann):
    (pid,) = service.generators()
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(openai.APIStatusError) as raised:
            client(service, ann).images.generate(prompt="ant", extra_body={"timeout_s": 0.5})
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (raised.value.status_code, raised.value.code) == (408, "deadline_exceeded")


def test_a_request_whose_client_goes_away_is_cancelled(service, door, ann):
    (pid,) = service.generators()
    name = f"left-{uuid.uuid4()}"
    headers = {"Authorization": f"Bearer {ann}", "X-Request-Id": name}
    os.kill(pid, signal.SIGSTOP)  # so that nothing is answered meanwhile
    try:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.address}/v1/images/generations", json={"prompt": "ant"}, headers=headers, timeout=1)
        assert until(lambda: audited(door, name))["outcome"] == "cancelled"
    finally:
        os.kill(pid, signal.SIGCONT)
