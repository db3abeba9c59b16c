"""The paths of the OpenAPI document: one entry for each path that the gateway serves."""

from collections.abc import Mapping
from typing import Any

from proxy.http.openapi.problems import BODY, COMMON, MALFORMED, Responses, problem_responses
from proxy.http.paths import (
    DOCS_PATH,
    EXPLAIN_PATH,
    LIVENESS_PATH,
    METRICS_PATH,
    OPENAPI_PATH,
    PURGE_PATH,
    QUOTA_PATH,
    READINESS_PATH,
    USAGE_PATH,
)
from proxy.problems import Code
from proxy.upstream.address import ESTIMATE_PATH

Object = Mapping[str, Any]

_EXAMPLE_BODY = [{"model": "JuggernautXL", "batch_size": 1, "prompt": {"positive": "a cat"}}]
_EXAMPLE_KEY = "f0a9e2b7c1d84e6f95b3a7d2c8e1f4063b5a9d7e2f8c1b4a6d3e9f7058c2b1a4"
_EXAMPLE_AMOUNTS = {
    "requests": 23,
    "refused": 0,
    "estimated_credits": 76.5,
    "outcomes": {"hit": 17, "miss": 6},
}
_EXAMPLE_QUOTAS = {
    "team": "design",
    "rate": {"per_s": 50, "burst": 100, "remaining": 84},
    "quotas": [
        {
            "scope": "team",
            "measure": "estimated_credits",
            "per": "month",
            "limit": 5000,
            "used": 76.5,
            "remaining": 4923.5,
            "on_exceed": "refuse",
            "window_start": "2026-11-01T00:00:00+00:00",
            "resets_at": "2026-12-01T00:00:00+00:00",
            "used_percent": 1.5,
        }
    ],
    "team_name": "Design",
}


def _headers(*names: str) -> dict[str, Object]:
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

_ADMISSION_HEADERS = _headers("RateLimit", "RateLimitPolicy", "ServerTiming")
_ESTIMATE_HEADERS = {**_ADMISSION_HEADERS, **_headers("CacheStatus", "Age", "BalanceAge", "Warning")}
_STATIC_HEADERS = _headers("ETag", "RequestId")


def _query(name: str, schema: Object, description: str, **more: Any) -> Object:
    return {"name": name, "in": "query", "schema": schema, "description": description, **more}


_PARAMETERS: list[Object] = [{"$ref": "#/components/parameters/RequestId"}]


def _json(schema: str, description: str, example: Any, headers: Object | None = None) -> Object:
    """A response with a JSON body."""
    return {
        "description": description,
        "headers": {**(headers or {}), **_headers("RequestId")},
        "content": {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}, "example": example},
        },
    }


def _body(schema: str, examples: Mapping[str, Any]) -> Object:
    content = {
        "schema": {"$ref": f"#/components/schemas/{schema}"},
        "examples": {name: {"value": value} for name, value in examples.items()},
    }
    return {"required": True, "content": {"application/json": content}}


def _tokens(*kinds: str) -> list[Object]:
    return [{f"{kind}Token": []} for kind in kinds]


def _static(media_type: str, description: str) -> Responses:
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


_ESTIMATE = {
    "operationId": "estimate",
    "tags": ["Teams"],
    "summary": "Estimate what a generation would cost",
    "description": (
        "As RenderNet's endpoint: the same path, body and answer. The answer may be a stored one; `balance` is always "
        "the newest balance that is known. The query string is a part of the question and is sent to RenderNet as it "
        "is. An answer of RenderNet without a price is passed on as it is, unless the operator has it refused with 502 "
        "`unpriced`."
    ),
    "security": _tokens("Team"),
    "parameters": [{"$ref": "#/components/parameters/CacheControl"}, *_PARAMETERS],
    "requestBody": _body("Generations", {"One image": _EXAMPLE_BODY}),
    "responses": {
        "200": _json(
            "Estimate",
            "The estimate and the balance, in credits.",
            {"data": {"estimated": 4, "balance": 10000}, "error": {}},
            _ESTIMATE_HEADERS,
        ),
        "4XX": {
            "description": "RenderNet refused the body: its status and JSON, as they are.",
            "headers": {**_ESTIMATE_HEADERS, **_headers("RequestId", "NoStore")},
            "content": {
                "application/json": {
                    "schema": {"description": "Any JSON."},
                    "example": {"data": None, "error": {"code": "INVALID", "message": "model is unknown"}},
                }
            },
        },
        **problem_responses(
            (
                *COMMON,
                *BODY,
                Code.UNKNOWN_TOKEN,
                Code.FORBIDDEN,
                Code.TEAM_DISABLED,
                Code.RATE_LIMITED,
                Code.QUOTA_EXCEEDED,
                Code.UPSTREAM_ERROR,
                Code.UPSTREAM_REFUSED,
                Code.UPSTREAM_BUSY,
                Code.UPSTREAM_TIMEOUT,
                Code.UNPRICED,
                Code.NOT_CACHED,
                Code.STORE_UNAVAILABLE,
            ),
            _ESTIMATE_HEADERS,
        ),
    },
}

