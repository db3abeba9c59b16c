"""A gateway whose price book or ledger is killed, hangs, or has a bad network.

The tests check the answers, their latency, the log lines, the bookings, and the recovery.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from faulty_proxy import Conditions, FaultyProxy, proxy_to
from fleet import BODY, Fleet, StoreProcess, TeamClient, fleet_of, kinds, limiting, results, store_process
from gateway_fixture import UpstreamFixture
from lateness import assert_in_time
from load_generator import (
    CREDITS,
    LANES,
    REQUESTS,
    LoadGenerator,
    LogTail,
    TimedAnswer,
    answered,
    assert_booked,
    degraded,
    metric,
    new_body,
    slowest_s,
    timed,
)
from proxy.settings.loader import PREFIX
from proxy.store.client import COOLDOWN_S, TICK_S, TIMEOUT_S
from scripted_simulator import Simulator
from serving import wait_until

pytestmark = pytest.mark.usefixtures("coverage_paused")

WAIT_S = TIMEOUT_S + 2 * TICK_S
"""Delay of a call whose store does not answer."""

OUTAGE_S = COOLDOWN_S + 0.2
"""Longer than the cool-down, so that the store is tried again during the outage."""

BACK_S = COOLDOWN_S + 2.5
"""Time to recover on a busy machine; without other load it takes half a second."""

MOST_LINES = 10
"""For two roles: each logs its begin, a few reasons and its end; and buffered debits may be sent twice."""

BYPASS = "fwd=bypass; detail=store-unavailable"
UNANSWERED = "unanswered_debits_total"

REFUSES, ADMITS = range(2)
"""The gateways, by `on_outage`. The second one has its price book on the ledger's server."""


@dataclass(frozen=True)
class ProxiedStore:
    """A store, and the proxy in front of it."""

    server: StoreProcess
    store_proxy: FaultyProxy


@dataclass(frozen=True)
class Setup:
    fleet: Fleet
    ledger: ProxiedStore
    book: ProxiedStore

    def log(self, at: int) -> LogTail:
        return LogTail(self.fleet.gateways[at])


@contextmanager
def _killed(proxied_store: ProxiedStore) -> Iterator[None]:
    proxied_store.server.kill()
    try:
        yield
    finally:
        proxied_store.server.start()


@contextmanager
def _stopped(proxied_store: ProxiedStore) -> Iterator[None]:
    with proxied_store.server.hanging():
        yield


def _conditions(bad: Conditions) -> Callable[[ProxiedStore], AbstractContextManager[None]]:
    return lambda proxied_store: proxied_store.store_proxy.under(bad)


BOTH: dict[str, Callable[[ProxiedStore], AbstractContextManager[None]]] = {
    "killed": _killed,
    "stopped": _stopped,
    "resets": _conditions(Conditions(accepts=False)),
    "half open": _conditions(Conditions(carries=False)),
}
OF_THE_BOOK = {
    **BOTH,
    "late": _conditions(Conditions(latency_s=1.5 * WAIT_S)),
    "drips": _conditions(Conditions(latency_s=0.03, piece_bytes=1)),
}
OF_THE_LEDGER = {**BOTH, "loses replies": _conditions(Conditions(swallows=b""))}
OF_BOTH_ROLES = {name: OF_THE_LEDGER[name] for name in ("killed", "loses replies")}


@contextmanager
def proxied_store() -> Iterator[ProxiedStore]:
    with store_process() as server:
        server.start()
        with proxy_to(server.url) as store_proxy:
            yield ProxiedStore(server, store_proxy)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture) -> Iterator[Setup]:
    with ExitStack() as opened:
        ledger, book = opened.enter_context(proxied_store()), opened.enter_context(proxied_store())
        limits = limiting(team_defaults=[CREDITS, REQUESTS])
        refuses, admits = {f"{PREFIX}CACHE__URL": book.store_proxy.url}, {f"{PREFIX}STORE__ON_OUTAGE": "admit"}
        how: dict[str, Any] = {
            "store_url": ledger.store_proxy.url,
            "upstream_url": upstream.url,
            "env": [limits | refuses, limits | admits],
            "metrics": {"public": True},
        }
        fleet = opened.enter_context(fleet_of(2, tmp_path_factory.mktemp("stores"), **how))
        yield Setup(fleet, ledger, book)


# The price book


