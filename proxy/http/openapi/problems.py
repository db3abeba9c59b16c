"""The error responses of the OpenAPI document. Each problem code has one example here, at least."""

from collections.abc import Iterable

import orjson

from proxy.http.openapi.schemas import Object, reference
from proxy.problems import Code, Problem
from proxy.upstream.address import ESTIMATE_PATH

EXAMPLE_REQUEST_ID = "b1946ac92492d2347c6235b4d2611184"

_QUOTA = {
    "scope": "team",
    "measure": "estimated_credits",
    "per": "month",
    "limit": 5000,
    "used": 4998.5,
    "requested": 4,
    "resets_at": "2026-12-01T00:00:00+00:00",
}
_NOT_FOUND = (
    f"The gateway does not serve /pub/v1/models. Of RenderNet's API it only serves POST {ESTIMATE_PATH}; its own paths "
    "are /v1/quota, /v1/usage, …"
)

EXAMPLES = (
    Problem(Code.INVALID_BODY, "The item at index 1 is not an object: each item must be a generation object."),
    Problem(Code.INVALID_REQUEST, "The header x-api-key was sent 2 times: send it once."),
    Problem(Code.INVALID_QUERY, "from must be a date, such as 2026-11-01."),
    Problem(
        Code.UNKNOWN_TOKEN,
        "The request has no token: send your team's token as X-API-KEY, or as Authorization: Bearer <token>.",
    ),
    Problem(
        Code.QUOTA_EXCEEDED,
        "1.5 of the team's 5000 estimated credits per month are left until 2026-12-01T00:00:00+00:00, and this "
        "estimate needs 4.",
        members={"quota": _QUOTA, "violated-policies": ["credits-month"]},
    ),
    Problem(
        Code.OVER_CEILING,
        "The estimate is 4 credits, and the request accepts at most 2.5: make the generation cheaper, or raise "
        "Estimate-Proxy-Max-Credits.",
        members={"estimated": 4, "ceiling": 2.5},
    ),
    Problem(Code.TEAM_DISABLED, "The team 'design' is disabled: ask the gateway's operator to enable it."),
    Problem(Code.FORBIDDEN, "This needs an admin token; you sent a team's token."),
    Problem(Code.NOT_FOUND, _NOT_FOUND, members={"err": {"code": Code.NOT_FOUND, "message": _NOT_FOUND}}),
    Problem(Code.METHOD_NOT_ALLOWED, "This path only takes POST.", fields=((b"allow", b"POST"),)),
    Problem(
        Code.BODY_TOO_LARGE,
        "The body is larger than the gateway's limit of 262144 bytes: if it has several items, send them in several "
        "requests; if it has one, shorten it.",
    ),
    Problem(
        Code.UNSUPPORTED_MEDIA_TYPE,
        "The body's content type is not supported: send the header Content-Type: application/json.",
    ),
    Problem(
        Code.RATE_LIMITED,
        "The team may send 50 requests per second, and at most 100 at once: send requests more slowly.",
        retry_after_s=1,
    ),
    Problem(
        Code.QUOTA_EXCEEDED,
        "0 of the team's 20 requests per day are left until 2026-11-23T00:00:00+00:00.",
        retry_after_s=1800,
        members={
            "quota": {**_QUOTA, "measure": "requests", "per": "day", "limit": 20, "used": 20, "requested": 1},
            "violated-policies": ["requests-day"],
        },
        other_status=429,
    ),
    Problem(Code.HEADERS_TOO_LARGE, "The request's head is larger than 65536 bytes: send fewer or shorter headers."),
    Problem(
        Code.INTERNAL_ERROR,
        "The gateway failed because of an internal error: its operator finds the reason in the log under this "
        "request's id.",
    ),
    Problem(Code.NOT_IMPLEMENTED, "The request's method is not supported."),
    Problem(
        Code.UPSTREAM_ERROR,
        "RenderNet answered 500: try again later.",
        members={"upstream": {"status": 500, "code": "INTERNAL", "message": "try again"}},
    ),
    Problem(
        Code.UPSTREAM_REFUSED,
        "RenderNet refused the gateway's API key: tell the gateway's operator.",
        members={"upstream": {"status": 401, "code": "UNAUTHORIZED", "message": "invalid api key"}},
    ),
    Problem(Code.UNPRICED, "RenderNet answered without a price for this body."),
    Problem(
        Code.UPSTREAM_BUSY,
        "RenderNet accepts no more requests for this account at the moment: try again later.",
        retry_after_s=7,
    ),
    Problem(Code.STORE_UNAVAILABLE, "The ledger is unavailable: send the request again.", retry_after_s=1),
    Problem(Code.OVERLOADED, "The gateway is overloaded: send the request again later."),
    Problem(Code.DRAINING, "The gateway is shutting down: send the request again.", retry_after_s=1),
    Problem(Code.UPSTREAM_TIMEOUT, "RenderNet did not answer in time: try again later."),
    Problem(
        Code.NOT_CACHED,
        "No usable answer is stored, and Cache-Control: only-if-cached forbids asking RenderNet: send the request "
        "without it.",
    ),
    Problem(Code.VERSION_NOT_SUPPORTED, "HTTP/2.0 is not supported: use HTTP/1.1."),
)

