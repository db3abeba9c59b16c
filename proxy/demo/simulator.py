"""A look-alike of RenderNet's estimate API, for the demo and as the upstream of the tests.

Rules of this file:

* Paths, header names and the shapes of answers follow RenderNet's documentation. **Prices and error codes
  are invented**: nothing here says what a generation costs.
* A price is a pure function of the body. Seed, prompt and sampler do not matter, unknown members neither;
  a value that cannot be used counts as its default, so any array of objects has a price.
* A fault wins over every check. It either takes the place of the ordinary answer or deforms it.
* Chance comes from the seed alone. The app lives on one event loop; a test drives it from any thread.
"""

import asyncio
import re
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from enum import StrEnum, auto
from random import Random
from typing import Any, Final, Self, TypeAlias

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

Item: TypeAlias = Mapping[str, Any]

ESTIMATE_PATH: Final = "/pub/v1/generations/estimate"

_QUARTER: Final = Decimal("0.25")
_STYLE_CREDITS: Final = Decimal("0.5")
_DEFAULT_MODEL: Final = "juggernautxl"
_MODEL_CREDITS: Final[Mapping[str, Decimal]] = {
    _DEFAULT_MODEL: Decimal(1),
    "realvisxl_v3.0_turbo": Decimal("0.75"),
    "flux": Decimal("2.75"),
}

_SPENT_AT_ONCE: Final = 3
_MAX_RECEIVED: Final = 10_000
_MAX_HANG_S: Final = 60.0
_CHUNK_BYTES: Final = 7
_PADDING_BYTES: Final = 2 * 1024 * 1024 + 1


def estimate(items: Sequence[Item]) -> Decimal:
    """Credits for the whole array, in steps of a quarter."""
    return sum((price_of(item) for item in items), Decimal())


def price_of(item: Item) -> Decimal:
    """Credits for one generation object. The first mode present decides; null is absent."""
    credits_of = next((price for name, price in _MODES if item.get(name) is not None), _image_credits)
    batch_size = int(_number(item.get("batch_size"), default=1, most=100))
    return _up_to_quarter(credits_of(item)) * batch_size


def json_number(amount: Decimal) -> bytes:
    """The amount as JSON: `5`, `2.75`, `2.5`."""
    return format(amount.normalize(), "f").encode()


def _style_credits(item: Item) -> Decimal:
    base_model = _member(item, "style_detail", "base_model")
    return _STYLE_CREDITS + _image_credits(item if base_model is None else {**item, "model": base_model})


def _image_credits(item: Item) -> Decimal:
    model, steps = item.get("model"), _number(item.get("steps"), default=20, most=200)
    name = model.casefold() if isinstance(model, str) else _DEFAULT_MODEL
    quality = 2 if item.get("quality") == "Plus" else 1
    extra_tens = max(Decimal(), ((steps - 20) / 10).to_integral_value(ROUND_CEILING))
    return _MODEL_CREDITS.get(name, _MODEL_CREDITS[_DEFAULT_MODEL]) * quality + _QUARTER * extra_tens


def _true_touch_credits(item: Item) -> Decimal:
    return 2 * _number(_member(item, "true_touch", "scale_factor"), default=1, most=8)


def _narrator_credits(item: Item) -> Decimal:
    script = _member(item, "narrator", "script")
    return 10 + Decimal(len(script) if isinstance(script, str) else 0) / 50


def _video_credits(item: Item) -> Decimal:
    return 6 * _number(_member(item, "video_anyone", "duration"), default=5, most=60)


_MODES: Final[Sequence[tuple[str, Callable[[Item], Decimal]]]] = (
    ("segment", lambda _: Decimal(5)),
    ("style", _style_credits),
    ("style_detail", _style_credits),
    ("model", _image_credits),
    ("true_touch", _true_touch_credits),
    ("narrator", _narrator_credits),
    ("video_anyone", _video_credits),
)


