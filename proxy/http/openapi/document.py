"""`GET /openapi.json`: the OpenAPI 3.1 document of every path that the gateway serves.

It is the same for every gateway of a version, so that clients can be generated from any of them. To add a path, add an
`Operation` to `PATHS`; to add a problem code, an example to `problems.EXAMPLES`.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import orjson

from proxy import __version__
from proxy.http.openapi import operator_operations as operators
from proxy.http.openapi import team_operations as teams
from proxy.http.openapi.parts import Operation
from proxy.http.openapi.problems import EXAMPLE_REQUEST_ID, example_components
from proxy.http.openapi.schemas import SCHEMAS, Object
from proxy.http.paths import (
    DOCS_PATH,
    EXPLAIN_PATH,
    LEARNED_PATH,
    LIVENESS_PATH,
    METRICS_PATH,
    OPENAPI_PATH,
    PAGE_PATH,
    PRICE_CHANGES_PATH,
    PURGE_PATH,
    QUOTA_PATH,
    QUOTE_PATH,
    READINESS_PATH,
    TOKEN_PATH,
    USAGE_PATH,
)
from proxy.http.static_files import StaticFile
from proxy.upstream.address import ESTIMATE_PATH

PATHS: Mapping[str, Operation] = {
    ESTIMATE_PATH: teams.ESTIMATE,
    QUOTE_PATH: teams.QUOTE,
    QUOTA_PATH: teams.QUOTA,
    USAGE_PATH: teams.USAGE,
    TOKEN_PATH: teams.TOKEN,
    EXPLAIN_PATH: teams.EXPLAIN,
    LEARNED_PATH: operators.LEARNED,
    PRICE_CHANGES_PATH: operators.PRICE_CHANGES,
    PURGE_PATH: operators.PURGE,
    METRICS_PATH: operators.METRICS,
    LIVENESS_PATH: operators.LIVENESS,
    READINESS_PATH: operators.READINESS,
    PAGE_PATH: operators.PAGE,
    OPENAPI_PATH: operators.OPENAPI,
    DOCS_PATH: operators.DOCS,
}

_DESCRIPTION = """\
A shared gateway for RenderNet's price estimates. Teams call it with their own tokens; it adds the account's API key,
caches prices, and enforces rates and quotas.

Send a token as `X-API-KEY`, or as `Authorization: Bearer <token>`. Send bodies as `application/json`, uncompressed.
Amounts are credits that teams estimated, not what RenderNet charged. They are exact decimal numbers: a program that
adds them should not read them as doubles.

An error is a problem document (RFC 9457) with RenderNet's own members besides: `error.code` is stable. A path that is
not served is 404 `not-found`, a wrong method 405 `method-not-allowed`. Pages of other origins can call the API if
the operator lists them in `server.cors_origins`; their preflights get 204, all others 403 `forbidden`."""

_TAGS = [
    {"name": "Teams", "description": "What teams call."},
    {"name": "Operators", "description": "What operators and their monitoring call."},
    {"name": "Documentation", "description": "What people open in a browser, and this description."},
]

_TOKENS = {
    "Team": "A team's token: `estimate-proxy token new TEAM`.",
    "Viewer": "Reads the reports of all teams: `estimate-proxy token new --viewer`.",
    "Admin": "Reads the reports of all teams, and purges: `estimate-proxy token new --admin`.",
    "Metrics": "Reads `/metrics`: `estimate-proxy token new --metrics`.",
}

_NUMBER = {"type": "integer", "minimum": 0}
_TEXT = {"type": "string"}


def _text_header(description: str, *, example: str) -> Object:
    return {"description": description, "schema": _TEXT, "example": example}


_HEADERS: Mapping[str, Object] = {
    "Age": {"description": "Seconds since RenderNet said it, if the answer is a stored one.", "schema": _NUMBER},
    "BalanceAge": {"description": "Seconds since RenderNet reported the balance.", "schema": _NUMBER},
    "CacheStatus": _text_header("How the answer was found (RFC 9211).", example="estimate-proxy; hit; ttl=288"),
    "ETag": {"description": "The version of the file.", "required": True, "schema": _TEXT},
    "NoStore": {"description": "Not to be cached.", "required": True, "schema": {"const": "no-store"}},
    "RateLimit": _text_header(
        "What the rate and each quota have left (draft-ietf-httpapi-ratelimit-headers-11).",
        example='"rate";r=57;t=1, "credits-month";r=4923;t=694800',
    ),
    "RateLimitPolicy": _text_header(
        "The rate and the quotas.", example='"rate";q=100;w=2, "credits-month";q=5000;qu="credits";w=2592000'
    ),
    "RequestId": {
        "description": "The caller's, or a new one.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
        "example": EXAMPLE_REQUEST_ID,
    },
    "RetryAfter": {"description": "Seconds to wait, if they are at most an hour.", "schema": _NUMBER},
    "ServerTiming": _text_header(
        "Where the time went, in milliseconds.", example="cache;desc=miss, store;dur=0.4, upstream;dur=182.1"
    ),
    "WWWAuthenticate": {"description": "How to send a token.", "required": True, "schema": {"const": "Bearer"}},
    "Warning": _text_header("The `warn` quotas that this answer exceeds.", example='"credits-month"'),
}


def _header_parameter(name: str, description: str, schema: Object = _TEXT, **more: Any) -> Object:
    return {"name": name, "in": "header", "description": description, "schema": schema, **more}


_PARAMETERS: Mapping[str, Object] = {
    "CacheControl": _header_parameter(
        "Cache-Control",
        "`no-cache` asks RenderNet and stores the answer, `no-store` asks RenderNet and stores nothing, "
        "`max-age=N` accepts an answer that is at most N seconds old, `only-if-cached` never asks RenderNet.",
        example="max-age=60",
    ),
    "MaxCredits": _header_parameter(
        "Estimate-Proxy-Max-Credits",
        "A price above this many credits is refused with 402 `over-ceiling`. At most 6 decimals.",
        {"type": "string", "pattern": "^[0-9]+([.][0-9]{1,6})?$"},
        example="20",
    ),
    "RequestId": _header_parameter(
        "X-Request-Id", "The caller's id of the request: 1 to 128 of `[A-Za-z0-9._-]`. Any other is replaced."
    ),
}


def openapi_document() -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "estimate-proxy",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": ".", "description": "This gateway."}],
        "tags": _TAGS,
        "paths": {path: {operation.method: operation.document()} for path, operation in PATHS.items()},
        "components": {
            "securitySchemes": {
                f"{kind}Token": {"type": "apiKey", "in": "header", "name": "X-API-KEY", "description": description}
                for kind, description in _TOKENS.items()
            },
            "schemas": SCHEMAS,
            "headers": _HEADERS,
            "parameters": _PARAMETERS,
            "examples": example_components(),
        },
    }


@cache
def openapi_file() -> StaticFile:
    return StaticFile(orjson.dumps(openapi_document()), "application/json")
