"""Several gateways on one ledger: quotas hold under simultaneous requests and while processes die.

The number of requests that deaths cut off is logged: see `-o log_cli=true`.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from fleet import BODY, Fleet, TeamClient, fleet_of, limiting
from gateway_fixture import DESIGN, PATH, UpstreamFixture, answers
from gateway_process import GatewayProcess, GatewayRunner, Tree, address_of, kill
from ledger_snapshot import LedgerSnapshot, snapshot_of
from proxy.demo.simulator import Exchange
from scripted_simulator import Simulator
from serving import wait_until

pytestmark = pytest.mark.usefixtures("coverage_paused")

CALLERS = 2000
LIMIT = 100
QUOTA: Tree = {"measure": "estimated_credits", "limit": LIMIT, "per": "month"}
COUNTED: Tree = {"measure": "requests", "limit": 10**6, "per": "month"}
"""A limit that is never reached; it shows its counter."""
PATIENT: dict[str, Tree] = {
    "server": {"request_timeout_s": 30},
    "store": {"timeout_s": 10},
    "upstream": {"timeout_s": 30, "max_connections": 1000},
    "team_defaults": {"rate": {"per_s": 100_000, "burst": 1_000_000}},
}
"""Timeouts that a busy machine does not reach: with 2,000 requests at once the store's default of 0.25 s is short, and
some requests would get a 503, which does not test quotas."""

LANES = 32
PAUSE_S = 0.05
"""Between two estimates of a lane while no process is killed: the processors are needed for processes that start."""

FLUSHED_WITHIN_S = 2.0
"""Debits acknowledged longer ago survive the death of a store."""

Bodies = Callable[[int], bytes]

log = logging.getLogger(__name__)

SAME: dict[int, Bodies] = {1: lambda _: b"[{}]", 3: lambda _: BODY}
DISTINCT: dict[int, Bodies] = {
    1: lambda number: b'[{"seed":%d}]' % number,
    3: lambda number: b'[{"model":"Flux","steps":30,"seed":%d}]' % number,
}
"""Bodies by their price."""


@dataclass(frozen=True)
class Caller:
    """A prepared estimate: its team, gateway and body."""

    url: str
    token: str
    body: bytes


@asynccontextmanager
async def connected(caller: Caller) -> AsyncIterator[Coroutine[Any, Any, int]]:
    """Opens a connection, and returns a function that sends the request and returns the status."""
    reader, writer = await asyncio.open_connection(*address_of(caller.url))
    head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\nx-api-key: {caller.token}\r\nconnection: close\r\n"

    async def ask() -> int:
        writer.write(f"{head}content-length: {len(caller.body)}\r\n\r\n".encode() + caller.body)
        return int((await reader.read()).split(maxsplit=2)[1])

    try:
        yield ask()
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def at_once(callers: Sequence[Caller]) -> Counter[int]:
    """Connects all, then sends all estimates at once, and returns their statuses."""
    async with asyncio.timeout(40), AsyncExitStack() as opened:
        asks = [await opened.enter_async_context(connected(caller)) for caller in callers]
        return Counter(await asyncio.gather(*asks))


def callers(teams: Sequence[TeamClient], body: Bodies) -> list[Caller]:
    """Returns requests of all teams to all gateways."""
    urls = [served.url for served in teams[0].fleet.gateways]
    pairs = [(team.token, url) for team in teams for url in urls]
    return [Caller(url, token, body(n)) for n in range(CALLERS) for token, url in [pairs[n % len(pairs)]]]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, valkey_url: str, upstream: UpstreamFixture) -> Iterator[Fleet]:
    """Gateways where each team has a quota of a hundred credits."""
    env = [limiting(team_defaults=[QUOTA, COUNTED])] * 4
    folder = tmp_path_factory.mktemp("quotas")
    with fleet_of(4, folder, store_url=valkey_url, upstream_url=upstream.url, env=env, **PATIENT) as opened:
        yield opened


@pytest.fixture
def team(fleet: Fleet, simulator: Simulator) -> TeamClient:
    assert simulator.calls == 0
    return fleet.team()


# Two thousand requests for one quota


@pytest.mark.parametrize("price", [1, 3])
def test_hits(price: int, team: TeamClient) -> None:
    assert team.ask(0, SAME[price](0)).status_code == 200
    statuses = asyncio.run(at_once(callers([team], SAME[price])))
    fit = LIMIT // price
    assert statuses == {200: fit - 1, 402: CALLERS - fit + 1}
    for at in range(4):
        snapshot = snapshot_of(team, at)
        assert snapshot.used == [fit * price, fit]
        assert snapshot.usage == {
            "requests": fit,
            "refused": CALLERS - fit + 1,
            "estimated_credits": fit * price,
            "outcomes": {"hit": fit - 1, "miss": 1, "quota-exceeded": CALLERS - fit + 1},
        }


@pytest.mark.parametrize(("price", "bodies"), [(3, SAME), (1, DISTINCT)], ids=["of one question", "of many questions"])
def test_misses_that_are_all_admitted_before_any_price_is_known(
    price: int, bodies: dict[int, Bodies], team: TeamClient, simulator: Simulator
) -> None:
    statuses = asyncio.run(_held(callers([team], bodies[price]), [team], simulator))
    fit = LIMIT // price
    assert statuses == {200: fit, 402: CALLERS - fit}
    assert simulator.calls == (1 if bodies is SAME else CALLERS)
    snapshot = snapshot_of(team)
    assert snapshot.used == [fit * price, fit]
    outcomes = set(snapshot.usage.pop("outcomes"))
    if bodies is SAME:  # the leader may be among the answered or the refused requests
        assert outcomes - {"miss"} == {"collapsed", "quota-exceeded"}
    else:
        assert outcomes == {"miss", "quota-exceeded"}
    assert snapshot.usage == {"requests": fit, "refused": CALLERS - fit, "estimated_credits": fit * price}


async def _held(asked: Sequence[Caller], teams: Sequence[TeamClient], simulator: Simulator) -> Counter[int]:
    """Like `at_once`, but upstream only answers once all are admitted."""
    with simulator.hold():
        task = asyncio.create_task(at_once(asked))
        await asyncio.to_thread(lambda: wait_until(lambda: _under_way(teams) == len(asked), within_s=20))
    return await task


def _under_way(teams: Sequence[TeamClient]) -> int:
    return sum(snapshot_of(team).usage["requests"] for team in teams)


def test_the_organisations_quota_over_three_teams(
    tmp_path: Path, valkey_url: str, upstream: UpstreamFixture, simulator: Simulator
) -> None:
    env = [limiting(org=[QUOTA])] * 3  # two would be overloaded
    how = {**PATIENT, "org": {"id": f"org-{secrets.token_hex(4)}"}}
    with fleet_of(3, tmp_path, store_url=valkey_url, upstream_url=upstream.url, env=env, **how) as opened:
        teams = [opened.team() for _ in range(3)]
        statuses = asyncio.run(_held(callers(teams, SAME[1]), teams, simulator))
        assert statuses == {200: LIMIT, 402: CALLERS - LIMIT}
        snapshot = [snapshot_of(team) for team in teams]
        assert [of_one.used for of_one in snapshot] == [[LIMIT]] * 3
        columns = ("requests", "refused", "estimated_credits")
        assert [sum(of_one.usage[column] for of_one in snapshot) for column in columns] == [
            LIMIT,
            CALLERS - LIMIT,
            LIMIT,
        ]


# Deaths


@dataclass(frozen=True)
class SentEstimate:
    """An estimate and its times; without a status it was cut off."""

    began: float
    ended: float
    status: int | None


@dataclass
class Traffic:
    """Sends estimates, hits and misses in turn, one at a time per lane.

    pause_s: how long a lane pauses between two estimates.
    """

    gateways: Sequence[GatewayProcess]
    token: str
    pause_s: float = 0.0
    asked: list[SentEstimate] = field(default_factory=list)
    _numbers: "count[int]" = field(default_factory=count)

    @asynccontextmanager
    async def flowing(self) -> AsyncIterator[None]:
        self._stopped = asyncio.Event()
        async with asyncio.timeout(40), asyncio.TaskGroup() as group:
            for lane in range(LANES):
                group.create_task(self._flow(self.gateways[lane % len(self.gateways)].url))
            yield
            self._stopped.set()

    async def answered(self, more: int) -> None:
        """Waits until this number of further estimates is answered."""
        wanted = self.answers + more
        await asyncio.to_thread(lambda: wait_until(lambda: self.answers >= wanted, within_s=20))

    @property
    def answers(self) -> int:
        return sum(one.status == 200 for one in self.asked)

    async def _flow(self, url: str) -> None:
        while not self._stopped.is_set():
            number = next(self._numbers)
            body = DISTINCT[1](number if number % 2 else 0)
            began = time.monotonic()
            status = await _status(Caller(url, self.token, body))
            self.asked.append(SentEstimate(began, time.monotonic(), status))
            await asyncio.sleep(self.pause_s if status == 200 else PAUSE_S)


async def _status(caller: Caller) -> int | None:
    with suppress(ConnectionError, IndexError):
        async with connected(caller) as asking:
            return await asking
    return None


@dataclass(frozen=True)
class Death:
    """The death of a process, with its begin and end."""

    began: float
    ended: float

    @classmethod
    async def of(cls, process: psutil.Process) -> "Death":
        began = time.monotonic()
        await asyncio.to_thread(kill, process)
        return cls(began, time.monotonic())

    def cut_off(self, one: SentEstimate) -> bool:
        """Returns whether the estimate was in flight and got no answer."""
        return one.status != 200 and one.began <= self.ended and one.ended >= self.began

    def answered_before(self, one: SentEstimate) -> bool:
        """Returns whether the estimate was answered, and not just before the death."""
        return one.status == 200 and (one.ended < self.began - FLUSHED_WITHIN_S or one.began > self.ended)


def account(traffic: Traffic, deaths: Sequence[Death], snapshot: LedgerSnapshot, price: Decimal) -> Tree:
    """Returns the sums of requests and bookings, after a check that the bookings are consistent."""
    credits_used, requests = snapshot.used
    assert (snapshot.usage["requests"], snapshot.usage["estimated_credits"]) == (requests, credits_used)
    assert sum(snapshot.usage["outcomes"].values()) == requests + snapshot.usage["refused"]
    debits = credits_used / price
    assert debits == requests - snapshot.usage["outcomes"].get("cancelled", 0)
    return {
        "answers": traffic.answers,
        "cut_off": sum(any(death.cut_off(one) for death in deaths) for one in traffic.asked),
        "debits": int(debits),
        "requests": int(requests),
        "lost": max(0, traffic.answers - int(debits)),
    }


CENT = Decimal("0.01")


def cents(exchange: Exchange) -> ASGIApp:
    """Makes upstream answer a low price after a delay."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.02)
        await answers(b'{"data":{"estimated":0.01,"balance":7},"error":{}}')(exchange)(scope, receive, send)

    return app


