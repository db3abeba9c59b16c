"""The connection pool with servers that are slow, hang up, or send too much or nothing."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from itertools import chain, repeat
from typing import Any

import pytest
from redis.exceptions import BusyLoadingError, InvalidResponse, NoScriptError, ResponseError
from redis.exceptions import ConnectionError as NotConnectedError

from proxy.store.access import MAX_CONNECTIONS, StoreAccess
from proxy.store.connection_pool import ConnectionPool
from proxy.store.scripts import Call, Node, Script, execute
from proxy.store.topology import ConnectionFactory
from proxy.urls import Address, parse_store_url

GREETING = b"+OK\r\n"
PONG = b"+PONG\r\n"
READ_BYTES = 65536
SCRIPT = Script("proxy.cache", "price_get")


class Server:
    """Sends a greeting on each connection, then its answers in turn; it repeats the last one."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = answers
        self.greeting = GREETING
        self.pieces = False
        self.hangs_up = False
        self.may_greet = asyncio.Event()
        self.may_greet.set()
        self.clients: list[asyncio.StreamWriter] = []

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients.append(writer)
        await reader.read(READ_BYTES)
        await self.may_greet.wait()
        writer.write(self.greeting)
        answers = chain(self.answers, repeat(self.answers[-1]))
        while await reader.read(READ_BYTES):
            answer = next(answers)
            for piece in [bytes((byte,)) for byte in answer] if self.pieces else [answer]:
                writer.write(piece)
                await asyncio.sleep(0)
            if self.hangs_up:
                break
        writer.close()

    async def close(self) -> None:
        for client in self.clients:
            client.close()
            with suppress(ConnectionError):
                await client.wait_closed()


@asynccontextmanager
async def pool_of(
    server: Server, url: str = "redis://x", connect_timeout_s: float = 2
) -> AsyncIterator[ConnectionPool]:
    async with await asyncio.start_server(server.converse, "127.0.0.1", 0) as listener:
        address = Address("127.0.0.1", listener.sockets[0].getsockname()[1])
        pool = ConnectionFactory(parse_store_url(url), StoreAccess(connect_timeout_s=connect_timeout_s)).pool(address)
        try:
            yield pool
        finally:
            server.may_greet.set()
            await pool.close()
            await server.close()


