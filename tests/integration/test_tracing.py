"""Writes a registry to a temporary folder: `cca serve` on real Ray sends spans of requests to a real OTLP receiver."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from deploy import tracing
from tests.driver import until
from tests.service import ANSWER_S, Service


@dataclass(frozen=True)
class Span:
    trace: str
    own: str
    parent: str
    name: str
    service: str
    seconds: float
    attributes: dict[str, Any]


class Receiver:
    """Keeps the spans that are sent to it."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                if self.path == "/v1/traces":
                    receiver.spans += spans(sent)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def of(self, trace: str) -> list[Span]:
        return [span for span in self.spans if span.trace == trace]


def spans(sent: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in sent.resource_spans:
        about = values(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
                yield Span(*ids, span.name, about["service.name"], seconds, values(span.attributes))


def values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def service(receiver: Receiver, start_service) -> Service:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tracing.VARIABLE, f"http://127.0.0.1:{receiver.server.server_port}")
        return start_service()


def asked(service: Service, path: str, content: str) -> tuple[str, str, str]:
    """(trace, span, request id) of a caller that has a trace, after the answer."""
    trace, parent, name = secrets.token_hex(16), secrets.token_hex(8), f"traced-{secrets.token_hex(4)}"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": name}
    answer = httpx.post(service.address + path, content=content, headers=headers, timeout=ANSWER_S)
    assert answer.status_code == 200, answer.text
    return trace, parent, name


def line(spans: list[Span], leaf: Span) -> list[str]:
    """Names of the spans above ``leaf``, from the caller's child down to it."""
    own = {span.own: span for span in spans}
    names = [leaf.name]
    while leaf.parent in own:
        leaf = own[leaf.parent]
        names.append(leaf.name)
    return names[::-1]


def test_a_request_is_one_trace_from_the_proxy_to_each_image(service, receiver):
    body = json.dumps({"prompt": "bee", "n": 3, "seed": 5, "cfg_scale": 2})
    trace, parent, name = asked(service, "/v1/images/generations", body)
    # proxy, ingress and generator with the ways between them, and ours; each process sends its spans after some seconds
    until(lambda: len(receiver.of(trace)) == 5 + 5, 60)
    found = receiver.of(trace)
    by_name = {span.name: span for span in found}
    assert {span.service for span in found} == {"cca"}
    (top,) = (span for span in found if span.parent == parent)
    assert {span.parent for span in found} <= {parent, *(span.own for span in found)}, "a hop is missing"
    hops = line(found, by_name["image"])
    assert hops[0] == top.name
    assert hops[-3] == "replica_handle_request Generator draw"
    assert "images" in hops
    assert hops[-2:] == ["draw", "image"]
    assert top.attributes["request_id"] == name
    assert by_name["images"].attributes == {
        "cca.request_id": name,
        "cca.class": "bee",
        "cca.n": 3,
        "cca.seed": 5,
        "cca.version": service.served(),
        "cca.outcome": "ok",
    }
    assert by_name["draw"].attributes == {"cca.model": service.served(), "cca.n": 3, "cca.calls_per_image": 32}
    images = [span for span in found if span.name == "image"]
    assert sorted(span.attributes["cca.seed"] for span in images) == [5, 6, 7]
    assert all(0 <= span.attributes["cca.queue_s"] <= span.seconds for span in images)


def test_a_caller_without_a_trace_has_one_trace_all_the_same(service, receiver):
    name = f"traced-{secrets.token_hex(4)}"
    url = f"{service.address}/v1/images/generations"
    assert httpx.post(url, json={"prompt": "ant"}, headers={"X-Request-Id": name}, timeout=ANSWER_S).status_code == 200

    def hops() -> set[str]:
        return {span.name.split(" ")[0] for span in receiver.spans if name in span.attributes.values()}

    until(lambda: hops() == {"proxy_http_request", "route_to_replica", "replica_handle_request", "images"}, 60)
    (trace,) = {span.trace for span in receiver.spans if name in span.attributes.values()}
    until(lambda: "image" in {span.name for span in receiver.of(trace)}, 60)


def test_lines_of_a_batch_and_a_stream_are_traced_too(service, receiver):
    lines = [json.dumps({"body": {"prompt": prompt, "seed": 1}}) for prompt in ("ant", "dog")]
    trace, _, name = asked(service, "/v1/images/batches", "\n".join(lines))
    until(lambda: [span.name for span in receiver.of(trace)].count("images") == 2, 60)
    outcomes = {
        span.attributes["cca.request_id"]: span.attributes["cca.outcome"]
        for span in receiver.of(trace)
        if span.name == "images"
    }
    assert outcomes == {f"{name}:1": "ok", f"{name}:2": "unknown_class"}
    trace, _, _ = asked(service, "/v1/images/generations", '{"prompt": "ant", "n": 2, "stream": true}')
    until(lambda: {"images", "image"} <= {span.name for span in receiver.of(trace)}, 60)
    (images,) = (span for span in receiver.of(trace) if span.name == "images")
    assert images.attributes["cca.outcome"] == "ok"
