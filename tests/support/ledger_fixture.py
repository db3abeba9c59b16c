"""One gateway's ledger on a real store, and readers of what the store holds."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from time import time_ns
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import redis

from faulty_proxy import FaultyProxy
from proxy.problems import Code, Outcome, Problem, StoreUnavailable
from proxy.quota.backlog import BufferedDebit, FlushBatch
from proxy.quota.batches import LedgerBatcher
from proxy.quota.counters import BASE_PERIODS, CounterSet, LedgerKeys
from proxy.quota.ledger import Admitted, Denied, Ledger
from proxy.quota.ledger_script import MAX_BATCH_ENTRIES, MAX_ENTRY_MICRO
from proxy.quota.quotas import Charge, Measure, Quota, Rate, Scope, TeamLimits
from proxy.quota.windows import Period
from proxy.store.client import Store
from proxy.telemetry.metrics import Metrics

ZONE = ZoneInfo("Europe/Berlin")
KEYS = LedgerKeys("acme")
DAY_S = 86_400
CREDIT = 1_000_000
DEAREST = 10**12
"""Micro-credits of the highest estimate that has a price."""

HIT = Charge(Outcome.HIT, 4 * CREDIT, "Flux")
MISS = Charge(Outcome.MISS, 4 * CREDIT, "Flux")
FAILED = Charge(Outcome.UPSTREAM_ERROR)
BUSY = Charge(Outcome.UPSTREAM_BUSY), Problem(Code.UPSTREAM_BUSY, "RenderNet is busy: try again later.")
"""What a request is refunded with that was not sent upstream."""

COOLDOWN_S = 0.02
"""The store client's cool-down after a failure, shortened for tests."""


def terms(*quotas: Quota, team: str = "design", rate: Rate | None = None) -> TeamLimits:
    return TeamLimits(team, rate or Rate(10_000, 10_000), quotas)


def quota(limit: int, measure: Measure = "requests", per: Period = "month", scope: Scope = "team") -> Quota:
    return Quota(scope, measure, per, limit, refuse=True)


PLAIN = terms()
SLOW = terms(rate=Rate(0.01, 9))
"""Its rate remembers for longer than a test takes."""


def largest_flush(name: str, counters: CounterSet, charge: Charge) -> FlushBatch:
    """As many credits as one call can book. One request: only the first row has it."""
    charge = replace(charge, credits_micro=MAX_ENTRY_MICRO)
    return FlushBatch(name, tuple(BufferedDebit(counters, charge, int(row == 0)) for row in range(MAX_BATCH_ENTRIES)))


@dataclass
class LedgerFixture:
    """A gateway's ledger with its batcher and metrics."""

    ledger: Ledger
    batcher: LedgerBatcher
    metrics: Metrics

    def metric(self, name: str) -> float:
        value = self.metrics.registry.get_sample_value(f"estimate_proxy_{name}")
        assert value is not None
        return value

    async def admitted(self, terms: TeamLimits = PLAIN) -> Admitted:
        """An admitted request."""
        admission = await self.ledger.admit(terms)
        assert isinstance(admission, Admitted)
        return admission

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 -- what happens in a server sends no event
                await asyncio.sleep(0.005)

    async def until_paid(self) -> None:
        """Waits until the backlog is empty."""
        await self.until(lambda: not self.ledger._backlog)
        assert self.metric("buffered_debits") == 0

    async def until_back(self) -> None:
        """Waits until the ledger answers."""
        async with asyncio.timeout(10):
            while True:
                with suppress(StoreUnavailable):
                    await self.ledger.peek(PLAIN, None)
                    return
                await asyncio.sleep(0.005)


Scenario = Callable[[LedgerFixture], Coroutine[Any, Any, None]]


@asynccontextmanager
async def opened(url: str, *, admits: bool = False, drain_s: float = 5) -> AsyncIterator[LedgerFixture]:
    metrics = Metrics()
    store = Store(url, "ledger")
    batcher = LedgerBatcher(store, KEYS, ZONE, metrics)
    ledger = Ledger(batcher, metrics, admits_on_outage=admits)
    await ledger.open()
    try:
        yield LedgerFixture(ledger, batcher, metrics)
    finally:
        await ledger.close(drain_s)
        await store.close()


def run_scenario(url: str, scenario: Scenario, *, admits: bool = False, drain_s: float = 5) -> None:
    """Runs a scenario with the ledger of one gateway, which then has `drain_s` to book what is buffered."""

    async def run() -> None:
        async with asyncio.timeout(30), opened(url, admits=admits, drain_s=drain_s) as fixture:
            await scenario(fixture)

    asyncio.run(run())


async def cut(store_proxy: FaultyProxy) -> None:
    """The ledger is out of reach, and the loop has seen how its connections were closed."""
    await asyncio.to_thread(store_proxy.cut)


class SkewedClock:
    """A gateway's clock that is `ahead_s` seconds fast."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> int:
        return time_ns() + int(self.ahead_s * 1e9)


def calls(server: redis.Redis) -> int:
    """The number of script calls since the test began, without those the server did not know."""
    stats = server.info("commandstats").get("cmdstat_evalsha", {"calls": 0, "failed_calls": 0})
    return int(stats["calls"]) - int(stats["failed_calls"])


def hashes(server: redis.Redis, pattern: str) -> dict[str, Counter[str]]:
    """The fields of the ledger's hashes that are not 0."""
    names: Any = server.keys(f"ep1:{{acme}}:{pattern}")
    held: Any = [server.hgetall(name) for name in names]
    return {
        name.decode(): Counter({field.decode(): int(amount) for field, amount in fields.items() if amount != b"0"})
        for name, fields in zip(names, held, strict=True)
    }


def rows(server: redis.Redis, team: str = "design") -> Counter[str]:
    """A team's usage rows, summed over all days."""
    return sum(hashes(server, f"u:*:{team}").values(), Counter[str]())


def used(server: redis.Redis, team: str | None = "design") -> tuple[int, int]:
    """Requests and credits of all days. Asserts that counters of days, weeks and months agree with usage rows."""
    scope = "o" if team is None else f"t:{team}"
    sums = [sum(hashes(server, f"q:{scope}:{per}:*").values(), Counter[str]()) for per in BASE_PERIODS]
    assert sums[0] == sums[1] == sums[2]
    in_rows: Counter[str] = Counter()
    for name, amount in rows(server, team or "*").items():
        in_rows[name.rpartition(":")[2]] += amount
    assert (in_rows["requests"], in_rows["credits"]) == (sums[0]["requests"], sums[0]["credits"])
    return sums[0]["requests"], sums[0]["credits"]


def everything(server: redis.Redis) -> dict[bytes, Any]:
    """All keys with their values, without rates that have expired."""
    names: Any = server.keys("*")
    found = {name: server.dump(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def word(admission: Admitted | Denied) -> str:
    return "admitted" if isinstance(admission, Admitted) else admission.problem.code.value


def told(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Levels and messages since the last call."""
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    caplog.clear()
    return found
