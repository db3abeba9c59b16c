"""uvicorn's server, with our connection class, on a socket that is already open.

uvicorn's own signal handling, logs and headers are off: the supervisor handles signals.
"""

import contextlib
import math
import socket
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp

from proxy.http.connection import Connection


class Server(uvicorn.Server):
    """Calls `announce` once it serves. Setting `should_exit` stops it."""

    def __init__(self, app: ASGIApp, *, head_timeout_s: float, drain_s: float, announce: Callable[[], None]) -> None:
        config = uvicorn.Config(
            app,
            loop="uvloop",
            http=partial(Connection, head_cache={}, head_timeout_s=head_timeout_s),  # type: ignore[arg-type] # uvicorn only calls it
            ws="none",
            interface="asgi3",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(drain_s),
        )
        super().__init__(config)
        self._announce = announce

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signal handlers alone: the supervisor handles signals."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()
