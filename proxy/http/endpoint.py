"""HTTP in, HTTP out: the endpoints as ASGI applications, problems as documents, one log line a request.

* The header list is read once, before the first `receive()`: the server appends chunked trailers to it later.
* `http.disconnect` while a body is read is an abort, never the end of the body.
* A request whose body is still arriving is not work yet: it counts as `proxy.gateway.in_flight` says, by its team.
* Decisions are taken on `scope["path"]` alone; nothing of a request steers where upstream is.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property
from itertools import count
from math import floor
from time import perf_counter
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from proxy.gateway.estimates import Answer, ClientRequest, Explanation, Purged, Trace
from proxy.gateway.in_flight import ARRIVING_REQUEST_BYTES, Arrival, InFlightTracker
from proxy.http.connection import HEAD, WHOLE_BODY
from proxy.http.framing import Headers
from proxy.http.headers import Lines, RequestHeaders
from proxy.http.request_cycle import REPLY, Delivery
from proxy.http.usage_endpoints import Document
from proxy.problems import DEFAULT_RETRY_AFTER_S, BadRequest, ClientGone, Code, Outcome, Overloaded, Problem
from proxy.quota.ledger import Admitted, Denied
from proxy.telemetry.logs import event
from proxy.telemetry.metrics import Metrics

Result = Answer | Explanation | Purged | Document | Problem
Handler = Callable[[ClientRequest, Trace], Awaitable[Result]]

MAX_QUERY_BYTES = 8192

_JSON_TYPE = b"content-type: application/json"
_NO_STORE = b"cache-control: no-store"

_CLIENT_GONE = 499
"""What the log shows for a request whose client did not wait for the answer, as nginx does."""

log = logging.getLogger(__name__)


class RequestIds:
    """Names for requests whose client gave none: a random beginning, then a count."""

    def __init__(self) -> None:
        self._begin = secrets.token_hex(8)
        self._numbers = count()

    def next(self) -> str:
        return f"{self._begin}{next(self._numbers):016x}"


class RequestContext(Trace):
    """One request on its way to its one log line."""

    close = False
    """The connection, behind the answer."""

    def __init__(self, operation: str, request_id: str) -> None:
        self.operation = operation
        self.request_id = request_id
        self.started = perf_counter()

    def end(self, metrics: Metrics, outcome: Outcome, status: int) -> None:
        """Counts the request, and writes its log line."""
        duration_s = perf_counter() - self.started
        metrics.record_request(self.team, self.operation, outcome, duration_s)
        if not log.isEnabledFor(logging.INFO):
            return
        facts = {
            "request_id": self.request_id,
            "team": self.team,
            "operation": self.operation,
            "outcome": outcome.value,
            "status": status,
            "ms": _ms(duration_s),
        }
        if self.upstream_s is not None:
            facts["upstream_ms"] = _ms(self.upstream_s)
        event(log, logging.INFO, "request", facts)


class Endpoint:
    """An ASGI application that tells one of the gateway's stories."""

    def __init__(
        self,
        operation: str,
        handler: Handler,
        *,
        tracker: InFlightTracker,
        metrics: Metrics,
        max_body_bytes: int,
        timeout_s: float,
    ) -> None:
        self._operation = operation
        self._handler = handler
        self._tracker = tracker
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s
        self._ids = RequestIds()

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Looked up once: Python asks the system each time whether the process is still the same."""
        return asyncio.get_running_loop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head: RequestHeaders = scope[HEAD]
        context = RequestContext(self._operation, head.request_id or self._ids.next())
        ending: Result | None
        self._tracker.in_flight += 1
        try:
            _refuse_overload(self._tracker)
            deadline = self._loop.time() + self._timeout_s
            asked = IncomingRequest(scope, receive, context, self._tracker, self._max_body_bytes, deadline)
            ending = await self._handler(asked, context)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 -- none of them is left unsaid
            ending = _result_of(error, context)
        finally:
            self._tracker.in_flight -= 1
        if ending is None:
            context.end(self._metrics, Outcome.CANCELLED, _CLIENT_GONE)
            return
        context.close = context.close or self._tracker.draining
        outcome = Outcome.HIT if isinstance(ending, Purged | Document) else ending.outcome
        status, lines, body = _response_of(ending, context)
        match scope[REPLY](status, lines, body, close=context.close):
            case Delivery.BY_MESSAGES:
                headers = _fields([*lines, b"content-length: %d" % len(body)], context)
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
            case Delivery.CLIENT_GONE:
                outcome, status = Outcome.CANCELLED, _CLIENT_GONE
        context.end(self._metrics, outcome, status)


class IncomingRequest:
    """What a request asks for. Raises `BadRequest` if its head is malformed."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        context: RequestContext,
        tracker: InFlightTracker,
        max_bytes: int,
        deadline: float,
    ) -> None:
        head: RequestHeaders = scope[HEAD]
        self.token = head.token
        self.directives = head.directives
        self.accept = head.accept
        self.query: bytes = scope["query_string"]
        self.deadline = deadline
        if len(self.query) > MAX_QUERY_BYTES:
            raise BadRequest(Code.INVALID_REQUEST, f"The query string has more than {MAX_QUERY_BYTES} bytes.")
        self._scope = scope
        self._head = head
        self._receive = receive
        self._context = context
        self._tracker = tracker
        self._max_bytes = max_bytes

    async def read_body(self) -> bytes:
        """The whole body, once.

        Raises `BadRequest` if it is late, too large or not declared as plain JSON, `ClientGone`, `Overloaded`.
        """
        self._head.check_media_type()
        whole: bytes | None = self._scope.get(WHOLE_BODY)
        if len(whole or b"") > self._max_bytes or self._head.content_length > self._max_bytes:
            raise self._too_large()
        if whole is not None:
            return whole
        try:
            async with asyncio.timeout_at(self.deadline):
                body = await self._collect()
        except TimeoutError:
            self._context.close = True
            raise BadRequest(Code.INVALID_REQUEST, "The body did not arrive in time.") from None
        _refuse_overload(self._tracker)
        return body

    async def _collect(self) -> bytes:
        """The body's pieces, as they arrive."""
        pieces, size, more = [], 0, True
        with self._tracker.arriving(self._context.team) as arrival:
            self._hold(arrival, ARRIVING_REQUEST_BYTES)
            while more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece, more = message["body"], message["more_body"]
                size += len(piece)
                if size > self._max_bytes:
                    raise self._too_large()
                self._hold(arrival, len(piece))
                pieces.append(piece)
        return b"".join(pieces)

    def _hold(self, arrival: Arrival, size: int) -> None:
        if not arrival.hold(size):
            self._context.close = True
            raise Overloaded("Too many request bodies are still arriving: send fewer at a time.")

    def _too_large(self) -> BadRequest:
        self._context.close = True
        return BadRequest(Code.BODY_TOO_LARGE, f"The body has more than {self._max_bytes} bytes: send fewer items.")


