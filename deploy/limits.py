"""Reads and writes nothing: how much each holder of a key has asked for, counted in this process."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from deploy.api import ApiError
from deploy.keys import Holder

MINUTE_S = 60.0
DAY_S = 86_400


class Limits:
    """Requests of the last minute and images of the day (UTC), by name.

    Ingress replicas share nothing: each counts what it sees, and a restart begins anew.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.requests: defaultdict[str, deque[float]] = defaultdict(deque)
        self.day = 0
        self.images: defaultdict[str, int] = defaultdict(int)

    @contextmanager
    def admitted(self, name: str, holder: Holder, images: int) -> Iterator[None]:
        """Count a request and its images; ApiError 429 where it is one too many. Images that do not leave because the
        request fails are given back."""
        self._count_request(name, holder.requests_per_minute)
        day = self._count_images(name, holder.images_per_day, images)
        try:
            yield
        except BaseException:
            if day == self.day:
                self.images[name] -= images
            raise

    def _count_request(self, name: str, limit: int | None) -> None:
        if limit is None:
            return
        now, recent = self.clock(), self.requests[name]
        while recent and recent[0] <= now - MINUTE_S:
            recent.popleft()
        if len(recent) >= limit:
            wait_s = max(1, math.ceil(recent[-limit] + MINUTE_S - now))
            message = f"{name} may send {limit} requests a minute: try again in {wait_s} s"
            raise ApiError(429, message, None, "rate_limit_exceeded", wait_s)
        recent.append(now)

    def _count_images(self, name: str, limit: int | None, images: int) -> int:
        now = self.clock()
        if int(now // DAY_S) != self.day:
            self.day = int(now // DAY_S)
            self.images.clear()
        if limit is not None and self.images[name] + images > limit:
            left = limit - self.images[name]
            message = f"{name} may draw {limit} images a day (UTC) and has {left} left, this request asks for {images}"
            raise ApiError(429, message, "n", "insufficient_quota", math.ceil(DAY_S - now % DAY_S))
        self.images[name] += images
        return self.day
