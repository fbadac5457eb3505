"""Writes a report below a temporary folder: its page opened from there, offline, in wide and narrow windows."""

from __future__ import annotations

import os

import pytest

from pipelines.report.render import report_html
from tests.reporting import data, pictures, votes


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_fits_and_loads_nothing(chromium, tmp_path, language, width):
    file = tmp_path / "report.html"
    file.write_bytes(report_html(data(min_votes=30, given=votes(15, 5)), language, pictures()))
    context = chromium.new_context(viewport={"width": width, "height": 844}, offline=True, java_script_enabled=True)
    page = context.new_page()
    asked, problems = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text))
    page.goto(file.as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) == len(pictures())
    assert all(found > 0 for found in widths)
    # Tables that are wider than the window scroll inside their own box, which the keyboard reaches.
    boxes = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(b => [b.scrollWidth > b.clientWidth, b.tabIndex])"
    )
    assert any(wider for wider, _ in boxes) or width > 390
    assert all(index == 0 for _, index in boxes)
    box = page.locator(".verdict h2").bounding_box()
    assert box["y"] < 300, "the verdict is what one sees first"
    assert page.evaluate("document.documentElement.lang") == language
    if folder := os.environ.get("CCA_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/report-{language}-{width}.png", full_page=True)
    context.close()


def test_it_is_the_same_without_scripts(chromium, tmp_path):
    file = tmp_path / "report.html"
    file.write_bytes(report_html(data(), "en", pictures()))
    context = chromium.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(file.as_uri())
    assert page.locator("h2").first.inner_text() == "Serve the aligned model."
    page.locator("summary").click()
    assert "max_distance_vs_base" in page.locator("details pre").inner_text()
    context.close()
