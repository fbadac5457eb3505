"""Reads a model in memory, draws images: requests of one version share an engine, and finished ones are decoded beside
it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from cca_core.generate import Engine, Sampling, decode_images
from cca_core.metrics.content_filter import ContentFilter
from cca_core.models import ARImageModel, ImageTokenizer, to_uint8
from deploy.tracing import describe, span

log = logging.getLogger("ray.serve")
#: Slots of the engine: images that are drawn at once, half of it where they are guided. It is the shape of every model
#: call, so that another number is another rounding.
SLOTS = 16
#: Images that are decoded at once, again one shape. A CPU is busy with one.
DECODED_AT_ONCE = {"cpu": 1, "cuda": 16}
Task = TypeVar("Task")


class Worker(Generic[Task]):
    """A thread that runs while there is work, and no longer: nobody has to end it with the model it works on."""

    def __init__(self, work: Callable[[list[Task]], bool]) -> None:
        """``work`` is given what has come since its last call, and says whether it has anything left to do."""
        self._work, self._lock = work, threading.Lock()
        self._tasks: list[Task] = []
        self._running = False

    def put(self, task: Task) -> None:
        with self._lock:
            self._tasks.append(task)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        busy = False
        while True:
            with self._lock:
                tasks, self._tasks = self._tasks, []
                if not tasks and not busy:
                    self._running = False
                    return
            try:
                busy = self._work(tasks)
            except BaseException:
                with self._lock:
                    self._running = False  # what comes next has a thread of its own again
                raise


@dataclass(eq=False)
class Job:
    """One image, and who waits for it."""

    class_id: int
    seed: int
    sampling: Sampling
    loop: asyncio.AbstractEventLoop
    image: asyncio.Future[np.ndarray | None]
    #: When it was given slots, as time.perf_counter counts.
    entered: float | None = None

    @property
    def given_up(self) -> bool:
        """Nobody waits any more."""
        return self.image.cancelled()

    def end(self, outcome: np.ndarray | Exception | None) -> None:
        """Hand over the image, None where it is blocked, or the error."""

        def tell() -> None:
            if not self.image.done():
                if isinstance(outcome, Exception):
                    self.image.set_exception(outcome)
                else:
                    self.image.set_result(outcome)

        # A loop that is closed has nobody who waits.
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(tell)


class Drawing:
    """Draws with one model version."""

    def __init__(
        self, model: ARImageModel, tokenizer: ImageTokenizer, content_filter: ContentFilter | None, device: str
    ) -> None:
        self.model, self.tokenizer, self.filter = model, tokenizer, content_filter
        self.at_once = DECODED_AT_ONCE[device]
        self.engine = Engine(model, SLOTS)
        #: Told, in the engine's thread, of slots in use and images that wait for one, when either changes.
        self.report: Callable[[int, int], None] = lambda used, waiting: None
        self._reported = (0, 0)
        self._jobs: dict[int, Job] = {}
        self._drawer, self._decoder = Worker(self._draw), Worker(self._decode)

    async def draw(self, class_id: int, seed: int, sampling: Sampling) -> np.ndarray | None:
        """One uint8 image [H, W, 3]; None where the content filter blocks it. Cancelled, it leaves its slots."""
        loop = asyncio.get_running_loop()
        job = Job(class_id, seed, sampling, loop, loop.create_future())
        with span("image", seed=seed) as traced:
            came = time.perf_counter()
            self._drawer.put(job)
            image = await job.image
            describe(traced, queue_s=job.entered and job.entered - came, blocked=image is None)
        return image

    def _draw(self, new: list[Job]) -> bool:
        """One step of the engine."""
        try:
            for job in new:
                if not job.given_up:
                    (ticket,) = self.engine.submit(torch.tensor([job.class_id]), job.sampling, torch.tensor([job.seed]))
                    self._jobs[ticket] = job
            for ticket in [ticket for ticket, job in self._jobs.items() if job.given_up]:
                self.engine.cancel(ticket)
                del self._jobs[ticket]
            now = time.perf_counter()
            finished = self.engine.step()
            for ticket in (*self.engine.under_way, *(drawn.ticket for drawn in finished)):
                self._jobs[ticket].entered = self._jobs[ticket].entered or now
            for drawn in finished:
                self._decoder.put((self._jobs.pop(drawn.ticket), drawn.tokens_N))
        except Exception as error:
            log.exception("the engine failed: its requests are answered with an error, and it starts afresh")
            for job in {*self._jobs.values(), *new}:
                job.end(error)
            self._jobs.clear()
            self.engine = Engine(self.model, SLOTS)
        fill = (self.engine.used_slots, self.engine.waiting)
        if fill != self._reported:  # far from every step
            self._reported = fill
            self.report(*fill)
        return self.engine.busy

    def _decode(self, drawn: list[tuple[Job, Tensor]]) -> bool:
        """Decode and filter what was drawn since the last call."""
        wanted = [(job, tokens) for job, tokens in drawn if not job.given_up]
        for start in range(0, len(wanted), self.at_once):
            part = wanted[start : start + self.at_once]
            try:
                tokens = torch.stack([tokens for _, tokens in part])
                images = decode_images(self.tokenizer, tokens, batch_size=self.at_once)
                blocked = self.filter.blocked(images, self.at_once) if self.filter else [False] * len(part)
                pixels = to_uint8(images).numpy()
            except Exception as error:
                log.exception("decoding failed: its requests are answered with an error")
                for job, _ in part:
                    job.end(error)
                continue
            for (job, _), image, bad in zip(part, pixels, blocked, strict=True):
                job.end(None if bad else image)
        return False
