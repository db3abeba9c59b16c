"""The ASGI applications of the endpoints: reads a request, calls its handler, sends the result, writes a log line.

* The header list is read once, before the first `receive()`: the server appends chunked trailers to it later.
* `http.disconnect` while a body is read is an abort, never the end of the body.
* A request whose body is still arriving does not count as in flight: its memory is limited instead, by team, as
  `proxy.gateway.in_flight` describes.
* Routing uses `scope["path"]` alone, and nothing in a request can change which upstream is asked.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Iterator
from functools import cached_property
from itertools import count

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from proxy.gateway.in_flight import ARRIVING_REQUEST_BYTES, Arrival, InFlightTracker
from proxy.gateway.request import ClientRequest, Purged, Result, Trace
from proxy.http.connection import SCOPE_BODY, SCOPE_HEADERS
from proxy.http.headers import RequestHeaders
from proxy.http.paths import OWN_PATHS, shown_path
from proxy.http.request_cycle import SCOPE_REPLY, Delivery
from proxy.http.responses import RequestContext, common_lines, message_headers, render, request_id_of
from proxy.problems import BadRequest, ClientGone, Code, Outcome, Overloaded, Problem
from proxy.telemetry.metrics import Metrics
from proxy.upstream.address import ESTIMATE_PATH

Handler = Callable[[ClientRequest, Trace], Awaitable[Result]]

MAX_QUERY_BYTES = 8192

_CLIENT_GONE = 499
"""The status in the log for a request whose client closed the connection before the answer; nginx uses it too."""

log = logging.getLogger(__name__)


def _new_ids() -> Iterator[str]:
    """Ids for requests without a usable one: a random prefix, then a counter."""
    prefix = secrets.token_hex(8)
    return (f"{prefix}{number:016x}" for number in count())


class Endpoint:
    """An ASGI application that answers requests with the result of one handler.

    operation: the label in metrics and logs.
    timeout_s: the deadline of the whole answer, body included.
    """

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
        self._new_ids = _new_ids()

    @cached_property
    def _loop(self) -> asyncio.AbstractEventLoop:
        """Cached: `get_running_loop` calls getpid(2) each time."""
        return asyncio.get_running_loop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: RequestHeaders = scope[SCOPE_HEADERS]
        context = RequestContext(self._operation, headers.request_id or next(self._new_ids), scope)
        result: Result | None
        self._tracker.in_flight += 1
        try:
            _check_overload(self._tracker)
            deadline = self._loop.time() + self._timeout_s
            request = IncomingRequest(scope, receive, context, self._tracker, self._max_body_bytes, deadline)
            result = await self._handler(request, context)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 -- each becomes a result or a log line
            result = _problem_of(error, context)
        finally:
            self._tracker.in_flight -= 1
        if result is None:
            context.end(self._metrics, Outcome.CANCELLED, _CLIENT_GONE, None)
            return
        context.close = context.close or self._tracker.draining
        # The contract's outcomes are those of estimates: reports, purges and /metrics count as `hit`.
        outcome = Outcome.HIT if isinstance(result, Purged) else result.outcome
        status, lines, body = render(result, context)
        match scope[SCOPE_REPLY](status, lines, body, close=context.close):
            case Delivery.BY_MESSAGES:
                fields = message_headers([*lines, b"content-length: %d" % len(body)], context)
                await send({"type": "http.response.start", "status": status, "headers": fields})
                await send({"type": "http.response.body", "body": body})
            case Delivery.CLIENT_GONE:
                outcome, status = Outcome.CANCELLED, _CLIENT_GONE
        context.end(self._metrics, outcome, status, result)


class IncomingRequest:
    """The `ClientRequest` of an ASGI scope. Raises `BadRequest` if the request's head is malformed."""

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        context: RequestContext,
        tracker: InFlightTracker,
        max_bytes: int,
        deadline: float,
    ) -> None:
        headers: RequestHeaders = scope[SCOPE_HEADERS]
        self.token = headers.token
        self.directives = headers.directives
        self.ceiling_micro = headers.ceiling_micro
        self.accept = headers.accept
        self.query: bytes = scope["query_string"]
        self.deadline = deadline
        if len(self.query) > MAX_QUERY_BYTES:
            raise BadRequest(Code.INVALID_REQUEST, f"The query string is longer than {MAX_QUERY_BYTES} bytes.")
        self._scope = scope
        self._headers = headers
        self._receive = receive
        self._context = context
        self._tracker = tracker
        self._max_bytes = max_bytes

    async def read_body(self) -> bytes:
        """The whole body; call it once.

        Raises `BadRequest` if it is late, too large or not declared as plain JSON, `ClientGone`, `Overloaded`.
        """
        self._headers.check_media_type()
        whole: bytes | None = self._scope.get(SCOPE_BODY)
        if len(whole or b"") > self._max_bytes or self._headers.content_length > self._max_bytes:
            raise self._too_large()
        if whole is not None:
            return whole
        try:
            async with asyncio.timeout_at(self.deadline):
                body = await self._collect()
        except TimeoutError:
            self._context.close = True
            raise BadRequest(Code.INVALID_REQUEST, "The body did not arrive in time.") from None
        _check_overload(self._tracker)
        return body

    async def _collect(self) -> bytes:
        pieces, size, more = [], 0, True
        with self._tracker.arriving(self._context.team) as arrival:
            self._reserve(arrival, ARRIVING_REQUEST_BYTES)
            while more:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                piece, more = message["body"], message["more_body"]
                size += len(piece)
                if size > self._max_bytes:
                    raise self._too_large()
                self._reserve(arrival, len(piece))
                pieces.append(piece)
        return b"".join(pieces)

    def _reserve(self, arrival: Arrival, size: int) -> None:
        if not arrival.reserve(size):
            self._context.close = True
            raise Overloaded("Too many request bodies are arriving at once: send fewer requests in parallel.")

    def _too_large(self) -> BadRequest:
        self._context.close = True
        return BadRequest(
            Code.BODY_TOO_LARGE,
            f"The body is larger than the gateway's limit of {self._max_bytes} bytes: if it has several items, send "
            "them in several requests; if it has one, shorten it.",
        )


