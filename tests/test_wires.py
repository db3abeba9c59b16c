"""Connections to a server that answers in pieces, says what nobody asked, hangs up or wants no more of them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import ConnectionError as NotConnectedError
from redis.exceptions import InvalidResponse, NoScriptError, RedisError

from proxy.wires import Wire, Wires, greeted

Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]

PING = ("PING",)
READ_BYTES = 65536


def saying(*pieces: bytes) -> Peer:
    """A server that answers the first thing said with these pieces, and then waits."""

    async def peer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(READ_BYTES)
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read(READ_BYTES)

    return peer


@asynccontextmanager
async def served(peer: Peer) -> AsyncIterator[Callable[[], Coroutine[Any, Any, Wire]]]:
    """A way to dial it."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await peer(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def dial() -> Wire:
        _, wire = await asyncio.get_running_loop().create_connection(Wire, "127.0.0.1", port)
        return wire

    async with server:
        yield dial


async def said_on(wire: Wire, count: int) -> list[Any]:
    replies: list[Any] = []
    await wire.say([PING] * count, replies)
    return replies


def play(scene: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await scene

    asyncio.run(bounded())


def test_replies_come_in_any_pieces_and_errors_are_replies() -> None:
    async def scene() -> None:
        stream = b"+PONG\r\n*2\r\n$2\r\nab\r\n:5\r\n-NOSCRIPT none\r\n$-1\r\n"
        async with served(saying(*(stream[at : at + 1] for at in range(len(stream))))) as dial:
            wire = await dial()
            first, second, third, fourth = await said_on(wire, 4)
            assert (first, second, fourth) == (b"PONG", [b"ab", 5], None)
            assert isinstance(third, NoScriptError)
            assert wire.is_open
            wire.close()

    play(scene())


@pytest.mark.parametrize("more", [b"+PONG\r\n", b"-ERR max number of clients reached\r\n", b"!nonsense\r\n"])
def test_what_nobody_asked_for_ends_the_wire(more: bytes) -> None:
    async def scene() -> None:
        async with served(saying(b"+PONG\r\n" + more)) as dial:
            wire = await dial()
            assert await said_on(wire, 1) == [b"PONG"]
            assert not wire.is_open
            with pytest.raises(RedisError):
                await said_on(wire, 1)

    play(scene())


def test_what_is_no_reply_ends_the_wire() -> None:
    async def scene() -> None:
        async with served(saying(b"!nonsense\r\n")) as dial:
            wire = await dial()
            with pytest.raises(InvalidResponse):
                await said_on(wire, 1)
            assert not wire.is_open

    play(scene())


def test_replies_that_came_before_the_end_are_there() -> None:
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(READ_BYTES)
        writer.write(b"+PONG\r\n+PO")
        await writer.drain()

    async def scene() -> None:
        async with served(hang_up) as dial:
            wire, replies = await dial(), list[Any]()
            with pytest.raises(NotConnectedError, match="closed the connection"):
                await wire.say([PING, PING], replies)
            assert replies == [b"PONG"]

    play(scene())


@pytest.mark.parametrize(
    ("answer", "refusal"),
    [
        (b"+OK\r\n+OK\r\n", None),
        (b"+OK\r\n-ERR unknown subcommand 'SETINFO'\r\n", None),
        (b"-WRONGPASS invalid username-password pair\r\n-NOAUTH Authentication required.\r\n", "username-password"),
        (b"-ERR DB index is out of range\r\n+OK\r\n", "DB index is out of range"),
        (b"+OK\r\n-NOAUTH Authentication required.\r\n", "Authentication required"),
    ],
)
def test_a_greeting(answer: bytes, refusal: str | None) -> None:
    async def scene() -> None:
        async with served(saying(answer)) as dial:
            wire = await dial()
            if refusal is None:
                assert (await greeted(wire, [("SELECT", 1)])).is_open
                wire.close()
            else:
                with pytest.raises(NotConnectedError, match=refusal):
                    await greeted(wire, [("SELECT", 1)])
                assert not wire.is_open

    play(scene())


def test_wires_are_used_again_and_bounded() -> None:
    async def scene() -> None:
        async with served(saying(b"+PONG\r\n")) as dial:
            wires = Wires(dial, at_most=2)
            first, second = await wires.take(), await wires.take()
            third = asyncio.get_running_loop().create_task(wires.take())
            await asyncio.sleep(0)
            assert not third.done()
            wires.give_back(second)
            assert await third is second
            wires.give_back(second)
            wires.give_back(first)
            assert await wires.take() is first
            wires.close_idle()
            wires.give_back(first)
            assert await wires.take() is first
            assert await wires.take() is not second, "it was closed"
            await wires.close()
            assert first.closed.done()

    play(scene())


def test_room_is_kept_where_nobody_answers() -> None:
    async def unreachable() -> Wire:
        raise OSError("nobody there")

    async def scene() -> None:
        wires = Wires(unreachable, at_most=1)
        for _ in range(3):
            with pytest.raises(OSError, match="nobody there"):
                await wires.take()
        await wires.close()

    play(scene())


def test_what_ended_while_idle_is_not_used() -> None:
    async def scene() -> None:
        goes = asyncio.Event()

        async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            del reader, writer
            await goes.wait()

        async with served(leave) as dial:
            wires = Wires(dial, at_most=2)
            wire = await wires.take()
            wires.give_back(wire)
            goes.set()
            await wire.closed
            assert await wires.take() is not wire
            await wires.close()

    play(scene())
