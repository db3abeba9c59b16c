"""Outcomes of requests, problems (RFC 9457) and the package's exceptions.

A *denial* is a `Problem`, returned like any other value. A *failure* is an exception of this tree:

    ProxyError
    ├── BadRequest              the request is malformed; carries its `Problem`
    ├── ClientGone              the client closed the connection before it was answered
    ├── Overloaded              the process has more requests than it can serve
    └── StoreUnavailable        the price book or ledger is unavailable, or did not answer in time
        └── StoreOutcomeUnknown the call may have been executed: it was sent, but its reply was lost

`proxy.http.endpoint` turns those that reach it into responses.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import orjson

NO_NAME = "-"
"""In metrics, usage and logs: no team, no model, or the whole organisation."""


class Outcome(StrEnum):
    """The result of a request, as in its log line, in metrics and in usage."""

    HIT = "hit"
    INFERRED = "inferred"
    STALE = "stale"
    MISS = "miss"
    COLLAPSED = "collapsed"
    BYPASS = "bypass"
    UNPRICED = "unpriced"
    UPSTREAM_REJECTED = "upstream-rejected"
    UNAUTHENTICATED = "unauthenticated"
    RATE_LIMITED = "rate-limited"
    QUOTA_EXCEEDED = "quota-exceeded"
    OVER_CEILING = "over-ceiling"
    TEAM_DISABLED = "team-disabled"
    INVALID = "invalid"
    UPSTREAM_ERROR = "upstream-error"
    UPSTREAM_REFUSED = "upstream-refused"
    UPSTREAM_BUSY = "upstream-busy"
    UPSTREAM_TIMEOUT = "upstream-timeout"
    STORE_UNAVAILABLE = "store-unavailable"
    OVERLOADED = "overloaded"
    NOT_CACHED = "not-cached"
    CANCELLED = "cancelled"
    INTERNAL_ERROR = "internal-error"


SAVES_CALL = frozenset(("hit", "inferred", "collapsed"))
"""Outcomes of answers that caused no request to upstream. A stale one has caused a refresh, or was served because a
request had failed."""

SAVES_TIME = SAVES_CALL - {"collapsed"}
"""Those of them that did not wait for another's request either."""


class Code(StrEnum):
    """The codes of problems. They are stable: clients may depend on them."""

    INVALID_BODY = "invalid-body"
    INVALID_REQUEST = "invalid-request"
    INVALID_QUERY = "invalid-query"
    UNKNOWN_TOKEN = "unknown-token"  # noqa: S105 -- the name of a problem, not a secret
    TEAM_DISABLED = "team-disabled"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    BODY_TOO_LARGE = "body-too-large"
    HEADERS_TOO_LARGE = "headers-too-large"
    UNSUPPORTED_MEDIA_TYPE = "unsupported-media-type"
    NOT_IMPLEMENTED = "not-implemented"
    VERSION_NOT_SUPPORTED = "version-not-supported"
    RATE_LIMITED = "rate-limited"
    QUOTA_EXCEEDED = "quota-exceeded"
    OVER_CEILING = "over-ceiling"
    INTERNAL_ERROR = "internal-error"
    UPSTREAM_ERROR = "upstream-error"
    UPSTREAM_REFUSED = "upstream-refused"
    UNPRICED = "unpriced"
    UPSTREAM_BUSY = "upstream-busy"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    UPSTREAM_TIMEOUT = "upstream-timeout"
    NOT_CACHED = "not-cached"
    STORE_UNAVAILABLE = "store-unavailable"


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    title: str
    outcome: Outcome


_KINDS = {
    Code.INVALID_BODY: _Kind(400, "The body is invalid", Outcome.INVALID),
    Code.INVALID_REQUEST: _Kind(400, "The request is malformed", Outcome.INVALID),
    Code.INVALID_QUERY: _Kind(400, "A query parameter is invalid", Outcome.INVALID),
    Code.UNKNOWN_TOKEN: _Kind(401, "No valid token", Outcome.UNAUTHENTICATED),
    Code.TEAM_DISABLED: _Kind(403, "This team is disabled", Outcome.TEAM_DISABLED),
    Code.FORBIDDEN: _Kind(403, "This is not permitted", Outcome.UNAUTHENTICATED),
    Code.NOT_FOUND: _Kind(404, "The gateway does not serve this path", Outcome.INVALID),
    Code.METHOD_NOT_ALLOWED: _Kind(405, "The path does not support this method", Outcome.INVALID),
    Code.BODY_TOO_LARGE: _Kind(413, "The body is too large", Outcome.INVALID),
    Code.HEADERS_TOO_LARGE: _Kind(431, "The request's headers are too large", Outcome.INVALID),
    Code.NOT_IMPLEMENTED: _Kind(501, "The request uses an unsupported HTTP feature", Outcome.INVALID),
    Code.VERSION_NOT_SUPPORTED: _Kind(505, "The HTTP version is not supported", Outcome.INVALID),
    Code.UNSUPPORTED_MEDIA_TYPE: _Kind(415, "The body must be plain JSON", Outcome.INVALID),
    Code.RATE_LIMITED: _Kind(429, "The team sends requests too fast", Outcome.RATE_LIMITED),
    Code.QUOTA_EXCEEDED: _Kind(402, "A quota is used up or would be exceeded", Outcome.QUOTA_EXCEEDED),
    Code.OVER_CEILING: _Kind(402, "The estimate is higher than the request's ceiling", Outcome.OVER_CEILING),
    Code.INTERNAL_ERROR: _Kind(500, "Internal error of the gateway", Outcome.INTERNAL_ERROR),
    Code.UPSTREAM_ERROR: _Kind(502, "RenderNet failed", Outcome.UPSTREAM_ERROR),
    Code.UPSTREAM_REFUSED: _Kind(502, "RenderNet refused the gateway's API key", Outcome.UPSTREAM_REFUSED),
    Code.UNPRICED: _Kind(502, "RenderNet returned no price", Outcome.UNPRICED),
    Code.UPSTREAM_BUSY: _Kind(503, "RenderNet is busy", Outcome.UPSTREAM_BUSY),
    Code.OVERLOADED: _Kind(503, "The gateway is overloaded", Outcome.OVERLOADED),
    Code.DRAINING: _Kind(503, "The gateway is shutting down", Outcome.CANCELLED),
    Code.STORE_UNAVAILABLE: _Kind(503, "The store is unavailable", Outcome.STORE_UNAVAILABLE),
    Code.UPSTREAM_TIMEOUT: _Kind(504, "RenderNet did not answer in time", Outcome.UPSTREAM_TIMEOUT),
    Code.NOT_CACHED: _Kind(504, "No usable answer is stored", Outcome.NOT_CACHED),
}

