"""Faults of the simulated RenderNet: the five of the demo, and those that only tests need."""

import asyncio
import re
from contextlib import suppress
from enum import Enum, member

from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.demo.simulator import (
    Exchange,
    Responder,
    busy,
    chunked,
    envelope,
    error_in_200,
    html,
    html_page,
    json_response,
    refuse,
    server_error,
)

MAX_HANG_S = 60.0
PADDING_BYTES = 2 * 1024 * 1024 + 1


def _estimated(number: bytes) -> Responder:
    """The ordinary answer with another amount."""
    return lambda exchange: json_response(exchange.status, re.sub(rb'(?<="estimated":)[^,]+', number, exchange.body))


def _with_data(members: bytes) -> Responder:
    """The ordinary answer with more members in `data`."""
    more = b'"data":{' + members + b","
    return lambda exchange: json_response(exchange.status, exchange.body.replace(b'"data":{', more, 1))


def _truncated(exchange: Exchange) -> ASGIApp:
    return json_response(exchange.status, exchange.body[: len(exchange.body) // 2])


def _oversized(exchange: Exchange) -> ASGIApp:
    return _with_data(b'"padding":"%b"' % (b"0" * PADDING_BYTES))(exchange)


def _echo_key(exchange: Exchange) -> ASGIApp:
    key = b"".join(exchange.received.api_keys).decode("latin-1")
    return json_response(400, envelope("invalid_request", f"Unexpected value near {key}"))


def _echo_key_escaped(exchange: Exchange) -> ASGIApp:
    key = "".join(f"\\u{byte:04x}" for byte in b"".join(exchange.received.api_keys))
    body = envelope("invalid_request", "Unexpected value near <key>")
    return json_response(400, body.replace(b"<key>", key.encode()))


def _redirect(_: Exchange) -> ASGIApp:
    return RedirectResponse("/pub/v1/elsewhere", 302)


def _hang(_: Exchange) -> ASGIApp:
    return _wait_for_client


async def _wait_for_client(scope: Scope, receive: Receive, send: Send) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(MAX_HANG_S):
            await receive()  # the body has been read, so this returns when the client disconnects
    await json_response(504, envelope("timeout", "Gave up"))(scope, receive, send)


class Fault(Enum):
    """Each is a `Responder`, for `Simulator.script` and `Simulator(faults=…)`."""

    SERVER_ERROR = member(server_error)
    BUSY = member(refuse(429, "too_many_requests", "Slow down", **{"retry-after": "1"}))
    BUSY_FOR_NO_TIME = member(busy)
    ERROR_IN_200 = member(error_in_200)
    CHUNKED = member(chunked)
    HTML_PAGE = member(html_page)
    HTML_IN_200 = member(html(200))
    REFUSED_KEY = member(refuse(401, "unauthorized", "Invalid API key"))
    FORBIDDEN = member(refuse(403, "forbidden", "The API is not part of your plan"))
    ECHOES_KEY = member(_echo_key)
    ECHOES_KEY_ESCAPED = member(_echo_key_escaped)
    UNPRICED_TEXT = member(_estimated(b'"5"'))
    UNPRICED_NULL = member(_estimated(b"null"))
    UNPRICED_NEGATIVE = member(_estimated(b"-5"))
    UNPRICED_BOOL = member(_estimated(b"true"))
    UNPRICED_HUGE = member(_estimated(b"2000000000"))
    TRUNCATED_JSON = member(_truncated)
    OVERSIZED = member(_oversized)
    EXTRA_DATA = member(_with_data(b'"currency":"credits","breakdown":[{"item":0,"credits":1.50}]'))
    REDIRECT = member(_redirect)
    HANG = member(_hang)

    def __call__(self, exchange: Exchange) -> ASGIApp:
        responder: Responder = self.value
        return responder(exchange)
