"""Reads and writes nothing: calls to a server that outlast it while it is away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)

#: So long a server may be away, in seconds: a restart, a move to another machine.
AWAY_S = 300.0
#: So long a local file may be locked by another process.
LOCKED_S = 15.0
LOOK_AGAIN_S = 5.0

log = logging.getLogger(__name__)
Args = ParamSpec("Args")
Result = TypeVar("Result")


class Patience:
    """Repeats a call whose error says that the server is ``away``, for ``seconds`` at most and until ``stopped`` is
    set; then the error is the call's own."""

    def __init__(
        self, server: str, away: Callable[[BaseException], bool], seconds: float, stopped: threading.Event
    ) -> None:
        self.server, self.away, self.seconds, self.stopped = server, away, seconds, stopped

    def __call__(self, call: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs) -> Result:
        retrying = Retrying(
            retry=retry_if_exception(self.away),
            wait=wait_random_exponential(multiplier=0.5, max=LOOK_AGAIN_S),
            stop=stop_any(stop_after_delay(self.seconds), stop_when_event_set(self.stopped)),
            sleep=sleep_using_event(self.stopped),
            before_sleep=self._say,
            reraise=True,
        )
        return retrying(call, *args, **kwargs)

    def _say(self, state: RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome:
            reason = str(state.outcome.exception()).splitlines()[0]
            log.warning("%s is away, waiting up to %.0f s for it: %s", self.server, self.seconds, reason[:200])
