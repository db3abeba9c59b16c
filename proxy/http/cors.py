"""CORS: lets pages of the origins in `server.cors_origins` call the API from a browser.

* Only requests with an `Origin` header come here; others cost one look-up (`Application` in `proxy.http.application`).
* A browser asks before it sends a token (a preflight: the Fetch standard, §4.8). It gets 204 for a listed origin, and
  403 for any other, whatever the path: which paths there are is not a secret.
* A request that is not a preflight is served whatever its origin, but only pages of listed origins can read the answer.
  Clients other than browsers send `Origin` too.
* Credentials mode (cookies) is not offered: a token is a header that the page sets itself.
"""

from collections.abc import Awaitable, Callable, Collection
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.http.connection import SCOPE_HEADERS
from proxy.http.framing import Headers
from proxy.http.headers import Lines, RequestHeaders
from proxy.http.paths import without_tokens
from proxy.http.request_cycle import SCOPE_REPLY, Delivery
from proxy.http.responses import request_id_of
from proxy.problems import Code, Problem

PREFLIGHT_MAX_AGE_S = 600
"""How long a browser sends requests without asking again. It is also how long it may go on after a reload that removes
the origin; it does not show the page the answers any more."""

MAX_SHOWN_ORIGIN = 200

_ALLOWED_METHODS = "GET, POST"
_ALLOWED_HEADERS = (
    "Authorization, Cache-Control, Content-Type, Estimate-Proxy-Max-Credits, X-API-KEY, X-Request-Id"  # beyond Accept
)
_EXPOSED_HEADERS = (
    b"Age, Cache-Status, ETag, Estimate-Proxy-Balance-Age, Estimate-Proxy-Warning, RateLimit, RateLimit-Policy, "
    b"Retry-After, Server-Timing, X-Request-Id"
)

Refuse = Callable[[Problem, Request], Response]


class Cors:
    """An ASGI application that passes requests on to `app`, and answers preflights itself.

    origins: returns the listed origins; a reload changes them.
    refuse: makes the response that answers a request with a problem, and writes its log line.
    """

    def __init__(self, app: ASGIApp, origins: Callable[[], Collection[str]], refuse: Refuse) -> None:
        self._app = app
        self._origins = origins
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: RequestHeaders = scope[SCOPE_HEADERS]
        origin = headers.origin or ""
        is_listed = origin in self._origins()
        if scope["method"] == "OPTIONS" and headers.asks_preflight:
            request = Request(scope)
            response = _permission(origin, request) if is_listed else self._refuse(_not_listed(origin), request)
            await response(scope, receive, send)
        elif is_listed:
            fields = _fields(origin)
            scope[SCOPE_REPLY] = partial(_reply, scope[SCOPE_REPLY], list(map(b": ".join, fields)))
            await self._app(scope, receive, partial(_send, send, fields))
        else:
            await self._app(scope, receive, send)


def _permission(origin: str, request: Request) -> Response:
    """The answer to a preflight of a listed origin."""
    headers = {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": _ALLOWED_METHODS,
        "access-control-allow-headers": _ALLOWED_HEADERS,
        "access-control-max-age": str(PREFLIGHT_MAX_AGE_S),
        "vary": "origin",
        "x-request-id": request_id_of(request),
    }
    return Response(None, 204, headers)


def _not_listed(origin: str) -> Problem:
    return Problem(
        Code.FORBIDDEN,
        f"Pages of the origin {without_tokens(origin[:MAX_SHOWN_ORIGIN])!r} may not call this gateway from a browser: "
        "ask the gateway's operator to add it to cors_origins in the section [server] of its config, or call the "
        "gateway from your server.",
    )


def _fields(origin: str) -> Headers:
    return [
        (b"access-control-allow-origin", origin.encode()),
        (b"access-control-expose-headers", _EXPOSED_HEADERS),
        (b"vary", b"origin"),
    ]


def _reply(
    reply: Callable[..., Delivery], cors_lines: Lines, status: int, lines: Lines, body: bytes, *, close: bool
) -> Delivery:
    """As `Cycle.reply`, with more header lines."""
    return reply(status, lines + cors_lines, body, close=close)


async def _send(send: Callable[[Message], Awaitable[None]], cors_fields: Headers, message: Message) -> None:
    """As an ASGI `send`, with more header fields."""
    if message["type"] == "http.response.start":
        message = {**message, "headers": [*message["headers"], *cors_fields]}
    await send(message)
