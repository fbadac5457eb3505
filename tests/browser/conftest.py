"""Starts one Chromium for the session, and a window of its own for each test that asks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

#: Names of an installed browser; without one, Playwright's own is used (`playwright install chromium`).
INSTALLED = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, INSTALLED)), None)
    with sync_playwright() as playwright:
        # Without the sandbox, since containers and root have none; the pages are our own.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def window(chromium: Browser) -> Iterator[Callable[..., Page]]:
    """Opens a window with a memory of its own; a page that logs an error or asks another host fails the test."""
    contexts, problems = [], []

    def open_window(width: int = 1280, height: int = 800) -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: _check_local(request.url, problems))
        return page

    yield open_window
    for context in contexts:
        context.close()
    assert not problems, problems


def _check_local(url: str, problems: list[str]) -> None:
    if not url.startswith(("http://127.0.0.1:", "blob:http://127.0.0.1:", "data:,")):
        problems.append(f"asked {url}")
