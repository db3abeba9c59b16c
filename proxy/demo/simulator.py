"""A simulator of RenderNet's estimate API, for the demo and as the upstream of the tests.

* Paths, header names and the shapes of answers follow RenderNet's documentation. **Prices and error codes are
  invented**: nothing here says what a generation costs.
* A price is a pure function of the body, but not the sum of its items' prices. Seed, prompt, sampler and unknown
  members do not change it. A value that cannot be used counts as its default, so any array of objects has a price.
* A fault is a `Responder`. It is applied after all checks, and replaces or changes the ordinary answer.
* All randomness comes from the seed.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from random import Random
from typing import Any, Final, TypeAlias

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

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

_MINIMUM_CREDITS: Final = Decimal(1)
"""Of a request, however cheap its items are."""

_FULL_PRICE_ITEMS: Final = 2
_REBATE: Final = Decimal("0.75")
"""What the third item of a request, and each later one, costs of its price."""

_SPENT_AT_ONCE: Final = 3
_CHUNK_BYTES: Final = 7


def estimate(items: Sequence[Item]) -> Decimal:
    """Credits for the whole array, in steps of a quarter: not less than a minimum, and with a rebate for many items."""
    prices = [price_of(item) for item in items]
    rebated = [_up_to_quarter(price * _REBATE) for price in prices[_FULL_PRICE_ITEMS:]]
    return max(_MINIMUM_CREDITS, sum(prices[:_FULL_PRICE_ITEMS] + rebated, Decimal()))


def price_of(item: Item) -> Decimal:
    """Credits for one generation object. The first mode that is present decides; null counts as absent."""
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
    """The value if it is a number from 1 to `most`, or text that spells one; else the default."""
    if not isinstance(value, int | float | str):
        return Decimal(default)
    try:
        number = Decimal(str(value))  # a boolean's text is not a number
    except (ArithmeticError, ValueError):
        return Decimal(default)
    return number if number.is_finite() and 1 <= number <= most else Decimal(default)


def _up_to_quarter(amount: Decimal) -> Decimal:
    return (amount / _QUARTER).to_integral_value(ROUND_CEILING) * _QUARTER


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
    """A request with its ordinary answer, which a responder may replace or change."""

    received: Received
    status: int
    body: bytes


Responder: TypeAlias = Callable[[Exchange], ASGIApp]
"""Returns a Starlette response, or any other ASGI app that answers."""


def refuse(status: int, code: str, message: str, **headers: str) -> Responder:
    return lambda _: json_response(status, envelope(code, message), **headers)


def html(status: int) -> Responder:
    """A page, as a CDN sends one."""
    page = f"<!DOCTYPE html>\n<html><head><title>{status}</title></head><body><h1>Edge</h1></body></html>\n"
    return lambda _: HTMLResponse(page, status)


def chunked(exchange: Exchange) -> ASGIApp:
    """The ordinary answer, in chunks of a few bytes."""
    return StreamingResponse(_chunks(exchange.body), exchange.status, media_type="application/json")


server_error = refuse(500, "internal_error", "Something went wrong")
busy = refuse(429, "too_many_requests", "Slow down")
error_in_200 = refuse(200, "estimate_failed", "No price for this generation")
html_page = html(502)


def ordinary(exchange: Exchange) -> ASGIApp:
    return json_response(exchange.status, exchange.body)


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), _CHUNK_BYTES):
        yield body[start : start + _CHUNK_BYTES]


def json_response(status: int, body: bytes, **headers: str) -> Response:
    return Response(body, status, headers, media_type="application/json")


def envelope(code: str, message: str) -> bytes:
    return orjson.dumps({"data": None, "error": {"code": code, "message": message}})


class Simulator:
    """One RenderNet account as an ASGI app.

    calls: the number of estimate requests whose body has arrived.
    spend_every: after so many calls, the organisation spends some of `balance`; 0: never. faults: the probability of
    each, per request. is_spared: excludes a request from faults. latency_s: the shortest and the longest delay.
    """

    def __init__(
        self,
        *,
        api_key: str,
        balance: int = 10_000,
        spend_every: int = 10,
        latency_s: tuple[float, float] = (0.0, 0.0),
        faults: Mapping[Responder, float] = {},
        seed: int = 0,
    ) -> None:
        self.calls = 0
        self.balance = balance
        self._api_key = api_key.encode("latin-1")
        self._spend_every = spend_every
        self._latency_s = latency_s
        self._faults = dict(faults)
        self.is_spared: Callable[[Received], bool] = lambda _: False
        self._random = Random(seed)  # noqa: S311 - repeatable chance is the point
        self.app = Starlette(
            routes=[Route(ESTIMATE_PATH, self._estimate, methods=["POST"])],
            exception_handlers={404: self.not_found, 405: self.not_found},
        )
        self.app.router.redirect_slashes = False

    async def not_found(self, _: Request, __: Exception) -> Response:
        """Answers a request to another path, or with another method."""
        return json_response(404, envelope("not_found", "No such endpoint"))

    async def accept(self, received: Received) -> Responder:
        """Counts a request whose body has arrived, and returns how to answer it. A subclass may wait here."""
        self.calls += 1
        if self._spend_every and self.calls % self._spend_every == 0:
            self.balance = max(0, self.balance - _SPENT_AT_ONCE)
        return self._random_responder(received)

    async def _estimate(self, request: Request) -> ASGIApp:
        received = await read(request)
        respond = await self.accept(received)
        await asyncio.sleep(self._random.uniform(*self._latency_s))
        status, body = self.ordinary_answer(received)
        return respond(Exchange(received, status, body))

    def _random_responder(self, received: Received) -> Responder:
        if self.is_spared(received):
            return ordinary
        chance = self._random.random()
        for fault, probability in self._faults.items():
            chance -= probability
            if chance < 0:
                return fault
        return ordinary

    def ordinary_answer(self, received: Received) -> tuple[int, bytes]:
        """Status and body without a fault."""
        if received.api_keys != [self._api_key]:
            return 401, envelope("unauthorized", "Invalid API key")
        items = _items(received.body)
        if items is None:
            return 400, envelope("invalid_request", "Expected an array of generation objects")
        estimated = json_number(estimate(items))
        return 200, b'{"data":{"estimated":%b,"balance":%d},"error":{}}' % (estimated, self.balance)


async def read(request: Request) -> Received:
    scope = request.scope
    # Copied before the body is read: the server appends the trailers of a chunked body to its list.
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
