"""Reads nothing: what requests may ask for beyond one PNG, with a fake generator behind the real HTTP API."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Awaitable, Callable
from typing import Any
from xml.etree import ElementTree

import httpx
import httpx2
import numpy as np
import openai
import pytest
from PIL import Image
from ray.serve._private.http_util import validate_http_proxy_callback_return
from ray.serve._private.utils import call_function_from_import_path

from deploy.access import Access
from deploy.api import ApiError
from deploy.pictures import picture
from deploy.proxy import CALLBACK
from deploy.routes import http_api
from tests.fake_generator import VERSION, FakeGenerator, client, fleet

URL = "/v1/images/generations"


def with_client(use: Callable[[httpx.AsyncClient], Awaitable[Any]], generator: FakeGenerator | None = None) -> Any:
    async def run() -> Any:
        async with client(generator) as asking:
            return await use(asking)

    return asyncio.run(run())


def post(**fields: Any) -> httpx.Response:
    return with_client(lambda asking: asking.post(URL, json={"prompt": "ant", **fields}))


def opened(answer: httpx.Response, index: int = 0) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][index]["b64_json"])))


def origin(image: Image.Image) -> dict[str, str]:
    """The attributes of the image's XMP, without their namespaces."""
    xmp = image.info["xmp"] if "xmp" in image.info else image.info["XML:com.adobe.xmp"]
    (description,) = ElementTree.fromstring(xmp)[0]
    return {name.split("}")[1]: value for name, value in description.attrib.items()}


def events(answer: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.mark.parametrize(("output_format", "kind"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_every_format_has_the_image_and_its_origin(output_format, kind):
    answer = post(output_format=output_format, seed=77, n=2, size="16x16", temperature=0.5)
    assert (answer.json()["output_format"], answer.json()["size"]) == (output_format, "16x16")
    image = opened(answer, 1)
    assert (image.format, image.size) == (kind, (16, 16))
    assert np.abs(np.asarray(image).astype(int) - 78).max() <= 1
    xmp = origin(image)
    assert xmp["DigitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert (xmp["model"], xmp["class"], xmp["seed"]) == (VERSION, "ant", "78")
    assert json.loads(xmp["sampling"])["temperature"] == 0.5
    if kind == "PNG":
        assert (image.text["Source"], image.text["Software"], image.text["cca.seed"]) == ("AI-generated", VERSION, "78")
    else:
        assert dict(image.getexif()) == {0x010E: "AI-generated", 0x0131: VERSION}


def test_webp_keeps_every_pixel_unless_told_otherwise_and_the_same_seed_gives_the_same_bytes():
    first, again = (post(output_format="webp", seed=3) for _ in range(2))
    assert np.all(np.asarray(opened(first)) == 3)
    assert first.json()["data"] == again.json()["data"]


@pytest.mark.parametrize("output_format", ["webp", "jpeg"])
def test_less_quality_takes_less_space(output_format):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    about = {"enlarge": 1, "model": "m", "name": 'a "b" <c>\x00', "seed": 1, "sampling": {}}
    low, high, default = (
        picture(noise, file_format=output_format, compression=quality, **about) for quality in (5, 90, None)
    )
    assert len(low) < len(high) < len(default)
    assert origin(Image.open(io.BytesIO(low)))["class"] == 'a "b" <c>?'


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"sed": 1}, "sed", "sed: unknown; did you mean seed?"),
        ({"Temperature": 1}, "Temperature", "Temperature: unknown; did you mean temperature?"),
        ({"qqq": 1}, "qqq", "qqq: unknown; a request has prompt, model, n, size"),
        ({"output_format": "gif"}, "output_format", "output_format: Input should be 'png', 'webp' or 'jpeg'"),
        ({"output_compression": 50}, "output_compression", "take output_format webp or jpeg"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "less than or equal to 100"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"partial_images": 2}, "partial_images", "nothing to choose"),
        ({"timeout_s": 0}, "timeout_s", "greater than 0"),
        ({"timeout_s": 1000}, "timeout_s", "less than or equal to 100"),
    ],
)
def test_what_cannot_be_asked_is_said_with_the_remedy(fields, param, says):
    answer = post(**fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert says in answer.json()["error"]["message"]


def test_the_answer_says_what_an_image_cost():
    assert [post(cfg_scale=scale).json()["calls_per_image"] for scale in (1, 2)] == [16, 32]


def test_a_stream_sends_each_image_as_soon_as_it_is_finished():
    whole = post(n=3, seed=10, size="16x16")
    sent = events(post(n=3, seed=10, size="16x16", stream=True))
    assert [name for name, _ in sent] == ["image_generation.completed"] * 3
    assert [data["index"] for _, data in sent] == [2, 1, 0], "in the order in which they were finished"
    images = whole.json()["data"]
    for name, data in sent:
        assert (data["b64_json"], data["seed"]) == (images[data["index"]]["b64_json"], 10 + data["index"])
        assert (data["type"], data["model"], data["size"], data["output_format"]) == (name, VERSION, "16x16", "png")


def test_the_first_image_does_not_wait_for_the_second():
    async def use() -> None:
        generator = FakeGenerator()
        generator.before = generator.gate.clear  # the first image goes through, the second waits
        first = asyncio.Event()
        sent: list[bytes] = []

        async def send(message: dict[str, Any]) -> None:
            if message.get("body"):
                sent.append(message["body"])
                first.set()

        app = http_api(fleet(generator), Access(), list)
        answering = asyncio.create_task(app(scope(), receiver({"prompt": "ant", "n": 2, "stream": True}), send))
        await first.wait()
        assert len(sent) == 1
        assert not answering.done()
        answering.cancel()  # what Serve does when the client goes away
        await asyncio.gather(answering, return_exceptions=True)
        assert generator.responses[-1].cancelled, "nothing is drawn for nobody"

    asyncio.run(use())


def scope() -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": URL,
        "raw_path": URL.encode(),
        "query_string": b"",
        "headers": headers,
    }


