"""Reads HTTP requests, passes them on to an S3 server and writes its answers back, but for a seeded share of faults."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

#: An answer with an S3 error: kind -> status and code.
ERRORS = {"slow_down": (503, "SlowDown"), "internal_error": (500, "InternalError")}
#: No answer: the connection is closed (FIN) or reset (RST).
DROPS = ("closed", "reset")
#: All headers and half the body of the answer to a GET, then the connection is closed or reset.
CUTS = ("cut_closed", "cut_reset")
KINDS = (*ERRORS, *DROPS, *CUTS)
#: What S3 says of a session token whose time is over, where ``kinds`` asks for it; the request is never done.
EXPIRED = "expired"
ANSWERS = {**ERRORS, EXPIRED: (400, "ExpiredToken")}
#: Of one connection, not of the message; the length of the body is told anew.
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "expect", "content-length"}

Headers = list[tuple[str, str]]


class FaultyProxy(ThreadingHTTPServer):
    """Stands before the server at ``upstream``. ``share`` (0 to 1) and ``kinds`` of faults may be set at any time.

    Errors and drops come before the server sees the request or after it has done it: "stored, but not confirmed".
    ``seed`` is of the generator that draws them, in the order in which requests come.
    """

    request_queue_size = 128

    def __init__(self, upstream: str, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(upstream).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.share = 0.0
        self.kinds: tuple[str, ...] = KINDS
        #: Faults that happened: "closed before GET", "slow_down after PUT", "cut_reset in GET".
        self.faults: Counter[str] = Counter()
        self._random, self._lock = random.Random(seed), threading.Lock()

    def draw(self, method: str) -> tuple[str, str]:
        """The fault that the next request meets (none: ""), and when."""
        with self._lock:
            happens = self._random.random() < self.share
            when, kind = self._random.choice(("before", "after")), self._random.choice(self.kinds)
        if kind in CUTS:
            kind, when = (kind, "in") if method == "GET" else (DROPS[CUTS.index(kind)], when)
        if kind == EXPIRED:
            when = "before"
        return (kind if happens else ""), when

    def count(self, fault: str) -> None:
        with self._lock:
            self.faults[fault] += 1

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client has left
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One client connection, kept alive until a fault ends it. The base class answers ``Expect: 100-continue``."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyProxy

    def pass_on(self) -> None:
        body = self._body()
        kind, when = self.server.draw(self.command)
        answer = (0, [], b"") if kind and when == "before" else self._ask(body)
        if kind in CUTS and len(answer[2]) < 2:
            kind = ""  # nothing to cut
        if kind:
            self.server.count(f"{kind} {when} {self.command}")
        if kind in ANSWERS:
            status, code = ANSWERS[kind]
            xml = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}, injected</Message></Error>".encode()
            answer = (status, [("Content-Type", "application/xml"), ("Content-Length", str(len(xml)))], xml)
        if kind not in DROPS:
            self._answer(*answer, cut=kind in CUTS)
        if kind in DROPS + CUTS:
            self.close_connection = True
            if kind.endswith("reset"):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return body

    def _ask(self, body: bytes) -> tuple[int, Headers, bytes]:
        """What the server answers. It gets the client's Host as it is: the signature covers it."""
        with contextlib.closing(http.client.HTTPConnection(self.server.upstream, timeout=120)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in end_to_end(self.headers.items()):
                connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            data, headers = response.read(), end_to_end(response.getheaders())
            length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
            if length and response.status != http.client.NO_CONTENT:
                headers.append(("Content-Length", length))
            return response.status, headers, data

    def _answer(self, status: int, headers: Headers, data: bytes, *, cut: bool) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)

    def log_message(self, *_: object) -> None:
        """Say nothing: the counts tell."""


def end_to_end(headers: Iterable[tuple[str, str]]) -> Headers:
    return [(name, value) for name, value in headers if name.lower() not in HOP_BY_HOP]


@contextlib.contextmanager
def running_proxy(upstream: str, seed: int) -> Iterator[FaultyProxy]:
    """A proxy in a thread of this process; without faults until ``share`` is set."""
    with FaultyProxy(upstream, seed) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