def run_scenario(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await scenario

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 -- what happens in a server sends no event
        await asyncio.sleep(0.001)


async def make_calls(pool: ConnectionPool, count: int) -> list[Call]:
    """Makes calls at the same time, and returns their replies."""
    loop = asyncio.get_running_loop()
    calls = [Call(SCRIPT, ("k",), (), loop.create_future(), loop.time()) for _ in range(count)]
    await execute(Node("it", "connection", "127.0.0.1", pool), calls)
    return calls


# Calls


def test_replies_can_arrive_in_any_pieces_and_errors_are_replies() -> None:
    async def scenario() -> None:
        server = Server(b"+PONG\r\n*2\r\n$2\r\nab\r\n:5\r\n-LOADING wait\r\n-OOM full\r\n$-1\r\n")
        server.pieces = True
        async with pool_of(server) as pool:
            first, second, third, fourth, fifth = (call.result for call in await make_calls(pool, 5))
            assert (first, second, fifth) == (b"PONG", [b"ab", 5], None)
            assert isinstance(third, BusyLoadingError)
            assert isinstance(fourth, ResponseError)

    run_scenario(scenario())


@pytest.mark.parametrize(("word", "connections"), [(b"OOM full", 1), (b"READONLY replica", 2), (b"LOADING wait", 2)])
def test_after_an_error_that_means_not_serving_the_pool_reconnects(word: bytes, connections: int) -> None:
    async def scenario() -> None:
        server = Server(b"-%b\r\n+PONG\r\n" % word)
        async with pool_of(server) as pool:
            await make_calls(pool, 2)
            (_, call) = await make_calls(pool, 2)
            assert call.result == b"PONG"
            assert len(server.clients) == connections

    run_scenario(scenario())


@pytest.mark.parametrize("more", [b"+PONG\r\n", b"-ERR max number of clients reached\r\n", b"!nonsense\r\n"])
def test_after_an_unexpected_reply_a_connection_is_not_reused(more: bytes) -> None:
    async def scenario() -> None:
        server = Server(b"+PONG\r\n" + more)
        async with pool_of(server) as pool:
            for count in (1, 2):
                (call,) = await make_calls(pool, 1)
                assert call.result == b"PONG"
                assert len(server.clients) == count

    run_scenario(scenario())


def test_malformed_replies_end_the_connection() -> None:
    async def scenario() -> None:
        async with pool_of(Server(b"!nonsense\r\n")) as pool:
            (call,) = await make_calls(pool, 1)
            assert isinstance(call.result, InvalidResponse)
            assert call.sent
            assert not pool.is_in_use

    run_scenario(scenario())


def test_replies_received_before_the_end_of_a_connection_count() -> None:
    async def scenario() -> None:
        server = Server(b"+PONG\r\n+PO")
        server.hangs_up = True
        async with pool_of(server) as pool:
            served, lost = await make_calls(pool, 2)
            assert served.result == b"PONG"
            assert isinstance(lost.result, NotConnectedError)
            assert lost.sent

    run_scenario(scenario())


def test_a_script_that_cannot_be_loaded_raises_the_servers_error() -> None:
    async def scenario() -> None:
        server = Server(b"-NOSCRIPT none\r\n", b"-NOPERM no 'script|load'\r\n-NOSCRIPT none\r\n")
        async with pool_of(server) as pool:
            (call,) = await make_calls(pool, 1)
            assert "script|load" in str(call.result)

    run_scenario(scenario())


def test_a_script_flushed_again_at_once_raises_an_error_instead_of_its_digest() -> None:
    async def scenario() -> None:
        server = Server(b"-NOSCRIPT none\r\n", b"$2\r\nab\r\n-NOSCRIPT none\r\n")
        async with pool_of(server) as pool:
            (call,) = await make_calls(pool, 1)
            assert isinstance(call.result, NoScriptError)

    run_scenario(scenario())


# Opening


@pytest.mark.parametrize(
    ("greeting", "refusal"),
    [
        (b"+OK\r\n+OK\r\n", None),
        (b"-ERR unknown subcommand 'SETINFO'\r\n+OK\r\n", None),
        (b"+OK\r\n-ERR DB index is out of range\r\n", "DB index is out of range"),
        (b"-NOAUTH Authentication required.\r\n-NOAUTH Authentication required.\r\n", "Authentication required"),
        (b"-LOADING wait\r\n", "wait"),
    ],
)
def test_refusals_during_the_handshake_are_raised(greeting: bytes, refusal: str | None) -> None:
    async def scenario() -> None:
        server = Server(PONG)
        server.greeting = greeting
        async with pool_of(server, "redis://x/1") as pool:
            if refusal is None:
                await pool.release(await pool.acquire())
            else:
                with pytest.raises(NotConnectedError, match=refusal):
                    await pool.acquire()

    run_scenario(scenario())


def test_a_connection_opened_for_a_cancelled_call_serves_the_next() -> None:
    async def scenario() -> None:
        server = Server(b"+PONG\r\n")
        server.may_greet.clear()
        async with pool_of(server) as pool:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(make_calls(pool, 1), 0.05)
            server.may_greet.set()
            (call,) = await make_calls(pool, 1)
            assert call.result == b"PONG"
            await until(lambda: not pool._opening)
            assert len(pool._idle) == len(server.clients) <= 2

    run_scenario(scenario())


def test_a_call_takes_the_first_free_connection() -> None:
    """It takes a connection that is released before its own one is open."""

    async def scenario() -> None:
        server = Server(PONG)
        async with pool_of(server) as pool:
            first = await pool.acquire()
            server.may_greet.clear()
            second = asyncio.create_task(pool.acquire())
            await asyncio.sleep(0)
            await pool.release(first)
            assert await second is first
            server.may_greet.set()
            await until(lambda: bool(pool._idle))
            await pool.release(first)

    run_scenario(scenario())


def test_a_handshake_without_an_answer_times_out() -> None:
    async def scenario() -> None:
        server = Server(PONG)
        server.may_greet.clear()
        async with pool_of(server, connect_timeout_s=0.05) as pool:
            (call,) = await make_calls(pool, 1)
            assert isinstance(call.result, NotConnectedError)
            assert not call.sent

    run_scenario(scenario())


def test_connections_are_reused_and_their_number_is_bounded() -> None:
    async def scenario() -> None:
        server = Server(PONG)
        async with pool_of(server) as pool:
            held = [await pool.acquire() for _ in range(MAX_CONNECTIONS)]
            late, later = (asyncio.create_task(pool.acquire()) for _ in range(2))
            await asyncio.sleep(0.01)
            assert not late.done()
            late.cancel()
            await asyncio.wait({late})
            await pool.release(held[3])
            assert await later is held[3]
            for connection in held:
                await pool.release(connection)
            assert await pool.acquire() is held[-1]
            await pool.close_idle()
            await pool.release(held[-1])
            assert await pool.acquire() is held[-1]
            assert await pool.acquire() not in held, "they were closed"
            assert len(server.clients) == MAX_CONNECTIONS + 1

    run_scenario(scenario())


def test_a_call_cancelled_at_the_last_moment_passes_its_connection_on() -> None:
    async def scenario() -> None:
        async with pool_of(Server(PONG)) as pool:
            held = [await pool.acquire() for _ in range(MAX_CONNECTIONS)]
            leaving, staying = (asyncio.create_task(pool.acquire()) for _ in range(2))
            await asyncio.sleep(0)
            await pool.release(held[0])
            leaving.cancel()
            assert await staying is held[0]
            assert leaving.cancelled()

    run_scenario(scenario())


def test_connections_that_cannot_be_opened_do_not_use_up_the_pool() -> None:
    async def scenario() -> None:
        server = Server(PONG)
        async with pool_of(server) as pool:
            server.greeting = b"-ERR max number of clients reached\r\n"
            for _ in range(2 * MAX_CONNECTIONS):
                with pytest.raises(NotConnectedError, match="max number of clients"):
                    await pool.acquire()

    run_scenario(scenario())


def test_a_refused_connection_fails_no_call_while_another_may_be_released() -> None:
    async def scenario() -> None:
        server = Server(PONG)
        async with pool_of(server) as pool:
            only = await pool.acquire()
            server.greeting = b"-ERR max number of clients reached\r\n"
            waiting = asyncio.create_task(pool.acquire())
            await until(lambda: len(server.clients) == 2 and not pool._opening)
            assert not waiting.done()
            await only.disconnect(nowait=True)
            await pool.release(only)
            with pytest.raises(NotConnectedError, match="max number of clients"):
                await waiting

    run_scenario(scenario())


def test_a_refused_connection_fails_every_call_that_no_connection_can_serve() -> None:
    """The connection in use ends, and one is opened for the two calls that wait for it."""

    async def scenario() -> None:
        server = Server(PONG)
        async with pool_of(server) as pool:
            only = await pool.acquire()
            server.greeting = b"-ERR max number of clients reached\r\n"
            waiting = [asyncio.create_task(pool.acquire()) for _ in range(2)]
            await until(lambda: len(server.clients) == 3 and not pool._opening)
            await only.disconnect(nowait=True)
            await pool.release(only)
            failures = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 1)
            assert [type(failure) for failure in failures] == [NotConnectedError] * 2

    run_scenario(scenario())


@pytest.mark.parametrize("how", [asyncio.StreamWriter.close, lambda writer: writer.transport.abort()])
def test_a_connection_that_ended_while_idle_is_not_used(how: Callable[[asyncio.StreamWriter], None]) -> None:
    async def scenario() -> None:
        server = Server(b"+PONG\r\n")
        async with pool_of(server) as pool:
            await make_calls(pool, 1)
            how(server.clients[0])
            await asyncio.sleep(0.02)  # the event loop handles the end of the connection first
            (call,) = await make_calls(pool, 1)
            assert call.result == b"PONG"

    run_scenario(scenario())


def test_calls_that_never_got_a_connection_count_as_not_sent() -> None:
    async def scenario() -> None:
        server = Server(PONG)
        server.greeting = b"-NOAUTH Authentication required.\r\n"
        async with pool_of(server) as pool:
            (call,) = await make_calls(pool, 1)
            assert isinstance(call.result, NotConnectedError)
            assert not call.sent

    run_scenario(scenario())