def _check_overload(tracker: InFlightTracker) -> None:
    if tracker.is_overloaded():
        raise Overloaded("The gateway is overloaded: send the request again later.")


def _problem_of(error: BaseException, context: RequestContext) -> Problem | None:
    """The problem that answers an exception; None if the client is gone."""
    match error:
        case BadRequest(problem=problem):
            return problem
        case ClientGone():
            return None
        case Overloaded():
            return Problem(Code.OVERLOADED, str(error))
        case asyncio.CancelledError():
            if (task := asyncio.current_task()) is not None:
                task.uncancel()  # the task goes on: Python 3.11.2 would otherwise end it at its next timeout
            context.close = True
            return Problem(Code.DRAINING, "The gateway is shutting down: send the request again.", retry_after_s=1)
        case _:
            log.error("request %s failed", context.request_id, exc_info=error)
            return Problem(
                Code.INTERNAL_ERROR,
                "The gateway failed because of an internal error: its operator finds the reason in the log under "
                "this request's id.",
            )


async def refuse_route(tracker: InFlightTracker, metrics: Metrics, request: Request, error: Exception) -> Response:
    """Answers requests for a path or method that the gateway does not serve."""
    if isinstance(error, HTTPException) and error.status_code == 405:  # noqa: PLR2004 -- RFC 9110 §15.5.6
        allow = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
        problem = Problem(
            Code.METHOD_NOT_ALLOWED, f"This path only takes {allow}.", fields=((b"allow", allow.encode()),)
        )
    else:
        problem = _not_found(request.scope["path"], shown_path(request.scope["raw_path"]))
    return refuse(tracker, metrics, problem, request)


def refuse(tracker: InFlightTracker, metrics: Metrics, problem: Problem, request: Request) -> Response:
    """Answers a request that no handler takes, and writes its log line."""
    context = RequestContext("other", request_id_of(request), request.scope)
    context.close = tracker.draining
    body = problem.document(context.request_id)
    context.end(metrics, problem.outcome, problem.status, problem)
    headers = [*problem.headers, *message_headers(common_lines(context), context)]
    return Response(body, problem.status, {name.decode(): value.decode() for name, value in headers})


def _not_found(path: str, shown: str) -> Problem:
    """The problem of a path that is not served. `shown` is the path as problems show it.

    It has `err` besides `error`: RenderNet's other endpoints use that name, and so do clients that call them.
    """
    without_extra_slashes = "/" + "/".join(filter(None, path.split("/")))
    if without_extra_slashes in (ESTIMATE_PATH, *OWN_PATHS):
        detail = f"The gateway does not serve {shown}: send the request to {without_extra_slashes}."
        if path.startswith("//"):
            detail += " Remove the slash at the end of your client's base URL, which causes the second slash."
    else:
        detail = (
            f"The gateway does not serve {shown}. Of RenderNet's API it only serves POST {ESTIMATE_PATH}; its own "
            f"paths are {', '.join(OWN_PATHS)}."
        )
    return Problem(Code.NOT_FOUND, detail, members={"err": {"code": Code.NOT_FOUND, "message": detail}})
