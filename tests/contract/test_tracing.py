"""Reads the environment: traces are off unless a collector is named, and need a package that sends them."""

from __future__ import annotations

import os
import sys

import pytest

from cca_core.config import ConfigError
from deploy import tracing


@pytest.fixture
def environment(monkeypatch):
    for name in (tracing.VARIABLE, *tracing.SETTINGS):
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    for name in tracing.SETTINGS:
        os.environ.pop(name, None)


def switched_on() -> dict[str, str]:
    tracing.switch_on()
    return {name: os.environ[name] for name in tracing.SETTINGS if name in os.environ}


def test_nothing_is_traced_unless_a_collector_is_named(environment):
    assert switched_on() == {}
    with tracing.span("images", n=1) as made:
        assert not made.is_recording()


def test_a_collector_is_enough_and_what_is_set_already_stays(environment):
    environment.setenv(tracing.VARIABLE, "http://127.0.0.1:1")
    environment.setenv("RAY_SERVE_TRACING_SAMPLING_RATIO", "0.1")
    assert switched_on() == {**tracing.SETTINGS, "RAY_SERVE_TRACING_SAMPLING_RATIO": "0.1"}


def test_a_missing_package_is_said(environment):
    environment.setenv(tracing.VARIABLE, "http://127.0.0.1:1")
    environment.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"pip install 'cca-pipeline\[tracing\]'"):
        tracing.switch_on()
