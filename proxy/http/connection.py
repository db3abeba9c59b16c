"""An HTTP/1.1 connection: an asyncio protocol that reads requests, runs the application and writes responses.

It replaces uvicorn's protocol, which parses the bytes after a request with `Upgrade` as a new request, has no limit on
heads and trailers, and queues pipelined requests without limit. Here:

* Requests are read and answered one at a time. When bytes of the next request arrive meanwhile, they are buffered, and
  reading from the socket is paused.
* A malformed request is answered with a problem document, and the connection is closed. The connection answers a
  malformed head; the application answers a malformed body, which its `receive` raises as `BadRequest`.
* A client that is still sending its body when the response is written gets time to read the response.
* Parsed request heads are cached, because a client's requests mostly have the same head.

uvicorn still provides the ASGI messages of a request, flow control, and the server: see `proxy.http.request_cycle` and
`proxy.http.server`.
"""

import asyncio
import logging
import math
import secrets
from typing import Any, NamedTuple
from urllib.parse import unquote

import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.protocols.utils import get_local_addr, get_remote_addr
from uvicorn.server import ServerState

from proxy.http.framing import MAX_HEAD_BYTES, ChunkedBody, RequestHead, find_end_of_head, parse_head, skip_empty_lines
from proxy.http.headers import RequestHeaders
from proxy.http.request_cycle import Cycle
from proxy.problems import NO_NAME, BadRequest, Code, Problem
from proxy.telemetry.logs import event

KEEP_ALIVE_S = 75
"""Limits how long an idle connection stays open.

Load balancers close idle connections after 60 s. This is longer, so that they close first, and never send a request on
a connection that is already closed.
"""

LINGER_S = 30.0
"""Limits how long a client may take to read its responses, and to stop sending after the last (RFC 9112 §9.6)."""

MAX_DISCARDED_BYTES = 128 * 2**20
"""Limits what a client may send after a response, which is dropped.

It is this much because some clients read the response only after they have sent the whole body.
"""

MAX_CACHED_HEADS = 1000
MAX_CACHED_HEAD_BYTES = 2048
"""Limit the cache of parsed heads to 4 MB; longer heads are not cached. Evicts in FIFO order."""

SCOPE_BODY = "estimate_proxy.body"
"""The scope's key for the whole body, if it arrived together with the head. `receive` returns it too."""

SCOPE_HEADERS = "estimate_proxy.head"
"""The scope's key for the headers as `RequestHeaders`."""

log = logging.getLogger(__name__)

_ASGI: Any = {"version": "3.0", "spec_version": "2.3"}


class _CachedHead(NamedTuple):
    """A parsed head, and the ASGI scope that is copied for each request with that head."""

    head: RequestHead
    scope: dict[str, Any]


