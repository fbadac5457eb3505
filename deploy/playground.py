"""Reads ``deploy/page/index.html``: the page at ``/``, which draws through the API as any client does.

The page is one file that loads nothing else. The browser runs only the script and the style whose hashes stand in the
header, whatever a class name or an error message may hold.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


def playground() -> tuple[str, dict[str, str]]:
    """The page and the headers that it is sent with."""
    page = (files("deploy") / "page" / "index.html").read_text(encoding="utf-8")
    policy = {
        "default-src": "'none'",
        "img-src": "data:",
        "connect-src": "'self'",
        "style-src": _hashes(page, "style"),
        "script-src": _hashes(page, "script"),
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return page, {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def _hashes(page: str, tag: str) -> str:
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside)
    return " ".join(f"'sha256-{digest}'" for digest in digests)