def test_killed_gateways_lose_no_debit_and_book_none_twice(team: TeamClient, simulator: Simulator) -> None:
    simulator.script(*[cents] * 10_000)
    traffic = Traffic(team.fleet.gateways, team.token)
    deaths = asyncio.run(_kill_three_workers(traffic))
    sums = account(traffic, deaths, snapshot_of(team, 3), CENT)
    log.warning("three gateways killed: %s", sums)
    assert {one.status for one in traffic.asked} == {200, None}
    assert sums["cut_off"] == sum(one.status is None for one in traffic.asked), "only a death loses an answer"
    assert sums["answers"] <= sums["debits"] <= sums["requests"] <= sums["answers"] + sums["cut_off"]


async def _kill_three_workers(traffic: Traffic) -> list[Death]:
    async with traffic.flowing():
        deaths = []
        for served in traffic.gateways[:3]:
            await traffic.answered(200)
            deaths.append(await Death.of(served.worker()))
        traffic.pause_s = PAUSE_S
        for served in traffic.gateways[:3]:
            await asyncio.to_thread(served.wait_until_serving, times=2)
        await traffic.answered(200)
        return deaths


@pytest.mark.parametrize("victim", ["ledger", "gateway"])
def test_a_killed_store_loses_nothing_acknowledged_two_seconds_before(
    victim: str, runner: GatewayRunner, simulator: Simulator
) -> None:
    """Kills the ledger only, which its gateway restarts, or the gateway with all its processes."""
    simulator.script(*[cents] * 100_000)
    how: dict[str, Any] = {"env": limiting(team_defaults=[{**QUOTA, "limit": 10**6}, COUNTED]), **PATIENT}
    served = runner.start(**how)
    traffic = Traffic([served], DESIGN)
    death = asyncio.run(_kill(victim, served, traffic))
    following = served if victim == "ledger" else runner.start(**how)
    sums = account(traffic, [death], LedgerSnapshot.of(following, DESIGN), CENT)
    sums["spared"] = sum(map(death.answered_before, traffic.asked))
    log.warning("%s killed: %s", victim, sums)
    assert sums["spared"] >= 100
    assert sums["spared"] <= sums["debits"] <= sums["requests"] <= sums["answers"] + sums["cut_off"]
    assert not following.messages("a new ledger begins" if victim == "gateway" else "the ledger was lost")


async def _kill(victim: str, served: GatewayProcess, traffic: Traffic) -> Death:
    process = served.store("ledger") if victim == "ledger" else psutil.Process(served.process.pid)
    async with traffic.flowing():
        await traffic.answered(100)
        traffic.pause_s = PAUSE_S
        await asyncio.sleep(FLUSHED_WITHIN_S + 0.1)
        traffic.pause_s = 0.0
        await traffic.answered(100)
        death = await Death.of(process)
        traffic.pause_s = PAUSE_S
        if victim == "ledger":
            await traffic.answered(200)
        return death
