"""HTTP in, HTTP out: the endpoints as ASGI applications, problems as documents, one log line a request.

* The header list is taken once, before the first `receive()`: the server appends chunked trailers to it later.
* `http.disconnect` while a body is read is an abort, never the end of the body.
* Decisions are taken on `scope["path"]` alone; nothing of a request steers where upstream is.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from math import floor
from time import perf_counter

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.directives import Directives, parse_directives
from proxy.gateway import Answer, Ask, Explanation, Purged, Trace
from proxy.ledger import Admitted, Denied
from proxy.logs import event
from proxy.metrics import Metrics
from proxy.problems import BadRequest, ClientGone, Code, Outcome, Problem
from proxy.statements import Report

MAX_IN_FLIGHT = 2000
"""Requests that one process works on at a time; more are told to come back."""

MAX_DISCARDED_BYTES = 4 * 2**20
"""Of a body that is too large, so much is read and dropped for the client to hear the answer."""

Headers = list[tuple[bytes, bytes]]
Ending = Answer | Explanation | Purged | Report | Problem
Story = Callable[[Ask, Trace], Awaitable[Ending]]

MAX_QUERY_BYTES = 8192

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_JSON = b"application/json"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lifecycle:
    """What the process is doing, as its endpoints need to know it."""

    draining: bool = False
    in_flight: int = 0
    stop_by: float = 0.0
    """Monotonic time by which everything is to be over, once it is stopping."""


@dataclass(slots=True)
class Exchange:
    """One request on its way to its one log line."""

    operation: str
    request_id: str
    started: float = field(default_factory=perf_counter)
    trace: Trace = field(default_factory=Trace)
    close: bool = False

    @classmethod
    def begin(cls, operation: str, headers: Headers) -> "Exchange":
        given = [value.decode("latin-1") for value in values(headers, b"x-request-id")]
        known = len(given) == 1 and _REQUEST_ID.fullmatch(given[0])
        return cls(operation, given[0] if known else secrets.token_hex(16))

    def end(self, metrics: Metrics, outcome: Outcome, status: int) -> None:
        """Counts the request, and writes its log line."""
        duration_s = perf_counter() - self.started
        metrics.count_request(self.trace.team, self.operation, outcome, duration_s)
        facts = {
            "request_id": self.request_id,
            "team": self.trace.team,
            "operation": self.operation,
            "outcome": outcome.value,
            "status": status,
            "ms": _ms(duration_s),
        }
        if self.trace.upstream_s is not None:
            facts["upstream_ms"] = _ms(self.trace.upstream_s)
        event(log, logging.INFO, "request", facts)


class StoryEndpoint:
    """An ASGI application that tells one of the gateway's stories."""

    def __init__(
        self,
        operation: str,
        story: Story,
        *,
        lifecycle: Lifecycle,
        metrics: Metrics,
        max_body_bytes: int,
        timeout_s: float,
    ) -> None:
        self._operation = operation
        self._story = story
        self._lifecycle = lifecycle
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Headers = list(scope["headers"])
        exchange = Exchange.begin(self._operation, headers)
        self._lifecycle.in_flight += 1
        self._metrics.requests_in_flight.inc()
        try:
            ending = await self._answer(scope, headers, receive, exchange)
        except asyncio.CancelledError:
            ending = Problem(Code.DRAINING, "The gateway is shutting down: ask again.", retry_after_s=1)
            exchange.close = True
        finally:
            self._lifecycle.in_flight -= 1
            self._metrics.requests_in_flight.dec()
        if ending is None or (exchange.trace.waited and await _is_gone(receive)):
            exchange.end(self._metrics, Outcome.CANCELLED, 499)
            return
        exchange.close = exchange.close or self._lifecycle.draining
        await respond(send, exchange, ending, self._metrics)

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, exchange: Exchange) -> Ending | None:
        """How the story ends; None when nobody is left to hear it. What the story raises becomes a problem here."""
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        body = _Body(receive, self._max_body_bytes, exchange)
        try:
            if self._lifecycle.in_flight > MAX_IN_FLIGHT:
                return Problem(Code.OVERLOADED, "The gateway has too much to do: try again.", retry_after_s=1)
            ask = Ask(
                token=_token(headers),
                read_body=lambda: body.read(headers, deadline),
                query=_query(scope),
                directives=_directives(headers),
                accept=", ".join(value.decode("latin-1") for value in values(headers, b"accept")) or None,
                deadline=deadline,
            )
            return await self._story(ask, exchange.trace)
        except BadRequest as error:
            return error.problem
        except ClientGone:
            return None
        except Exception:
            log.exception("request %s failed", exchange.request_id)
            return Problem(Code.INTERNAL_ERROR, "The gateway failed; its log has the reason under this request's id.")


