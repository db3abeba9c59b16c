"""uvicorn as this gateway uses it: on a socket that is there already, without signals, logs or headers of its own."""

import contextlib
import math
import secrets
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from proxy.problems import Code, Problem

KEEP_ALIVE_S = 75
"""Longer than load balancers keep idle connections (60 s), so that they close first and never meet a closed one."""


MAX_HEAD_BYTES = 64 * 2**10
"""Of a request line and headers; the piece that completes them may be larger by what the system reads at once."""


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol with a bound on a request's head, and malformed requests answered as problems.

    A chunked body's trailers are kept out of the headers, where uvicorn appends them: they are no credentials.
    """

    _head_bytes = 0
    _in_head = False

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"The request's head has more than {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self.scope["headers"] = list(self.headers)
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP request, or too much of one, and hangs up."""
        self._in_head = False
        problem, request_id = Problem(Code.INVALID_REQUEST, msg), secrets.token_hex(16)
        body = problem.document(request_id)
        headers = [*problem.headers(), (b"x-request-id", request_id.encode()), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in headers), b"", body]
        self.transport.write(b"\r\n".join(lines))
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server; `announce` is called when it serves, and setting `should_exit` ends it."""

    def __init__(self, app: ASGIApp, *, drain_s: float, announce: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            loop="uvloop",
            http=_Protocol,
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
