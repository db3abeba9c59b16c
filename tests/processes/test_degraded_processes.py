"""A gateway some of whose processes or clients are gone or hang, or that begins and ends without its ledger.

Who dies while it leads, or with debits on the books, is in test_fleet and test_quotas_fleet; the supervisor's and the
embedded stores' deaths are in test_serve.
"""

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from faulty_proxy import Way, relay
from fleet import limiting, own_ledger
from gateway_fixture import DESIGN, PATH, UpstreamFixture, break_off, cache_status
from ledger_snapshot import Books
from load_generator import CREDITS, PRICE, REQUESTS, new_body
from processes import SOON_S, House, Served, address_of, house
from proxy.demo.simulator import Simulator
from serving import wait_until

LIMITS = limiting(team_defaults=[CREDITS, REQUESTS])
WORKERS = 2
DRAIN_S = 1.0


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture) -> Iterator[Served]:
    with house(tmp_path_factory.mktemp("processes"), upstream.url) as home:
        found = home.begin("--workers", str(WORKERS), env=LIMITS)
        found.wait_until_serving(times=WORKERS)
        yield found
        assert found.stop() == 0


def used(served: Served) -> tuple[int, int]:
    """Credits and requests."""
    spent, requests = Books.of(served, DESIGN).used
    return int(spent), int(requests)


def leaving(served: Served, body: bytes) -> socket.socket:
    """The connection of a client that has asked."""
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {DESIGN}\r\ncontent-length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(address_of(served.url), timeout=SOON_S)
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_that_leaves_takes_nobodys_answer_along(served: Served, simulator: Simulator) -> None:
    body, (spent, requests) = new_body(), used(served)
    with ThreadPoolExecutor() as pool:
        with simulator.hold(), leaving(served, body) as connection:
            assert simulator.arrived(1)
            follower = pool.submit(served.ask, body)
            wait_until(lambda: used(served)[1] == requests + 2)
            break_off(connection)
        answer = follower.result(SOON_S)
    assert (answer.status_code, answer.json()["data"]["estimated"]) == (200, PRICE)
    assert cache_status(answer).endswith("; collapsed")
    wait_until(lambda: [line for line in served.lines() if line.get("outcome") == "cancelled"])
    assert cache_status(served.ask(body)).startswith("hit; ")
    assert simulator.calls == 1
    assert used(served) == (spent + 3 * PRICE, requests + 3), "for the one that has left as well"


@pytest.mark.usefixtures("simulator")
def test_a_worker_that_hangs_keeps_nobody_waiting_who_comes_after_it(served: Served) -> None:
    hung = served.workers()[0]
    hung.suspend()
    try:
        answers = [served.ask(new_body()) for _ in range(10)]
    finally:
        hung.resume()
    assert {answer.status_code for answer in answers} == {200}
    assert max(answer.elapsed.total_seconds() for answer in answers) < 1, "less than any lease or timeout"
    assert not served.told("died")


@pytest.mark.usefixtures("simulator")
def test_it_begins_and_ends_in_order_without_its_ledger_and_says_what_is_lost(home: House, valkey_url: str) -> None:
    with own_ledger() as ledger:
        ledger.start()
        with relay(ledger.url) as way:
            store, server = {"url": way.url, "on_outage": "admit"}, {"drain_delay_s": 0, "drain_s": DRAIN_S}
            with way.being(Way(carries=False)):
                served = home.start(env=LIMITS, store=store, server=server, cache={"url": valkey_url})
                assert [served.ask(new_body()).status_code for _ in range(3)] == [200] * 3
            served.wait_until_told("the ledger is back: all buffered debits are booked")
            assert Books.of(served, DESIGN).used == [3 * PRICE, 3]
            with way.being(Way(accepts=False)):
                assert [served.ask(new_body()).status_code for _ in range(2)] == [200] * 2
                served.send(signal.SIGTERM)
                assert served.exit_status(within_s=DRAIN_S + SOON_S) == 0
    assert served.told("lost") == ["the debits of 2 requests are lost: the ledger stayed out of reach"]