class Connection(asyncio.Protocol):
    """One client's connection. It is the transport of its cycles: they write and close through it.

    head_cache: the cache of parsed heads, shared by all connections.
    """

    transport: asyncio.Transport
    flow: FlowControl

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        head_cache: dict[bytes, _CachedHead],
        head_timeout_s: float,
    ) -> None:
        self.server_state = server_state
        self._app = config.loaded_app
        self._app_state = app_state
        self._loop = _loop or asyncio.get_running_loop()
        self._head_cache = head_cache
        self._head_timeout_s = head_timeout_s
        self._received = b""
        """Bytes that are not parsed yet: an incomplete head, or what follows a request that is not answered yet."""
        self._searched_bytes = 0
        """How much of `_received` was already searched for the end of a head."""
        self._cycle: Cycle | None = None
        self._body_left = 0
        self._chunked_body: ChunkedBody | None = None
        self._discarded = 0
        self._is_closing = False
        self._is_half_closed = False
        self._is_draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._expires = math.inf
        """When to stop waiting for the client, on the loop's clock."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # no other kind is passed
        self.transport = transport
        self.flow = FlowControl(transport)
        self._server, self._client = get_local_addr(transport), get_remote_addr(transport)
        self.server_state.connections.add(self)  # type: ignore[arg-type] # the server only calls `shutdown`
        self._expire_in(self._head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(self)
        self._is_closing = True
        if self._timer is not None:
            self._timer.cancel()
        if self._cycle is not None:
            self._cycle.abandon()
        self.flow.resume_writing()
        if exc is None:
            self.transport.close()

    def eof_received(self) -> bool:
        """The client closed its side. If its request is complete or refused, it still gets the response.

        Returns True to keep the connection open for writing.
        """
        self._is_half_closed = True
        if self._cycle is None or not self._is_answering or self._is_in_body:
            return False
        self._cycle.half_close()
        return True

    def pause_writing(self) -> None:
        """The client does not read its responses: it gets `LINGER_S` to do so."""
        self.flow.pause_writing()
        self._expire_in(LINGER_S)

    def resume_writing(self) -> None:
        self.flow.resume_writing()
        self._wait_until(math.inf if self._is_answering else self._loop.time() + KEEP_ALIVE_S)

    def shutdown(self) -> None:
        """The server drains: closes an idle connection at once, another one after its response."""
        self._is_draining = True
        if self._cycle is None or self._cycle.response_complete:
            self.transport.close()
        else:
            self._cycle.keep_alive = False

    @property
    def _is_answering(self) -> bool:
        return self._cycle is not None and not self._cycle.response_complete

    @property
    def _is_in_body(self) -> bool:
        return bool(self._body_left) or self._chunked_body is not None

    # Reading

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._read()

    def _read(self) -> None:
        """Parses what was received, up to the end of a request that must be answered before the next one is read."""
        try:
            while self._received and not self._is_closing:
                if self._is_in_body:
                    self._read_body()
                elif self._is_answering:
                    self.flow.pause_reading()
                    return
                elif not self._read_head():
                    return
        except BadRequest as error:
            self._refuse(error.problem)
        if self._is_closing and self._received:
            self._count_discarded(len(self._received))
            self._received = b""

    def _read_head(self) -> bool:
        """Begins the next request. Returns False if its head is incomplete."""
        received = self._received = skip_empty_lines(self._received)
        end = find_end_of_head(received, self._searched_bytes)
        if end is None:
            if received and not self._searched_bytes:
                self._expire_in(self._head_timeout_s)
            self._searched_bytes = len(received)
            return False
        self._searched_bytes = 0
        self._wait_until(math.inf)
        cached = self._head_cache.get(received[:end]) or self._parse(received[:end])
        self._begin(cached, end)
        return True

    def _parse(self, text: bytes) -> _CachedHead:
        """Parses a head, and caches it. Raises `BadRequest`."""
        head = parse_head(text)
        path = head.path.decode("ascii")
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": head.version,
            "method": head.method,
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": head.path,
            "query_string": head.query,
            "root_path": "",
            "headers": head.headers,
            SCOPE_HEADERS: RequestHeaders(head.headers),
        }
        cached = _CachedHead(head, scope)
        if len(text) <= MAX_CACHED_HEAD_BYTES:
            self._head_cache[text] = cached
            if len(self._head_cache) > MAX_CACHED_HEADS:
                del self._head_cache[next(iter(self._head_cache))]
        return cached

    def _begin(self, cached: _CachedHead, end_of_head: int) -> None:
        """Runs the application for a request, with its body if all of it has arrived."""
        self._discarded = 0
        received, head = self._received, cached.head
        scope = cached.scope.copy()
        scope["server"], scope["client"], scope["state"] = self._server, self._client, self._app_state.copy()
        body = None
        if head.content_length is None:
            self._chunked_body = ChunkedBody(MAX_HEAD_BYTES - end_of_head)
            self._received = received[end_of_head:]
        elif len(received) - end_of_head >= head.content_length:
            end = end_of_head + head.content_length
            scope[SCOPE_BODY] = body = received[end_of_head:end]
            self._received = received[end:]
        else:
            self._body_left = head.content_length
            self._received = received[end_of_head:]
        self._cycle = cycle = Cycle(scope, self, head, body)
        cycle.task = self._loop.create_task(cycle.run_asgi(self._app))
        self.server_state.tasks.add(cycle.task)

    def _read_body(self) -> None:
        received = self._received
        if self._chunked_body is None:
            piece, self._received = received[: self._body_left], received[self._body_left :]
            self._body_left -= len(piece)
        else:
            piece, self._received = self._chunked_body.feed(received)
            if self._chunked_body.complete:
                self._chunked_body = None
        if self._is_answering:
            self._deliver(piece)
        else:
            self._count_discarded(len(received) - len(self._received))
            if not self._is_in_body:
                self._wait_until(self._loop.time() + KEEP_ALIVE_S)

    def _deliver(self, piece: bytes) -> None:
        """Passes a piece of the body to the application, and pauses reading if the application does not take it."""
        cycle: Any = self._cycle
        cycle.body += piece
        cycle.more_body = self._is_in_body
        if len(cycle.body) > HIGH_WATER_LIMIT and cycle.more_body:
            self.flow.pause_reading()
        if piece or not cycle.more_body:
            cycle.message_event.set()

    # Answering

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def is_closing(self) -> bool:
        return self._is_closing or self.transport.is_closing()

    def close(self) -> None:
        """Closes the connection, but not before the client could read its response.

        Closing while the client is still sending would reset the connection, and the response would be lost.
        """
        self._is_closing = True
        if self._is_in_body:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Reads and drops what the client sends, until it closes the connection (RFC 9112 §9.6)."""
        if self._is_half_closed or self._is_draining:
            self.transport.close()
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.flow.resume_reading()
        self._expire_in(LINGER_S)

    def on_response_complete(self) -> None:
        """Reads the next request, if bytes of it are buffered, or waits for it."""
        self.server_state.total_requests += 1
        if self.is_closing():
            return
        self.flow.resume_reading()
        if self._is_in_body:
            self._expire_in(LINGER_S)
        else:
            self._wait_until(self._loop.time() + KEEP_ALIVE_S)
            if self._timer is None or self._timer.when() > self._expires:
                self._schedule()
        if self._received:
            self._read()
        if self._is_half_closed and not self._is_answering:
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        """Answers a malformed request, and closes the connection after the answer."""
        self._is_closing = True
        if not self._is_in_body:
            self._write_problem(problem)
            self._linger()
        elif self._cycle is not None and self._is_answering:
            self._chunked_body = None  # so that `close` does not wait for the end of a body that may have none
            self._cycle.refuse_body(problem)
        else:
            self.transport.close()

    def _write_problem(self, problem: Problem) -> None:
        request_id = secrets.token_hex(16)
        facts = {
            "request_id": request_id,
            "client": self._client[0] if self._client else NO_NAME,
            "status": problem.status,
            "code": problem.code.value,
            "reason": problem.detail,
        }
        event(log, logging.INFO, "malformed request", facts)
        body = problem.document(request_id)
        fields = [
            *self.server_state.default_headers,
            *problem.headers,
            (b"x-request-id", request_id.encode()),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        self.transport.write(
            b"%b%b\r\n\r\n%b" % (STATUS_LINE[problem.status], b"\r\n".join(map(b": ".join, fields)), body)
        )

    def _count_discarded(self, size: int) -> None:
        self._discarded += size
        if self._discarded > MAX_DISCARDED_BYTES:
            self._is_closing = True
            self.transport.abort()

    # Waiting

    def _wait_until(self, time: float) -> None:
        """Sets the expiry. A timer that is already running may fire earlier; `_expire` then sets it again."""
        if not self.flow.write_paused:
            self._expires = time

    def _expire_in(self, seconds: float) -> None:
        self._expires = self._loop.time() + seconds
        self._schedule()

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._expires, self._expire)

    def _expire(self) -> None:
        """Closes the connection if its expiry has passed; else sets the timer again.

        The timer is not cancelled by each request: letting it fire now and then is cheaper than one timer per request.
        """
        self._timer = None
        if self._expires == math.inf:
            return
        if self._loop.time() < self._expires:
            self._schedule()
        elif self._searched_bytes:
            self._refuse(
                Problem(
                    Code.INVALID_REQUEST,
                    f"The request's head did not arrive within {self._head_timeout_s:g} s: send it in one piece.",
                )
            )
        else:
            self._is_closing = True
            self.transport.abort()
