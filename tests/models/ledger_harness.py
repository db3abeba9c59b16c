"""The ledgers of two gateways on one real store, for the state machine of the ledger."""

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from math import inf
from typing import Any

import pytest
import redis

from harness import MILLION, Clock, use_clocked_scripts
from ledger_fixture import largest_flush
from ledger_model import ZONE, Process
from proxy.quota.batches import LedgerBatcher
from proxy.quota.counters import LedgerKeys
from proxy.quota.ledger import Admitted, Denied, Ledger
from proxy.quota.quotas import Charge, QuotaState, TeamLimits
from proxy.quota.reports import LedgerReader
from proxy.store.access import StoreAccess
from proxy.store.client import Store
from proxy.store.topology import CONNECTION
from proxy.telemetry.metrics import Metrics

MOST_NAMES = 2
KEYS = LedgerKeys("acme")
START_US = int(datetime(2031, 10, 25, 22, 30, tzinfo=ZONE).timestamp()) * MILLION
"""A Saturday evening: the clocks are set back in the night, and the month ends with the next week's Friday."""

Answer = Admitted | Denied | QuotaState | None


class Gateway:
    """One of those that share the ledger, with a loop of its own that turns only while it is asked."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._clock = clock
        self._runner = asyncio.Runner()
        self._store = self._runner.run(_store(url))
        self._reports = LedgerReader(self._store, KEYS, ZONE)
        self.ledger = self._new_ledger()

    def begin(self) -> None:
        """Anew, and knowing nothing; what the last example still owed is lost."""
        self._store.cooldowns[CONNECTION] = inf
        self._runner.run(self.ledger.close(1))
        self._store.cooldowns[CONNECTION] = 0
        self._clock.skew_us = 0
        self.ledger = self._new_ledger()
        self._runner.run(self.ledger.open())

    def run(self, process: Process, asked: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
        """The answers to what is asked in one turn of the loop."""
        self._let(process)
        return self._runner.run(_in_one_turn(asked))

    def pay(self, process: Process) -> None:
        """Returns when nothing is owed any more."""
        self.run(process, [_none(self.ledger._flushing)])

    def flush(self, process: Process, name: str, terms: TeamLimits, charge: Charge) -> None:
        """Books as many credits as one call can, as of the moment that the gateway takes it for."""
        self._let(process)
        batcher = self.ledger._batcher
        self._runner.run(batcher.book(largest_flush(name, batcher.counters(terms), charge)))

    def quota_states(self, process: Process, terms: list[TeamLimits]) -> list[QuotaState]:
        self._let(process)
        return self._runner.run(self._reports.quota_states(terms))

    def close(self) -> None:
        self._runner.run(self._store.close())
        self._runner.close()

    def _let(self, process: Process) -> None:
        """Whether there is a ledger, and what time it is, are this process's own matters."""
        self._store.cooldowns[CONNECTION] = inf if process.out else 0
        self._clock.skew_us = process.skew_us

    def _new_ledger(self) -> Ledger:
        metrics = Metrics()
        return Ledger(LedgerBatcher(self._store, KEYS, ZONE, metrics), metrics, admits_on_outage=True)


async def _store(url: str) -> Store:
    return Store(url, "ledger", access=StoreAccess(timeout_s=10))


async def _none(flushing: asyncio.Task[None] | None) -> None:
    assert flushing is not None
    await asyncio.wait_for(flushing, 10)


async def _in_one_turn(asked: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    return await asyncio.gather(*asked)


async def later(asked: Coroutine[Any, Any, Answer]) -> Answer:
    """One turn later: that is when a settlement, which has a task of its own, gets to the ledger."""
    await asyncio.sleep(0)
    return await asked


class Harness:
    """What all examples use."""

    def __init__(self, store: redis.Redis, clock: Clock, gateways: list[Gateway]) -> None:
        self.store = store
        self.clock = clock
        self.gateways = gateways

    def begin(self) -> None:
        self.store.flushall()
        self.clock.set(START_US)
        for gateway in self.gateways:
            gateway.begin()

    def calls(self) -> int:
        """How many scripts were called so far."""
        return int(self.store.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    def keys(self) -> dict[str, tuple[dict[str, int], bool]]:
        """The hashes of usage and counters with their fields that are not 0, and of all keys whether they expire."""
        names: Any = sorted(self.store.keys("ep1:{acme}:*"))
        pipeline = self.store.pipeline(transaction=False)
        for name in names:
            pipeline.pttl(name)
            if name.startswith((b"ep1:{acme}:u:", b"ep1:{acme}:q:")):
                pipeline.hgetall(name)
            else:
                pipeline.type(name)
        replies = pipeline.execute()
        return {
            name.decode(): (_amounts(held), ttl != -1)
            for name, ttl, held in zip(names, replies[::2], replies[1::2], strict=True)
        }


def _amounts(held: Any) -> dict[str, int]:
    return {field.decode(): int(n) for field, n in held.items() if n != b"0"} if isinstance(held, dict) else {}


@contextmanager
def open_harness(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Harness]:
    use_clocked_scripts(monkeypatch)
    monkeypatch.setattr("proxy.quota.ledger_script.MAX_MODELS", MOST_NAMES)
    monkeypatch.setattr("proxy.quota.ledger.FLUSH_EVERY_S", 0)
    with ExitStack() as opened:
        store = opened.enter_context(redis.Redis.from_url(url))
        clock = Clock(store, START_US)
        monkeypatch.setattr("proxy.quota.batches.time_ns", clock.time_ns)
        monkeypatch.setattr("proxy.quota.reports.time", clock.time)
        gateways = [Gateway(url, clock) for _ in range(2)]
        for gateway in gateways:
            opened.callback(gateway.close)
        yield Harness(store, clock, gateways)
