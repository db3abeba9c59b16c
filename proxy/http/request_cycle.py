"""A request and its response as ASGI messages: uvicorn's, with a way to send an answer that is there as a whole.

What few requests need is made when it is needed.
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

SCOPE_REPLY = "estimate_proxy.reply"
"""Where a request's scope has a way to send an answer at once: see `Cycle.reply`. `send` is there too."""

_NUL, _LF, _CR = 0, 10, 13
"""As numbers they are found in a quarter of the time."""

log = logging.getLogger(__name__)


class Delivery(Enum):
    """What became of an answer."""

    SENT = auto()
    BY_MESSAGES = auto()
    """It is still to be sent, by ASGI messages: the client is slow, or wants no body."""
    CLIENT_GONE = auto()


class ClientConnection(Protocol):
    """The connection that a cycle answers on."""

    transport: asyncio.Transport
    flow: FlowControl
    server_state: ServerState

    def on_response_complete(self) -> None: ...

    def write(self, data: bytes) -> None: ...

    def close(self) -> None:
        """Closes the connection, once the client can have read its answer."""

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
    task: asyncio.Task[None]

    def __init__(self, scope: Any, connection: ClientConnection, head: RequestHead, body: bytes | None) -> None:
        """body: None if it is still to come."""
        self.scope = scope
        self.transport = connection  # type: ignore[assignment] # which closes in its own way
        self._write = connection.transport.write
        self.flow = connection.flow
        self.default_headers = connection.server_state.default_headers
        self.on_response = connection.on_response_complete
        self.tasks = connection.server_state.tasks
        self.keep_alive = head.keep_alive
        self.waiting_for_100_continue = head.expects_continue and body is None
        self.body = bytearray() if body is None else body  # type: ignore[assignment] # it is read, and grows if None
        self.more_body = body is None
        scope[SCOPE_REPLY] = self.reply

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
            self.scope.pop(SCOPE_REPLY, None)  # type: ignore[misc] # else the two hold each other
            self.tasks.discard(self.task)

    async def _fail(self, error: BaseException | None) -> None:
        """The application has not answered, which is a defect of it."""
        log.error("a request ended without an answer", exc_info=error)
        if self.response_started:
            self.transport.close()
        else:
            await self.send_500_response()

    async def receive(self) -> Any:
        """As uvicorn's, and `http.disconnect` once the client has closed its side: it can still be answered."""
        if not self.has_given_body:
            message = await super().receive()
            self.has_given_body = message["type"] == "http.request" and not message["more_body"]
            return message
        if not (self.is_half_closed or self.disconnected or self.response_complete):
            await self.message_event.wait()
        return {"type": "http.disconnect"}

    def reply(self, status: int, lines: Lines, body: bytes, *, close: bool) -> Delivery:
        """Sends an answer, whose header `lines` say nothing of its length and wire.

        Raises `ValueError` for a line that would break the head.
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
            raise ValueError("a header field has a line break or NUL in it")
        self._write(b"%b%b\r\n\r\n%b" % (STATUS_LINE[status], b"\r\n".join(sent), body))
        self.response_started = self.response_complete = True
        if "message_event" in self.__dict__:
            self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return Delivery.SENT

    def half_close(self) -> None:
        """The client has closed its side, and may still read."""
        self.is_half_closed = True
        self.message_event.set()

    def abandon(self) -> None:
        """The client is gone, or has been answered already: the application hears of a disconnect."""
        if not self.response_complete:
            self.disconnected = True
        self.message_event.set()


def _nothing() -> None:
    """Replaces the callback of a response that is complete."""
