"""How a request can end, and the one document that tells a client why it failed.

A *denial* is a `Problem`, returned like any other value. A *failure* is an exception of this tree; those that reach
`proxy.http.endpoint` become responses there:

    ProxyError
    ├── BadRequest          the request itself is at fault; carries its `Problem`
    ├── ClientGone          nobody is left to answer
    ├── Overloaded          more than this process can serve
    └── StoreUnavailable    price book or ledger is out of reach, or does not answer in time
        └── StoreOutcomeUnknown after it was asked: what was to be done may have been done
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import orjson

NO_NAME = "-"
"""Stands in metrics, usage and logs for a team or a model that has no name, and for the whole organisation."""


class Outcome(StrEnum):
    """What became of a request: one value a request, in its log line."""

    HIT = "hit"
    STALE = "stale"
    MISS = "miss"
    COLLAPSED = "collapsed"
    BYPASS = "bypass"
    UNPRICED = "unpriced"
    UPSTREAM_REJECTED = "upstream-rejected"
    UNAUTHENTICATED = "unauthenticated"
    RATE_LIMITED = "rate-limited"
    QUOTA_EXCEEDED = "quota-exceeded"
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


class Code(StrEnum):
    """The codes of problems; stable, clients may decide by them."""

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
    Code.INVALID_BODY: _Kind(400, "The body is not an array of generation objects", Outcome.INVALID),
    Code.INVALID_REQUEST: _Kind(400, "The request is malformed", Outcome.INVALID),
    Code.INVALID_QUERY: _Kind(400, "The query is malformed", Outcome.INVALID),
    Code.UNKNOWN_TOKEN: _Kind(401, "No valid team token", Outcome.UNAUTHENTICATED),
    Code.TEAM_DISABLED: _Kind(403, "This team is disabled", Outcome.TEAM_DISABLED),
    Code.FORBIDDEN: _Kind(403, "This needs another token", Outcome.UNAUTHENTICATED),
    Code.NOT_FOUND: _Kind(404, "Nothing is served here", Outcome.INVALID),
    Code.METHOD_NOT_ALLOWED: _Kind(405, "This path does not take this method", Outcome.INVALID),
    Code.BODY_TOO_LARGE: _Kind(413, "The body is too large", Outcome.INVALID),
    Code.HEADERS_TOO_LARGE: _Kind(431, "The request's head is too large", Outcome.INVALID),
    Code.NOT_IMPLEMENTED: _Kind(501, "The request uses what is not implemented", Outcome.INVALID),
    Code.VERSION_NOT_SUPPORTED: _Kind(505, "The HTTP version is not supported", Outcome.INVALID),
    Code.UNSUPPORTED_MEDIA_TYPE: _Kind(415, "The body must be plain JSON", Outcome.INVALID),
    Code.RATE_LIMITED: _Kind(429, "The team asks too often", Outcome.RATE_LIMITED),
    Code.QUOTA_EXCEEDED: _Kind(402, "A quota is used up, or would be passed", Outcome.QUOTA_EXCEEDED),
    Code.INTERNAL_ERROR: _Kind(500, "The gateway failed", Outcome.INTERNAL_ERROR),
    Code.UPSTREAM_ERROR: _Kind(502, "RenderNet failed", Outcome.UPSTREAM_ERROR),
    Code.UPSTREAM_REFUSED: _Kind(502, "RenderNet refused the gateway's key", Outcome.UPSTREAM_REFUSED),
    Code.UNPRICED: _Kind(502, "RenderNet gave no price", Outcome.UNPRICED),
    Code.UPSTREAM_BUSY: _Kind(503, "RenderNet is busy", Outcome.UPSTREAM_BUSY),
    Code.OVERLOADED: _Kind(503, "The gateway is overloaded", Outcome.OVERLOADED),
    Code.DRAINING: _Kind(503, "The gateway is shutting down", Outcome.CANCELLED),
    Code.STORE_UNAVAILABLE: _Kind(503, "The store is out of reach", Outcome.STORE_UNAVAILABLE),
    Code.UPSTREAM_TIMEOUT: _Kind(504, "RenderNet did not answer in time", Outcome.UPSTREAM_TIMEOUT),
    Code.NOT_CACHED: _Kind(504, "No stored answer will do", Outcome.NOT_CACHED),
}

_TYPES = {Code.QUOTA_EXCEEDED: "https://iana.org/assignments/http-problem-types#quota-exceeded"}
"""Where the draft of RateLimit fields has registered a type (draft-ietf-httpapi-ratelimit-headers-11 §6)."""

DEFAULT_RETRY_AFTER_S = 1
"""For a 503 whose end nobody knows."""

LONGEST_RETRY_AFTER_S = 3600
"""A longer wait is not told to clients: they would rather fail than sleep."""


@dataclass(frozen=True)
class Problem:
    """Why a request gets no estimate. `detail` is a sentence that says what to do, without any secret.

    fields: response header fields that go with it, such as `Allow`.
    members: what the document has besides, as JSON.
    other_status: where it is not the one that goes with the code.
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
    def outcome(self) -> Outcome:
        return _KINDS[self.code].outcome

    def document(self, request_id: str) -> bytes:
        """RFC 9457 problem details that are RenderNet's error envelope too, as JSON.

        request_id: of characters that JSON does not escape.
        """
        head, tail = self._encoded_parts
        return b'%b,"request_id":"%b",%b' % (head, request_id.encode(), tail)

    @cached_property
    def _encoded_parts(self) -> tuple[bytes, bytes]:
        """Of a document: many requests may be told of one problem."""
        head = {
            "type": _TYPES.get(self.code, f"urn:estimate-proxy:problem:{self.code}"),
            "title": _KINDS[self.code].title,
            "status": self.status,
            "detail": self.detail,
        }
        tail = {"data": None, "error": {"code": self.code, "message": self.detail}, **self.members}
        return orjson.dumps(head)[:-1], orjson.dumps(tail)[1:]

    @cached_property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """The response headers that belong to this problem (RFC 9110 §11.6.1, §10.2.3)."""
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
        """The same as they are sent: `name: value`."""
        return tuple(map(b": ".join, self.headers))


class ProxyError(Exception):
    """The root of this tree."""


class BadRequest(ProxyError):  # noqa: N818 -- named as HTTP names it
    def __init__(self, code: Code, detail: str, *fields: tuple[bytes, bytes]) -> None:
        """fields: as in `Problem`."""
        super().__init__(detail)
        self.problem = Problem(code, detail, fields=fields)


class ClientGone(ProxyError):  # noqa: N818 -- a fact, not an error of ours
    pass


class Overloaded(ProxyError):  # noqa: N818 -- a state, not a defect
    pass


class StoreUnavailable(ProxyError):  # noqa: N818 -- named as the promise that it breaks
    pass


class StoreOutcomeUnknown(StoreUnavailable):
    pass
