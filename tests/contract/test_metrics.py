"""Reads the dashboard, the alert rules and pages of metrics: what they name is there, and what happens is counted."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import ray.serve
import yaml

from deploy.access import Access
from deploy.metrics import SlotMetrics, joined
from deploy.routes import http_api
from tests.fake_generator import VERSION, asking_of, client, fleet

URL = "/v1/images/generations"
#: Names of series that Ray makes of a metric's name.
SERIES = re.compile(r"ray_((?:cca|serve)_\w+?)(?:_total|_bucket|_sum|_count)?\b")


def expressions() -> dict[str, str]:
    """Every expression of the dashboard and of the rules, by what shows it."""
    dashboard = json.loads((files("deploy") / "grafana" / "dashboard.json").read_text())
    rules = yaml.safe_load((files("deploy") / "prometheus" / "rules.yaml").read_text())
    shown = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    alerts = {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    assert len(shown) > 12
    assert len(alerts) > 3
    return {**shown, **alerts}


def made_by(*folders: Path) -> set[str]:
    """Names of metrics in quotes anywhere below."""
    sources = (path.read_text() for folder in folders for path in folder.rglob("*.py"))
    return {name for text in sources for name in re.findall(r'"((?:cca|serve)_\w+)"', text)}


def test_the_dashboard_and_the_rules_name_metrics_that_exist():
    known = made_by(Path(str(files("deploy"))), Path(ray.serve.__file__).parent)
    used = {name: set(SERIES.findall(expression)) for name, expression in expressions().items()}
    assert all(used.values()), "an expression without a metric of the service"
    missing = {name: found - known for name, found in used.items() if found - known}
    assert not missing
    own = made_by(Path(str(files("deploy"))))
    assert own == {name for found in used.values() for name in found if name.startswith("cca_")}, "shown nowhere"


def test_an_alert_says_what_to_do():
    rules = yaml.safe_load((files("deploy") / "prometheus" / "rules.yaml").read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert {"summary", "action"} <= rule["annotations"].keys(), rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")


class Counted:
    """Stands in a metric's place, since Ray's own are sent away."""

    def __init__(self) -> None:
        self.values: list[tuple[Any, ...]] = []

    def record(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values.append((value, *(tags or {}).values()))

    inc = observe = set = record


def test_requests_are_counted_by_outcome_and_version():
    access = Access()
    for name in ("requests", "images", "calls", "answer", "first", "open"):
        setattr(access.metrics, name, Counted())

    async def use() -> None:
        async with client(access=access) as asking:
            await asking.post(URL, json={"prompt": "ant", "n": 3})
            await asking.post(URL, json={"prompt": "ant", "n": 2, "stream": True, "cfg_scale": 1})
            await asking.post(URL, json={"prompt": "dog"})

    asyncio.run(use())
    found = access.metrics
    assert found.requests.values == [(1, "ok", VERSION), (1, "ok", VERSION), (1, "unknown_class", "")]
    assert found.images.values == [(3, VERSION), (1, VERSION), (1, VERSION)]
    assert found.calls.values == [(96, VERSION), (16, VERSION), (16, VERSION)]
    assert len(found.answer.values) == len(found.first.values) == 2, "a refusal is quick, and no answer"
    assert all(first <= whole for (first, _), (whole, _) in zip(found.first.values, found.answer.values, strict=True))
    assert [value for (value,) in found.open.values] == [1, 0] * 3


def test_slots_of_a_version_that_was_replaced_are_no_slots():
    slots = SlotMetrics()
    for name in ("total", "used", "waiting"):
        setattr(slots, name, Counted())
    slots.serve("a/1", 16)
    slots.fill("a/1", 3, 2)
    slots.serve("a/2", 16)
    slots.fill("a/1", 0, 0)
    last = {
        name: {model: value for value, model in getattr(slots, name).values} for name in ("total", "used", "waiting")
    }
    assert last == {
        "total": {"a/1": 0, "a/2": 16},
        "used": {"a/1": 0, "a/2": 0},
        "waiting": {"a/1": 0, "a/2": 0},
    }


@pytest.fixture
def port() -> Iterator[int]:
    """A page of metrics as a node of Ray has it."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"# HELP ray_cca_images_total Images.\n# TYPE ray_cca_images_total counter\n")
            self.wfile.write(b'ray_cca_images_total{a="1"} 2.0\n# TYPE ray_node_cpu gauge\nray_node_cpu 3\n')

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def test_metrics_are_those_of_the_service_of_all_nodes_that_answer(port):
    pages = [f"http://127.0.0.1:{port}/metrics", "http://127.0.0.1:1/metrics"]

    async def use() -> Any:
        async with asking_of(http_api(fleet(), Access(), lambda: pages)) as asking:
            return await asking.get("/metrics")

    answer = asyncio.run(use())
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text.splitlines() == [
        "# HELP ray_cca_images_total Images.",
        "# TYPE ray_cca_images_total counter",
        'ray_cca_images_total{a="1"} 2.0',
    ]


def test_a_family_of_two_nodes_has_one_header():
    pages = [f'# TYPE ray_serve_x gauge\nray_serve_x{{n="{node}"}} {node}\n' for node in (1, 2)]
    assert joined(pages) == '# TYPE ray_serve_x gauge\nray_serve_x{n="1"} 1\nray_serve_x{n="2"} 2\n'
