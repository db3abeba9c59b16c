"""The ASGI messages of one request: uvicorn's request cycle, with a fast path for complete responses.

`Cycle.reply` writes a complete response in one call, without ASGI messages. Objects that few requests need, such as the
event for arriving bodies, are created when they are first used.
"""

import asyncio
import logging
from enum import Enum, auto
from functools import cached_property
from typing import Any, Protocol

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.server import ServerState

from proxy.http.framing import RequestHead
from proxy.http.headers import Lines
from proxy.problems import BadRequest, Problem

SCOPE_REPLY = "estimate_proxy.reply"
"""The scope's key for `Cycle.reply`, which sends a complete response at once. `send` works too."""

_NUL, _LF, _CR = 0, 10, 13
"""As integers: searching bytes for an integer takes a quarter of the time."""

log = logging.getLogger(__name__)


class Delivery(Enum):
    """What happened to a response."""

    SENT = auto()
    BY_MESSAGES = auto()
    """It was not sent: the caller must send it by ASGI messages, because the client is slow or the method is HEAD."""
    CLIENT_GONE = auto()


class ClientConnection(Protocol):
    """The connection that a cycle writes its response to."""

    transport: asyncio.Transport
    flow: FlowControl
    server_state: ServerState

    def on_response_complete(self) -> None: ...

    def write(self, data: bytes) -> None: ...

    def close(self) -> None:
        """Closes the connection, but not before the client could read its response."""

    def is_closing(self) -> bool: ...


class Cycle(RequestResponseCycle):
    disconnected = False
    is_half_closed = False
    has_given_body = False
    response_started = False
    response_complete = False
    chunked_encoding = None
    expected_content_length = 0
    access_log = False
    logger = log
    body_problem: Problem | None = None
    """Why the body cannot be read. Not the exception: its traceback would keep the received bytes in memory."""
    task: asyncio.Task[None]

    def __init__(self, scope: Any, connection: ClientConnection, head: RequestHead, body: bytes | None) -> None:
        """body: None if it has not arrived completely."""
        self.scope = scope
        self.transport = connection  # type: ignore[assignment] # our connection: its `close` waits for the client
        self._write = connection.transport.write
        self.flow = connection.flow
        self.default_headers = connection.server_state.default_headers
        self.on_response = connection.on_response_complete
        self.tasks = connection.server_state.tasks
        self.keep_alive = head.keep_alive
        self.waiting_for_100_continue = head.expects_continue and body is None
        self.body = bytearray() if body is None else body  # type: ignore[assignment] # only a bytearray is appended to
        self.more_body = body is None
        scope[SCOPE_REPLY] = self.reply

    @cached_property
    def message_event(self) -> asyncio.Event:  # type: ignore[override] # uvicorn has a plain attribute
        event = asyncio.Event()
        if not self.more_body:
            event.set()
        return event

    async def run_asgi(self, app: Any) -> None:
        """As in uvicorn, without its checks for applications that break the ASGI protocol."""
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:  # noqa: BLE001 -- as in uvicorn: each failure is answered
            await self._fail(error)
        else:
            if not self.response_complete and not self.disconnected:
                await self._fail(None)
        finally:
            self.on_response = _nothing
            self.scope.pop(SCOPE_REPLY, None)  # type: ignore[misc] # breaks a reference cycle
            self.tasks.discard(self.task)

    async def _fail(self, error: BaseException | None) -> None:
        """The application failed, or ended without a response: sends a 500, or closes a response that has begun."""
        log.error("a request ended without a response", exc_info=error)
        if self.response_started:
            self.transport.close()
        else:
            await self.send_500_response()

    async def receive(self) -> Any:
        """As in uvicorn, but also returns `http.disconnect` when the client has only closed its side.

        Raises `BadRequest` if the body is malformed.
        """
        if not self.has_given_body:
            if self.body_problem is None:
                message = await super().receive()
            if self.body_problem is not None:
                raise BadRequest(self.body_problem.code, self.body_problem.detail)
            self.has_given_body = message["type"] == "http.request" and not message["more_body"]
            return message
        if not (self.is_half_closed or self.disconnected or self.response_complete):
            await self.message_event.wait()
        return {"type": "http.disconnect"}

    def reply(self, status: int, lines: Lines, body: bytes, *, close: bool) -> Delivery:
        """Sends a complete response.

        lines: header lines without `Content-Length` and `Connection`. Raises `ValueError` for a line that contains a
        line break or NUL.
        """
        if self.disconnected:
            return Delivery.CLIENT_GONE
        if self.flow.write_paused or self.scope["method"] == "HEAD":
            return Delivery.BY_MESSAGES
        sent = [*map(b": ".join, self.default_headers), *lines, b"content-length: %d" % len(body)]
        if close or not self.keep_alive:
            self.keep_alive = False
            sent.append(b"connection: close")
        text = b"".join(sent)
        if _NUL in text or _LF in text or _CR in text:
            raise ValueError("a response header contains a line break or NUL")
        self._write(b"%b%b\r\n\r\n%b" % (STATUS_LINE[status], b"\r\n".join(sent), body))
        self.response_started = self.response_complete = True
        if "message_event" in self.__dict__:
            self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return Delivery.SENT

    def half_close(self) -> None:
        """The client has closed its side, but may still read the response."""
        self.is_half_closed = True
        self.message_event.set()

    def refuse_body(self, problem: Problem) -> None:
        """The rest of the body cannot be read: makes `receive` raise, and closes the connection after the response."""
        self.body_problem = problem
        self.keep_alive = False
        self.message_event.set()

    def abandon(self) -> None:
        """The client is gone: makes `receive` return a disconnect."""
        if not self.response_complete:
            self.disconnected = True
        self.message_event.set()


def _nothing() -> None:
    """Replaces `on_response` once the request has ended."""
