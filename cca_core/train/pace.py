"""Reads a clock, writes nothing: how far long work over images is, for whoever watches it."""

from __future__ import annotations

import time
from collections.abc import Callable

#: A record goes out this often, in seconds, and when all is done.
RECORD_EVERY_S = 2.0


class Pace:
    """Turns "so many images are done" into records of progress: images, share, images per second, seconds left."""

    def __init__(self, on_log: Callable[[dict[str, float]], None], total: int, done: int = 0) -> None:
        """``done`` images of ``total`` were done before, at no cost now."""
        self._on_log, self._total, self._before = on_log, total, done
        self._started, self._last = time.monotonic(), 0.0

    def __call__(self, done: int, **more: float) -> None:
        now = time.monotonic()
        if now - self._last < RECORD_EVERY_S and done < self._total:
            return
        self._last = now
        rate = (done - self._before) / max(now - self._started, 1e-9)
        self._on_log(
            {
                "step": done,
                "images": done,
                "share_done": done / self._total,
                "images_per_s": rate,
                "seconds_left": (self._total - done) / max(rate, 1e-9),
                **more,
            }
        )