class _Body:
    """A request's body, read once."""

    def __init__(self, receive: Receive, max_bytes: int, exchange: Exchange) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._exchange = exchange

    async def read(self, headers: Headers, deadline: float) -> bytes:
        """The whole body.

        Raises `BadRequest` if it is late, too large or not declared as plain JSON, `ClientGone`.
        """
        _check_media_type(headers)
        if _declared_bytes(headers) > self._max_bytes + MAX_DISCARDED_BYTES:
            raise self._too_large()
        try:
            async with asyncio.timeout_at(deadline):
                return await self._collect()
        except TimeoutError:
            self._exchange.close = True
            raise BadRequest(Code.INVALID_REQUEST, "The body did not arrive in time.") from None

    async def _collect(self) -> bytes:
        chunks, size = [], 0
        async for chunk in self._chunks():
            size += len(chunk)
            if size > self._max_bytes + MAX_DISCARDED_BYTES:
                break
            chunks.append(chunk if size <= self._max_bytes else b"")
        if size > self._max_bytes:
            raise self._too_large()
        return b"".join(chunks)

    def _too_large(self) -> BadRequest:
        self._exchange.close = True
        return BadRequest(Code.BODY_TOO_LARGE, f"The body has more than {self._max_bytes} bytes: send fewer items.")

    async def _chunks(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            yield message["body"]
            more = message["more_body"]


async def respond(send: Send, exchange: Exchange, ending: Ending, metrics: Metrics) -> None:
    """Sends the response, and ends the exchange."""
    match ending:
        case Problem(status=status):
            headers, body = ending.headers(), ending.document(exchange.request_id)
        case Answer(status=status):
            headers, body = _answer_headers(ending), ending.body
        case Explanation():
            status, headers, body = 200, [(b"content-type", _JSON)], _explanation_document(ending)
        case Purged():
            status, headers, body = 200, [(b"content-type", _JSON)], _purged_document(ending)
        case Report():
            status, headers, body = 200, _report_headers(ending), ending.body
    headers += _common_headers(exchange)
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
    exchange.end(metrics, Outcome.HIT if isinstance(ending, Purged | Report) else ending.outcome, status)


async def refuse_route(lifecycle: Lifecycle, metrics: Metrics, request: Request, error: Exception) -> Response:
    """The answer to a path or method that is not served."""
    exchange = Exchange.begin("other", request.scope["headers"])
    exchange.close = lifecycle.draining
    if isinstance(error, HTTPException) and error.status_code == 405:  # noqa: PLR2004 -- RFC 9110 §15.5.6
        allow = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        problem = Problem(Code.METHOD_NOT_ALLOWED, f"This path takes {allow}.", allow=allow)
    else:
        problem = Problem(Code.NOT_FOUND, "Of RenderNet's API the gateway serves POST /pub/v1/generations/estimate.")
    body = problem.document(exchange.request_id)
    exchange.end(metrics, problem.outcome, problem.status)
    headers = [(name.decode(), value.decode()) for name, value in problem.headers() + _common_headers(exchange)]
    return Response(body, problem.status, dict(headers))


def values(headers: Headers, name: bytes) -> Iterator[bytes]:
    return (value for header, value in headers if header == name)


def _answer_headers(answer: Answer) -> Headers:
    headers = [(b"content-type", _JSON)]
    if answer.status >= 400:  # noqa: PLR2004 -- upstream's own errors are errors too
        headers.append((b"cache-control", b"no-store"))
    if answer.age_s is not None:
        headers.append((b"age", str(int(answer.age_s)).encode()))
    if answer.balance_age_s is not None:
        headers.append((b"estimate-proxy-balance-age", str(int(answer.balance_age_s)).encode()))
    return headers


def _report_headers(report: Report) -> Headers:
    return [(b"content-type", report.media_type.encode()), (b"vary", b"accept"), (b"cache-control", b"no-store")]


def _explanation_document(explanation: Explanation) -> bytes:
    """A price is shown only to a team whose estimate would be answered, as far as is known."""
    question, stored, admission = explanation.question, explanation.stored, explanation.admission
    would_be_refused = isinstance(admission, Denied)
    document: dict[str, object] = {
        "canonical_body": question.canonical.decode(),
        "key": question.key,
        "account": question.account,
        "query": question.query,
        "ignored_members": explanation.ignored,
        "stored": stored is not None,
        "admitted": not would_be_refused,
    }
    if stored is not None:
        document |= {"age_s": int(stored.age_s), "ttl_s": floor(stored.ttl_s)}
    if stored is not None and isinstance(admission, Admitted):
        document["estimated"] = orjson.Fragment(stored.price.estimated)
    if isinstance(admission, Denied):
        document["refusal"] = {"code": admission.problem.code, "detail": admission.problem.detail}
    unknown = {"price-book": explanation.outcome is Outcome.BYPASS, "ledger": admission is None}
    if any(unknown.values()):
        document["degraded"] = [role for role, is_unknown in unknown.items() if is_unknown]
        document["stored"] = None if unknown["price-book"] else document["stored"]
        document["admitted"] = None if unknown["ledger"] else document["admitted"]
    return orjson.dumps(document)


def _purged_document(purged: Purged) -> bytes:
    if purged.key is None:
        return orjson.dumps({"account": purged.account, "purged": "all"})
    return orjson.dumps(
        {"account": purged.account, "purged": "question", "key": purged.key, "was_stored": purged.found}
    )


def _common_headers(exchange: Exchange) -> Headers:
    trace = exchange.trace
    headers = [(b"x-request-id", exchange.request_id.encode())]
    if trace.cache_status is not None:
        headers.append((b"cache-status", b"estimate-proxy; " + trace.cache_status.encode()))
    headers += _limit_headers(trace)
    if timing := _server_timing(trace):
        headers.append((b"server-timing", timing.encode()))
    if exchange.close:
        headers.append((b"connection", b"close"))
    return headers


def _limit_headers(trace: Trace) -> Headers:
    if trace.standing is None:
        return []
    policies, limits = trace.standing.policies(), trace.standing.limits()
    headers = [(b"ratelimit-policy", policies.encode()), (b"ratelimit", limits.encode())]
    if trace.warnings:
        names = ", ".join(f'"{quota.policy}"' for quota in trace.warnings)
        headers.append((b"estimate-proxy-warning", names.encode()))
    return headers


def _server_timing(trace: Trace) -> str:
    parts = []
    if trace.cache_status is not None:
        parts.append(f"cache;desc={'hit' if trace.cache_status.startswith('hit') else 'miss'}")
    if trace.store_s is not None:
        parts.append(f"store;dur={_ms(trace.store_s)}")
    if trace.upstream_s is not None:
        parts.append(f"upstream;dur={_ms(trace.upstream_s)}")
    return ", ".join(parts)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def _token(headers: Headers) -> str | None:
    """The team's token: `X-API-KEY`, or else `Authorization: Bearer`. One sent twice is refused."""
    key = _only(headers, b"x-api-key")
    authorization = _only(headers, b"authorization")
    if key is not None:
        return key
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def _query(scope: Scope) -> bytes:
    query: bytes = scope["query_string"]
    if len(query) > MAX_QUERY_BYTES:
        raise BadRequest(Code.INVALID_REQUEST, f"The query string has more than {MAX_QUERY_BYTES} bytes.")
    return query


def _directives(headers: Headers) -> Directives:
    return parse_directives(", ".join(value.decode("latin-1") for value in values(headers, b"cache-control")))


def _only(headers: Headers, name: bytes) -> str | None:
    found = list(values(headers, name))
    if len(found) > 1:
        raise BadRequest(Code.INVALID_REQUEST, f"The header {name.decode()} was sent {len(found)} times.")
    return found[0].decode("latin-1").strip() if found else None


def _declared_bytes(headers: Headers) -> int:
    """The Content-Length; the server has seen to it that it is one number, or absent."""
    return int(_only(headers, b"content-length") or 0)


def _check_media_type(headers: Headers) -> None:
    content_type = _only(headers, b"content-type")
    if content_type is not None and content_type.partition(";")[0].strip().lower() != _JSON.decode():
        raise BadRequest(Code.UNSUPPORTED_MEDIA_TYPE, "Send the body with Content-Type: application/json.")
    if (coding := _only(headers, b"content-encoding")) is not None and coding.lower() != "identity":
        raise BadRequest(Code.UNSUPPORTED_MEDIA_TYPE, "Send the body without a content coding.")


async def _is_gone(receive: Receive) -> bool:
    """Whether the client has hung up, without waiting for it to."""
    try:
        async with asyncio.timeout(0):
            return bool((await receive())["type"] == "http.disconnect")
    except TimeoutError:
        return False
