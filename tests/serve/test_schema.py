"""Requests that a machine makes up from the OpenAPI description: none may fail inside the server."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error

from kvote.serve.engine import Limits


@pytest.fixture(scope="module")
def operations(start):
    server = start(limits=Limits(context=512, chunk=128))
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


def try_each(operations, examples):
    for operation in operations:

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def tried(case):
            case.call_and_validate(checks=[not_a_server_error], timeout=60)

        tried()


def test_no_request_of_a_few_fails_inside_the_server(operations):
    assert len(operations) >= 12
    try_each(operations, 5)


@pytest.mark.slow
def test_no_request_of_many_fails_inside_the_server(operations):
    try_each(operations, 40)
