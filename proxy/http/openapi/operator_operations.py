"""The OpenAPI operations for operators, viewers and monitoring, and those that need no token."""

from proxy.http.openapi.parts import (
    CSV_PARAMETERS,
    EXAMPLE_BODY,
    EXAMPLE_KEY,
    NOT_MODIFIED,
    Operation,
    answer,
    headers,
    json_answer,
    json_body,
    json_or_csv,
    query,
    static_file,
)
from proxy.http.openapi.problems import problem_responses
from proxy.http.openapi.schemas import DAY
from proxy.problems import Code

_EXAMPLE_SCOPE = {
    "scope": "9c1f0a7e5b2d4c68a03f77d1",
    "items": ["model Flux"],
    "state": "observing",
    "counting": ["0.batch_size", "0.model", "0.quality", "0.steps"],
    "left_out": ["0.prompt.positive", "0.seed"],
    "tests": 84,
    "tests_needed": 100,
    "bound": 0.035037,
    "bound_in_words": "of 84 tries none cost otherwise: with 95 % confidence fewer than 4 % of bodies do",
    "settings": 12,
    "asked": 131,
    "answered": 0,
    "answered_percent": 0.0,
    "would_have_answered": 0,
    "would_have_answered_percent": 0.0,
    "would_have_been_wrong": 0,
    "audits": 0,
    "list_moves": 0,
    "contradictions": 0,
    "last_contradiction": None,
    "team": "design",
    "last_asked": "2026-11-22T10:31:00+00:00",
}

_ACCOUNT = query("account", {"type": "string"}, "Only this account.", example="default")

PURGE = Operation(
    name="purge",
    tag="Operators",
    summary="Delete cached prices",
    description="The price of one body, or all prices of an account. All gateways follow within two seconds.",
    tokens=("Admin",),
    body=json_body(
        "Purge",
        {
            "One question": {"account": "default", "body": EXAMPLE_BODY},
            "All prices of an account": {"account": "default", "all": True},
        },
    ),
    answer=json_answer(
        "Purged",
        "What was deleted.",
        {"account": "default", "purged": "question", "key": EXAMPLE_KEY, "was_stored": True},
    ),
    problems=(Code.STORE_UNAVAILABLE,),
)

LEARNED = Operation(
    name="learned",
    tag="Operators",
    summary="Show what the cache has learned about prices",
    description=(
        "Which members of bodies do not decide the price, by account and scope (the members, models and number of "
        "items of bodies), and how sure that is. Neither keys nor amounts."
    ),
    tokens=("Viewer", "Admin"),
    parameters=[_ACCOUNT],
    answer=json_answer(
        "Learned",
        "What was learned, by account.",
        {
            "learn": "observe",
            "timezone": "UTC",
            "accounts": [{"account": "default", "scopes": [_EXAMPLE_SCOPE]}],
        },
    ),
    problems=(Code.INVALID_QUERY, Code.STORE_UNAVAILABLE),
)

PRICE_CHANGES = Operation(
    name="priceChanges",
    tag="Operators",
    summary="List price changes",
    description=(
        "Each time that RenderNet gave another price for a body than before: when, for what, and how it was found. The "
        "first 500 of each day are kept, for 400 days."
    ),
    tokens=("Viewer", "Admin"),
    parameters=[
        _ACCOUNT,
        query("from", DAY, "The first day; by default everything that is kept."),
        *CSV_PARAMETERS,
    ],
    answer=json_or_csv(
        "PriceChanges",
        "The changes, the oldest first.",
        {
            "from": "2026-11-01",
            "to": "2026-11-22",
            "timezone": "UTC",
            "changes": [
                {
                    "at": "2026-11-20T09:14:03+00:00",
                    "account": "default",
                    "model": "Flux",
                    "key": EXAMPLE_KEY[:16],
                    "old": 2.75,
                    "new": 3,
                    "found_by": "audit",
                }
            ],
            "not_kept": 0,
        },
        "at,account,model,key,old,new,found_by\r\n"
        f"2026-11-20T09:14:03+00:00,default,Flux,{EXAMPLE_KEY[:16]},2.75,3,audit\r\n",
    ),
    problems=(Code.INVALID_QUERY, Code.STORE_UNAVAILABLE),
)

METRICS = Operation(
    name="metrics",
    tag="Operators",
    summary="Metrics for Prometheus",
    description="As Prometheus text or OpenMetrics, by `Accept`. Needs no token if `metrics.public` is set.",
    tokens=("Metrics", "Admin"),
    answer=answer(
        "All metrics.",
        {
            "text/plain": {"schema": {"type": "string"}, "example": "estimate_proxy_requests_in_flight 3.0\n"},
            "application/openmetrics-text": {"schema": {"type": "string"}},
        },
    ),
)

LIVENESS = Operation(
    name="liveness",
    tag="Operators",
    summary="Tell whether the process lives",
    description="Touches nothing else.",
    answer=json_answer("Liveness", "The process lives.", {"status": "alive"}),
)

READINESS = Operation(
    name="readiness",
    tag="Operators",
    summary="Tell whether the gateway takes requests",
    description="503 only while it starts or drains: without a store or RenderNet it still serves, as documented.",
    answer=json_answer("Readiness", "It does.", {"status": "ready", "degraded": []}),
    last_answers={
        "503": json_answer("Draining", "It is shutting down.", {"status": "draining"}, headers("RetryAfter", "NoStore"))
    },
)

PAGE = Operation(
    name="page",
    tag="Documentation",
    summary="A page that shows usage and quotas",
    description=(
        "For people, in a browser: it asks for a token and reads the other paths. 404 for a client whose `Accept` does "
        "not name `text/html`, and with `page.enabled = false`."
    ),
    answer=static_file("text/html", "The page."),
    more_answers=NOT_MODIFIED,
    last_answers=problem_responses((Code.NOT_FOUND,)),
)

OPENAPI = Operation(
    name="openapi",
    tag="Documentation",
    summary="This document",
    description="OpenAPI 3.1. The same for everybody, whatever the settings.",
    answer=static_file("application/json", "The document."),
    more_answers=NOT_MODIFIED,
)

DOCS = Operation(
    name="docs",
    tag="Documentation",
    summary="A page that shows this document",
    description="For people. It loads nothing from other origins.",
    answer=static_file("text/html", "The page."),
    more_answers=NOT_MODIFIED,
)
