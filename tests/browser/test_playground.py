"""Writes nothing that lasts: the page at / as people use it, with a fake generator behind the real HTTP API."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from deploy.access import Access
from deploy.api import ApiError
from deploy.keys import VARIABLE, add_key
from deploy.routes import http_api
from tests.driver import answering, until
from tests.fake_generator import CLASSES, VERSION, FakeGenerator, fleet

DONE = re.compile(r"(\d+) images?, \d+\.\d\d seconds and (\d+) model calls per image")


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def generator() -> FakeGenerator:
    return FakeGenerator()


@contextmanager
def served(generator: FakeGenerator, access: Access) -> Iterator[str]:
    """The address of the API."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = http_api(fleet(generator), access, list)
        with answering(app, listener) as address:
            yield address


@pytest.fixture
def address(generator: FakeGenerator) -> Iterator[str]:
    with served(generator, Access()) as found:
        yield found


def opened(window: Callable[..., Page], address: str, width: int = 1280, height: int = 800) -> Page:
    page = window(width, height)
    page.goto(address)
    expect(page.get_by_label("Class")).to_be_focused()
    return page


def screenshot(page: Page, name: str) -> None:
    if folder := os.environ.get("CCA_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/playground-{name}.png", full_page=True)


def test_a_class_is_drawn_by_keyboard_alone(address, window, generator):
    page = opened(window, address)
    expect(page.locator("#version")).to_have_text(f"Model {VERSION}")
    assert page.get_by_label("Class").locator("option").all_inner_texts() == list(CLASSES)
    page.keyboard.type("bee")
    page.keyboard.press("Tab")  # images
    page.keyboard.press("Tab")  # seed
    page.keyboard.type("40")
    page.keyboard.press("Tab")  # temperature
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#shown")).to_have_text("0.95")
    page.keyboard.press("Tab")  # guidance
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Draw")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".result p")).to_have_text(DONE)
    assert [page.get_by_role("img", name=f"bee, seed {seed}").count() for seed in range(40, 44)] == [1] * 4
    expect(page.locator("#said")).to_contain_text("bee: 4 images")
    expect(page.get_by_role("button", name="Draw")).to_be_focused()
    (asked,) = {(one.prompt, one.temperature, one.cfg_scale) for one in generator.asked}
    assert asked == ("bee", 0.95, None), "the version's own guidance"


def test_images_appear_while_others_are_drawn_and_stop_ends_it(address, window, generator):
    page = opened(window, address)
    generator.before = generator.gate.clear  # the first image goes through, the second waits
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("img")).to_have_count(1)
    expect(page.locator(".result p")).to_have_text("1 of 4 images")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".result p")).to_have_text("stopped after 1 of 4 images")
    until(lambda: generator.responses[-1].cancelled)
    generator.before = lambda: None
    generator.loop.call_soon_threadsafe(generator.gate.set)
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".result p")).to_have_text(DONE)


def test_guided_and_guidance_free_stand_side_by_side_with_their_cost(address, window, generator):
    page = opened(window, address)
    page.get_by_label("Guidance scale").fill("3")
    page.get_by_role("button", name="Compare guided and guidance-free").click()
    results = page.locator(".result")
    expect(results.locator("p")).to_have_text([DONE, DONE])
    assert results.locator("h2").all_inner_texts() == ["Guided (3)", "Guidance-free"]
    assert [DONE.match(text)[2] for text in results.locator("p").all_inner_texts()] == ["32", "16"]
    assert [one.cfg_scale for one in generator.asked] == [3.0] * 4 + [1.0] * 4, "one after the other"
    seeds = results.nth(0).locator("figcaption").all_inner_texts()
    assert results.nth(1).locator("figcaption").all_inner_texts() == seeds, "of the same seeds"
    left, right = results.nth(0).bounding_box(), results.nth(1).bounding_box()
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_what_goes_wrong_is_said_in_words(address, window, generator):
    page = opened(window, address)
    generator.before = lambda: (_ for _ in ()).throw(ApiError(503, "the service is busy: try again shortly"))
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("alert")).to_have_text("The service is busy: try again shortly.")
    expect(page.locator(".result p")).to_have_text("not drawn")
    screenshot(page, "error")
    blocked = iter([None, ApiError(400, "the content filter blocks it", None, "content_policy_violation")])

    def second_fails() -> None:
        if error := next(blocked):
            raise error

    generator.before = second_fails
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("alert")).to_have_text("The content filter blocks it.")
    expect(page.locator(".result p")).to_have_text("not drawn after 1 of 4 images")
    page.route("**/v1/images/generations", lambda route: route.abort())
    page.get_by_role("button", name="Draw").click()
    expect(page.get_by_role("alert")).to_have_text("The service does not answer: is it still running?")
    page.unroute("**/v1/images/generations")
    generator.before = lambda: None
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".result p")).to_have_text(DONE)
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_key_is_asked_for_and_kept_for_the_tab(window, generator, tmp_path: Path):
    file = tmp_path / "keys.json"
    key = add_key(file, "ann", replace=False)
    access = Access()
    access.configure(keys=str(file))
    with served(generator, access) as address:
        page = window()
        page.goto(address)
        expect(page.get_by_label("API key")).to_be_focused()
        expect(page.get_by_role("alert")).to_be_empty()
        page.keyboard.type("cca-wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("This key is unknown or disabled")
        expect(page.get_by_label("API key")).to_be_focused()
        screenshot(page, "key")
        page.keyboard.type(key)
        page.keyboard.press("Enter")
        expect(page.get_by_label("Class")).to_be_focused()
        page.reload()
        expect(page.get_by_label("Class")).to_be_focused()
        page.get_by_role("button", name="Draw").click()
        expect(page.locator(".result p")).to_have_text(DONE)
        file.write_text("{}")
        page.get_by_role("button", name="Draw").click()
        expect(page.get_by_label("API key")).to_be_focused()
        other = window()
        other.goto(address)
        expect(other.get_by_label("API key")).to_be_visible()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_it_fits_and_loads_nothing_else(address, window, width, height):
    page = window(width, height)
    asked = []
    page.on("request", lambda request: asked.append(request.url.removeprefix(address)))
    page.goto(address)
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".result p")).to_have_text([DONE, DONE])
    assert {url for url in asked if not url.startswith("data:")} == {"/", "/v1/models", "/v1/images/generations"}
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    assert page.evaluate("getComputedStyle(document.querySelector('.result img')).imageRendering") == "pixelated"
    assert page.evaluate("[...document.querySelectorAll('input, select')].every(field => field.labels.length === 1)")
    screenshot(page, str(width))


def test_scripts_of_others_do_not_run(address, window):
    page = opened(window, address)
    answer = page.request.get(address)
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    page.evaluate(
        """() => {
          const script = document.createElement("script");
          script.textContent = "document.title = 'taken'";
          document.body.append(script);
          document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=\\"document.title = 'taken'\\">");
        }"""
    )
    page.get_by_role("button", name="Draw").click()
    expect(page.locator(".result p")).to_have_text(DONE)
    expect(page).to_have_title("Draw images")
