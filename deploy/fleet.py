"""Reads requests, writes which generator answers each: the champion's, or for a share of them a canary's.

A canary harms no client: what it does not draw, the champion draws with the same seed. It is judged by what it answers,
beside the champion at the same time, and gets no request any more once it is worse.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ray.serve.handle import DeploymentHandle

from deploy import calls
from deploy.api import ANSWER_S, ApiError, ImageRequest
from deploy.generator import BLOCKED, Drawn

log = logging.getLogger("ray.serve")
#: Fewer requests that went wrong say nothing.
MIN_WRONG = 3
#: The share that may go wrong beyond twice the champion's.
MAX_WRONG_SHARE = 0.05
#: Answers of each side before their times are compared, and how many of the last ones are.
MIN_ANSWERS, LAST_ANSWERS = 20, 100
#: Times the champion's median, and seconds on top: what the clock of a short answer may be wrong by.
MAX_SLOWER, SLACK_S = 1.5, 0.02


@dataclass
class Side:
    """What is known of the answers of one version since the canary began."""

    requests: int = 0
    failed: int = 0
    blocked: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LAST_ANSWERS))

    def answered(self, seconds: float) -> None:
        self.requests += 1
        self.seconds.append(seconds)

    def wrong(self, error: Exception) -> None:
        """Count an answer that is none: the content filter's, or a failure."""
        self.requests += 1
        if isinstance(error, ApiError) and error.code == BLOCKED:
            self.blocked += 1
        else:
            self.failed += 1

    def said(self) -> dict[str, Any]:
        median = round(statistics.median(self.seconds), 4) if self.seconds else None
        return {
            "requests": self.requests,
            "failed": self.failed,
            "blocked": self.blocked,
            "median_seconds": median,
        }


@dataclass
class Canary:
    """A version on trial, and its share of the requests."""

    version: str
    share: float
    #: Why it gets no request any more; empty while it gets its share.
    ended: str = ""
    canary: Side = field(default_factory=Side)
    champion: Side = field(default_factory=Side)
    _due: float = 0.0

    def takes(self, asked: ImageRequest) -> bool:
        """Whether this request is the canary's: every 1 / share-th one, and whoever asks for its version."""
        if self.ended:
            return False
        if asked.model is not None and "/" in asked.model:
            return asked.model == self.version
        self._due += self.share
        if self._due < 1 - 1e-9:  # ten times 0.1 is a little less than 1
            return False
        self._due -= 1
        return True

    def judge(self) -> None:
        """End the trial where the canary is worse than the champion."""
        canary, champion = self.canary, self.champion
        if _more(canary.failed, canary.requests, champion.failed, champion.requests):
            self.ended = f"{canary.failed} of {canary.requests} requests failed"
        elif _more(canary.blocked, canary.requests, champion.blocked, champion.requests):
            self.ended = f"its content filter blocked {canary.blocked} of {canary.requests} requests"
        elif min(len(canary.seconds), len(champion.seconds)) >= MIN_ANSWERS:
            own, other = statistics.median(canary.seconds), statistics.median(champion.seconds)
            if own > MAX_SLOWER * other + SLACK_S:
                self.ended = f"its answers take {own:.2f} s, the champion's {other:.2f} s (medians)"

    def said(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "share": self.share,
            "ended": self.ended,
            "canary": self.canary.said(),
            "champion": self.champion.said(),
        }


def _more(count: int, requests: int, champions: int, champions_requests: int) -> bool:
    """Whether more goes wrong than may: counts of the canary, then of the champion."""
    expected = champions / champions_requests if champions_requests else 0.0
    return count >= MIN_WRONG and count > requests * (2 * expected + MAX_WRONG_SHARE)


class Fleet:
    """The generators behind the API.

    Args:
        champion: the generators that every request may go to.
        find_canary: gives the canary's generators; asked when the first request is theirs.
        on_trial: is told a canary's version, and whether it is worse than the champion.
    """

    def __init__(
        self,
        champion: DeploymentHandle,
        find_canary: Callable[[], DeploymentHandle],
        on_trial: Callable[[str, bool], None],
    ) -> None:
        self.champion, self.find_canary, self.on_trial = champion, find_canary, on_trial
        self.canary: Canary | None = None

    def configure(self, version: str = "", share: float = 0.0) -> None:
        """Begin a canary, or end it where no version is named. One that goes on keeps what is known of it."""
        if self.canary is not None:
            if (self.canary.version, self.canary.share) == (version, share):
                return
            self.on_trial(self.canary.version, False)  # nothing is left to be done about it
        self.canary = Canary(version, share) if version else None

    def said(self) -> dict[str, Any] | None:
        """The canary's state, as GET /canary shows it; None where there is none."""
        return self.canary.said() if self.canary else None

    async def info(self, within_s: float = ANSWER_S) -> dict[str, Any]:
        """What the champion's generators serve."""
        return await calls.info(self.champion, within_s)

    async def draw(self, asked: ImageRequest) -> Drawn:
        """All images of a request; ApiError where it is refused or its time is over."""
        (drawn,) = [answer async for answer in self._each(asked, _whole)]
        return drawn

    async def draw_each(self, asked: ImageRequest) -> AsyncGenerator[tuple[int, Drawn]]:
        """The images of a request with their indices, each as soon as it is finished, all of one version."""
        async with aclosing(self._each(asked, calls.draw_each)) as answers:
            async for answer in answers:
                yield answer

    async def _each(self, asked: ImageRequest, ask: Callable[..., AsyncGenerator[Any]]) -> AsyncGenerator[Any]:
        """What ``ask`` gives of the generators whose turn it is."""
        trial, started = self.canary, time.perf_counter()
        within_s = asked.timeout_s or ANSWER_S
        refused: Exception | None = None
        if trial is not None and trial.takes(asked):
            begun = False
            try:
                # Half of the time, so that the champion has the other half.
                async with aclosing(ask(self.find_canary(), asked, within_s / 2)) as answers:
                    async for answer in answers:
                        begun = True
                        yield answer
                trial.canary.answered(time.perf_counter() - started)
                self._judge(trial)
                return
            except Exception as error:  # whatever it is: it is the canary's
                if begun or asked.model == trial.version:
                    trial.canary.wrong(error)
                    self._judge(trial)
                    raise
                log.warning("canary %s did not draw: %s", trial.version, error)
                refused = error
        try:
            left_s = within_s - (time.perf_counter() - started)
            async with aclosing(ask(self.champion, asked, left_s)) as answers:
                async for answer in answers:
                    yield answer
            if refused is None and trial is not None:
                trial.champion.answered(time.perf_counter() - started)
        except Exception as error:
            if trial is not None and refused is None and _counts(error):
                trial.champion.wrong(error)
            if refused is not None and not _counts(refused) and not _counts(error):
                refused = None  # both say that the request is wrong
            raise
        finally:
            if trial is not None and refused is not None:
                trial.canary.wrong(refused)
                self._judge(trial)

    def _judge(self, trial: Canary) -> None:
        if trial.ended:
            return
        trial.judge()
        if trial.ended:
            log.error("canary %s is rolled back: %s", trial.version, trial.ended)
            self.on_trial(trial.version, True)


async def _whole(generator: DeploymentHandle, asked: ImageRequest, within_s: float) -> AsyncGenerator[Drawn]:
    yield await calls.draw(generator, asked, within_s)


def _counts(error: Exception) -> bool:
    """Whether an error says something of the generators, not of the request."""
    return not isinstance(error, ApiError) or error.status >= 500 or error.code in (BLOCKED, calls.DEADLINE)