def _refuse_overload(tracker: InFlightTracker) -> None:
    if tracker.is_overloaded():
        raise Overloaded("The gateway has too much to do: try again.")


def _result_of(error: BaseException, context: RequestContext) -> Problem | None:
    """What a story has raised, as a problem; None when nobody is left to hear it."""
    match error:
        case BadRequest(problem=problem):
            return problem
        case ClientGone():
            return None
        case Overloaded():
            return Problem(Code.OVERLOADED, str(error))
        case asyncio.CancelledError():
            if (task := asyncio.current_task()) is not None:
                task.uncancel()  # it goes on: Python 3.11.2 would end it at its next time limit otherwise
            context.close = True
            return Problem(Code.DRAINING, "The gateway is shutting down: ask again.", retry_after_s=1)
        case _:
            log.error("request %s failed", context.request_id, exc_info=error)
            return Problem(Code.INTERNAL_ERROR, "The gateway failed; its log has the reason under this request's id.")


def _response_of(ending: Result, context: RequestContext) -> tuple[int, Lines, bytes]:
    """Status, header fields but those of its length and connection, and body."""
    match ending:
        case Answer(status=status):
            lines, body = _answer_lines(ending), ending.body
        case Problem(status=status):
            lines, body = [*ending.lines], ending.document(context.request_id)
        case Explanation():
            status, lines, body = 200, [_JSON_TYPE, _NO_STORE], _explanation_document(ending)
        case Purged():
            status, lines, body = 200, [_JSON_TYPE, _NO_STORE], _purged_document(ending)
        case Document():
            status, lines, body = 200, _document_lines(ending), ending.body
    return status, lines + _common_lines(context), body


