"""uvicorn as this gateway uses it: on a socket that is there already, without signals, logs or headers of its own."""

import asyncio
import contextlib
import logging
import math
import secrets
import socket
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple
from urllib.parse import unquote

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from proxy.heads import Head, Lines
from proxy.problems import Code, Problem

KEEP_ALIVE_S = 75
"""Longer than load balancers keep idle connections (60 s), so that they close first and never meet a closed one."""

MAX_HEAD_BYTES = 64 * 2**10
"""Of a request line and headers; the piece that completes them may be larger by what the system reads at once."""

MAX_KNOWN = 1000
MAX_KNOWN_BYTES = 2048
"""So many heads are known again, and none that is longer: 4 MB with what was read from them."""

WHOLE_BODY = "estimate_proxy.body"
"""Where a request's scope has its body, if that came with its head: `receive` brings it too."""

HEAD = "estimate_proxy.head"
"""Where a request's scope has its headers as a `Head`."""

REPLY = "estimate_proxy.reply"
"""Where a request's scope has a way to send an answer at once: see `_Cycle.reply`. `send` is there too."""

_ASGI: Any = {"version": "3.0", "spec_version": "2.3"}
_END_OF_HEAD = b"\r\n\r\n"
_NUL, _LF, _CR = 0, 10, 13
"""As numbers they are found in a quarter of the time."""
_FOR_THE_SERVER = frozenset((b"transfer-encoding", b"expect"))

log = logging.getLogger(__name__)


class _Cycle(RequestResponseCycle):
    """uvicorn's, with a way to send an answer that is there as a whole. What few requests need is made when it is."""

    disconnected = False
    waiting_for_100_continue = False
    response_started = False
    response_complete = False
    chunked_encoding = None
    expected_content_length = 0
    access_log = False
    logger = log
    task: asyncio.Task[None]

    def __init__(self, scope: Any, protocol: "_Protocol", *, keep_alive: bool, body: bytes | None) -> None:
        self.scope = scope
        self.transport = protocol.transport
        self.flow = protocol.flow
        self.default_headers = protocol.server_state.default_headers
        self.on_response = protocol.on_response_complete
        self.tasks = protocol.tasks
        self.keep_alive = keep_alive
        self.body = bytearray() if body is None else body  # type: ignore[assignment] # it is read, and grows if None
        self.more_body = body is None
        scope[REPLY] = self.reply

    @cached_property
    def message_event(self) -> asyncio.Event:  # type: ignore[override] # it can be written
        event = asyncio.Event()
        if not self.more_body:
            event.set()
        return event

    async def run_asgi(self, app: Any) -> None:
        """As uvicorn does it, less what is checked of applications that anybody wrote."""
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:  # noqa: BLE001 -- as uvicorn: a client hears of anything
            await self._fail(error)
        else:
            if not self.response_complete and not self.disconnected:
                await self._fail(None)
        finally:
            self.on_response = _nothing
            self.scope.pop(REPLY, None)  # type: ignore[misc] # else the two hold each other
            self.tasks.discard(self.task)

    async def _fail(self, error: BaseException | None) -> None:
        """The application has not answered, which is a defect of it."""
        log.error("a request ended without an answer", exc_info=error)
        if self.response_started:
            self.transport.close()
        else:
            await self.send_500_response()

    def reply(self, status: int, lines: Lines, body: bytes, *, close: bool) -> bool:
        """Sends an answer, whose header `lines` say nothing of its length and connection.

        False, and nothing is sent, if that is to be done by messages: to a client that is slow, or wants no body.
        Raises `ValueError` for a line that would break the head.
        """
        if self.flow.write_paused or self.disconnected or self.scope["method"] == "HEAD":
            return False
        sent = [*map(b": ".join, self.default_headers), *lines, b"content-length: %d" % len(body)]
        if close or not self.keep_alive:
            self.keep_alive = False
            sent.append(b"connection: close")
        text = b"".join(sent)
        if _NUL in text or _LF in text or _CR in text:
            raise ValueError("a header field has a line break or NUL in it")
        self.transport.write(b"%b%b\r\n\r\n%b" % (STATUS_LINE[status], b"\r\n".join(sent), body))
        self.response_started = self.response_complete = True
        if "message_event" in self.__dict__:
            self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True


