"""Overload: excess requests are refused at once, and admitted ones are answered as usual."""

import asyncio
import json
import resource
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import monotonic

import pytest

from gateway_fixture import DESIGN, MARKETING, PATH, GatewayFixture, OpenGateway, cache_status, code_of
from gateway_process import GatewayProcess, GatewayRunner, address_of
from proxy.gateway.in_flight import ARRIVING_REQUEST_BYTES, MAX_ACTIVE
from proxy.upstream.client import QUEUED_PER_CONNECTION
from serving import wait_until
from wire import talking

CLIENTS = MAX_ACTIVE + 500
"""Number of clients that send at the same time."""

BODY = b'[{"model":"Flux"}]'
REQUEST = (
    f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {DESIGN}\r\nContent-Length: {len(BODY)}\r\n\r\n".encode() + BODY
)


@contextmanager
def many_files() -> Iterator[None]:
    """Raises this process's limit of open files to the maximum."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@dataclass(frozen=True)
class TimedAnswer:
    status: int
    retry_after: str | None
    after_s: float


async def send_at_once(served: GatewayProcess, size: int) -> list[TimedAnswer]:
    """Returns the answers to a number of requests that are all sent while the worker is stopped."""
    worker = served.worker()
    clients = [await asyncio.open_connection(*address_of(served.url)) for _ in range(size)]
    worker.suspend()
    try:
        for _, writer in clients:
            writer.write(REQUEST)
        await asyncio.gather(*(writer.drain() for _, writer in clients))
    finally:
        worker.resume()
    began = monotonic()
    try:
        return await asyncio.gather(*(_timed_answer(reader, began) for reader, _ in clients))
    finally:
        for _, writer in clients:
            writer.close()


async def _timed_answer(reader: asyncio.StreamReader, began: float) -> TimedAnswer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    fields = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
    await reader.readexactly(int(fields["content-length"]))
    return TimedAnswer(int(head.split()[1]), fields.get("retry-after"), monotonic() - began)


@pytest.mark.usefixtures("simulator")
def test_requests_up_to_the_limit_are_served_and_the_rest_get_a_503(runner: GatewayRunner) -> None:
    served = runner.start()
    assert served.ask(BODY).status_code == 200
    with many_files():
        answers = asyncio.run(send_at_once(served, CLIENTS))
    statuses = Counter(one.status for one in answers)
    assert set(statuses) == {200, 503}
    assert statuses[200] >= MAX_ACTIVE
    assert {one.retry_after for one in answers if one.status == 503} == {"1"}
    refused_s, answered_s = (median(one.after_s for one in answers if one.status == status) for status in (503, 200))
    assert refused_s < answered_s, "refusals are immediate"
    assert served.ask(BODY).status_code == 200, "it is over as soon as they are served"
    usage = served.get("/v1/usage").json()
    assert usage["total"]["requests"] == statuses[200] + 2
    assert served.stop() == 0


def test_a_full_upstream_queue_does_not_affect_hits(open_gateway: OpenGateway) -> None:
    connections = 4
    gateway = open_gateway(upstream={"max_connections": connections, "timeout_s": 9})  # a busy machine takes seconds
    gateway.ask(BODY)
    admitted = connections * (1 + QUEUED_PER_CONNECTION)
    with ExitStack() as opened:
        waiting = []
        with gateway.simulator.hold() as hold:
            for number in range(admitted):
                client = opened.enter_context(gateway.connect())
                body = b'[{"seed":%d}]' % number
                head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nX-API-KEY: {DESIGN}\r\nContent-Length: {len(body)}\r\n\r\n"
                client.sendall(head.encode() + body)
                waiting.append(client)
            assert gateway.simulator.arrived(connections)
            wait_until(lambda: gateway.tracker.waiting == admitted)
            for number in range(admitted, admitted + 20):
                refused = gateway.ask(b'[{"seed":%d}]' % number)
                assert (refused.status_code, code_of(refused)) == (503, "overloaded")
                assert refused.headers["retry-after"] == "1"
                assert cache_status(gateway.ask(BODY)).startswith("hit; ")
            hold.release()
        for client in waiting:
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert gateway.simulator.calls == 1 + admitted
    usage = gateway.client.get("/v1/usage").json()["total"]
    assert usage["outcomes"] == {"hit": 20, "miss": 1 + admitted, "overloaded": 20}
    assert (usage["requests"], usage["refused"]) == (21 + admitted, 20)


SLOW_BODIES = 1100
SILENT = 8000


@pytest.mark.usefixtures("simulator")
def test_slow_bodies_and_silent_connections_do_not_affect_other_clients(runner: GatewayRunner) -> None:
    served = runner.start(server={"request_timeout_s": 60}, store={"timeout_s": 10})  # bodies may take as long
    assert served.ask(BODY).status_code == 200
    with many_files(), ExitStack() as opened:
        connect = partial(socket.create_connection, address_of(served.url), timeout=30)
        slow = [opened.enter_context(connect()) for _ in range(SLOW_BODIES)]
        for connection in slow:
            connection.sendall(REQUEST[: 1 - len(BODY)])
        silent = [opened.enter_context(connect()) for _ in range(SILENT)]
        with served.client() as client:
            others = [client.post(PATH, content=BODY, headers={"x-api-key": MARKETING}) for _ in range(500)]
        assert {response.status_code for response in others} == {200}
        for connection in slow:
            connection.sendall(BODY[1:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 "), "a complete body is answered"
    assert len(silent) == SILENT
    assert served.stop() == 0


def test_one_team_may_use_half_of_the_places_for_arriving_bodies(
    gateway: GatewayFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.gateway.in_flight.MAX_ARRIVING_BYTES", 8 * ARRIVING_REQUEST_BYTES)
    beginning, other = REQUEST[: 1 - len(BODY)], REQUEST.replace(DESIGN.encode(), MARKETING.encode())
    with ExitStack() as opened:
        slow = [opened.enter_context(gateway.connect()) for _ in range(4)]
        for connection in slow[:3]:
            connection.sendall(beginning)
        wait_until(lambda: gateway.tracker.arriving_bytes["design"] > 3 * ARRIVING_REQUEST_BYTES)
        with talking(gateway) as (connection, reader):
            connection.sendall(beginning)
            status, headers, body = reader.response()
        assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
        assert json.loads(body)["error"]["code"] == "overloaded"
        with talking(gateway) as (connection, reader):
            connection.sendall(other[: 1 - len(BODY)])
            wait_until(lambda: gateway.tracker.arriving_bytes["marketing"])
            connection.sendall(other[1 - len(BODY) :])
            assert reader.response()[0] == 200, "another team has its own half"
        with talking(gateway) as (connection, reader):
            connection.sendall(REQUEST)
            assert reader.response()[0] == 200, "a body that arrives with its head does not count as arriving"
        for connection in slow[:3]:
            connection.sendall(BODY[1:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: not gateway.tracker.arriving_bytes)


def test_bodies_that_arrive_all_at_once_are_limited_too(gateway: GatewayFixture) -> None:
    """They were admitted while no body was there."""
    with talking(gateway) as (connection, reader):
        connection.sendall(REQUEST[: 1 - len(BODY)])
        wait_until(lambda: gateway.tracker.arriving_bytes)
        gateway.tracker.in_flight += MAX_ACTIVE
        connection.sendall(BODY[1:])
        status, _, _ = reader.response()
        gateway.tracker.in_flight -= MAX_ACTIVE
    assert status == 503


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("with_token", [True, False])
def test_endless_trailers_use_no_memory(runner: GatewayRunner, *, with_token: bool) -> None:
    served = runner.start()
    assert served.ask(BODY).status_code == 200
    worker, line = served.worker(), b"A: %b\r\n" % (b"b" * 1000)
    before = worker.memory_info().rss
    head = REQUEST.partition(b"Content-Length")[0] + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    head = head if with_token else head.replace(DESIGN.encode(), b"ep_nobody")
    sent = 0
    for _ in range(20):
        with socket.create_connection(address_of(served.url), timeout=30) as connection, suppress(ConnectionError):
            connection.sendall(head)
            for _ in range(50):
                connection.sendall(1000 * line)
                sent += 1000 * len(line)
    assert sent < 2**30, "most of 1 GB was not read"
    assert worker.memory_info().rss - before < 5 * 2**20
    assert served.ask(BODY).status_code == 200