def probe_answer(request: Request, document: Mapping[str, Any], *, draining: bool = False) -> Response:
    """The answer to a load balancer's or an orchestrator's check: JSON, for this moment only."""
    request_id = request.scope[HEAD].request_id or secrets.token_hex(16)
    headers = {"cache-control": "no-store", "x-request-id": request_id}
    if draining:
        headers |= {"connection": "close", "retry-after": str(DEFAULT_RETRY_AFTER_S)}
    return JSONResponse(document, 503 if draining else 200, headers)


async def refuse_route(tracker: InFlightTracker, metrics: Metrics, request: Request, error: Exception) -> Response:
    """The answer to a path or method that is not served."""
    context = RequestContext("other", request.scope[HEAD].request_id or secrets.token_hex(16))
    context.close = tracker.draining
    if isinstance(error, HTTPException) and error.status_code == 405:  # noqa: PLR2004 -- RFC 9110 §15.5.6
        allow = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        problem = Problem(Code.METHOD_NOT_ALLOWED, f"This path takes {allow}.", fields=((b"allow", allow.encode()),))
    else:
        problem = Problem(Code.NOT_FOUND, "Of RenderNet's API the gateway serves POST /pub/v1/generations/estimate.")
    body = problem.document(context.request_id)
    context.end(metrics, problem.outcome, problem.status)
    fields = [*problem.headers, *_fields(_common_lines(context), context)]
    return Response(body, problem.status, {name.decode(): value.decode() for name, value in fields})


def _fields(lines: Lines, context: RequestContext) -> Headers:
    """As a message to the server has them."""
    pairs = (line.split(b": ", 1) for line in ([*lines, b"connection: close"] if context.close else lines))
    return [(name, value) for name, value in pairs]


def _answer_lines(answer: Answer) -> Lines:
    lines = [_JSON_TYPE]
    if answer.status >= 400:  # noqa: PLR2004 -- upstream's own errors are errors too
        lines.append(_NO_STORE)
    if answer.age_s is not None:
        lines.append(b"age: %d" % answer.age_s)
    if answer.balance_age_s is not None:
        lines.append(b"estimate-proxy-balance-age: %d" % answer.balance_age_s)
    return lines


def _document_lines(report: Document) -> Lines:
    return [b"content-type: " + report.media_type.encode(), b"vary: accept", _NO_STORE]


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


def _common_lines(context: RequestContext) -> Lines:
    lines = [b"x-request-id: " + context.request_id.encode()]
    if context.cache_status is not None:
        lines.append(b"cache-status: estimate-proxy; " + context.cache_status.encode())
    if context.quota_state is not None:
        lines += context.quota_state.lines
    if context.warnings:
        names = ", ".join(f'"{quota.policy}"' for quota in context.warnings)
        lines.append(b"estimate-proxy-warning: " + names.encode())
    if timing := _timings(context):
        lines.append(b"server-timing: " + b", ".join(timing))
    return lines


def _timings(trace: Trace) -> list[bytes]:
    timings = []
    if trace.cache_status is not None:
        timings.append(b"cache;desc=hit" if trace.cache_status.startswith("hit") else b"cache;desc=miss")
    if trace.store_s is not None:
        timings.append(b"store;dur=%.1f" % (1000 * trace.store_s))
    if trace.upstream_s is not None:
        timings.append(b"upstream;dur=%.1f" % (1000 * trace.upstream_s))
    return timings


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