def _member(item: Item, outer: str, inner: str) -> Any:
    value = item.get(outer)
    return value.get(inner) if isinstance(value, Mapping) else None


def _number(value: Any, *, default: int, most: int) -> Decimal:
    """What the value means if that is a number from 1 to `most`, be it written as text; else the default."""
    if not isinstance(value, int | float | str):
        return Decimal(default)
    try:
        number = Decimal(str(value))  # a boolean's text is no number
    except (ArithmeticError, ValueError):
        return Decimal(default)
    return number if number.is_finite() and 1 <= number <= most else Decimal(default)


def _up_to_quarter(amount: Decimal) -> Decimal:
    return (amount / _QUARTER).to_integral_value(ROUND_CEILING) * _QUARTER


class Fault(StrEnum):
    SERVER_ERROR = auto()
    BUSY = auto()
    BUSY_FOR_NO_TIME = auto()
    ERROR_IN_200 = auto()
    CHUNKED = auto()
    HTML_PAGE = auto()
    HTML_IN_200 = auto()
    REFUSED_KEY = auto()
    FORBIDDEN = auto()
    ECHOES_KEY = auto()
    ECHOES_KEY_ESCAPED = auto()
    UNPRICED_TEXT = auto()
    UNPRICED_NULL = auto()
    UNPRICED_NEGATIVE = auto()
    UNPRICED_BOOL = auto()
    UNPRICED_HUGE = auto()
    TRUNCATED_JSON = auto()
    OVERSIZED = auto()
    EXTRA_DATA = auto()
    REDIRECT = auto()
    HANG = auto()