_QUOTA = {
    "operationId": "quota",
    "tags": ["Teams"],
    "summary": "Show the rate and the quotas, and what is left of them",
    "description": (
        "With a team's token: the team's own. With a viewer or admin token: one team with `team`, all without. Debits "
        "nothing."
    ),
    "security": _tokens("Team", "Viewer", "Admin"),
    "parameters": [_query("team", {"$ref": "#/components/schemas/TeamId"}, "The team to show."), *_PARAMETERS],
    "responses": {
        "200": {
            "description": "One team, or all teams.",
            "headers": _headers("RequestId", "NoStore"),
            "content": {
                "application/json": {
                    "schema": {
                        "oneOf": [
                            {"$ref": "#/components/schemas/TeamQuotas"},
                            {"$ref": "#/components/schemas/AllQuotas"},
                        ]
                    },
                    "examples": {
                        "A team": {"value": _EXAMPLE_QUOTAS},
                        "All teams": {"value": {"teams": [_EXAMPLE_QUOTAS]}},
                    },
                }
            },
        },
        **problem_responses((*COMMON, Code.INVALID_QUERY, Code.UNKNOWN_TOKEN, Code.FORBIDDEN, Code.STORE_UNAVAILABLE)),
    },
}

_USAGE = {
    "operationId": "usage",
    "tags": ["Teams"],
    "summary": "Report requests and estimated credits",
    "description": (
        "Numbers are exact. They are what teams estimated, not what RenderNet charged. A team's token shows the team's "
        "own rows, a viewer or admin token those of all teams."
    ),
    "security": _tokens("Team", "Viewer", "Admin"),
    "parameters": [
        _query(
            "from",
            {"type": "string", "format": "date"},
            "The first day; by default the first of the month. At most 400 days before `to`.",
            example="2026-11-01",
        ),
        _query("to", {"type": "string", "format": "date"}, "The last day; by default today.", example="2026-11-30"),
        _query(
            "by",
            {
                "type": "array",
                "items": {"enum": ["day", "week", "month", "team", "model"]},
                "minItems": 1,
                "uniqueItems": True,
                "default": ["day"],
            },
            "One row for each of these, in this order of columns; `team` needs a viewer or admin token.",
            style="form",
            explode=False,
            example=["day", "model"],
        ),
        _query("team", {"$ref": "#/components/schemas/TeamId"}, "Only the rows of this team."),
        _query("format", {"enum": ["json", "csv"]}, "Overrides `Accept: text/csv`."),
        _query("dialect", {"enum": ["rfc4180", "excel-semicolon"]}, "Of CSV, which it implies."),
        *_PARAMETERS,
    ],
    "responses": {
        "200": {
            "description": "The report. In CSV, new columns come last.",
            "headers": _headers("RequestId", "NoStore"),
            "content": {
                "application/json": {
                    "schema": {"$ref": "#/components/schemas/Usage"},
                    "example": {
                        "from": "2026-11-01",
                        "to": "2026-11-22",
                        "timezone": "UTC",
                        "by": ["day", "model"],
                        "rows": [{"day": "2026-11-22", "model": "Flux", **_EXAMPLE_AMOUNTS, "share_percent": 100}],
                        "total": _EXAMPLE_AMOUNTS,
                    },
                },
                "text/csv": {
                    "schema": {"type": "string"},
                    "example": "day,model,requests,refused,estimated_credits,…\r\n2026-11-22,Flux,23,0,76.5,…\r\n",
                },
            },
        },
        **problem_responses((*COMMON, Code.INVALID_QUERY, Code.UNKNOWN_TOKEN, Code.FORBIDDEN, Code.STORE_UNAVAILABLE)),
    },
}