MALFORMED = (Code.INVALID_REQUEST, Code.HEADERS_TOO_LARGE, Code.NOT_IMPLEMENTED, Code.VERSION_NOT_SUPPORTED)
"""Answers to a malformed head, on every path."""

ENDPOINT = (Code.INTERNAL_ERROR, Code.OVERLOADED, Code.DRAINING)
"""Those of every path that `proxy.http.endpoint` serves: all that need a token."""

TOKEN = (Code.UNKNOWN_TOKEN, Code.FORBIDDEN)
"""Those of every path that needs a token."""

BODY = (Code.INVALID_BODY, Code.BODY_TOO_LARGE, Code.UNSUPPORTED_MEDIA_TYPE)
"""Those of every path with a request body."""

_HEADERS = {
    401: {"WWW-Authenticate": reference("WWWAuthenticate", "headers")},
    429: {"Retry-After": reference("RetryAfter", "headers")},
    503: {"Retry-After": reference("RetryAfter", "headers")},
}


def example_components() -> Object:
    """The components that `problem_responses` refers to."""
    return {
        _name(problem): {"summary": problem.title, "value": orjson.loads(problem.document(EXAMPLE_REQUEST_ID))}
        for problem in EXAMPLES
    }


def problem_responses(codes: Iterable[Code], headers: Object | None = None) -> Object:
    """A response for each status of these codes.

    headers: those that the operation's other responses have.
    """
    by_status: dict[int, list[Problem]] = {}
    wanted = set(codes)
    for problem in EXAMPLES:
        if problem.code in wanted:
            by_status.setdefault(problem.status, []).append(problem)
    return {str(status): _response(by_status[status], headers or {}) for status in sorted(by_status)}


def _response(problems: list[Problem], headers: Object) -> Object:
    """The response of problems with the same status."""
    codes = {"properties": {"error": {"properties": {"code": {"enum": [problem.code for problem in problems]}}}}}
    own_headers = {
        "X-Request-Id": reference("RequestId", "headers"),
        "Cache-Control": reference("NoStore", "headers"),
        **_HEADERS.get(problems[0].status, {}),
    }
    return {
        "description": " ".join(f"`{problem.code}`: {problem.title}." for problem in problems),
        "headers": {**headers, **own_headers},
        "content": {
            "application/problem+json": {
                "schema": {"allOf": [reference("Problem"), codes]},
                "examples": {name: reference(name, "examples") for name in map(_name, problems)},
            }
        },
    }


def _name(problem: Problem) -> str:
    """The name of its example: the code, with the status if that is not the code's own."""
    return problem.code.value if problem.other_status is None else f"{problem.code}-{problem.status}"
