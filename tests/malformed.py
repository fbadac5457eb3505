"""Reads and writes nothing: requests as broken clients and scanners send them, each a function of its number."""

from __future__ import annotations

import json
import random
from typing import Any

#: A word that is no method of HTTP.
NO_METHOD = "BREW"
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", NO_METHOD)
PATHS = (
    "/v1/images/generations",
    "/v1/images/generations/",
    "/v1/images/edits",
    "/v1/models",
    "/v1/models/",
    "/v1/models/../../etc/passwd",
    "/v1/models/%00",
    "/v1/models/" + "a" * 3000,
    "/v1/models/%ED%A0%80",
    "/%2e%2e/%2e%2e/etc/passwd",
    "//v1/models",
    "/metrics?" + "x=" * 500,
    "/healthz",
    "/readyz",
    "/openapi.json",
    "/",
)
#: Values that no field expects, or that some take and others do not.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 16, 17, 2**31 - 1, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.5, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "ant", "bee", "3", "1", "auto", "8x8", "16x16", "0x0", "8x9", "png",
    "webp", "jpeg", "gif", "b64_json", "url", "\x00", "\ud800", "\u202e", "\u0661", "x" * 2000, "ant\n", "{}", "null",
    "'; DROP TABLE keys; --", "<script>alert(1)</script>", "../../etc/passwd", "${jndi:ldap://a}", "%s%n", [], [[]], {},
    ["ant"], {"ant": 1}, {"a": {"b": [1, 2, {"c": None}]}}, [0] * 500,
)  # fmt: skip
FIELDS = (
    "prompt", "model", "n", "size", "response_format", "output_format", "output_compression", "user", "seed", "stream",
    "temperature", "top_k", "top_p", "cfg_scale", "timeout_s", "quality", "style", "background", "moderation",
    "partial_images", "sed", "", "__class__", "\x00", "\ud800", "prompt ", "PROMPT", "x" * 300,
)  # fmt: skip
HEADERS: tuple[dict[str, str | bytes], ...] = (
    {},
    {"content-type": "text/plain"},
    {"content-type": "application/x-www-form-urlencoded"},
    {"content-type": "application/json; charset=utf-16"},
    {"authorization": "Bearer"},
    {"authorization": b"Bearer \xff\xfe\x80"},
    {"authorization": "Bearer " + "k" * 4000},
    {"x-request-id": "i" * 4000},
    {"x-request-id": b"\xc3\xa9\xff"},
    {"accept": "image/png", "accept-encoding": "nonsense"},
    {"content-encoding": "gzip"},
    {"host": "elsewhere"},
    {"cookie": "a=" + "b" * 3000},
)


def request(number: int) -> tuple[str, str, dict[str, str | bytes], bytes]:
    """(method, path, headers, body) of the request with that number."""
    draw = random.Random(number)
    headers = draw.choice(HEADERS)
    if draw.random() < 0.2:
        return draw.choice(METHODS), draw.choice(PATHS), headers, draw.choice((b"", b"{}", b"\xff" * 10))
    return "POST", PATHS[0], {"content-type": "application/json", **headers}, _body(draw)


def _body(draw: random.Random) -> bytes:
    asked = {"prompt": "ant", "seed": draw.randrange(1000)}
    kind = draw.random()
    if kind < 0.6:  # some fields are wrong
        for _ in range(draw.randint(1, 4)):
            asked[draw.choice(FIELDS)] = draw.choice(VALUES)
        return json.dumps(asked).encode()
    if kind < 0.7:  # no object
        return json.dumps(draw.choice(VALUES)).encode()
    if kind < 0.8:  # cut off, or bytes exchanged
        whole = bytearray(json.dumps({**asked, "n": 2}).encode())
        whole[draw.randrange(len(whole))] = draw.randrange(256)
        return bytes(whole[: draw.randrange(len(whole) + 1)])
    if kind < 0.9:
        return draw.randbytes(draw.randrange(300))
    return draw.choice(
        (
            b"[" * 50_000,
            b'{"a":' * 10_000,
            b'{"prompt": "ant", "prompt": "bee", "n": 1, "n": 0}',
            b'{"seed": ' + b"9" * 6000 + b"}",
            b'{"prompt": "' + b"a" * 70_000 + b'"}',
            '{"prompt": "ant"}'.encode("utf-16"),
            b'\xef\xbb\xbf{"prompt": "ant"}',
            b'{"prompt": "\\ud800\\udc00\\ud800", "model": "\\udfff"}',
            b'{"prompt": NaN, "n": Infinity}',
        )
    )
