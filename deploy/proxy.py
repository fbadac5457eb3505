"""Reads and rewrites the headers of requests in Serve's HTTP proxy, before Ray reads them.

Ray decodes some headers as UTF-8 and answers 500 where that fails, and takes orders from others. Nodes name this
module's function in the environment variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH; `cca serve` does so itself.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deploy.api import BATCH_S, BATCHES

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "deploy.proxy:middlewares"
REQUEST_ID = b"x-request-id"
#: What is kept of a request id: it goes into every line of the logs.
REQUEST_ID_BYTES = 128
#: Serve's limit of time for one request.
TIMEOUT = b"x-request-timeout-seconds"
#: Orders to Serve that are no client's to give: a request without end, and one that goes on when its client has gone.
ORDERS = (TIMEOUT, b"x-request-disconnect-disabled")
#: A batch ends itself, with an answer for every line.
BATCH_TIMEOUT = (TIMEOUT, str(BATCH_S + 60).encode())


class PlainHeaders:
    """ASGI middleware that leaves ASCII in headers, a short request id, and no orders to Serve but its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, _plain(name, value)) for name, value in scope.get("headers", ()) if name not in ORDERS]
        if scope.get("path") == BATCHES:
            headers.append(BATCH_TIMEOUT)
        await self.app({**scope, "headers": headers}, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve's proxy wraps itself in."""
    return [Middleware(PlainHeaders)]


def _plain(name: bytes, value: bytes) -> bytes:
    ascii_only = value if value.isascii() else value.decode("latin-1").encode("ascii", "backslashreplace")
    return ascii_only[:REQUEST_ID_BYTES] if name == REQUEST_ID else ascii_only
