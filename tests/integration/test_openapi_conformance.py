"""Answers to generated requests are as the OpenAPI document describes them: status, type, headers and schema.

Requests are valid and invalid ones, with a token of each kind. Schemas are checked strictly: a member that is not
described is an error, too.
"""

from typing import Any

import orjson
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from gateway_fixture import DESIGN, RETIRED, GatewayFixture, OpenGateway, answers
from past_usage import put_past_usage
from proxy.auth import digest_of, token_of
from proxy.http.openapi.document import openapi_document
from proxy.http.openapi.parts import EXAMPLE_BODY
from quota_fixture import ADMIN, FLUX, ONE, SEGMENT, quota
from serving import wait_until

VIEWER, METRICS = (token_of(letter * 32) for letter in "vp")
TOKENS = {
    "a team": DESIGN,
    "a disabled team": RETIRED,
    "a viewer": VIEWER,
    "an admin": ADMIN,
    "metrics": METRICS,
    "nobody": "ep_unknown",
}
CHECKS = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]
QUERIES = {
    "/v1/learned": [{"account": "default"}],
    "/v1/prices/changes": [{"account": "default"}, {"format": "csv"}],
    "/v1/quota": [{"team": "design"}],
    "/v1/usage": [{"by": "day,week,month,model"}, {"by": "team"}, {"model": "Flux"}, {"format": "csv"}],
}
EXAMPLES = 8
"""Generated requests for each operation."""


def strict(value: Any) -> Any:
    """The document with every object closed that does not say that it is open."""
    if isinstance(value, list):
        return [strict(item) for item in value]
    if not isinstance(value, dict):
        return value
    closed = {name: strict(member) for name, member in value.items()}
    return (
        {"additionalProperties": False, **closed} if value.get("type") == "object" and "properties" in value else closed
    )


def _results(document: Any) -> Any:
    """Untyped: an operation that is not valid has no `ok`, and fails the import."""
    return document.get_all_operations()


DOCUMENT = schemathesis.openapi.from_dict(strict(orjson.loads(orjson.dumps(openapi_document()))))
PATHS: dict[str, Any] = openapi_document()["paths"]
OPERATIONS = {described.label: described for described in (found.ok() for found in _results(DOCUMENT))}


@pytest.fixture
def gateway(open_gateway: OpenGateway) -> GatewayFixture:
    """A gateway whose reports have everything that they can have."""
    quotas = [quota(100), quota(1, "day", "requests", "warn")]
    opened = open_gateway(
        store={"timeout_s": 5},
        admin={"tokens": [digest_of(ADMIN)]},
        viewer={"tokens": [digest_of(VIEWER)]},
        metrics={"tokens": [digest_of(METRICS)]},
        org={"quotas": [quota(0, "week", on_exceed="warn")], "currency": {"code": "EUR", "per_credit": "0.002"}},
        teams={
            "design": {"name": "Design", "tokens": [digest_of(DESIGN)], "quotas": quotas},
            "retired": {"tokens": [digest_of(RETIRED)], "disabled": True},
        },
    )
    put_past_usage(opened.store, "design", [5] * 40)
    for body in (FLUX, FLUX, ONE, SEGMENT, orjson.dumps(EXAMPLE_BODY)):
        assert opened.ask(body).status_code == 200
    opened.simulator.script(answers(b'{"data":{"estimated":7,"balance":1},"error":{}}'))
    assert opened.ask(FLUX, cache_control="no-cache").json()["data"]["estimated"] == 7
    wait_until(lambda: shown(opened, "/v1/prices/changes")["changes"])
    wait_until(lambda: shown(opened, "/v1/learned")["accounts"][0]["scopes"])
    assert "forecast" in shown(opened, "/v1/quota?team=design")["quotas"][0]
    return opened


def shown(gateway: GatewayFixture, path: str) -> Any:
    return gateway.client.get(path, headers={"x-api-key": ADMIN}).json()


def test_the_document_is_openapi_3_1() -> None:
    DOCUMENT.validate()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_answers_are_as_described(gateway: GatewayFixture, operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    described = OPERATIONS[operation]
    modes = {mode: described.as_strategy(generation_mode=mode) for mode in GenerationMode}
    with requests.Session() as session:

        def send(case: Case[Any], token: str | None) -> int:
            headers = {} if token is None else {"X-API-KEY": token}
            if operation == "GET /":
                headers["Accept"] = "text/html"
            response = case.call_and_validate(gateway.url, session, headers, checks=CHECKS)
            assert response.status_code != 500
            return response.status_code

        @bounds(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.data())
        def try_generated(data: st.DataObject) -> None:
            token = data.draw(st.sampled_from([*TOKENS.values(), None]), "token")
            mode = data.draw(st.sampled_from(list(GenerationMode)), "mode")
            send(data.draw(modes[mode], "case"), token)

        seen = [send(case, token) for token in TOKENS.values() for case in documented_cases(operation)]
        assert 200 in seen
        try_generated()


def documented_cases(operation: str) -> list[Case[Any]]:
    """The requests that the document has as examples, and those of `QUERIES`."""
    method, path = operation.split(" ")
    case, body = OPERATIONS[operation].Case, PATHS[path][method.lower()].get("requestBody")
    if body is None:
        return [case(query=query) for query in ({}, *QUERIES.get(path, ()))]
    (media_type, content), *_ = body["content"].items()
    return [case(body=example["value"], media_type=media_type) for example in content["examples"].values()]
