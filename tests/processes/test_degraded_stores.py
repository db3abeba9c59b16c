"""A gateway whose price book or ledger is killed, hangs, or is behind a bad way: what it answers, how soon, what it
says and books meanwhile, and that it recovers by itself.
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

WAIT_S = TIMEOUT_S + 2 * TICK_S
"""What a call costs whose store does not answer."""

OUTAGE_S = COOLDOWN_S + 0.2
"""So that the store is tried again meanwhile."""

BACK_S = COOLDOWN_S + 2.5
"""Until all is as before, on a machine that has other things to do; half a second where it has none."""

MOST_LINES = 10
"""Of two roles: each begins, shows a few reasons, ends; and a pile of debits may go out twice."""

BYPASS = "fwd=bypass; detail=store-unavailable"
UNANSWERED = "unanswered_debits_total"

REFUSES, ADMITS = range(2)
"""The gateways, by what they do without the ledger. The second one has its price book on the ledger's server."""


@dataclass(frozen=True)
class Place:
    """A store, and the way to it."""

    server: StoreProcess
    store_proxy: FaultyProxy


@dataclass(frozen=True)
class WorkerContext:
    fleet: Fleet
    ledger: Place
    book: Place

    def log(self, at: int) -> LogTail:
        return LogTail(self.fleet.gateways[at])


@contextmanager
def _killed(place: Place) -> Iterator[None]:
    place.server.kill()
    try:
        yield
    finally:
        place.server.start()


@contextmanager
def _stopped(place: Place) -> Iterator[None]:
    with place.server.hanging():
        yield


def _conditions(bad: Conditions) -> Callable[[Place], AbstractContextManager[None]]:
    return lambda place: place.store_proxy.under(bad)


