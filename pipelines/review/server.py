"""Reads pairs of images, writes votes: the HTTP side of the review page.

No answer tells which image is whose: sides are named left and right, images leave as PNG files of equal length, and a
vote is turned into what it means here.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Literal

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from pydantic import BaseModel, ConfigDict

from cca_core.config import ConfigError
from cca_core.stages.review_pairs import Pair
from cca_core.votes import Choice, Vote, VoteStore, aligned_side, counting, reviewer_name

Side = Literal["left", "right"]
OTHER: dict[Side, Side] = {"left": "right", "right": "left"}
HEADERS = {
    # Another review may run on this address later: nothing of this one may be taken for it.
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class VoteRequest(BaseModel):
    """POST /api/votes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    review: str
    reviewer: str
    pair: int
    #: The side that is better, or neither.
    choice: Literal["left", "right", "equal"]


class Opened(BaseModel):
    """GET /api/review: what a reviewer's page starts from."""

    #: Which review this is: a page that was left open must not vote in another one.
    review: str
    reviewer: str
    #: Name of each pair's class.
    classes: list[str]
    #: What the reviewer has chosen, by pair.
    choices: dict[int, Literal["left", "right", "equal"]]


def review_api(pairs: Sequence[Pair], votes: VoteStore, on_vote: Callable[[], None]) -> FastAPI:
    """The page and its API. It keeps nothing: what a reviewer has done is read from the storage.

    Args:
        on_vote: called after each vote is stored.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    page = files("pipelines.review").joinpath("page.html").read_text(encoding="utf-8")
    # A hash, since whoever knew the digest could work out the sides.
    token = hashlib.sha256(f"review {votes.digest}".encode()).hexdigest()[:16]

    @app.middleware("http")
    async def headers(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(ConfigError)
    async def refuse(_: Request, error: ConfigError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 422)

    def check(review: str, pair: int) -> None:
        if review != token:
            raise HTTPException(409, "another review has begun on this address: reload the page")
        if not 0 <= pair < len(pairs):
            raise HTTPException(404, f"there is no pair {pair}: this review has {len(pairs)}")

    @app.get("/")
    def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/api/review")
    def opened(reviewer: str) -> Opened:
        name = reviewer_name(reviewer)
        given = [vote for vote in counting(votes.read(name)) if vote.pair < len(pairs)]
        return Opened(
            review=token,
            reviewer=name,
            classes=[pair.class_name for pair in pairs],
            choices={vote.pair: _seen_choice(vote) for vote in given},
        )

    @app.get("/api/images/{pair}/{side}")
    def image(pair: int, side: Side, reviewer: str, review: str) -> Response:
        check(review, pair)
        aligned = aligned_side(votes.digest, reviewer_name(reviewer), pair) == side
        return Response(_equally_long(pairs[pair].aligned if aligned else pairs[pair].guided), media_type="image/png")

    @app.post("/api/votes")
    def vote(given: VoteRequest) -> dict[str, bool]:
        check(given.review, given.pair)
        name = reviewer_name(given.reviewer)
        choice: Choice = "equal"
        if given.choice != "equal":
            choice = "aligned" if given.choice == aligned_side(votes.digest, name, given.pair) else "guided"
        votes.add(name, given.pair, pairs[given.pair].class_name, choice)
        on_vote()
        return {"saved": True}

    return app


def _seen_choice(vote: Vote) -> Literal["left", "right", "equal"]:
    """A stored vote as the reviewer gave it."""
    if vote.choice == "equal":
        return "equal"
    return vote.aligned_side if vote.choice == "aligned" else OTHER[vote.aligned_side]


def _equally_long(png: bytes) -> bytes:
    """The same image, not compressed: how well one compresses would tell something of it."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").save(out, format="PNG", compress_level=0)
    return out.getvalue()