class _Known(NamedTuple):
    """What a head has said that came before, byte for byte. `body_bytes` follow it."""

    scope: dict[str, Any]
    body_bytes: int


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol with a bound on a request's head, and malformed requests answered as problems.

    * A head that was parsed is known again by its bytes: a client's requests mostly have the same.
    * A chunked body's trailers are kept out of the headers, where uvicorn appends them: they are no credentials.
    """

    _idle_since = 0.0
    _head_bytes = 0
    _in_head = False
    _in_message = False
    _piece: bytes | None = None
    """What has just come, if a request begins with it."""

    def __init__(self, *args: Any, known: dict[bytes, _Known], **how: Any) -> None:
        super().__init__(*args, **how)
        self._known = known

    def data_received(self, data: bytes) -> None:
        self._idle_since = 0.0
        is_next = not self._in_message and (self.cycle is None or self.cycle.response_complete)
        if is_next and self._begin_known(data):
            return
        self._piece = data if is_next else None
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
        except httptools.HttpParserUpgrade:
            pass  # it is not taken up, and the request was answered as it is
        self._piece = None
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The request's head has more than {MAX_HEAD_BYTES} bytes.")

    def _begin_known(self, data: bytes) -> bool:
        """Begins a request that is there as a whole, if its head is known."""
        end = data.find(_END_OF_HEAD) + len(_END_OF_HEAD)
        known = self._known.get(data[:end])
        if known is None or len(data) != end + known.body_bytes:
            return False
        scope, body = known.scope.copy(), data[end:]
        scope["server"], scope["client"], scope["state"] = self.server, self.client, self.app_state.copy()
        scope[WHOLE_BODY] = body
        self.cycle = _Cycle(scope, self, keep_alive=True, body=body)
        self._start_asgi_task(self.cycle, self.app)
        return True

    def _remember(self, data: bytes) -> None:
        """The head of a request that is all of `data`, if nothing in it but its length is for the server."""
        scope: Any = self.scope
        end, fields = data.find(_END_OF_HEAD) + len(_END_OF_HEAD), dict(scope["headers"])
        body_bytes = int(fields.get(b"content-length", 0))
        is_plain = self.cycle.keep_alive and not self.parser.should_upgrade() and _FOR_THE_SERVER.isdisjoint(fields)
        as_parsed = data.count(b"\r\n", 0, end) == len(scope["headers"]) + 2 and len(data) == end + body_bytes
        if is_plain and as_parsed and end <= MAX_KNOWN_BYTES:
            self._known[data[:end]] = _Known({**scope, WHOLE_BODY: b"", REPLY: None}, body_bytes)
            if len(self._known) > MAX_KNOWN:
                del self._known[next(iter(self._known))]

    def on_message_begin(self) -> None:
        self._in_head, self._in_message, self._head_bytes = True, True, 0
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        """As uvicorn does it, less what is not used here: WebSockets, a root path, its own limit on concurrency."""
        self._in_head = False
        parser, url = self.parser, httptools.parse_url(self.url)
        version, path = parser.get_http_version(), url.path.decode("ascii")
        scope: Any = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "scheme": "http",
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
            "root_path": "",
            "headers": self.headers,
            "server": self.server,
            "client": self.client,
            "state": self.app_state.copy(),
            HEAD: Head(self.headers),
        }
        self.scope = scope
        self.headers = []  # trailers go there
        before, keep_alive = self.cycle, version != "1.0" and parser.should_keep_alive()
        self.cycle = cycle = _Cycle(self.scope, self, keep_alive=keep_alive, body=None)
        cycle.waiting_for_100_continue = self.expect_100_continue
        if before is None or before.response_complete:
            self._start_asgi_task(cycle, self.app)
        else:  # a pipelined request waits for its turn
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def on_message_complete(self) -> None:
        self._in_message = False
        if self.cycle.response_complete:
            return
        self.cycle.more_body = False
        self.cycle.message_event.set()
        if self._piece is not None:
            self.scope[WHOLE_BODY] = bytes(self.cycle.body)  # type: ignore[literal-required] # a key of ours
            self._remember(self._piece)

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """As uvicorn does it, but the task is taken out of the server's by itself: a callback would be a turn more."""
        cycle.task = self.loop.create_task(cycle.run_asgi(app))
        self.tasks.add(cycle.task)

    def on_response_complete(self) -> None:
        """As uvicorn does it, but with a timer a connection rather than one a request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._wait_for_idleness(self.timeout_keep_alive)

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection on which nothing has come for as long as it is kept."""
        idle_s = self.loop.time() - self._idle_since
        if self._idle_since and idle_s >= self.timeout_keep_alive:
            self.transport.close()
        else:
            self._wait_for_idleness(self.timeout_keep_alive - idle_s if self._idle_since else self.timeout_keep_alive)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def _wait_for_idleness(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP request, or too much of one, and hangs up."""
        self._in_head = False
        problem, request_id = Problem(Code.INVALID_REQUEST, msg), secrets.token_hex(16)
        body = problem.document(request_id)
        headers = [*problem.headers, (b"x-request-id", request_id.encode()), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in headers), b"", body]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()


def _nothing() -> None:
    """Happens behind a response that is complete."""


class Server(uvicorn.Server):
    """uvicorn's server; `announce` is called when it serves, and setting `should_exit` ends it."""

    def __init__(self, app: ASGIApp, *, drain_s: float, announce: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            loop="uvloop",
            http=partial(_Protocol, known={}),  # type: ignore[arg-type] # it is called, and nothing else
            ws="none",
            interface="asgi3",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=math.ceil(drain_s),
        )
        super().__init__(config)
        self._announce = announce

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The supervisor has the signals."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()
