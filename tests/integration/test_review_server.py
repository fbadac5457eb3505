"""Writes votes below a temporary folder: the review page over HTTP, and that no answer tells which image is whose."""

from __future__ import annotations

import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from cca_core.store import Store
from cca_core.votes import VoteStore, aligned_side, counting
from tests.reviewing import CLASSES, DIGEST, is_aligned, make_pairs, served

PAIRS = 40
#: Words of the storage that no answer may hold.
TELLING = ("aligned", "guided", "guidance", "cfg", DIGEST)


@pytest.fixture
def changes():
    return []


@pytest.fixture
def client(tmp_path, changes):
    with (
        served(tmp_path, make_pairs(PAIRS), lambda: changes.append(len(stored(tmp_path)))) as address,
        httpx.Client(base_url=address) as asking,
    ):
        yield asking


def stored(folder):
    return VoteStore(Store(str(folder)), DIGEST).read()


def opened(client: httpx.Client, name: str) -> dict:
    answer = client.get("/api/review", params={"reviewer": name})
    assert answer.status_code == 200, answer.text
    return answer.json()


def image(client: httpx.Client, name: str, pair: int, side: str) -> httpx.Response:
    review = opened(client, name)["review"]
    return client.get(f"/api/images/{pair}/{side}", params={"reviewer": name, "review": review})


def vote(client: httpx.Client, name: str, pair: object, choice: str, **more: object) -> httpx.Response:
    body = {"review": opened(client, "any")["review"], "reviewer": name, "pair": pair, "choice": choice, **more}
    return client.post("/api/votes", json=body)


def sides(client: httpx.Client, name: str) -> list[str]:
    """On which side the aligned image is seen, by pair; each pair has one on either side."""
    found = []
    for pair in range(PAIRS):
        aligned = {side: is_aligned(image(client, name, pair, side).content) for side in ("left", "right")}
        assert sorted(aligned.values()) == [False, True]
        found.append(next(side for side, is_it in aligned.items() if is_it))
    return found


def test_sides_are_shuffled_and_a_reload_or_a_restart_shows_the_same(client, tmp_path):
    ann, bob = sides(client, "Ann"), sides(client, "Bob")
    assert ann != bob
    assert 5 < ann.count("left") < PAIRS - 5
    assert sides(client, "Ann") == ann == [aligned_side(DIGEST, "Ann", pair) for pair in range(PAIRS)]
    with served(tmp_path, make_pairs(PAIRS)) as address, httpx.Client(base_url=address) as other:
        assert sides(other, "Ann") == ann


def test_images_differ_in_their_pixels_alone(client):
    answers = [image(client, "Ann", pair, side) for pair in range(PAIRS) for side in ("left", "right")]
    assert len({len(answer.content) for answer in answers}) == 1, "the file of a flat image is as long as that of noise"
    headers = [{k: v for k, v in answer.headers.items() if k != "date"} for answer in answers]
    assert all(found == headers[0] for found in headers)
    kinds = {tuple(re.findall(rb"IHDR.{13}|IDAT|IEND|tEXt|iTXt|tIME|eXIf|pHYs", answer.content)) for answer in answers}
    assert len(kinds) == 1, "same chunks, no metadata"


def test_no_answer_tells_which_is_which(client):
    votes = [vote(client, "Ann", 0, "left"), vote(client, "Ann", 1, "right"), vote(client, "Ann", 2, "equal")]
    assert len({answer.content for answer in votes}) == 1
    answers = [*votes, client.get("/"), client.get("/api/review", params={"reviewer": "Ann"})]
    answers.append(vote(client, "Ann", PAIRS, "left"))
    assert {client.get(path).status_code for path in ("/openapi.json", "/docs", "/redoc")} == {404}
    for answer in answers:
        text = (answer.text + str(answer.headers)).lower()
        assert not [word for word in TELLING if word in text], answer.url


