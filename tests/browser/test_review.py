"""Writes votes below a temporary folder: the review page as reviewers use it, by keyboard, mouse and touch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from cca_core.store import Store
from cca_core.votes import Vote, VoteStore, aligned_side, counting
from tests.reviewing import CLASSES, DIGEST, make_pairs, served

PAIRS = 30
#: What a reviewer presses, over and over, and what it means.
KEYS = {"ArrowLeft": "left", "ArrowRight": "right", "ArrowDown": "equal"}


@pytest.fixture
def address(tmp_path):
    with served(tmp_path, make_pairs(PAIRS)) as found:
        yield found


def stored(folder: Path) -> list[Vote]:
    return counting(VoteStore(Store(str(folder)), DIGEST).read())


def meant(reviewer: str, pair: int, side: str) -> str:
    if side == "equal":
        return "equal"
    return "aligned" if side == aligned_side(DIGEST, reviewer, pair) else "guided"


def begin(page: Page, address: str, name: str) -> None:
    page.goto(address)
    page.get_by_label("Your name").fill(name)
    page.keyboard.press("Enter")


def shows(page: Page, pair: int, done: int) -> None:
    """Until both images of that pair are there, so that a key counts."""
    expect(page.locator("#count")).to_have_text(f"pair {pair + 1} of {PAIRS}, {done} done")
    expect(page.locator("#said")).to_contain_text(f"Pair {pair + 1} of {PAIRS}")


def vote_by_keys(page: Page, start: int, stop: int) -> dict[int, str]:
    """Vote on pairs start..stop-1 in turn; what was meant, by pair."""
    given = {}
    for pair in range(start, stop):
        shows(page, pair, pair)
        key = list(KEYS)[(pair * 7) % 3]
        page.keyboard.press(key)
        given[pair] = KEYS[key]
    return given


def test_thirty_votes_by_keyboard_with_a_reload_between_and_nothing_is_lost(address, window, tmp_path):
    page = window()
    begin(page, address, "  Ann ")
    given = vote_by_keys(page, 0, 13)
    shows(page, 13, 13)
    page.reload()
    shows(page, 13, 13)
    given |= vote_by_keys(page, 13, PAIRS)
    expect(page.get_by_role("heading", name="Thank you!")).to_be_focused()
    expect(page.locator("#count")).to_have_text(f"{PAIRS} of {PAIRS} done")
    expected = {pair: meant("Ann", pair, side) for pair, side in given.items()}
    assert {vote.pair: vote.choice for vote in stored(tmp_path)} == expected
    assert {vote.reviewer for vote in stored(tmp_path)} == {"Ann"}
    assert len(expected) == PAIRS


def test_two_reviewers_at_once_each_go_on_where_they_were(address, window, tmp_path):
    ann, bob = window(), window()
    begin(ann, address, "Ann")
    begin(bob, address, "Bob")
    for pair in range(5):
        shows(ann, pair, pair)
        shows(bob, pair, pair)
        ann.keyboard.press("ArrowLeft")
        bob.keyboard.press("ArrowDown")
    shows(ann, 5, 5)
    shows(bob, 5, 5)
    again = window()
    begin(again, address, "ann")
    shows(again, 5, 5)
    found = {(vote.reviewer, vote.pair): vote.choice for vote in stored(tmp_path)}
    assert found == {
        **{("Ann", pair): meant("Ann", pair, "left") for pair in range(5)},
        **{("Bob", pair): "equal" for pair in range(5)},
    }


@pytest.mark.parametrize("key", ["Backspace", "ArrowUp"])
def test_going_back_shows_the_choice_and_a_new_one_replaces_it(address, window, tmp_path, key):
    page = window()
    begin(page, address, "Ann")
    vote_by_keys(page, 0, 3)
    shows(page, 3, 3)
    page.keyboard.press(key)
    shows(page, 2, 3)
    chosen = page.locator('.choices [aria-pressed="true"]')
    expect(chosen).to_have_attribute("data-choice", KEYS[list(KEYS)[(2 * 7) % 3]])
    page.keyboard.press("ArrowLeft")
    shows(page, 3, 3)
    assert len(VoteStore(Store(str(tmp_path)), DIGEST).read()) == 4, "history is kept"
    assert {vote.pair: vote.choice for vote in stored(tmp_path)}[2] == meant("Ann", 2, "left")
    # At the end, too, and at the beginning there is nowhere to go.
    for pair in (2, 1, 0):
        page.keyboard.press(key)
        shows(page, pair, 3)
    page.keyboard.press(key)
    shows(page, 0, 3)


def test_a_click_and_a_touch_vote_too(address, window, tmp_path):
    page = window(390, 844)
    begin(page, address, "Ann")
    shows(page, 0, 0)
    page.locator("#right").click()
    shows(page, 1, 1)
    page.get_by_role("button", name="Left is better").click()
    shows(page, 2, 2)
    page.get_by_role("button", name="Equal").click()
    shows(page, 3, 3)
    page.get_by_role("button", name="Back one pair").click()
    shows(page, 2, 3)
    assert [vote.choice for vote in stored(tmp_path)] == [meant("Ann", 0, "right"), meant("Ann", 1, "left"), "equal"]


def test_a_key_that_is_held_is_one_vote(address, window, tmp_path):
    page = window()
    begin(page, address, "Ann")
    shows(page, 0, 0)
    page.keyboard.down("ArrowLeft")
    shows(page, 1, 1)
    for _ in range(5):
        page.keyboard.down("ArrowLeft")  # pressed again without having been let go: a repeat
    page.keyboard.up("ArrowLeft")
    page.keyboard.press("ArrowDown")
    shows(page, 2, 2)
    assert [vote.choice for vote in stored(tmp_path)] == [meant("Ann", 0, "left"), "equal"]


def test_a_vote_that_is_not_stored_is_said_and_not_counted(address, window, tmp_path):
    page = window()
    begin(page, address, "Ann")
    shows(page, 0, 0)
    page.route("**/api/votes", lambda route: route.abort())
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("alert")).to_contain_text("This vote is not stored.")
    expect(page.locator("#count")).to_have_text(f"pair 1 of {PAIRS}, 0 done")
    page.unroute("**/api/votes")
    page.keyboard.press("ArrowLeft")
    shows(page, 1, 1)
    assert len(stored(tmp_path)) == 1


def test_a_name_that_is_none_is_refused_and_said(address, window, tmp_path):
    page = window()
    begin(page, address, "   ")
    expect(page.get_by_role("alert")).to_contain_text("1 to 40 printable characters")
    assert page.locator("#pair").is_hidden()


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (390, 844)])
def test_everything_fits_into_the_window(address, window, tmp_path, width, height):
    page = window(width, height)
    begin(page, address, "Ann")
    vote_by_keys(page, 0, 2)
    shows(page, 2, 2)
    expect(page.locator("#class")).to_have_text(CLASSES[2])
    boxes = {name: page.locator(name).bounding_box() for name in ("#left", "#right", ".choices", "#back")}
    assert boxes["#left"]["y"] == boxes["#right"]["y"]
    assert (boxes["#left"]["width"], boxes["#left"]["height"]) == (
        boxes["#right"]["width"],
        boxes["#right"]["height"],
    )
    assert boxes["#left"]["width"] >= 0.35 * width or boxes["#left"]["width"] >= 400
    for name, box in boxes.items():
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width, name
        assert 0 <= box["y"] <= box["y"] + box["height"] <= height, name
    assert page.evaluate("getComputedStyle(document.getElementById('left')).imageRendering") == "pixelated"
    if folder := os.environ.get("CCA_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/review-{width}.png")