def receiver(fields: dict[str, Any]) -> Callable[[], Awaitable[dict[str, Any]]]:
    messages = [{"type": "http.request", "body": json.dumps(fields).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.Event().wait()
        raise AssertionError

    return receive


def test_a_request_that_is_wrong_is_an_error_and_no_stream():
    answer = post(prompt="dog", stream=True)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_class")


def test_openais_client_reads_the_stream_and_its_errors():
    async def use() -> None:
        generator = FakeGenerator()
        # openai's client brings its own HTTP library.
        inside = httpx2.AsyncClient(transport=httpx2.ASGITransport(http_api(fleet(generator), Access(), list)))
        async with openai.AsyncOpenAI(base_url="http://fake/v1", api_key="none", http_client=inside) as asking:
            stream = await asking.images.generate(prompt="ant", n=2, stream=True, extra_body={"seed": 5})
            found = [event async for event in stream]
            assert [(event.type, event.seed) for event in found] == [
                ("image_generation.completed", 6),
                ("image_generation.completed", 5),
            ]
            blocked = iter([None, ApiError(400, "the filter blocks it", None, "content_policy_violation")])

            def second_fails() -> None:
                if error := next(blocked):
                    raise error

            generator.before = second_fails
            stream = await asking.images.generate(prompt="ant", n=2, stream=True)
            assert (await anext(stream)).b64_json
            with pytest.raises(openai.APIError, match="the filter blocks it"):
                await anext(stream)

    asyncio.run(use())


def test_headers_are_plain_before_ray_reads_them():
    """As Serve's proxy does it: the callback is found by its name, and wraps the proxy."""
    (middleware,) = validate_http_proxy_callback_return(call_function_from_import_path(CALLBACK))
    seen: dict[str, Any] = {}

    async def proxy(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.update(scope)

    sent = {**scope(), "headers": [(b"x-request-id", b"\xc3\xff" * 400), (b"a", b"\xe9"), (b"b", b"plain")]}
    asyncio.run(middleware.cls(proxy)(sent, None, None))
    names = dict(seen["headers"])
    assert names[b"x-request-id"] == b"\\xc3\\xff" * 16
    assert (names[b"a"], names[b"b"], seen["path"]) == (b"\\xe9", b"plain", URL)


@pytest.mark.parametrize("stream", [False, True])
def test_a_deadline_ends_the_request_and_the_drawing(stream):
    generator = FakeGenerator()

    async def use(asking: httpx.AsyncClient) -> httpx.Response:
        generator.gate.clear()  # nothing is ever drawn
        return await asking.post(URL, json={"prompt": "ant", "timeout_s": 0.05, "stream": stream})

    answer = with_client(use, generator)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (408, "deadline_exceeded", "timeout_s")
    assert "0.05 s" in error["message"]
    assert [response.cancelled for response in generator.responses] == [True]


def test_a_client_that_goes_away_ends_the_drawing():
    async def use() -> None:
        generator = FakeGenerator()
        generator.gate.clear()
        async with client(generator) as asking:
            answering = asyncio.create_task(asking.post(URL, json={"prompt": "ant"}))
            while not generator.responses:
                await asyncio.sleep(0)
            answering.cancel()  # what Serve does when the client goes away
            await asyncio.gather(answering, return_exceptions=True)
        assert [response.cancelled for response in generator.responses] == [True]

    asyncio.run(use())
