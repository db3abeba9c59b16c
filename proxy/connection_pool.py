"""A pool of redis-py connections to one Redis server.

* A connection is opened by a task of its own, beside the calls that wait for one: a call that gives up does not cancel
  the set-up, and the next call uses the connection.
* A connection that was closed, or received something, while it lay idle is not handed out. redis-py would reconnect in
  silence when something is sent on it.
* redis-py's own pools are not used: a caller of theirs waits for the connection that it opens, though another one is
  released meanwhile, and takes its set-up along when it is cancelled.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import ResponseError

MAX_CONNECTIONS = 16


class ConnectionPool:
    """At most `MAX_CONNECTIONS`, made by `make`. `close` must be called."""

    def __init__(self, make: Callable[[], AbstractConnection], *, connect_timeout_s: float) -> None:
        self._make = make
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[AbstractConnection] = []
        self._in_use: set[AbstractConnection] = set()
        self._opening: set[asyncio.Task[AbstractConnection]] = set()
        self._waiting: deque[asyncio.Future[AbstractConnection]] = deque()

    @property
    def is_in_use(self) -> bool:
        return bool(self._in_use)

    async def acquire(self) -> AbstractConnection:
        """A connection that is open, as far as is known; it must be released. Raises `RedisError`: nothing was sent."""
        while self._idle:
            connection = self._idle.pop()
            if await _is_usable(connection):
                self._in_use.add(connection)
                return connection
            await connection.disconnect(nowait=True)
        self._open_another()
        return await self._next_connection()

    async def release(self, connection: AbstractConnection) -> None:
        """Takes a connection back; one that was disconnected is forgotten."""
        self._in_use.remove(connection)
        if connection.is_connected:
            self._offer(connection)
        elif len(self._opening) < len(self._waiting):
            self._open_another()

    async def close_idle(self) -> None:
        """For when one connection has failed: the same may have happened to those that lie idle."""
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.disconnect(nowait=True)

    async def close(self) -> None:
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        connections = (*self._idle, *self._in_use)
        await asyncio.gather(*(connection.disconnect() for connection in connections), return_exceptions=True)

    async def _next_connection(self) -> AbstractConnection:
        """The next connection that is opened or released, first come, first served."""
        waiter: asyncio.Future[AbstractConnection] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            return await waiter
        except asyncio.CancelledError:
            with suppress(ValueError):  # it has had its turn
                self._waiting.remove(waiter)
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                await self.release(waiter.result())
            raise

    def _open_another(self) -> None:
        if len(self._idle) + len(self._in_use) + len(self._opening) < MAX_CONNECTIONS:
            task = asyncio.get_running_loop().create_task(self._open())
            self._opening.add(task)
            task.add_done_callback(self._opened)

    async def _open(self) -> AbstractConnection:
        connection = self._make()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call] # redis-py's
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
        """Gives an open connection to who waits for one, or puts it with the idle ones."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                self._in_use.add(connection)
                waiter.set_result(connection)
                return
        self._idle.append(connection)

    def _opening_failed(self, error: BaseException) -> None:
        """Tells one who waits, unless a connection that is in use may still come back for them."""
        while self._waiting and not self._in_use:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(_as_not_connected(error))
                return


async def _is_usable(connection: AbstractConnection) -> bool:
    """Whether a connection that lay idle is open and silent. `can_read` sees an end and bytes, but not a reset."""
    writer = connection._writer  # noqa: SLF001 -- redis-py has no public way to ask
    return writer is not None and not writer.is_closing() and not await connection.can_read()


def _as_not_connected(error: BaseException) -> BaseException:
    """A refused command of the set-up, such as SELECT, is a connection that failed; so is one without an answer."""
    if isinstance(error, ResponseError | OSError):  # TimeoutError is an OSError
        return NotConnectedError(str(error) or "no connection in time")
    return error
