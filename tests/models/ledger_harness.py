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
from proxy.quota.ledger_reader import LedgerReader
from proxy.quota.quotas import Charge, QuotaState, TeamLimits
from proxy.store.access import StoreAccess
from proxy.store.client import Store
from proxy.store.topology import CONNECTION
from proxy.telemetry.metrics import Metrics

MAX_NAMES = 2
KEYS = LedgerKeys("acme")
START_US = int(datetime(2031, 10, 25, 22, 30, tzinfo=ZONE).timestamp()) * MILLION
"""A Saturday evening: the clocks are set back in the night, and the month ends with the next week's Friday."""

Answer = Admitted | Denied | QuotaState | None


class Gateway:
    """One gateway's ledger, on an event loop that only runs during a call."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._clock = clock
        self._runner = asyncio.Runner()
        self._store = self._runner.run(_store(url))
        self._reports = LedgerReader(self._store, KEYS, ZONE)
        self.ledger = self._new_ledger()

    def reset(self) -> None:
        """Starts again with empty caches. Debits that the last example buffered are dropped."""
        self._store.cooldowns[CONNECTION] = inf
        self._runner.run(self.ledger.close(1))
        self._store.cooldowns[CONNECTION] = 0
        self._clock.skew_us = 0
        self.ledger = self._new_ledger()
        self._runner.run(self.ledger.open())

    def run(self, process: Process, coroutines: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
        """Starts all calls in one iteration of the event loop, and returns their answers."""
        self._apply(process)
        return self._runner.run(_in_one_iteration(coroutines))

    def flush(self, process: Process) -> None:
        """Waits until all buffered debits are booked."""
        self.run(process, [_wait_for_flush(self.ledger._flushing)])

    def book_largest_flush(self, process: Process, name: str, team_limits: TeamLimits, charge: Charge) -> None:
        """Books as many credits as one call can, at the gateway's estimate of the time."""
        self._apply(process)
        batcher = self.ledger._batcher
        self._runner.run(batcher.book(largest_flush(name, batcher.counters(team_limits), charge)))

    def quota_states(self, process: Process, team_limits: list[TeamLimits]) -> list[QuotaState]:
        self._apply(process)
        return self._runner.run(self._reports.quota_states(team_limits))

    def close(self) -> None:
        self._runner.run(self._store.close())
        self._runner.close()

    def _apply(self, process: Process) -> None:
        """Applies the process's outage and its clock skew."""
        self._store.cooldowns[CONNECTION] = inf if process.ledger_down else 0
        self._clock.skew_us = process.skew_us

    def _new_ledger(self) -> Ledger:
        metrics = Metrics()
        return Ledger(LedgerBatcher(self._store, KEYS, ZONE, metrics), metrics, admits_on_outage=True)


async def _store(url: str) -> Store:
    return Store(url, "ledger", access=StoreAccess(timeout_s=10))


async def _wait_for_flush(flushing: asyncio.Task[None] | None) -> None:
    assert flushing is not None
    await asyncio.wait_for(flushing, 10)


async def _in_one_iteration(coroutines: Sequence[Coroutine[Any, Any, Answer]]) -> list[Answer]:
    return await asyncio.gather(*coroutines)


async def one_iteration_later(call: Coroutine[Any, Any, Answer]) -> Answer:
    """Waits one iteration of the event loop: a settlement has its own task, so it reaches the ledger one later."""
    await asyncio.sleep(0)
    return await call


class Harness:
    """The store, the clock and the gateways that all examples share."""

    def __init__(self, store: redis.Redis, clock: Clock, gateways: list[Gateway]) -> None:
        self.store = store
        self.clock = clock
        self.gateways = gateways

    def reset(self) -> None:
        self.store.flushall()
        self.clock.set(START_US)
        for gateway in self.gateways:
            gateway.reset()

    def calls(self) -> int:
        """Returns how often the store has run scripts."""
        return int(self.store.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])

    def keys(self) -> dict[str, tuple[dict[str, int], bool]]:
        """Returns all keys with whether they expire; usage and counters with their fields that are not 0."""
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
    monkeypatch.setattr("proxy.quota.ledger_script.MAX_MODELS", MAX_NAMES)
    monkeypatch.setattr("proxy.quota.ledger.FLUSH_EVERY_S", 0)
    with ExitStack() as opened:
        store = opened.enter_context(redis.Redis.from_url(url))
        clock = Clock(store, START_US)
        monkeypatch.setattr("proxy.quota.batches.time_ns", clock.time_ns)
        monkeypatch.setattr("proxy.quota.ledger_reader.time", clock.time)
        gateways = [Gateway(url, clock) for _ in range(2)]
        for gateway in gateways:
            opened.callback(gateway.close)
        yield Harness(store, clock, gateways)
