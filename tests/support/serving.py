"""Runs ASGI applications on real sockets, in threads of this process.

Starting and stopping a server takes 0.25 s, so servers are pooled: each serves one application after the other.
"""

import asyncio
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager, suppress
from pathlib import Path

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.http.server import Server

NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For `verify` of httpx2 clients that only speak http: reading the certificates of the system takes 30 ms a client."""


class ServerThread:
    """A server in a thread. It serves one application at a time."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._serves = threading.Event()
        self._server = Server(self, head_timeout_s=10, drain_s=5, announce=self._begin)
        self._thread = threading.Thread(target=self._server.run, args=([listener],))
        self._thread.start()
        self._serves.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await Starlette()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    @contextmanager
    def serving(self, app: ASGIApp) -> Iterator[None]:
        self._app = app
        opened = AsyncExitStack()
        if isinstance(app, Starlette):
            self._run(opened, app.router.lifespan_context(app))
        try:
            yield
        finally:
            wait_until(lambda: not self._server.server_state.tasks)
            asyncio.run_coroutine_threadsafe(opened.aclose(), self._loop).result()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def _begin(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._serves.set()

    def _run(self, opened: AsyncExitStack, lifespan: AbstractAsyncContextManager[object]) -> None:
        asyncio.run_coroutine_threadsafe(opened.enter_async_context(lifespan), self._loop).result()


class ServerPool:
    """The servers that are not in use."""

    def __init__(self) -> None:
        self.free: list[ServerThread] = []

    def close(self) -> None:
        for host in self.free:
            host.close()


SERVER_POOL = ServerPool()


@contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """Runs `app` with its lifespan. Yields its base URL."""
    host = SERVER_POOL.free.pop() if SERVER_POOL.free else ServerThread()
    try:
        with host.serving(app):
            yield host.url
    except BaseException:
        host.close()
        raise
    SERVER_POOL.free.append(host)


def free_port() -> int:
    """A port that nobody listens on. It is below the range from which the kernel takes ports for outgoing connections,
    so that no client takes it before the server does.
    """
    while True:
        port = 10_000 + secrets.randbelow(_ephemeral_ports_from() - 10_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _ephemeral_ports_from() -> int:
    range_file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    return int(range_file.read_text().split()[0]) if range_file.exists() else 32_768


def wait_until(condition: Callable[[], object], *, within_s: float = 10.0) -> None:
    """Polls until `condition` holds. Fails the test after `within_s`."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {within_s} s"
        time.sleep(0.01)