BOTH: dict[str, Callable[[Place], AbstractContextManager[None]]] = {
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
def place() -> Iterator[Place]:
    with store_process() as server:
        server.start()
        with proxy_to(server.url) as store_proxy:
            yield Place(server, store_proxy)


@pytest.fixture(scope="module")
def premises(tmp_path_factory: pytest.TempPathFactory, upstream: UpstreamFixture) -> Iterator[WorkerContext]:
    with ExitStack() as opened:
        ledger, book = opened.enter_context(place()), opened.enter_context(place())
        limits = limiting(team_defaults=[CREDITS, REQUESTS])
        refuses, admits = {f"{PREFIX}CACHE__URL": book.store_proxy.url}, {f"{PREFIX}STORE__ON_OUTAGE": "admit"}
        how: dict[str, Any] = {
            "store_url": ledger.store_proxy.url,
            "upstream_url": upstream.url,
            "env": [limits | refuses, limits | admits],
            "metrics": {"public": True},
        }
        fleet = opened.enter_context(fleet_of(2, tmp_path_factory.mktemp("stores"), **how))
        yield WorkerContext(fleet, ledger, book)


# The price book


@pytest.mark.parametrize("fault", OF_THE_BOOK)
def test_without_its_price_book_it_asks_for_itself(fault: str, premises: WorkerContext, simulator: Simulator) -> None:
    team, client, log = premises.fleet.team(), premises.fleet.clients[REFUSES], premises.log(REFUSES)
    assert [timed(team, REFUSES, BODY).says for _ in range(2)] == ["200 fwd=miss", "200 hit"]
    with OF_THE_BOOK[fault](premises.book):
        assert timed(team, REFUSES, BODY).says == "200 hit", "out of memory"
        equal = _asked_together(team, simulator)
        told = LoadGenerator(team, REFUSES, new_body, for_s=OUTAGE_S / 2).answers()
        assert degraded(client) == ["price-book"]
        assert simulator.calls == 1 + 1 + len(told)
    assert {one.says for one in told} == {"200 fwd=bypass"}
    assert_in_time(slowest_s(told), 3 * WAIT_S, "To look has two tries, and nothing has a third: in peace 0.65 s.")
    recovered = _asked_until_all_is_well(team, REFUSES)
    log.assert_one_incident("the price-book's connection fails: ", "the price-book's connection works again")
    assert_booked(team, 3 + equal + len(told) + recovered)


def _asked_together(team: TeamClient, simulator: Simulator) -> int:
    """So many, of a question that is asked once."""
    calls, body = simulator.calls, new_body()
    with simulator.hold():
        asked = [team.asking(REFUSES, body) for _ in range(LANES)]
        assert simulator.arrived(calls + 1)
        time.sleep(0.1)  # nothing tells that the others wait
    assert kinds(results(asked)) == [BYPASS] + [f"{BYPASS}; collapsed"] * (LANES - 1)
    assert simulator.calls == calls + 1
    return len(asked)


def _asked_until_all_is_well(team: TeamClient, at: int) -> int:
    """How many were answered by then."""
    told: list[TimedAnswer] = []

    def is_over() -> bool:
        told.append(timed(team, at, new_body()))
        return told[-1].says == "200 fwd=miss"

    wait_until(is_over, within_s=BACK_S)
    return answered(told)


# The ledger


@pytest.mark.parametrize("fault", OF_THE_LEDGER)
def test_without_its_ledger_it_refuses(fault: str, premises: WorkerContext, simulator: Simulator) -> None:
    team, client, log = premises.fleet.team(), premises.fleet.clients[REFUSES], premises.log(REFUSES)
    unanswered = metric(client, UNANSWERED)
    assert timed(team, REFUSES, BODY).says == "200 fwd=miss"
    with OF_THE_LEDGER[fault](premises.ledger):
        hits = LoadGenerator(team, REFUSES, lambda: BODY, for_s=OUTAGE_S)
        misses = LoadGenerator(team, REFUSES, new_body, for_s=OUTAGE_S)
        told = hits.answers() + misses.answers()
        assert degraded(client) == ["ledger"]
    assert {(one.says, one.answer.headers["retry-after"]) for one in told} == {("503 store-unavailable", "1")}
    assert_in_time(slowest_s(told), 2 * WAIT_S, "Nobody waits twice: in peace the slowest take 0.31 s.")
    assert simulator.calls == 1
    recovered = _asked_until_all_is_well(team, REFUSES)
    log.assert_one_incident("the ledger's connection fails: ", "the ledger's connection works again")
    assert_booked(team, 1 + recovered, perhaps=round(metric(client, UNANSWERED) - unanswered))


@pytest.mark.parametrize("fault", OF_BOTH_ROLES)
def test_without_its_ledger_it_admits_if_that_is_wanted(
    fault: str, premises: WorkerContext, simulator: Simulator
) -> None:
    """Here the price book is away as well."""
    team, client, log = premises.fleet.team(), premises.fleet.clients[ADMITS], premises.log(ADMITS)
    unanswered = metric(client, UNANSWERED)
    assert timed(team, ADMITS, BODY).says == "200 fwd=miss"
    with OF_BOTH_ROLES[fault](premises.ledger):
        told = LoadGenerator(team, ADMITS, new_body, for_s=OUTAGE_S).answers()
        assert degraded(client) == ["ledger", "price-book"]
        assert metric(client, "buffered_debits") == len(told)
    assert {one.says for one in told} == {"200 fwd=bypass"}
    assert_in_time(
        slowest_s(told), 3 * WAIT_S, "A server with both roles is waited for as the price book, and no more."
    )
    assert simulator.calls == 1 + len(told)
    wait_until(lambda: metric(client, "buffered_debits") == 0, within_s=BACK_S)
    recovered = _asked_until_all_is_well(team, ADMITS)
    back = "the ledger is back: all buffered debits are booked"
    wait_until(lambda: log.messages(back))  # lines are written a moment later
    assert len(log.messages(back)) == 1
    assert len(log.said()) <= MOST_LINES
    assert_booked(team, 1 + len(told) + recovered, at=ADMITS, perhaps=round(metric(client, UNANSWERED) - unanswered))