def test_what_a_reviewer_gets_is_the_same_whichever_side_is_whose(tmp_path):
    """Two reviews whose models are swapped: all bytes but the pixels are equal."""
    swapped = [type(pair)(pair.class_name, pair.aligned, pair.guided) for pair in make_pairs(6)]
    seen = []
    for folder, pairs in (("one", make_pairs(6)), ("other", swapped)):
        with served(tmp_path / folder, pairs) as address, httpx.Client(base_url=address) as client:
            answers = [vote(client, "Ann", pair, "left") for pair in range(6)]
            answers += [client.get("/"), client.get("/api/review", params={"reviewer": "Ann"})]
            seen.append([answer.content for answer in answers])
            files = [image(client, "Ann", pair, side).content for pair in range(6) for side in ("left", "right")]
            seen[-1] += [file[:33] + len(file).to_bytes(4, "big") for file in files]
    assert seen[0] == seen[1]


def test_a_vote_is_stored_as_what_it_means_before_it_is_acknowledged(client, tmp_path, changes):
    given = ["left", "right", "equal"] * 4
    for pair, choice in enumerate(given):
        assert vote(client, " Ann ", pair, choice).json() == {"saved": True}
    where = [aligned_side(DIGEST, "Ann", pair) for pair in range(12)]
    meant = {"equal": "equal", **dict.fromkeys(("left", "right"), "guided")}
    expected = ["aligned" if choice == side else meant[choice] for choice, side in zip(given, where, strict=True)]
    assert set(expected) == {"aligned", "guided", "equal"}
    assert [(v.reviewer, v.choice, v.class_name) for v in stored(tmp_path)] == [
        ("Ann", choice, CLASSES[pair % 3]) for pair, choice in enumerate(expected)
    ]
    assert [v.aligned_side for v in stored(tmp_path)] == where
    assert changes == list(range(1, 13)), "told after each, when it stood in the storage"


def test_a_vote_that_cannot_be_stored_is_not_acknowledged(client, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Store, "write_bytes", fail)
    assert vote(client, "Ann", 0, "left").status_code == 500


def test_a_reload_goes_on_where_the_reviewer_was(client):
    given = {pair: ["left", "right", "equal"][pair % 3] for pair in range(12)}
    for pair, choice in [*given.items(), (3, "right"), (4, "left")]:
        vote(client, "Ann", pair, choice)
    vote(client, "Bob", 0, "equal")
    found = opened(client, "ann")
    assert found["choices"] == {str(pair): choice for pair, choice in (given | {3: "right", 4: "left"}).items()}
    assert found["classes"] == [CLASSES[pair % 3] for pair in range(PAIRS)]
    assert opened(client, "Cid")["choices"] == {}


def test_two_reviewers_at_once_lose_nothing(client, tmp_path):
    review, barrier = opened(client, "Ann")["review"], threading.Barrier(2)

    def all_pairs(name: str) -> None:
        barrier.wait()
        for pair in range(PAIRS):
            body = {"review": review, "reviewer": name, "pair": pair, "choice": "left"}
            assert httpx.post(f"{client.base_url}/api/votes", json=body).status_code == 200

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(all_pairs, ["Ann", "Bob"]))
    found = {(v.reviewer, v.pair) for v in counting(stored(tmp_path))}
    assert found == {(name, pair) for name in ("Ann", "Bob") for pair in range(PAIRS)}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"pair": PAIRS}, 404, f"this review has {PAIRS}"),
        ({"pair": -1}, 404, "no pair -1"),
        ({"pair": "0"}, 422, ""),
        ({"choice": "aligned"}, 422, ""),
        ({"reviewer": ""}, 422, "1 to 40 printable characters"),
        ({"reviewer": "x" * 41}, 422, "1 to 40 printable characters"),
        ({"review": "another"}, 409, "reload the page"),
        ({"more": 1}, 422, ""),
    ],
)
def test_what_is_no_vote_is_refused_and_not_stored(client, tmp_path, body, status, says):
    answer = vote(client, **({"name": "Ann", "pair": 0, "choice": "left"} | body))
    assert answer.status_code == status, answer.text
    assert says in str(answer.json()["detail"])
    assert stored(tmp_path) == []


def test_a_page_of_another_review_sees_no_image(client):
    answer = client.get("/api/images/0/left", params={"reviewer": "Ann", "review": "another"})
    assert (answer.status_code, answer.json()["detail"].endswith("reload the page")) == (409, True)


def test_the_page_loads_nothing_from_elsewhere_and_nothing_is_cached(client):
    page = client.get("/")
    assert not re.search(r"(?:src|href)=\"(?!data:)|https?://|@import", page.text)
    for answer in (page, image(client, "Ann", 0, "left"), client.get("/nowhere")):
        assert answer.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
