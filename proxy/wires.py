"""Connections to one Redis server, which take replies as they come.

To go through redis-py's connection takes longer than the call itself. From redis-py is what errors mean; hiredis reads
and writes.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from hiredis import Reader, pack_command
from redis.asyncio.connection import DefaultParser
from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import InvalidResponse, RedisError

CLOSE_S = 1.0
"""For connections to close: TLS waits for the other side."""

Command = Sequence[bytes | int | str]
Dial = Callable[[], Coroutine[Any, Any, "Wire"]]

_GREETING: Command = ("CLIENT", "SETINFO", "LIB-NAME", "estimate-proxy")
_NOT_YET = object()


class Wire(asyncio.Protocol):
    """A connection. One that has failed stays so; `failure` says why."""

    def __init__(self) -> None:
        self._reader = Reader(
            protocolError=InvalidResponse, replyError=DefaultParser.parse_error, notEnoughData=_NOT_YET
        )
        self._loop = asyncio.get_running_loop()
        self._replies: list[Any] = []
        self._wanted = 0
        self._complete: asyncio.Future[None] = self._loop.create_future()
        self.failure: Exception | None = None
        self.closed: asyncio.Future[None] = self._loop.create_future()

    @property
    def is_open(self) -> bool:
        return self.failure is None and not self._transport.is_closing()

    async def say(self, commands: Sequence[Command], replies: list[Any]) -> None:
        """Sends the commands, and adds their replies to `replies` as they come; errors of the server's are such too.

        Raises `RedisError` or `OSError` if some do not come. Who stops waiting must close the wire.
        """
        if self.failure is not None:
            raise self.failure
        self._replies, self._wanted, self._complete = replies, len(commands), self._loop.create_future()
        self._transport.write(b"".join(map(pack_command, commands)))  # type: ignore[arg-type] # its stub knows tuples of one type
        await self._complete

    def close(self) -> None:
        self._fail(NotConnectedError("the connection was given up"))
        self._transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # no other comes
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while (reply := self._reader.gets()) is not _NOT_YET:
                if not self._wanted:
                    raise reply if isinstance(reply, RedisError) else InvalidResponse("it said something unasked")
                self._wanted -= 1
                self._replies.append(reply)
        except RedisError as error:
            self._fail(error)
            self._transport.close()
        if not self._wanted and not self._complete.done():
            self._complete.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc if isinstance(exc, OSError) else NotConnectedError("the server closed the connection"))
        self.closed.set_result(None)

    def _fail(self, failure: Exception) -> None:
        if self.failure is None:
            self.failure = failure
        if self._wanted and not self._complete.done():
            self._complete.set_exception(self.failure)


class Wires:
    """Those to one server, `at_most` so many: who comes then waits until one is free."""

    def __init__(self, dial: Dial, *, at_most: int) -> None:
        self._dial = dial
        self._room = asyncio.Semaphore(at_most)
        self._idle: list[Wire] = []
        self._in_use: set[Wire] = set()

    @property
    def are_used(self) -> bool:
        return bool(self._in_use)

    async def take(self) -> Wire:
        """One that is open, as far as anybody knows. It must be given back. Raises `RedisError`, `OSError`."""
        await self._room.acquire()
        try:
            wire = self._newest_open() or await self._dial()
        except BaseException:
            self._room.release()
            raise
        self._in_use.add(wire)
        return wire

    def give_back(self, wire: Wire) -> None:
        self._in_use.remove(wire)
        self._room.release()
        if wire.is_open:
            self._idle.append(wire)

    def close_idle(self) -> None:
        """What one wire has met may have befallen the others. Those in use find out by themselves."""
        idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()

    async def close(self) -> None:
        closing = [*self._idle, *self._in_use]
        for wire in closing:
            wire.close()
        if closing:
            await asyncio.wait({wire.closed for wire in closing}, timeout=CLOSE_S)

    def _newest_open(self) -> Wire | None:
        while self._idle:
            wire = self._idle.pop()
            if wire.is_open:
                return wire
        return None


async def greeted(wire: Wire, commands: Sequence[Command]) -> Wire:
    """A wire that has just been opened, behind the commands that make it usable, such as a password's.

    The last thing said is who we are, which the server need not understand; but it is there and answers.
    Raises `RedisError` or `OSError`.
    """
    replies: list[Any] = []
    try:
        await wire.say([*commands, _GREETING], replies)
    except BaseException:
        wire.close()
        raise
    *made, greeting = replies
    refusal = next((reply for reply in made if isinstance(reply, Exception)), greeting)
    if refusal is not greeting or isinstance(greeting, NotConnectedError):
        wire.close()
        raise NotConnectedError(str(refusal))
    return wire
