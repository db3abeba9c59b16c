"""A TCP proxy that injects network faults: latency, lost replies, resets, half-open connections.

It runs in its own thread. `set_conditions` can be called at any time. It buffers little more than one chunk for each
direction of a connection, and has at most `MAX_CONNECTIONS`.
"""

import asyncio
import socket
import struct
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from urllib.parse import unquote, urlsplit

CHUNK = 65536
MAX_CONNECTIONS = 64
WITHIN_S = 10.0


@dataclass(frozen=True)
class Conditions:
    """How replies and new connections are treated.

    latency_s: delay before each piece of a reply, and before the first byte on a new connection.
    patience_s: a connection that was idle for longer drops everything from then on, as after `drop_silently`.
    piece_bytes: replies are sent in pieces of this size; with a latency they arrive slowly.
    swallows: after the client has sent a chunk with these bytes, the connection loses all replies; b"": any chunk.
    carries: if False, a connection becomes half open as soon as the client sends something.
    accepts: if False, new connections are reset at once.
    """

    latency_s: float = 0.0
    patience_s: float = inf
    piece_bytes: int = CHUNK
    swallows: bytes | None = None
    carries: bool = True
    accepts: bool = True


HEALTHY = Conditions()


@dataclass(eq=False)
class _Line:
    """A connection through the proxy.

    mute: its replies are lost.
    forgotten: it drops everything in both directions; the client does not see that the server closes it.
    """

    client: StreamWriter
    active_at: float
    mute: bool = False
    forgotten: bool = False


class FaultyProxy:
    """A proxy to the server at `server_url`, of any scheme. Clients connect to `url`."""

    def __init__(self, server_url: str) -> None:
        self.url = ""
        self.swallowed = threading.Event()
        """Set when a reply has been lost."""
        self._server = urlsplit(server_url)
        self._conditions = HEALTHY
        self._lines: set[_Line] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def set_conditions(self, store_proxy: Conditions) -> None:
        """Applies from now on, to existing connections too."""
        self.swallowed.clear()
        self._conditions = store_proxy

    @contextmanager
    def under(self, store_proxy: Conditions) -> Iterator[None]:
        """Applies inside the block. If `conditions` accept no connection, existing ones are reset."""
        self.set_conditions(store_proxy)
        if not store_proxy.accepts:
            self.reset_connections()
        try:
            yield
        finally:
            self.set_conditions(HEALTHY)

    def reset_connections(self) -> None:
        """Resets all connections. Returns when they are closed."""
        asyncio.run_coroutine_threadsafe(self._close_all(_tear), self._loop).result(WITHIN_S)

    def drop_silently(self) -> None:
        """Existing connections drop everything from now on, as when a firewall has lost its table."""
        for line in list(self._lines):
            line.forgotten = True

    def redirect_to(self, server_url: str) -> None:
        """New connections go to another server, as when its DNS name moves. Existing ones stay."""
        self._server = urlsplit(server_url)

    def cut(self) -> None:
        """Closes all connections, as a server does that ends, and resets new ones."""
        self.set_conditions(Conditions(accepts=False))
        asyncio.run_coroutine_threadsafe(self._close_all(StreamWriter.close), self._loop).result(WITHIN_S)

    async def serve(self, ready: threading.Event) -> None:
        """Runs until `stop`."""
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        listener = await asyncio.start_server(self._welcome, "127.0.0.1", 0)
        scheme = "redis" if self._server.scheme == "unix" else self._server.scheme
        self.url = f"{scheme}://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        ready.set()
        await self._over.wait()
        listener.close()
        await self._close_all(_tear)
        await asyncio.gather(*self._tasks)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)

    async def _close_all(self, close: Callable[[StreamWriter], None]) -> None:
        for line in self._lines:
            close(line.client)
        await asyncio.sleep(0)  # that is when sockets are closed

    async def _welcome(self, reader: StreamReader, client: StreamWriter) -> None:
        if not self._conditions.accepts or len(self._lines) == MAX_CONNECTIONS:
            _tear(client)
            return
        line = _Line(client, self._loop.time())
        task = asyncio.ensure_future(self._relay(reader, line))
        self._tasks.add(task)
        self._lines.add(line)
        await asyncio.wait({task})
        self._lines.discard(line)
        self._tasks.discard(task)

    async def _relay(self, reader: StreamReader, line: _Line) -> None:
        """Until either side closes; then the other is closed too."""
        with suppress(OSError):
            await asyncio.sleep(self._conditions.latency_s)
            from_server, server = await self._connect()
            both = {
                asyncio.ensure_future(self._pass_on(reader, server, line)),
                asyncio.ensure_future(self._bring_back(from_server, line)),
            }
            _, other = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in other:
                task.cancel()
            await asyncio.wait(both)
            server.close()
        line.client.close()

    async def _connect(self) -> tuple[StreamReader, StreamWriter]:
        if self._server.scheme == "unix":
            return await asyncio.open_unix_connection(unquote(self._server.path))
        return await asyncio.open_connection(self._server.hostname, self._server.port)

    async def _pass_on(self, reader: StreamReader, server: StreamWriter, line: _Line) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                line.mute |= self._conditions.swallows is not None and self._conditions.swallows in chunk
                line.forgotten |= (
                    not self._conditions.carries or self._loop.time() - line.active_at > self._conditions.patience_s
                )
                line.active_at = self._loop.time()
                if not line.forgotten:
                    server.write(chunk)
                    await server.drain()

    async def _bring_back(self, reader: StreamReader, line: _Line) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                line.active_at = self._loop.time()
                if line.forgotten:
                    continue
                if line.mute:
                    self.swallowed.set()
                    continue
                for piece in _pieces(chunk, self._conditions.piece_bytes):
                    await asyncio.sleep(self._conditions.latency_s)
                    line.client.write(piece)
                    await line.client.drain()
        if line.forgotten:
            await asyncio.Future()  # until the client leaves


def _pieces(chunk: bytes, size: int) -> Iterator[bytes]:
    return (chunk[start : start + size] for start in range(0, len(chunk), size))


def _tear(client: StreamWriter) -> None:
    """Closes with a reset, and forgets what was still to be sent."""
    with suppress(OSError):  # it is closed already
        client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.transport.abort()


@contextmanager
def proxy_to(server_url: str) -> Iterator[FaultyProxy]:
    """A running proxy."""
    found, ready = FaultyProxy(server_url), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(found.serve(ready)))
    thread.start()
    assert ready.wait(WITHIN_S), "the proxy does not start"
    try:
        yield found
    finally:
        found.stop()
        thread.join(WITHIN_S)
