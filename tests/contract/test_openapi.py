"""Reads nothing: requests made from the service's OpenAPI document, valid and not, to the API with a fake generator."""

from __future__ import annotations

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from deploy.access import Access
from deploy.routes import http_api
from tests.fake_generator import fleet


@schemathesis.serializer("application/x-ndjson")
def as_it_is(ctx: schemathesis.SerializationContext, value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


API = schemathesis.openapi.from_asgi("/openapi.json", http_api(fleet(), Access(), list))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    unsupported_method,
]


@API.parametrize()
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_what_its_document_says(case):
    case.call_and_validate(checks=CHECKS)