@pytest.mark.parametrize("fault", OF_THE_BOOK)
def test_without_its_price_book_each_request_calls_upstream(fault: str, setup: Setup, simulator: Simulator) -> None:
    team, client, log = setup.fleet.team(), setup.fleet.clients[REFUSES], setup.log(REFUSES)
    assert [timed(team, REFUSES, BODY).says for _ in range(2)] == ["200 fwd=miss", "200 hit"]
    with OF_THE_BOOK[fault](setup.book):
        assert timed(team, REFUSES, BODY).says == "200 hit", "out of memory"
        equal = _equal_requests(team, simulator)
        responses = LoadGenerator(team, REFUSES, new_body, for_s=OUTAGE_S / 2).answers()
        assert degraded(client) == ["price-book"]
        assert simulator.calls == 1 + 1 + len(responses)
    assert {one.says for one in responses} == {"200 fwd=bypass"}
    assert_in_time(slowest_s(responses), 3 * WAIT_S, "Reads are tried twice, never three times: without load 0.65 s.")
    recovered = _ask_until_recovered(team, REFUSES)
    log.assert_one_incident("the price-book's connection fails: ", "the price-book's connection works again")
    assert_booked(team, 3 + equal + len(responses) + recovered)


def _equal_requests(team: TeamClient, simulator: Simulator) -> int:
    """Sends a number of equal requests at once, and asserts that upstream is called once."""
    calls, body = simulator.calls, new_body()
    with simulator.hold():
        asked = [team.asking(REFUSES, body) for _ in range(LANES)]
        assert simulator.arrived(calls + 1)
        time.sleep(0.1)  # there is no signal that the other requests are waiting
    assert kinds(results(asked)) == [BYPASS] + [f"{BYPASS}; collapsed"] * (LANES - 1)
    assert simulator.calls == calls + 1
    return len(asked)


def _ask_until_recovered(team: TeamClient, at: int) -> int:
    """Sends requests until the gateway has recovered, and returns how many were answered."""
    responses: list[TimedAnswer] = []

    def is_over() -> bool:
        responses.append(timed(team, at, new_body()))
        return responses[-1].says == "200 fwd=miss"

    wait_until(is_over, within_s=BACK_S)
    return answered(responses)


# The ledger


@pytest.mark.parametrize("fault", OF_THE_LEDGER)
def test_without_its_ledger_requests_are_refused(fault: str, setup: Setup, simulator: Simulator) -> None:
    team, client, log = setup.fleet.team(), setup.fleet.clients[REFUSES], setup.log(REFUSES)
    unanswered = metric(client, UNANSWERED)
    assert timed(team, REFUSES, BODY).says == "200 fwd=miss"
    with OF_THE_LEDGER[fault](setup.ledger):
        hits = LoadGenerator(team, REFUSES, lambda: BODY, for_s=OUTAGE_S)
        misses = LoadGenerator(team, REFUSES, new_body, for_s=OUTAGE_S)
        responses = hits.answers() + misses.answers()
        assert degraded(client) == ["ledger"]
    assert {(one.says, one.answer.headers["retry-after"]) for one in responses} == {("503 store-unavailable", "1")}
    assert_in_time(slowest_s(responses), 2 * WAIT_S, "No request waits twice: without load the slowest take 0.31 s.")
    assert simulator.calls == 1
    recovered = _ask_until_recovered(team, REFUSES)
    log.assert_one_incident("the ledger's connection fails: ", "the ledger's connection works again")
    assert_booked(team, 1 + recovered, perhaps=round(metric(client, UNANSWERED) - unanswered))


@pytest.mark.parametrize("fault", OF_BOTH_ROLES)
def test_without_its_ledger_requests_are_admitted_with_on_outage_admit(
    fault: str, setup: Setup, simulator: Simulator
) -> None:
    """The price book is unavailable too."""
    team, client, log = setup.fleet.team(), setup.fleet.clients[ADMITS], setup.log(ADMITS)
    unanswered = metric(client, UNANSWERED)
    assert timed(team, ADMITS, BODY).says == "200 fwd=miss"
    with OF_BOTH_ROLES[fault](setup.ledger):
        responses = LoadGenerator(team, ADMITS, new_body, for_s=OUTAGE_S).answers()
        assert degraded(client) == ["ledger", "price-book"]
        assert metric(client, "buffered_debits") == len(responses)
    assert {one.says for one in responses} == {"200 fwd=bypass"}
    assert_in_time(
        slowest_s(responses), 3 * WAIT_S, "A server with both roles is waited for as the price book, and no more."
    )
    assert simulator.calls == 1 + len(responses)
    wait_until(lambda: metric(client, "buffered_debits") == 0, within_s=BACK_S)
    recovered = _ask_until_recovered(team, ADMITS)
    back = "the ledger is back: all buffered debits are booked"
    wait_until(lambda: log.messages(back))  # log lines are written a moment later
    assert len(log.messages(back)) == 1
    assert len(log.said()) <= MOST_LINES
    assert_booked(
        team, 1 + len(responses) + recovered, at=ADMITS, perhaps=round(metric(client, UNANSWERED) - unanswered)
    )