_EXPLAIN = {
    "operationId": "explain",
    "tags": ["Teams"],
    "summary": "Explain how the gateway reads a body",
    "description": (
        "Shows the canonical body and its key, whether a price is stored, and whether an estimate would be admitted "
        "now. Asks RenderNet nothing and debits no quota, but uses one request of the rate. Without the store, "
        "`degraded` says what is not known."
    ),
    "security": _tokens("Team"),
    "parameters": _PARAMETERS,
    "requestBody": _body("Generations", {"One image": _EXAMPLE_BODY}),
    "responses": {
        "200": _json(
            "Explanation",
            "What the gateway knows about this body.",
            {
                "canonical_body": '[{"batch_size":1,"model":"JuggernautXL","prompt":{"positive":"a cat"}}]',
                "key": _EXAMPLE_KEY,
                "account": "default",
                "query": "",
                "ignored_members": [],
                "stored": True,
                "admitted": True,
                "age_s": 12,
                "ttl_s": 3588,
                "estimated": 4,
            },
            {**_ADMISSION_HEADERS, **_headers("NoStore")},
        ),
        **problem_responses(
            (*COMMON, *BODY, Code.UNKNOWN_TOKEN, Code.FORBIDDEN, Code.TEAM_DISABLED, Code.RATE_LIMITED),
            _ADMISSION_HEADERS,
        ),
    },
}

_PURGE = {
    "operationId": "purge",
    "tags": ["Operators"],
    "summary": "Delete cached prices",
    "description": "The price of one body, or all prices of an account. All gateways follow within two seconds.",
    "security": _tokens("Admin"),
    "parameters": _PARAMETERS,
    "requestBody": _body(
        "Purge",
        {
            "One question": {"account": "default", "body": _EXAMPLE_BODY},
            "All prices of an account": {"account": "default", "all": True},
        },
    ),
    "responses": {
        "200": _json(
            "Purged",
            "What was deleted.",
            {"account": "default", "purged": "question", "key": _EXAMPLE_KEY, "was_stored": True},
            _headers("NoStore"),
        ),
        **problem_responses((*COMMON, *BODY, Code.UNKNOWN_TOKEN, Code.FORBIDDEN, Code.STORE_UNAVAILABLE)),
    },
}

_METRICS = {
    "operationId": "metrics",
    "tags": ["Operators"],
    "summary": "Metrics for Prometheus",
    "description": "As Prometheus text or OpenMetrics, by `Accept`. Needs no token if `metrics.public` is set.",
    "security": _tokens("Metrics", "Admin"),
    "parameters": _PARAMETERS,
    "responses": {
        "200": {
            "description": "All metrics.",
            "headers": _headers("RequestId", "NoStore"),
            "content": {
                "text/plain": {"schema": {"type": "string"}, "example": "estimate_proxy_requests_in_flight 3.0\n"},
                "application/openmetrics-text": {"schema": {"type": "string"}},
            },
        },
        **problem_responses((*COMMON, Code.UNKNOWN_TOKEN, Code.FORBIDDEN)),
    },
}

_LIVENESS = {
    "operationId": "liveness",
    "tags": ["Operators"],
    "summary": "Tell whether the process lives",
    "description": "Touches nothing else.",
    "security": [],
    "parameters": _PARAMETERS,
    "responses": {
        "200": _json("Liveness", "The process lives.", {"status": "alive"}, _headers("NoStore")),
        **problem_responses(MALFORMED),
    },
}

_READINESS = {
    "operationId": "readiness",
    "tags": ["Operators"],
    "summary": "Tell whether the gateway takes requests",
    "description": "503 only while it starts or drains: without a store or RenderNet it still serves, as documented.",
    "security": [],
    "parameters": _PARAMETERS,
    "responses": {
        "200": _json("Readiness", "It does.", {"status": "ready", "degraded": []}, _headers("NoStore")),
        **problem_responses(MALFORMED),
        "503": _json("Draining", "It is shutting down.", {"status": "draining"}, _headers("RetryAfter", "NoStore")),
    },
}

_OPENAPI = {
    "operationId": "openapi",
    "tags": ["Documentation"],
    "summary": "This document",
    "description": "OpenAPI 3.1. The same for everybody, whatever the settings.",
    "security": [],
    "parameters": _PARAMETERS,
    "responses": _static("application/json", "The document."),
}

_DOCS = {
    "operationId": "docs",
    "tags": ["Documentation"],
    "summary": "A page that shows this document",
    "description": "For people. It loads nothing from other origins.",
    "security": [],
    "parameters": _PARAMETERS,
    "responses": _static("text/html", "The page."),
}

PATHS: Mapping[str, Object] = {
    ESTIMATE_PATH: {"post": _ESTIMATE},
    QUOTA_PATH: {"get": _QUOTA},
    USAGE_PATH: {"get": _USAGE},
    EXPLAIN_PATH: {"post": _EXPLAIN},
    PURGE_PATH: {"post": _PURGE},
    METRICS_PATH: {"get": _METRICS},
    LIVENESS_PATH: {"get": _LIVENESS},
    READINESS_PATH: {"get": _READINESS},
    OPENAPI_PATH: {"get": _OPENAPI},
    DOCS_PATH: {"get": _DOCS},
}
