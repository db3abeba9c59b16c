"""A pool of redis-py connections to one Redis server.

* Connections are opened in background tasks: a call that times out does not cancel the set-up, and the next call uses
  the connection.
* A connection that was closed, or received bytes, while it was idle is not handed out. redis-py would reconnect
  silently when something is sent on it.
* Health check: `keep_warm`, if called regularly, pings connections that were idle for `HEALTH_CHECK_S`. Firewalls and
  NAT gateways drop idle connections silently; a dead connection is replaced before a call needs it.
* redis-py's own pools are not used: their callers wait for the connection that they open even if another one is
  released meanwhile, and cancel its set-up when they are cancelled.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import inf

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import RedisError, ResponseError

from proxy.store.access import MAX_CONNECTIONS

MIN_CONNECTIONS = 4
"""Kept open, so that a burst of concurrent calls does not wait for connections to be set up."""

HEALTH_CHECK_S = 1.0
"""Idle time after which a connection is pinged, and the longest that a dead connection stays in the pool.

It is far below the idle timeouts of firewalls and NAT gateways. A ping costs about 50 µs.
"""

REPLACE_EVERY_S = 0.5
"""Limits how often `replace_all` closes connections: a server that does not serve says so in each reply."""


class ConnectionPool:
    """At most `MAX_CONNECTIONS` connections to one server, made by `make`. `close` must be called."""

    def __init__(self, make: Callable[[], AbstractConnection], *, connect_timeout_s: float) -> None:
        self._make = make
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[AbstractConnection] = []
        self._in_use: set[AbstractConnection] = set()
        self._opening: set[asyncio.Task[AbstractConnection]] = set()
        self._waiting: deque[asyncio.Future[AbstractConnection]] = deque()
        self.replaced_at = -inf
        """When `replace_all` last closed connections, on the event loop's clock."""

    @property
    def is_in_use(self) -> bool:
        """Whether a call has a connection of the pool, or one is being opened."""
        return bool(self._in_use or self._opening)

    async def acquire(self) -> AbstractConnection:
        """A connection that seems open. It must be released. Raises `RedisError` if none can be opened."""
        while self._idle:
            connection = self._idle.pop()
            if await _is_usable(connection):
                self._in_use.add(connection)
                return connection
            await connection.disconnect(nowait=True)
        self._open_another()
        return await self._next_connection()

    async def release(self, connection: AbstractConnection) -> None:
        """Takes a connection back; one that was disconnected is dropped."""
        self._in_use.remove(connection)
        if connection.should_reconnect():  # type: ignore[no-untyped-call] # redis-py has no types here
            await connection.disconnect(nowait=True)
        if connection.is_connected:
            self._offer(connection)
        elif len(self._opening) < len(self._waiting):
            self._open_another()

    async def close_idle(self) -> None:
        """Closes idle connections. Called when one connection has failed: the others may be dead too."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.disconnect(nowait=True)

    async def replace_all(self) -> None:
        """Replaces all connections, at most once in `REPLACE_EVERY_S`: the host name may lead to another server now.

        Connections in use are closed when they are released.
        """
        now = asyncio.get_running_loop().time()
        if now - self.replaced_at < REPLACE_EVERY_S:
            return
        self.replaced_at = now
        for connection in self._in_use:
            connection.mark_for_reconnect()  # type: ignore[no-untyped-call] # redis-py has no types here
        await self.close_idle()

    async def keep_warm(self, ping_timeout_s: float) -> None:
        """Pings connections that were idle for long, and opens new ones until there are `MIN_CONNECTIONS`."""
        now = asyncio.get_running_loop().time()
        for connection in [idle for idle in self._idle if idle.next_health_check < now]:
            if connection in self._idle:  # a call may have taken it meanwhile
                self._idle.remove(connection)
                self._in_use.add(connection)
                await self._check(connection, ping_timeout_s)
        for _ in range(MIN_CONNECTIONS - self._count()):
            self._open_another()

    async def close(self) -> None:
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        connections = (*self._idle, *self._in_use)
        await asyncio.gather(*(connection.disconnect() for connection in connections), return_exceptions=True)

    async def _next_connection(self) -> AbstractConnection:
        """The next connection that is opened or released; waiting calls are served in FIFO order."""
        waiter: asyncio.Future[AbstractConnection] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            with suppress(ValueError):  # it was served already
                self._waiting.remove(waiter)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                await self.release(waiter.result())
            raise

    async def _check(self, connection: AbstractConnection, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                if await _is_usable(connection):
                    await connection.check_health()  # type: ignore[no-untyped-call] # redis-py has no types here
                else:
                    await connection.disconnect(nowait=True)
        except ResponseError:
            pass  # the server replied: this user may not use PING
        except (RedisError, OSError):
            await connection.disconnect(nowait=True)
            await self.close_idle()
        finally:
            await self.release(connection)

    def _count(self) -> int:
        return len(self._idle) + len(self._in_use) + len(self._opening)

    def _open_another(self) -> None:
        if self._count() < MAX_CONNECTIONS:
            task = asyncio.get_running_loop().create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    async def _open(self) -> AbstractConnection:
        connection = self._make()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await connection.connect_check_health(check_health=False, retry_socket_connect=False)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    def _opened(self, task: asyncio.Task[AbstractConnection]) -> None:
        self._opening.remove(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._offer(task.result())
        else:
            self._opening_failed(error)

    def _offer(self, connection: AbstractConnection) -> None:
        """Gives an open connection to the first waiting call, or makes it idle."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._in_use.add(connection)
                waiter.set_result(connection)
                return
        self._idle.append(connection)

    def _opening_failed(self, error: BaseException) -> None:
        """Fails waiting calls that no connection can serve: none is in use, and too few are being opened."""
        while len(self._waiting) > len(self._opening) and not self._in_use:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(_as_not_connected(error))


async def _is_usable(connection: AbstractConnection) -> bool:
    """Whether an idle connection is open and has received nothing.

    `can_read` detects EOF and unread bytes, but not a reset; for that the transport is checked.
    """
    writer = connection._writer  # noqa: SLF001 -- redis-py has no public way: tests/integration/test_private_apis.py
    return writer is not None and not writer.is_closing() and not await connection.can_read()


def _as_not_connected(error: BaseException) -> BaseException:
    """Converts a failed set-up (a refused SELECT, a timeout) into a connection error."""
    if not isinstance(error, ResponseError | OSError):  # TimeoutError is an OSError
        return error
    failure = NotConnectedError(str(error) or "connection set-up timed out")
    failure.__cause__ = error
    return failure
