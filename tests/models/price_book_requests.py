"""Requests and answers of the price book's state machine.

Hypothesis strategies for requests, their bodies, upstream's answers, and the parser of responses.
"""

from random import Random

import httpx2
import orjson
from hypothesis import strategies as st
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bodies import respell
from gateway_fixture import code_of
from price_book_fleet import BALANCE_MAX_AGE_MS, LIFETIME_MS, REVALIDATE_MS, TTL_MS, Answer, Directives
from price_book_upstream import BUSY_S, FAULTS, REJECTION, Body, Upstream, amount_text, document
from proxy.demo.simulator import Exchange

KEYS, SEEDS = 4, 2
TICK_MS = 125
"""Time between steps. Multiples of 1/8 s are exact in floating point, so comparisons at a limit are exact too."""

BODIES = st.builds(Body, st.integers(0, KEYS - 1), st.integers(0, SEEDS - 1))
WHERE = st.sampled_from([0, 0, 1])
PLAIN = Directives()
NO_CACHE = Directives("no-cache", bypass_cache=True)
DIRECTIVES = st.sampled_from(
    [
        *[PLAIN] * 8,
        NO_CACHE,
        Directives("no-store", bypass_cache=True, store=False),
        Directives("max-age=0", max_age_s=0),
        Directives("max-age=30", max_age_s=30),
        Directives("max-stale, max-age=100", max_age_s=100),
        Directives("only-if-cached", only_if_cached=True),
        Directives("only-if-cached, max-age=30", only_if_cached=True, max_age_s=30),
        Directives("only-if-cached, no-cache", only_if_cached=True, bypass_cache=True),
    ]
)
ANY_FAULT = st.sampled_from([None, None, *FAULTS])
_EDGES_MS = (BALANCE_MAX_AGE_MS, 30_000, TTL_MS, TTL_MS + REVALIDATE_MS, LIFETIME_MS)
AGES_MS = st.sampled_from([edge + more for edge in _EDGES_MS for more in (-TICK_MS, 0, TICK_MS, 10_000)])
PAUSES_MS = st.sampled_from([875, 1_000, 2_000, 2_125, 5_000, 10_000, 11_000, 600_000, 3_600_000])


def content(body: Body, spelling: int | None = None) -> bytes:
    items = [{"model": "Flux", "steps": 20 + body.key, "seed": body.seed}]
    return orjson.dumps(items) if spelling is None else respell(items, Random(spelling))


class NumberedAnswers:
    """The simulator's answers, as the model of upstream defines them, each with the next number."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.answered_keys: list[int] = []
        """The key of the request of each answer."""

    @property
    def serial(self) -> int:
        return len(self.answered_keys)

    def __call__(self, exchange: Exchange) -> ASGIApp:  # noqa: PLR0911 -- one line per fault
        (item,) = orjson.loads(exchange.received.body)
        body = Body(item["steps"] - 20, item["seed"])
        self.answered_keys.append(body.key)
        match self._upstream.fault:
            case None:
                return _json(
                    200, document(amount_text(self._upstream.prices[body]), self._upstream.balance, self.serial)
                )
            case "gives no price":
                return _json(200, document("null", self._upstream.balance, self.serial))
            case "rejects":
                return _json(422, REJECTION)
            case "fails":
                return _json(500, REJECTION)
            case "sends a page":
                return HTMLResponse("<h1>Edge</h1>")
            case "is busy":
                return _json(429, REJECTION, **{"retry-after": str(BUSY_S)})
            case "refuses the key":
                return _json(401, REJECTION)
            case fault:
                assert fault == "hangs up"
                return _hang_up


def _json(status: int, body: str, **headers: str) -> Response:
    return Response(body, status, headers, media_type="application/json")


async def _hang_up(_: Scope, __: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})


def answer_of(response: httpx2.Response) -> Answer:
    """Converts a response to the model's form."""
    headers = response.headers
    is_problem = headers["content-type"] == "application/problem+json"
    assert is_problem or (headers.get("cache-control") == "no-store") == (response.status_code >= 400)
    status = headers.get("cache-status")
    age_s, balance_age_s, retry_after_s = (
        None if name not in headers else int(headers[name])
        for name in ("age", "estimate-proxy-balance-age", "retry-after")
    )
    return Answer(
        response.status_code,
        code_of(response) if is_problem else response.text,
        None if status is None else status.removeprefix("estimate-proxy; "),
        age_s,
        balance_age_s,
        retry_after_s,
    )
