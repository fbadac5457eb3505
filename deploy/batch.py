"""Reads batches of requests as JSON lines, writes an answer per line as soon as it is there, in OpenAI's form."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from deploy.access import Access, Record
from deploy.answers import whole
from deploy.api import BATCH_S, GENERATIONS, INTERNAL, ApiError, ImageRequest, json_object, plain, requested
from deploy.fleet import Fleet

log = logging.getLogger("ray.serve")
MAX_BATCH_BYTES = 1024**2
#: Images of one batch. Answers wait in memory for a client that reads slowly.
MAX_BATCH_IMAGES = 2000
#: Images of all batches of this process that are drawn at once, half of a generator's slots: so many are at most ahead
#: of anyone else's request. A line of more is drawn alone.
AT_ONCE = 8
#: Refusals that are not for good: a batch has time.
LATER = ("busy", "unavailable", "rate_limit_exceeded")
FIELDS = ("custom_id", "method", "url", "body")
EXPIRED = {"code": "batch_expired", "message": f"the line was not done within the {BATCH_S:.0f} s of a batch"}
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Line:
    """One request of a batch, or what is wrong with it."""

    number: int
    custom_id: str | None
    asked: ImageRequest | ApiError


def parse_batch(body: bytes) -> list[Line]:
    """The lines of a batch. A wrong line is one of them; ApiError where there are none or too many."""
    texts = [(number, text) for number, text in enumerate(body.split(b"\n"), 1) if text.strip()]
    if not texts:
        raise ApiError(400, "the batch is empty: send one request per line", None, "invalid_value")
    lines = [_line(number, text) for number, text in texts[: MAX_BATCH_IMAGES + 1]]
    if sum(line.asked.n if isinstance(line.asked, ImageRequest) else 1 for line in lines) > MAX_BATCH_IMAGES:
        message = f"the batch asks for more than {MAX_BATCH_IMAGES} images: send it in parts"
        raise ApiError(400, message, None, "invalid_value")
    return lines


def _line(number: int, text: bytes) -> Line:
    custom_id = None
    try:
        fields = json_object(text, "line")
        given = fields.get("custom_id")
        if not isinstance(given, str | None):
            raise ApiError(400, "custom_id: a string", "custom_id", "invalid_value")
        custom_id = given
        for name in fields:
            if name not in FIELDS:
                raise ApiError(400, f"{plain(name)}: a line has {', '.join(FIELDS)}", plain(name), "unknown_parameter")
        if (fields.get("method", "POST"), fields.get("url", GENERATIONS)) != ("POST", GENERATIONS):
            raise ApiError(400, f"url: a line asks for POST {GENERATIONS}", "url", "invalid_value")
        if not isinstance(fields.get("body"), dict):
            raise ApiError(400, f"body: the JSON object that {GENERATIONS} takes", "body", "invalid_value")
        asked = requested(fields["body"])
        if asked.stream:
            raise ApiError(400, "stream: a batch has whole answers, leave it out", "stream", "unsupported_value")
    except ApiError as error:
        return Line(number, custom_id, error)
    return Line(number, custom_id, asked)


class Share:
    """So many images are drawn at once, in the order in which they are asked for."""

    def __init__(self, images: int) -> None:
        self.images, self._free, self._first = images, asyncio.Semaphore(images), asyncio.Lock()

    @asynccontextmanager
    async def of(self, images: int) -> AsyncIterator[None]:
        """A part of the share; who asks for more than all of it takes all."""
        taken = 0
        try:
            async with self._first:  # one that needs much is not overtaken for ever by those that need less
                while taken < min(images, self.images):
                    await self._free.acquire()
                    taken += 1
            yield
        finally:
            for _ in range(taken):
                self._free.release()


class Batches:
    """Draws batches beside other requests."""

    def __init__(self, fleet: Fleet, access: Access) -> None:
        self.fleet, self.access, self.share = fleet, access, Share(AT_ONCE)

    async def answers(self, request_id: str, authorization: str | None, lines: Sequence[Line]) -> AsyncIterator[str]:
        """A JSON line per line of the batch, in the order in which they are done. Whoever stops listening ends them."""
        until = asyncio.get_running_loop().time() + BATCH_S
        waiting, done = iter(lines), asyncio.Queue[str]()

        async def work() -> None:
            for line in waiting:
                done.put_nowait(await self._answer(f"{request_id}:{line.number}", authorization, line, until))

        # No more tasks than can draw: batches take turns.
        workers = [asyncio.create_task(work()) for _ in range(min(AT_ONCE, len(lines)))]
        try:
            for _ in lines:
                yield await done.get()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _answer(self, request_id: str, authorization: str | None, line: Line, until: float) -> str:
        response: dict[str, Any] | None = None
        expired = None
        try:
            async with asyncio.timeout_at(until):
                response = _response(request_id, 200, await self._drawn(request_id, authorization, line))
        except ApiError as error:
            response = _response(request_id, error.status, error.body())
        except TimeoutError:
            expired = EXPIRED
        except Exception as error:
            log.error("line %s failed", request_id, exc_info=error)
            response = _response(request_id, INTERNAL.status, INTERNAL.body())
        about = {"id": request_id, "custom_id": line.custom_id, "line": line.number}
        return json.dumps({**about, "response": response, "error": expired}) + "\n"

    async def _drawn(self, request_id: str, authorization: str | None, line: Line) -> dict[str, Any]:
        with self.access.recorded(request_id) as record, ExitStack() as stack:
            found = self.access.holder(authorization)  # it may have ended since the batch began
            record.key = found[0] if found else None
            if isinstance(line.asked, ApiError):
                raise line.asked
            record.asked = asked = line.asked

            async def admit() -> None:
                stack.enter_context(self.access.admitted(found, asked.n))

            await _patiently(record, admit)
            async with self.share.of(asked.n):
                drawn = await _patiently(record, lambda: self.fleet.draw(asked))
                record.drew(drawn)
                answer = await whole(asked, drawn)
            record.outcome = "ok"
        return answer


def _response(request_id: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    return {"status_code": status, "request_id": request_id, "body": body}


async def _patiently(record: Record, attempt: Callable[[], Awaitable[Answer]]) -> Answer:
    """What the attempt gives, made again for as long as it is refused for now."""
    while True:
        record.started = time.perf_counter()  # to wait for one's turn is no slowness of the service
        try:
            return await attempt()
        except ApiError as refused:
            if refused.code not in LATER:
                raise
            wait_s = refused.retry_after_s or 1
        await asyncio.sleep(wait_s)
