"""Writes to temporary folders: `cca serve` on a real registry and Ray, asked by the openai client."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from deploy import local
from deploy.release import APPLICATION, details, set_model
from tests.driver import cca, until
from tests.service import (
    ANSWER_S,
    BRIGHT,
    CLASSES,
    NAME,
    brightness,
    end,
    free_port,
    pixels,
    start,
)


def test_four_images_of_one_class(service):
    images = service.draw("ant", n=4, size="8x8", seed=1)
    opened = [Image.open(io.BytesIO(image)) for image in images]
    assert [(image.format, image.mode, image.size) for image in opened] == [("PNG", "RGB", (8, 8))] * 4
    assert len({pixels(image).tobytes() for image in images}) == 4


def test_size_enlarges_without_smoothing(service):
    (own,), (large,) = service.draw("ant", seed=1), service.draw("ant", seed=1, size="64x64")
    assert pixels(large).shape == (64, 64, 3)
    assert np.array_equal(pixels(large), pixels(own).repeat(8, 0).repeat(8, 1))


def test_images_carry_their_origin(service):
    (png,) = service.draw("bee", seed=41, temperature=0.5)
    text = Image.open(io.BytesIO(png)).text
    assert text["Source"] == "AI-generated"
    assert "digitalsourcetype/trainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]
    assert (text["Software"], text["Title"], text["cca.seed"]) == (f"{NAME}/1", "bee", "41")
    assert '"temperature": 0.5' in text["cca.sampling"]
    assert '"cfg_scale": 1.5' in text["cca.sampling"]


def test_same_seed_same_bytes_alone_and_in_a_crowd(service):
    samplings = [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9, "cfg_scale": 1.0}]
    asked = [{"prompt": CLASSES[i % 3], "seed": i, **samplings[i % 4]} for i in range(12)]
    asked += [asked[3]] * 4
    alone = [service.draw(**one) for one in asked]
    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(lambda one: service.draw(**one), asked))
    assert crowd == alone
    assert len({pixels(image).tobytes() for (image,) in alone}) == 12


def test_n_images_are_the_single_ones_of_the_following_seeds(service):
    singles = [service.draw("3", seed=seed)[0] for seed in range(20, 24)]
    assert service.draw("3", n=4, seed=20) == singles


def test_a_class_has_a_name_and_an_index(service):
    assert service.draw("1", seed=5) == service.draw("bee", seed=5)
    assert service.draw("2", seed=5) == service.draw("3", seed=5), "a name wins over an index"
    assert service.draw("1", seed=5) != service.draw("0", seed=5)


def test_without_a_seed_one_is_drawn_and_told(service):
    answers = [service.client.images.generate(prompt="ant").data[0] for _ in range(2)]
    assert answers[0].seed != answers[1].seed
    for answer in answers:
        assert service.draw("ant", seed=answer.seed) == [base64.b64decode(answer.b64_json)]


def test_sampling_reaches_the_model(service):
    def seen(seed: int = 1, **sampling: Any) -> bytes:
        return pixels(service.draw("ant", seed=seed, **sampling)[0]).tobytes()

    greedy = seen(temperature=0)
    assert greedy == seen(2, temperature=0) == seen(top_k=1) == seen(top_p=0)
    assert greedy != seen()
    assert greedy != seen(temperature=0, cfg_scale=5)
    assert seen() == seen(cfg_scale=1.5)
    assert seen() != seen(cfg_scale=1)


def test_models_names_the_pinned_version(service):
    (model,) = service.client.models.list().data
    assert (model.id, model.object, model.class_names) == (f"{NAME}/1", "model", list(CLASSES))
    assert model.calls_per_image == 32, "guided by default: two calls per token"
    for name in (NAME, f"{NAME}/1"):
        assert service.client.models.retrieve(name).id == f"{NAME}/1"
        assert service.client.images.generate(prompt="ant", model=name).data
    with pytest.raises(openai.NotFoundError):
        service.client.models.retrieve("another")
    deployed = details(service.dashboard)["applications"][APPLICATION]["deployed_app_config"]["deployments"]
    (model,) = (one["user_config"]["model"] for one in deployed if one["name"] == "Generator")
    assert model == f"models:/{NAME}/1", "every replica, whenever it starts, reads this"


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        ({"prompt": "dog"}, "prompt", "unknown_class"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "3" * 900}, "prompt", "unknown_class"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 17}, "n", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"seed": 1.5}, "seed", "invalid_value"),
        ({"seed": "7"}, "seed", "invalid_value"),
        ({"seed": True}, "seed", "invalid_value"),
        ({"seed": 2**31}, "seed", "invalid_value"),
        ({"seed": 2**31 - 3, "n": 4}, "seed", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"top_p": 1.1}, "top_p", "invalid_value"),
        ({"cfg_scale": 0}, "cfg_scale", "invalid_value"),
        ({"sed": 1}, "sed", "unknown_parameter"),
        ({"size": "9x9"}, "size", "invalid_value"),
        ({"size": "8x16"}, "size", "invalid_value"),
        ({"size": "9" * 5000 + "x" + "9" * 5000}, "size", "invalid_value"),
        ({"response_format": "url"}, "response_format", "invalid_value"),
        ({"quality": "hd"}, "quality", "unsupported_value"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_request_is_told_by_its_field(service, asked, param, code):
    with pytest.raises(openai.BadRequestError) as raised:
        service.client.images.generate(**{"prompt": "ant", "extra_body": asked})
    assert raised.value.body.keys() == {"message", "type", "param", "code"}
    assert (raised.value.body["type"], raised.value.param, raised.value.code) == ("invalid_request_error", param, code)
    assert "Traceback" not in raised.value.response.text


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("POST", "/v1/images/generations", b"{", 400, "invalid_json"),
        ("POST", "/v1/images/generations", b"", 400, "invalid_json"),
        ("POST", "/v1/images/generations", b"\xff\xfe", 400, "invalid_json"),
        ("POST", "/v1/images/generations", b"[" * 30_000, 400, "invalid_json"),
        ("POST", "/v1/images/generations", b'{"prompt": "ant", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        ("POST", "/v1/images/generations", b"[]", 400, "invalid_json"),
        ("POST", "/v1/images/generations", b'"ant"', 400, "invalid_json"),
        ("POST", "/v1/images/generations", b"null", 400, "invalid_json"),
        ("POST", "/v1/images/generations", b"{}", 400, "invalid_value"),
        ("POST", "/v1/images/generations", b'{"prompt": "ant", "temperature": NaN}', 400, "invalid_value"),
        ("POST", "/v1/images/generations", b'{"prompt": "ant", "\\ud800": 1}', 400, "invalid_value"),
        ("POST", "/v1/images/generations", b'{"prompt": "\\ud800"}', 400, "invalid_value"),
        ("POST", "/v1/images/generations", b" " * 65_537, 413, "too_large"),
        ("POST", "/v1/images/generations", b'{"prompt": "ant", "model": "gpt-image-1"}', 404, "model_not_found"),
        ("GET", "/v1/images/generations", b"", 405, "unknown_url"),
        ("POST", "/v1/images/edits", b"{}", 404, "unknown_url"),
        ("DELETE", "/v1/models", b"", 405, "unknown_url"),
        ("GET", "/nowhere", b"", 404, "unknown_url"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_whatever_is_sent_the_answer_has_openais_error_body(service, method, path, content, status, code):
    answer = httpx.request(method, service.address + path, content=content, timeout=ANSWER_S)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error"}
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert (answer.json()["error"]["type"], answer.json()["error"]["code"]) == ("invalid_request_error", code)
    assert "Traceback" not in answer.text
    if status == 405:
        assert answer.headers["allow"]


def test_null_is_what_the_client_left_open(service):
    body = {"prompt": "ant", "seed": 3, "n": None, "size": None, "temperature": None, "user": "me", "quality": "auto"}
    answer = httpx.post(f"{service.address}/v1/images/generations", json=body, timeout=ANSWER_S)
    assert answer.status_code == 200, answer.text
    assert [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]] == service.draw("ant", seed=3)


def test_a_generator_that_does_not_answer_is_503_and_then_draws_its_bounded_queue_in_batches(service):
    (pid,) = service.generators()
    asked = {"prompt": "ant", "seed": 1}
    expected = service.draw(**asked)
    os.kill(pid, signal.SIGSTOP)
    try:
        ready = httpx.get(f"{service.address}/readyz", timeout=ANSWER_S)
        assert httpx.get(f"{service.address}/healthz", timeout=ANSWER_S).json() == {"status": "ok"}
        limits = httpx.Limits(max_connections=250)
        with httpx.Client(timeout=ANSWER_S, limits=limits) as client, ThreadPoolExecutor(250) as pool:
            url = f"{service.address}/v1/images/generations"
            answers = [pool.submit(client.post, url, json=asked) for _ in range(250)]
            wait(answers, ANSWER_S, FIRST_COMPLETED)  # the first that finds the queue full
            os.kill(pid, signal.SIGCONT)
            got = [answer.result() for answer in answers]
    finally:
        os.kill(pid, signal.SIGCONT)
    refused = [answer for answer in got if answer.status_code != 200]
    for answer in (ready, *refused):
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["error"]["type"] == "server_error"
    assert ready.json()["error"]["code"] == "unavailable"
    assert {answer.json()["error"]["code"] for answer in refused} == {"busy"}
    accepted = [answer.json()["data"][0]["b64_json"] for answer in got if answer not in refused]
    assert {base64.b64decode(image) for image in accepted} == set(expected)
    assert httpx.get(f"{service.address}/readyz", timeout=ANSWER_S).json() == {"status": "ready", "model": f"{NAME}/1"}


def test_a_killed_generator_loses_no_request_and_comes_back_with_its_version(service, registry):
    asked = [{"prompt": "bee", "seed": i, "temperature": 0.5 + i / 64} for i in range(48)]
    expected = [service.draw(**one) for one in asked]
    registry.set_alias("champion", "2")
    try:
        assert service.served() == f"{NAME}/1", "an alias is followed once, at the rollout"
        (pid,) = service.generators()
        with ThreadPoolExecutor(48) as pool:
            answers = [pool.submit(service.draw, **one) for one in asked]
            wait(answers, ANSWER_S, FIRST_COMPLETED)
            os.kill(pid, signal.SIGKILL)
            assert not all(answer.done() for answer in answers), "nothing was in flight: nothing was tested"
            assert [answer.result() for answer in answers] == expected
        assert service.served() == f"{NAME}/1", "a new replica has the pinned version, not the new champion"
        assert until(service.generators) != [pid]
    finally:
        registry.set_alias("champion", "1")


def test_images_that_the_content_filter_blocks_are_not_returned(service):
    assert service.client.models.retrieve(NAME).content_filter is None
    images = [service.draw("ant", seed=seed)[0] for seed in range(8)]
    blocked = [brightness(pixels(image)) >= BRIGHT for image in images]
    assert 0 < sum(blocked) < 8, "choose another BRIGHT"
    set_model(service.dashboard, f"models:/{NAME}/4")
    try:
        assert service.client.models.retrieve(NAME).content_filter["threshold"] == BRIGHT
        for seed in np.flatnonzero(np.logical_not(blocked)).tolist():
            assert pixels(service.draw("ant", seed=seed)[0]).tobytes() == pixels(images[seed]).tobytes()
        for seed in np.flatnonzero(blocked).tolist():
            with pytest.raises(openai.BadRequestError) as raised:
                service.draw("ant", seed=seed)
            assert raised.value.code == "content_policy_violation"
        with pytest.raises(openai.BadRequestError, match=f"blocks {sum(blocked)} of the 8 images, so none is returned"):
            service.draw("ant", n=8, seed=0)
        assert until(lambda: service.counted("cca_filtered_images_total") == [2 * sum(blocked)])
    finally:
        set_model(service.dashboard, f"models:/{NAME}/1")


@pytest.fixture(scope="module")
def mistakes(service, folder, tmp_path_factory):
    """What `cca serve` says to each mistake, as (its one line on stderr, folder); all are made at once."""
    empty, port = tmp_path_factory.mktemp("empty"), service.address.rsplit(":", 1)[1]
    silent = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}"}
    asked = {
        "no store": (empty, "models:/cca-digits@champion", str(free_port()), {}),
        "no champion": (folder, f"models:/{NAME}@best", str(free_port()), {}),
        "silent server": (empty, f"models:/{NAME}@champion", str(free_port()), silent),
        "taken port": (folder, f"models:/{NAME}@champion", port, {}),
    }

    def make(mistake: str) -> str:
        place, model, port, env = asked[mistake]
        result = cca(place, "serve", "--model", model, "--port", port, env=env)
        assert result.returncode == 2, result.stdout + result.stderr
        assert "dashboard" not in result.stdout, "Ray was started before the mistake was seen"
        (line,) = result.stderr.strip().splitlines()
        return line

    with ThreadPoolExecutor(len(asked)) as pool:
        said = dict(zip(asked, pool.map(make, asked), strict=True))
    assert not list(empty.rglob("*.db")), "a store was made"
    return said


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("no store", r"no model is registered here, .*mlflow\.db does not exist: make one with `cca run`"),
        ("no champion", rf"{NAME} has no best: choose one with `cca promote VERSION`.*versions 1, 2, 3, 4\)"),
        ("silent server", r"the MLflow registry http://\S+ does not answer \(connection refused\): start it"),
        ("taken port", r"nothing can listen on 127\.0\.0\.1:\d+ \(address already in use\): choose with"),
    ],
)
def test_a_bad_start_is_one_sentence_with_the_remedy(mistakes, mistake, says):
    assert re.match(f"error: {says}", mistakes[mistake]), mistakes[mistake]


def test_ctrl_c_ends_it_with_nothing_left(service):
    service.draw("ant")
    end(service.driver, signal.SIGINT)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.address}/healthz")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_falls_into_a_destructor_still_ends_it():
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)  # Python drops what this raises

    before = {number: signal.getsignal(number) for number in local.SIGNALS}
    local.on_signals(local.interrupt)
    try:
        Interrupted()
        with pytest.raises(KeyboardInterrupt):
            threading.Event().wait(ANSWER_S)
    finally:
        signal.alarm(0)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_sigterm_while_it_starts_ends_it_with_nothing_left(folder, registry):
    driver, _ = start(folder, "--model", f"models:/{NAME}/1")
    driver.wait_line("starting ")
    end(driver, signal.SIGTERM)
    assert "ready: " not in driver.output
