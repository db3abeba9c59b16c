"""uvicorn as this gateway uses it: on a socket that is there already, without signals, logs or headers of its own."""

import contextlib
import math
import socket
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

KEEP_ALIVE_S = 75
"""Longer than load balancers keep idle connections (60 s), so that they close first and never meet a closed one."""


class _Protocol(HttpToolsProtocol):
    """Keeps a chunked body's trailers out of the headers, where uvicorn appends them: they are no credentials."""

    def on_headers_complete(self) -> None:
        self.scope["headers"] = list(self.headers)
        super().on_headers_complete()


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