@dataclass(frozen=True, slots=True)
class Received:
    """A request as it arrived. Header names are in lower case, in the order sent."""

    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def api_keys(self) -> list[bytes]:
        return [value for name, value in self.headers if name == b"x-api-key"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request with its ordinary answer: what a handler makes the real answer of."""

    received: Received
    status: int
    body: bytes


Responder: TypeAlias = Callable[[Exchange], ASGIApp]
"""Takes an exchange, returns a Starlette response or any other ASGI app that answers."""


def _refusing(status: int, code: str, message: str, **headers: str) -> Responder:
    return lambda _: _json(status, _envelope(code, message), **headers)


def _estimating(spelling: bytes) -> Responder:
    return lambda exchange: _json(exchange.status, re.sub(rb'(?<="estimated":)[^,]+', spelling, exchange.body))


def _adding(members: bytes) -> Responder:
    more = b'"data":{' + members + b","
    return lambda exchange: _json(exchange.status, exchange.body.replace(b'"data":{', more, 1))


def _ordinary(exchange: Exchange) -> ASGIApp:
    return _json(exchange.status, exchange.body)


def _truncated(exchange: Exchange) -> ASGIApp:
    return _json(exchange.status, exchange.body[: len(exchange.body) // 2])


def _oversized(exchange: Exchange) -> ASGIApp:
    return _adding(b'"padding":"%b"' % (b"0" * _PADDING_BYTES))(exchange)


def _html(status: int) -> Responder:
    page = f"<!DOCTYPE html>\n<html><head><title>{status}</title></head><body><h1>Edge</h1></body></html>\n"
    return lambda _: HTMLResponse(page, status)


def _chunked(exchange: Exchange) -> ASGIApp:
    return StreamingResponse(_chunks(exchange.body), exchange.status, media_type="application/json")


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _CHUNK_BYTES):
        yield body[start : start + _CHUNK_BYTES]


def _echo_key(exchange: Exchange) -> ASGIApp:
    key = b"".join(exchange.received.api_keys).decode("latin-1")
    return _json(400, _envelope("invalid_request", f"Unexpected value near {key}"))


def _echo_key_escaped(exchange: Exchange) -> ASGIApp:
    key = "".join(f"\\u{byte:04x}" for byte in b"".join(exchange.received.api_keys))
    envelope = _envelope("invalid_request", "Unexpected value near <key>")
    return _json(400, envelope.replace(b"<key>", key.encode()))


async def _hang(scope: Scope, receive: Receive, send: Send) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(_MAX_HANG_S):
            await receive()  # the body is in, so this can only be the client leaving
    await _json(504, _envelope("timeout", "Gave up"))(scope, receive, send)


_HANDLERS: Final[Mapping[Fault, Responder]] = {
    Fault.SERVER_ERROR: _refusing(500, "internal_error", "Something went wrong"),
    Fault.BUSY: _refusing(429, "too_many_requests", "Slow down", **{"retry-after": "1"}),
    Fault.BUSY_FOR_NO_TIME: _refusing(429, "too_many_requests", "Slow down"),
    Fault.ERROR_IN_200: _refusing(200, "estimate_failed", "No price for this generation"),
    Fault.CHUNKED: _chunked,
    Fault.HTML_PAGE: _html(502),
    Fault.HTML_IN_200: _html(200),
    Fault.REFUSED_KEY: _refusing(401, "unauthorized", "Invalid API key"),
    Fault.FORBIDDEN: _refusing(403, "forbidden", "The API is not part of your plan"),
    Fault.ECHOES_KEY: _echo_key,
    Fault.ECHOES_KEY_ESCAPED: _echo_key_escaped,
    Fault.UNPRICED_TEXT: _estimating(b'"5"'),
    Fault.UNPRICED_NULL: _estimating(b"null"),
    Fault.UNPRICED_NEGATIVE: _estimating(b"-5"),
    Fault.UNPRICED_BOOL: _estimating(b"true"),
    Fault.UNPRICED_HUGE: _estimating(b"2000000000"),
    Fault.TRUNCATED_JSON: _truncated,
    Fault.OVERSIZED: _oversized,
    Fault.EXTRA_DATA: _adding(b'"currency":"credits","breakdown":[{"item":0,"credits":1.50}]'),
    Fault.REDIRECT: lambda _: RedirectResponse("/pub/v1/elsewhere", 302),
    Fault.HANG: lambda _: _hang,
}


def _json(status: int, body: bytes, **headers: str) -> Response:
    return Response(body, status, headers, media_type="application/json")


def _envelope(code: str, message: str) -> bytes:
    return orjson.dumps({"data": None, "error": {"code": code, "message": message}})


class Hold:
    """Keeps answers back from `Simulator.hold()` until `release()`, or the end of its `with` block."""

    def __init__(self) -> None:
        self._released: Future[None] = Future()

    def release(self) -> None:
        with suppress(InvalidStateError):  # a second release changes nothing
            self._released.set_result(None)

    async def passed(self) -> None:
        # Shielded, because a cancelled request would otherwise cancel the hold of all the others.
        await asyncio.shield(asyncio.wrap_future(self._released))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Simulator:
    """One RenderNet account behind an ASGI app.

    `calls` counts the estimates asked for, each as soon as its body is in; `received` keeps the newest
    requests, those for other paths too. Every `spend_every` calls somebody in the organisation spends from
    `balance` (0: nobody does). `faults` gives each fault's probability per request, `latency_s` the least
    and the greatest delay.
    """

    def __init__(
        self,
        *,
        api_key: str,
        balance: int = 10_000,
        spend_every: int = 10,
        latency_s: tuple[float, float] = (0.0, 0.0),
        faults: Mapping[Fault, float] = {},
        seed: int = 0,
    ) -> None:
        self.calls = 0
        self.received: deque[Received] = deque(maxlen=_MAX_RECEIVED)
        self.balance = balance
        self._api_key = api_key.encode("latin-1")
        self._spend_every = spend_every
        self._latency_s = latency_s
        self._faults = dict(faults)
        self._random = Random(seed)  # noqa: S311 - repeatable chance is the point
        self._spared: Callable[[Received], bool] = lambda _: False
        self._script: deque[Fault | Responder | None] = deque()
        self._hold: Hold | None = None
        self._arrival = threading.Condition()
        self.app = self._application()

    def script(self, *answers: Fault | Responder | None) -> None:
        """The next requests get these in the order they arrive, None being the ordinary answer."""
        self._script.extend(answers)

    def spare(self, spared: Callable[[Received], bool]) -> None:
        """No fault by chance for requests of which `spared` is true; scripted ones they get all the same."""
        self._spared = spared

    def hold(self) -> Hold:
        """Requests that arrive from now on are received, and answered only after a release."""
        self._hold = Hold()
        return self._hold

    def arrived(self, calls: int, *, within_s: float = 5.0) -> bool:
        """Wait, in a thread other than the app's, until so many calls have come in all."""
        with self._arrival:
            return self._arrival.wait_for(lambda: self.calls >= calls, within_s)

    def _application(self) -> Starlette:
        app = Starlette(
            routes=[Route(ESTIMATE_PATH, self._estimate, methods=["POST"])],
            exception_handlers={404: self._unknown, 405: self._unknown},
        )
        app.router.redirect_slashes = False
        return app

    async def _unknown(self, request: Request, _: Exception) -> Response:
        self.received.append(await _read(request))
        return _json(404, _envelope("not_found", "No such endpoint"))

    async def _estimate(self, request: Request) -> ASGIApp:
        received = await _read(request)
        hold = self._hold  # taken first: one made after this request has arrived is for later ones
        handler = self._arrive(received)
        if hold is not None:
            await hold.passed()
        await asyncio.sleep(self._random.uniform(*self._latency_s))
        status, body = self._judge(received)
        return handler(Exchange(received, status, body))

    def _arrive(self, received: Received) -> Responder:
        with self._arrival:
            self.received.append(received)
            self.calls += 1
            if self._spend_every and self.calls % self._spend_every == 0:
                self.balance = max(0, self.balance - _SPENT_AT_ONCE)
            handler = self._next_handler(received)
            self._arrival.notify_all()
        return handler

    def _next_handler(self, received: Received) -> Responder:
        answer = self._script.popleft() if self._script else self._drawn(received)
        if answer is None:
            return _ordinary
        return _HANDLERS[answer] if isinstance(answer, Fault) else answer

    def _drawn(self, received: Received) -> Fault | None:
        if self._spared(received):
            return None
        chance = self._random.random()
        for fault, probability in self._faults.items():
            chance -= probability
            if chance < 0:
                return fault
        return None

    def _judge(self, received: Received) -> tuple[int, bytes]:
        if received.api_keys != [self._api_key]:
            return 401, _envelope("unauthorized", "Invalid API key")
        items = _items(received.body)
        if items is None:
            return 400, _envelope("invalid_request", "Expected an array of generation objects")
        missing = next((text for text in _texts(items) if text.startswith("ast_missing")), None)
        if missing is not None:
            return 404, _envelope("not_found", f"Asset {missing} not found")
        estimated = json_number(estimate(items))
        return 200, b'{"data":{"estimated":%b,"balance":%d},"error":{}}' % (estimated, self.balance)


async def _read(request: Request) -> Received:
    scope = request.scope
    # The server adds a chunked body's trailers to its list: the headers are those from before the body.
    headers = list(scope["headers"])
    return Received(scope["path"], scope["query_string"], headers, await request.body())


def _items(body: bytes) -> list[dict[str, Any]] | None:
    try:
        items = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(items, list) or not items:
        return None
    return items if all(isinstance(item, dict) for item in items) else None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value, member names aside. A stack, because a body may nest beyond Python's."""
    rest = [value]
    while rest:
        match rest.pop():
            case str(text):
                yield text
            case dict(members):
                rest.extend(members.values())
            case list(elements):
                rest.extend(elements)
