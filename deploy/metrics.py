"""Reads requests' records, engines and Ray's metrics ports, writes Prometheus metrics: what the service says of itself.

Ray carries them, with ``ray_`` before the name and ``_total`` after that of a counter, labelled with the replica. Its
counters are sent as differences every few seconds: what a process counted last may be lost when it is killed.
"""

from __future__ import annotations

import asyncio
import logging
import urllib.request
from collections.abc import Callable, Sequence

import ray
from ray.serve.metrics import Counter, Gauge, Histogram

log = logging.getLogger("ray.serve")
BOUNDARIES_S = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 25.0, 50.0, 100.0)
#: Families that GET /metrics shows of all that Ray exports.
SHOWN = ("ray_cca_", "ray_serve_")
SCRAPE_S = 5.0


class Metrics:
    """The ingress's own metrics."""

    def __init__(self) -> None:
        self.requests = Counter("cca_requests", "Requests for images that have ended.", ("outcome", "model"))
        self.images = Counter("cca_images", "Images that were drawn and encoded.", ("model",))
        self.calls = Counter("cca_model_calls", "Model calls that these images took.", ("model",))
        self.answer = Histogram("cca_answer_seconds", "Until the last image.", BOUNDARIES_S, ("model",))
        self.first = Histogram("cca_first_image_seconds", "Until the first image.", BOUNDARIES_S, ("model",))
        self.worse = Gauge("cca_canary_worse", "1 while a canary that was worse waits to be taken away.", ("model",))
        self.worse.set(0, {"model": ""})  # there from the start: an alert on a series that is missing stays silent
        self.open = Gauge("cca_open_requests", "Requests for images that are being answered.")
        self.now_open = 0

    def begun(self) -> None:
        self._open(1)

    def on_trial(self, model: str, worse: bool) -> None:
        self.worse.set(int(worse), {"model": model})

    def drew(self, model: str, images: int, calls: int) -> None:
        self.images.inc(images, {"model": model})
        self.calls.inc(images * calls, {"model": model})

    def ended(self, outcome: str, model: str, seconds: float, first_image_s: float | None) -> None:
        """Count a request. Only whole answers count for the seconds: a refusal is quick and would flatter them."""
        self._open(-1)
        self.requests.inc(1, {"outcome": outcome, "model": model})
        if first_image_s is not None:
            self.first.observe(first_image_s, {"model": model})
        if outcome == "ok":
            self.answer.observe(seconds, {"model": model})

    def _open(self, change: int) -> None:
        self.now_open += change
        self.open.set(self.now_open)


class SlotMetrics:
    """A generator's own metrics: how full its engine is. Any thread may set them, Ray has a lock of its own."""

    def __init__(self) -> None:
        self.total = Gauge("cca_slots", "Slots of the engine of the version that is served.", ("model",))
        self.used = Gauge("cca_slots_used", "Slots with an image that is being drawn.", ("model",))
        self.waiting = Gauge("cca_images_waiting", "Images that wait for a slot.", ("model",))
        self.model: str | None = None

    def serve(self, model: str, slots: int) -> None:
        """A version takes over; what the one before it still draws is its own."""
        if self.model is not None:
            self.total.set(0, {"model": self.model})
        self.model = model
        self.total.set(slots, {"model": model})
        self.fill(model, 0, 0)

    def fill(self, model: str, used: int, waiting: int) -> None:
        self.used.set(used, {"model": model})
        self.waiting.set(waiting, {"model": model})


def targets() -> list[str]:
    """The metrics page of every node of this process's cluster."""
    alive = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"]]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in alive]


async def joined_page(find: Callable[[], Sequence[str]]) -> str:
    """The service's metrics of all nodes as one page in Prometheus's text format. A node that does not answer is left
    out."""
    urls = await asyncio.to_thread(find)
    pages = await asyncio.gather(*(asyncio.to_thread(_text, url) for url in urls))
    return joined(pages)


def joined(pages: Sequence[str]) -> str:
    """The shown families of several pages, each with one header and the samples of all."""
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in pages:
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                _, kind, family, *_ = line.split(" ", 3)
                known = headers.setdefault(family, [])
                if not any(header.startswith(f"# {kind} ") for header in known):
                    known.append(line)
            elif family and line:
                samples.setdefault(family, []).append(line)
    shown = [family for family in headers if family.startswith(SHOWN)]
    return "".join(f"{line}\n" for family in shown for line in (*headers[family], *samples.get(family, ())))


def _text(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=SCRAPE_S) as answer:  # noqa: S310  (Ray's own address)
            return answer.read().decode()
    except OSError as error:
        log.warning("no metrics from %s: %s", url, error)
        return ""
