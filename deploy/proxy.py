"""Reads and rewrites the headers of requests in Serve's HTTP proxy, before Ray reads them.

Ray decodes some headers as UTF-8 and answers 500 where that fails. Nodes name this module's function in the environment
variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH; `cca serve` does so itself.
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "deploy.proxy:middlewares"
REQUEST_ID = b"x-request-id"
#: What is kept of a request id: it goes into every line of the logs.
REQUEST_ID_BYTES = 128


class PlainHeaders:
    """ASGI middleware that leaves ASCII in headers, and a short request id."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, _plain(name, value)) for name, value in scope.get("headers", ())]
        await self.app({**scope, "headers": headers}, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve's proxy wraps itself in."""
    return [Middleware(PlainHeaders)]


def _plain(name: bytes, value: bytes) -> bytes:
    ascii_only = value if value.isascii() else value.decode("latin-1").encode("ascii", "backslashreplace")
    return ascii_only[:REQUEST_ID_BYTES] if name == REQUEST_ID else ascii_only
