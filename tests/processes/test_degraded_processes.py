"""A gateway with hanging or lost processes and clients, and its start and stop without a ledger.

Deaths of a leader are tested in test_fleet, deaths during debits in test_quotas_fleet, and deaths of the supervisor and
the embedded stores in test_serve.
"""

import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from faulty_proxy import Conditions, proxy_to
from fleet import limiting, store_process
from gateway_fixture import DESIGN, PATH, UpstreamFixture, break_off, cache_status
from gateway_process import SOON_S, GatewayProcess, GatewayRunner, address_of, gateway_runner
from ledger_snapshot import LedgerSnapshot
from load_generator import CREDITS, PRICE, REQUESTS, new_body
from scripted_simulator import Simulator
from serving import wait_until

LIMITS = limiting(team_defaults=[CREDITS, REQUESTS])
WORKERS = 2
DRAIN_S = 0.5
CONNECT_S = 0.4
"""A start tries several times to connect. It is still longer than a busy machine takes."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture) -> Iterator[GatewayProcess]:
    with gateway_runner(tmp_path_factory.mktemp("processes"), upstream.url) as runner:
        found = runner.begin("--workers", str(WORKERS), env=LIMITS)
        found.wait_until_serving(times=WORKERS)
        yield found
        assert found.stop() == 0


def used(served: GatewayProcess) -> tuple[int, int]:
    """Returns the team's credits and requests."""
    spent, requests = LedgerSnapshot.of(served, DESIGN).used
    return int(spent), int(requests)


def leaving(served: GatewayProcess, body: bytes) -> socket.socket:
    """Opens a connection that has sent a request."""
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {DESIGN}\r\ncontent-length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(address_of(served.url), timeout=SOON_S)
    connection.sendall(head.encode() + body)
    return connection


def test_a_client_that_leaves_does_not_affect_other_answers(served: GatewayProcess, simulator: Simulator) -> None:
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
    assert used(served) == (spent + 3 * PRICE, requests + 3), "for the client that left too"


@pytest.mark.usefixtures("simulator")
def test_a_hanging_worker_does_not_delay_later_clients(served: GatewayProcess) -> None:
    hung = served.workers()[0]
    hung.suspend()
    try:
        answers = [served.ask(new_body()) for _ in range(10)]
    finally:
        hung.resume()
    assert {answer.status_code for answer in answers} == {200}
    assert max(answer.elapsed.total_seconds() for answer in answers) < 1, "less than any lease or timeout"
    assert not served.messages("died")


@pytest.mark.usefixtures("simulator")
def test_without_its_ledger_it_starts_and_stops_cleanly_and_logs_lost_debits(
    runner: GatewayRunner, valkey_url: str
) -> None:
    with store_process() as ledger:
        ledger.start()
        with proxy_to(ledger.url) as store_proxy:
            store = {"url": store_proxy.url, "on_outage": "admit", "connect_timeout_s": CONNECT_S}
            server = {"drain_delay_s": 0, "drain_s": DRAIN_S}
            with store_proxy.under(Conditions(carries=False)):
                served = runner.start(env=LIMITS, store=store, server=server, cache={"url": valkey_url})
                assert [served.ask(new_body()).status_code for _ in range(3)] == [200] * 3
            served.wait_for_message("the ledger is back: all buffered debits are booked")
            assert LedgerSnapshot.of(served, DESIGN).used == [3 * PRICE, 3]
            with store_proxy.under(Conditions(accepts=False)):
                assert [served.ask(new_body()).status_code for _ in range(2)] == [200] * 2
                served.send(signal.SIGTERM)
                assert served.exit_status(within_s=DRAIN_S + SOON_S) == 0
    assert served.messages("lost") == ["the debits of 2 requests are lost: the ledger stayed out of reach"]
