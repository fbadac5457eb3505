"""Reads the token of a Ray cluster, writes nothing: what opens its dashboard, its jobs and its core."""

from __future__ import annotations

import os
from pathlib import Path


def cluster_token() -> str:
    """The token from where Ray looks for it too; empty where there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return token
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return file.read_text().strip() if file.is_file() else ""
