"""Reads OpenTelemetry's variables, writes spans to the collector that they name: traces of requests, by choice.

Serve makes a span for each hop of a request (proxy, ingress, generator) and joins them into one trace; ours lie below.
Nodes name ``processors`` in RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH; `cca serve` does so where there is a collector.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

from cca_core.config import ConfigError

#: The collector's address, as for any program that speaks OpenTelemetry; without it, nothing is traced.
VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
#: What Serve asks: who sends spans, and which share of the requests is traced. OpenTelemetry's names for a service.
SETTINGS = {
    "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "deploy.tracing:processors",
    "RAY_SERVE_TRACING_SAMPLING_RATIO": "1",
    "OTEL_SERVICE_NAME": "cca",
}
tracer = trace.get_tracer("cca")


def switch_on() -> None:
    """Have the processes that are started from here send spans, where a collector is named."""
    if not os.environ.get(VARIABLE):
        return
    try:
        _exporter()
    except ImportError as error:
        message = f"{VARIABLE} is set, and no package sends traces: pip install 'cca-pipeline[tracing]', or unset it"
        raise ConfigError(message) from error
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def processors() -> list[SpanProcessor]:
    """What Serve hands its spans to, in every process of the service."""
    return [BatchSpanProcessor(_exporter()())]


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[trace.Span]:
    """A span below Serve's; one that keeps nothing where the request is not traced."""
    if not trace.get_current_span().is_recording():
        yield trace.INVALID_SPAN
        return
    # A refusal is an outcome and no fault, and a stack trace of a fault is in the service's log.
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as made:
        describe(made, **attributes)
        yield made


def describe(described: trace.Span, **attributes: Any) -> None:
    """Set attributes ``cca.NAME``, those that are known."""
    described.set_attributes({f"cca.{name}": value for name, value in attributes.items() if value is not None})


def _exporter() -> type[SpanExporter]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # an optional package

    return OTLPSpanExporter
