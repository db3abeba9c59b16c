"""Shared building blocks of the OpenAPI operations: headers, parameters, bodies and answers."""

from collections.abc import Mapping
from typing import Any

from proxy.http.openapi.problems import MALFORMED, Responses, problem_responses

Object = Mapping[str, Any]

EXAMPLE_BODY = [{"model": "JuggernautXL", "batch_size": 1, "prompt": {"positive": "a cat"}}]
EXAMPLE_KEY = "f0a9e2b7c1d84e6f95b3a7d2c8e1f4063b5a9d7e2f8c1b4a6d3e9f7058c2b1a4"


def headers(*names: str) -> dict[str, Object]:
    """References to headers; a name is that of the header without its hyphens."""
    return {_HEADER_NAMES.get(name, name): {"$ref": f"#/components/headers/{name}"} for name in names}


_HEADER_NAMES = {
    "BalanceAge": "Estimate-Proxy-Balance-Age",
    "CacheStatus": "Cache-Status",
    "NoStore": "Cache-Control",
    "RateLimitPolicy": "RateLimit-Policy",
    "RequestId": "X-Request-Id",
    "ServerTiming": "Server-Timing",
    "Warning": "Estimate-Proxy-Warning",
}

ADMISSION_HEADERS = headers("RateLimit", "RateLimitPolicy", "ServerTiming")
ESTIMATE_HEADERS = {**ADMISSION_HEADERS, **headers("CacheStatus", "Age", "BalanceAge", "Warning")}
_STATIC_HEADERS = headers("ETag", "RequestId")


def query(name: str, schema: Object, description: str, **more: Any) -> Object:
    return {"name": name, "in": "query", "schema": schema, "description": description, **more}


PARAMETERS: list[Object] = [{"$ref": "#/components/parameters/RequestId"}]


def json_answer(schema: str, description: str, example: Any, more_headers: Object | None = None) -> Object:
    """A response with a JSON body. Every response has the header `X-Request-Id`."""
    return {
        "description": description,
        "headers": {**(more_headers or {}), **headers("RequestId")},
        "content": {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}, "example": example},
        },
    }


def json_body(schema: str, examples: Mapping[str, Any]) -> Object:
    content = {
        "schema": {"$ref": f"#/components/schemas/{schema}"},
        "examples": {name: {"value": value} for name, value in examples.items()},
    }
    return {"required": True, "content": {"application/json": content}}


def tokens(*kinds: str) -> list[Object]:
    return [{f"{kind}Token": []} for kind in kinds]


def static_answers(media_type: str, description: str) -> Responses:
    """The responses of a file that is served to everybody."""
    return {
        "200": {
            "description": description,
            "headers": _STATIC_HEADERS,
            "content": {media_type: {"schema": {"type": "object" if media_type == "application/json" else "string"}}},
        },
        "304": {"description": "The client's copy (`If-None-Match`) is current.", "headers": _STATIC_HEADERS},
        **problem_responses(MALFORMED),
    }
