"""Writes votes below a temporary folder and in memory: what reviewers chose, and what it says of the aligned model."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cca_core import votes as votes_module
from cca_core.config import ConfigError
from cca_core.metrics.votes import Tally, agreement, cohen_kappa, summarize, wilson_interval
from cca_core.store import Store
from cca_core.votes import CHOICES, Vote, VoteStore, aligned_side, counting, reviewer_name, votes_digest

ONE, OTHER = "1" * 64, "2" * 64


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path) -> Iterator[Store]:
    if request.param == "folder":
        yield Store(str(tmp_path / "store"))
    else:
        made = Store(f"memory://{uuid.uuid4().hex}/prefix")
        yield made
        if made.fs.exists(made.root):
            made.fs.rm(made.root.split("/prefix")[0], recursive=True)


def given(choices: str, reviewer: str = "Ann", classes: str = "") -> list[Vote]:
    """Votes on pairs 0, 1, ...: a for aligned, g for guided, e for equal, - for none."""
    names = {choice[0]: choice for choice in CHOICES}
    return [
        Vote(reviewer, pair, (classes or choices)[pair], names[letter], "left", pair)
        for pair, letter in enumerate(choices)
        if letter != "-"
    ]


# Values of the score interval by hand: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.959964.
@pytest.mark.parametrize(
    ("rate", "count", "low", "high"),
    [
        (0.5, 10, 0.2366, 0.7634),
        (0.0, 10, 0.0, 0.2775),
        (1.0, 10, 0.7225, 1.0),
        (0.5, 30, 0.3315, 0.6685),
        (0.5, 100, 0.4038, 0.5962),
        (0.5, 300, 0.4438, 0.5562),
        (0.8, 50, 0.6696, 0.8876),
    ],
)
def test_wilson_interval(rate, count, low, high):
    assert wilson_interval(rate, count) == pytest.approx((low, high), abs=5e-5)


def test_the_win_rate_counts_half_of_the_equals():
    tally = summarize(given("aaaggeeee")).tally
    assert tally == Tally(wins=3, losses=2, equal=4)
    assert (tally.votes, tally.win_rate) == (9, 5 / 9)
    assert tally.interval == wilson_interval(5 / 9, 9)
    nothing = summarize([]).tally
    assert math.isnan(nothing.win_rate)
    assert all(math.isnan(end) for end in nothing.interval)


def test_cohens_kappa_by_hand():
    # 20 yes both, 15 no both, 5 and 10 apart: agreement 0.7, by chance 0.5 * 0.6 + 0.5 * 0.4 = 0.5.
    shared = [("aligned", "aligned")] * 20 + [("guided", "guided")] * 15
    shared += [("aligned", "guided")] * 5 + [("guided", "aligned")] * 10
    assert cohen_kappa(shared) == pytest.approx(0.4)
    assert cohen_kappa([("aligned", "guided"), ("guided", "aligned")]) == pytest.approx(-1)
    assert cohen_kappa([("equal", "equal"), ("aligned", "aligned")]) == 1
    assert math.isnan(cohen_kappa([("equal", "equal")] * 3))


def test_agreement_is_over_what_both_have_voted_on():
    found = agreement(given("aage") + given("aae-", "Bob"))
    assert (found.compared, found.share) == (3, pytest.approx(2 / 3))
    alone = agreement(given("aag-") + given("---e", "Bob"))
    assert alone.compared == 0
    assert math.isnan(alone.share)
    assert math.isnan(alone.kappa)


def test_agreement_of_three_is_the_mean_over_couples_weighed_by_what_they_share():
    # Ann and Bob share 4 pairs and agree on 3; Ann and Cid share 2, agree on 0; Bob and Cid share 2, agree on 1.
    found = agreement(given("aagg") + given("aaga", "Bob") + given("gg--", "Cid")[:1] + given("---a", "Cid"))
    assert found.compared == 4 + 2 + 2
    assert found.share == pytest.approx((3 + 0 + 1) / 8)
    couples = [
        (4, cohen_kappa([("aligned", "aligned")] * 2 + [("guided", "guided"), ("guided", "aligned")])),
        (2, cohen_kappa([("aligned", "guided"), ("guided", "aligned")])),
        (2, cohen_kappa([("aligned", "guided"), ("aligned", "aligned")])),
    ]
    assert found.kappa == pytest.approx(sum(n * kappa for n, kappa in couples) / 8)


def test_counts_by_class():
    summary = summarize(given("aagge", classes="xyxyx") + given("e", "Bob", classes="x"))
    assert summary.by_class == {"x": Tally(wins=1, losses=1, equal=2), "y": Tally(wins=1, losses=1)}
    assert (summary.reviewers, summary.pairs) == (2, 5)


def test_a_vote_replaces_that_reviewers_earlier_one_and_history_stays(store):
    votes = VoteStore(store, ONE)
    for choice in ("aligned", "guided", "equal"):
        votes.add("Ann", 3, "ant", choice)
    votes.add("Bob", 3, "ant", "guided")
    votes.add("ann", 4, "bee", "aligned")
    assert [vote.choice for vote in votes.read()] == ["aligned", "guided", "equal", "guided", "aligned"]
    assert {(vote.reviewer, vote.pair, vote.choice) for vote in counting(votes.read())} == {
        ("Ann", 3, "equal"),
        ("Bob", 3, "guided"),
        ("ann", 4, "aligned"),
    }
    assert summarize(votes.read()).reviewers == 2, "Ann is ann"
    assert [vote.pair for vote in votes.read("ANN")] == [3, 3, 3, 4]


def test_votes_on_something_else_do_not_count(store):
    VoteStore(store, ONE).add("Ann", 0, "ant", "aligned")
    VoteStore(store, OTHER).add("Ann", 0, "ant", "guided")
    assert [vote.choice for vote in VoteStore(store, ONE).read()] == ["aligned"]
    assert VoteStore(store, "3" * 64).read() == []


def test_a_later_vote_counts_though_the_clock_was_set_back(store, monkeypatch):
    VoteStore(store, ONE).add("Ann", 0, "ant", "aligned")
    monkeypatch.setattr(votes_module.time, "time_ns", lambda: 5)
    VoteStore(store, ONE).add("Ann", 0, "ant", "guided")
    assert [vote.choice for vote in counting(VoteStore(store, ONE).read())] == ["guided"]


def test_two_processes_that_write_in_the_same_instant_lose_nothing(store, monkeypatch):
    monkeypatch.setattr(votes_module.time, "time_ns", lambda: 5)
    for votes in (VoteStore(store, ONE), VoteStore(store, ONE)):
        votes._last_ns = 0  # made before the other wrote
        votes.add("Ann", 0, "ant", "guided")
    assert len(VoteStore(store, ONE).read()) == 2


def test_many_reviewers_at_once_lose_nothing(store):
    votes = VoteStore(store, ONE)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: votes.add(f"reviewer {i % 8}", i // 8, "ant", "equal"), range(160)))
    found = counting(VoteStore(store, ONE).read())
    assert {(vote.reviewer, vote.pair) for vote in found} == {(f"reviewer {i % 8}", i // 8) for i in range(160)}


def test_the_digest_of_votes_is_of_what_counts(store):
    votes = VoteStore(store, ONE)
    empty = votes_digest(votes.read())
    votes.add("Ann", 0, "ant", "guided")
    first = votes_digest(votes.read())
    votes.add("Ann", 0, "ant", "aligned")
    assert len({empty, first, votes_digest(votes.read())}) == 3
    votes.add("Ann", 0, "ant", "guided")
    assert votes_digest(votes.read()) == first


def test_sides_are_fixed_differ_between_reviewers_and_are_balanced():
    def sides(name: str, digest: str = ONE) -> list[str]:
        return [aligned_side(digest, name, pair) for pair in range(400)]

    assert sides("Ann") == sides("ANN")
    assert sides("Ann") != sides("Bob")
    assert sides("Ann") != sides("Ann", OTHER)
    assert 160 < sides("Ann").count("left") < 240
    assert 160 < sum(a == b for a, b in zip(sides("Ann"), sides("Bob"), strict=True)) < 240


def test_a_reviewers_name_is_one_to_forty_printable_characters():
    assert reviewer_name("  Ann \t Lee ") == "Ann Lee"
    assert reviewer_name("e\u0301") == "\u00e9"
    assert reviewer_name("\u738b") == "\u738b"
    assert len(reviewer_name("x" * 40)) == 40
    for bad in ("", "   ", "x" * 41, "a\x00b", "a\u202eb"):
        with pytest.raises(ConfigError, match="1 to 40 printable characters"):
            reviewer_name(bad)


@pytest.mark.parametrize("name", ["../../etc", "a/b", ".", "*?[x]", "Zo\u00eb"])
def test_any_name_is_a_safe_folder(store, name):
    votes = VoteStore(store, ONE)
    votes.add(name, 0, "ant", "equal")
    assert [vote.reviewer for vote in votes.read(name)] == [name]
    (path,) = store.fs.find(store.root)
    assert path.startswith(f"{store.root}/votes/{ONE}/")
    assert json.loads(store.fs.cat_file(path))["class_name"] == "ant"