_TYPES = {Code.QUOTA_EXCEEDED: "https://iana.org/assignments/http-problem-types#quota-exceeded"}
"""Problem types that the draft of RateLimit fields registers (draft-ietf-httpapi-ratelimit-headers-11 §6)."""

DEFAULT_RETRY_AFTER_S = 1
"""`Retry-After` of a 503 without an estimate of its own."""

LONGEST_RETRY_AFTER_S = 3600
"""A longer wait is not sent as `Retry-After`: a client that sleeps for hours is worse off than one that fails."""


@dataclass(frozen=True)
class Problem:
    """Why a request was not answered. `detail` says what happened and what to do; it contains no secret.

    fields: additional response header fields, such as `Allow`.
    members: additional members of the document, as JSON values.
    other_status: replaces the status that belongs to the code.
    """

    code: Code
    detail: str
    retry_after_s: int | None = None
    fields: tuple[tuple[bytes, bytes], ...] = ()
    members: Mapping[str, Any] = field(default_factory=dict)
    other_status: int | None = None

    @property
    def status(self) -> int:
        return self.other_status or _KINDS[self.code].status

    @property
    def title(self) -> str:
        """What the code means."""
        return _KINDS[self.code].title

    @property
    def outcome(self) -> Outcome:
        return _KINDS[self.code].outcome

    def document(self, request_id: str) -> bytes:
        """The problem as JSON: RFC 9457 problem details that are also RenderNet's error envelope.

        request_id: must not contain characters that JSON escapes.
        """
        head, tail = self._encoded_parts
        return b'%b,"request_id":"%b",%b' % (head, request_id.encode(), tail)

    @cached_property
    def _encoded_parts(self) -> tuple[bytes, bytes]:
        """The document before and after the request id. Cached: one problem may answer many requests."""
        head = {
            "type": _TYPES.get(self.code, f"urn:estimate-proxy:problem:{self.code}"),
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        tail = {"data": None, "error": {"code": self.code, "message": self.detail}, **self.members}
        return orjson.dumps(head)[:-1], orjson.dumps(tail)[1:]

    @cached_property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The response headers of this problem (RFC 9110 §11.6.1, §10.2.3)."""
        headers = [(b"content-type", b"application/problem+json"), (b"cache-control", b"no-store")]
        if self.code is Code.UNKNOWN_TOKEN:
            headers.append((b"www-authenticate", b"Bearer"))
        retry_after_s = self.retry_after_s
        if retry_after_s is None and self.status == 503:  # noqa: PLR2004 -- RFC 9110 §15.6.4
            retry_after_s = DEFAULT_RETRY_AFTER_S
        if retry_after_s is not None and retry_after_s <= LONGEST_RETRY_AFTER_S:
            headers.append((b"retry-after", b"%d" % retry_after_s))
        return (*headers, *self.fields)

    @cached_property
    def lines(self) -> tuple[bytes, ...]:
        """The same headers as complete lines, `name: value`."""
        return tuple(map(b": ".join, self.headers))


class ProxyError(Exception):
    pass


class BadRequest(ProxyError):  # noqa: N818 -- named as HTTP names it
    def __init__(self, code: Code, detail: str, *fields: tuple[bytes, bytes]) -> None:
        """fields: additional response header fields, as in `Problem`."""
        super().__init__(detail)
        self.problem = Problem(code, detail, fields=fields)


class ClientGone(ProxyError):  # noqa: N818 -- a fact, not an error of ours
    pass


class Overloaded(ProxyError):  # noqa: N818 -- a state, not a defect
    pass


class StoreUnavailable(ProxyError):  # noqa: N818 -- a state, not a defect
    pass


class StoreOutcomeUnknown(StoreUnavailable):
    pass
